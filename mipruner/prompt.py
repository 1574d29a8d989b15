"""Data classes for one prompt: Visual (encoded image), Encoded (full prompt), Short (pruned prompt), Batch.

All classes except Batch hold one sample without padding. `collate` pads the short prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.selection import Selection


@dataclass(frozen=True, eq=False)
class Video:
    """A video: frames sampled in time.

    Attributes
    ----------
    frames : sequence of PIL images
        Frames in order of time, all of one size. They share one budget.
    fps : float
        Number of these frames per second. Used by families whose prompt contains the time of a frame (Qwen-VL).
    """

    frames: Sequence[Image.Image]
    fps: float = 2.0

    def __post_init__(self) -> None:
        if not self.frames:
            raise InputError("a video needs at least one frame")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a frame."""
        return self.frames[0].size

    @property
    def times(self) -> tuple[float, ...]:
        """Time of each frame in seconds."""
        return tuple(k / self.fps for k in range(len(self.frames)))


@dataclass(frozen=True, eq=False)
class Smaller:
    """An image that is resized before the vision encoder, to a grid of visual tokens.

    Attributes
    ----------
    image : PIL image
    grid : (rows, columns)
        Grid of the visual tokens after resizing.
    n_visual : int
        Number of visual tokens without resizing, see `Adapter.n_visual`.
    """

    image: Image.Image
    grid: tuple[int, int]
    n_visual: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the original image."""
        return self.image.size


Media = Image.Image | Video | Smaller
"""Kinds of media before the text of a prompt."""


def identity(image: Media) -> tuple[int, ...]:
    """Key of an image: its object identity and, if resized, its grid."""
    return (id(image.image), *image.grid) if isinstance(image, Smaller) else (id(image),)


@dataclass(frozen=True)
class Prompt:
    """One question about one or several images or videos.

    Attributes
    ----------
    text : str
        The user's text as sent to the model.
    images : sequence of PIL images and `Video`
        Images and videos before the text, in this order. An object that is in two prompts is encoded once.
    query : str, optional
        The part of ``text`` that is T of eq. 2; by default all of it.
    question : str, optional
        The part of ``text`` that is the question without the answer-format sentence, for methods that read only the
        question; by default all of it.
    sample : str
        Name of the sample, see `Features.sample`.
    """

    text: str
    images: Sequence[Media]
    query: str | None = None
    question: str | None = None
    sample: str = ""


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt, with one placeholder for each row of each image.

    Attributes
    ----------
    ids : Tensor [S]
    is_text : Tensor [S] bool
        The tokens of T, eq. 2.
    is_question : Tensor [n_text] bool
        The tokens of T that belong to the question itself.
    words : list of str
        The tokens of T as strings, see `Features.words`.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of these ids.
    """

    ids: Tensor
    is_text: Tensor
    is_question: Tensor
    words: list[str]
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Visual:
    """One image or video after vision encoder and projector.

    Attributes
    ----------
    rows : Tensor [n_rows, d]
        Rows for the language model, in the order of the prompt.
    grid : (rows, columns) or (frames, rows, columns), optional
        Grid of the visual tokens. None if they do not form one grid (several crops of an image).
    signals : dict
        Optional fields of `Features` that a pruner requested and this image has.
    deepstack : tuple of Tensor [n_visual, d]
        Rows added to the hidden states of the first decoder layers (Qwen3-VL).
    is_candidate : Tensor [n_rows] bool, optional
        False for rows that are not patches, such as the CLS token of a frame or the newline of a line. Like text, these
        are not scored and always kept. None if every row is a candidate.
    times : tuple of float
        Time of each frame in seconds; empty for an image.
    held : dict
        See `Features.held`.
    """

    rows: Tensor
    grid: tuple[int, ...] | None
    signals: dict[str, Any] = field(default_factory=dict)
    deepstack: tuple[Tensor, ...] = ()
    is_candidate: Tensor | None = None
    times: tuple[float, ...] = ()
    held: dict[Any, Any] = field(default_factory=dict, repr=False)

    def first(self, n: int) -> "Visual":
        """The first n rows, if the others are padding."""
        if n == len(self.rows):
            return self
        signals = {name: x[:n] for name, x in self.signals.items()}
        return replace(self, rows=self.rows[:n], signals=signals, deepstack=tuple(x[:n] for x in self.deepstack))

    @property
    def is_video(self) -> bool:
        return bool(self.times)

    @property
    def tokens(self) -> Tensor:
        """Candidate tokens [n_visual, d], V of eq. 1."""
        return self.candidates(self.rows)

    def candidates(self, x: Tensor) -> Tensor:
        """The entries of ``x`` [n_rows, ..] that belong to candidates."""
        return x if self.is_candidate is None else x[self.is_candidate]

    @property
    def n_visual(self) -> int:
        return len(self.rows) if self.is_candidate is None else int(self.is_candidate.sum())

    @property
    def n_bytes(self) -> int:
        known = [x for value in self.held.values() for x in (value if isinstance(value, tuple) else (value,))]
        held = (self.rows, *self.signals.values(), *self.deepstack, *known)
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


@dataclass(frozen=True)
class Encoded:
    """Embeddings of one full prompt: S tokens, n_visual of them visual.

    Attributes
    ----------
    ids : Tensor [S]
    embeds : Tensor [S, d]
    position_ids : Tensor [P, S]
        P is 1, or 4 with M-RoPE (text position, then time, height, width).
    slots : tuple of Tensor [n_visual]
        Indices of each image's candidates in the prompt.
    is_text : Tensor [S] bool
        The tokens of T, eq. 2.
    visuals : tuple of Visual
    signals : dict
        Optional fields of `Features` that come from the language model.
    sample : str
    """

    ids: Tensor
    embeds: Tensor
    position_ids: Tensor
    slots: tuple[Tensor, ...]
    is_text: Tensor
    visuals: tuple[Visual, ...]
    signals: dict[str, Any] = field(default_factory=dict)
    sample: str = ""

    @property
    def n_visual(self) -> int:
        """Number of visual tokens of all images."""
        return sum(visual.n_visual for visual in self.visuals)

    @property
    def is_visual(self) -> Tensor:
        """Mask of the visual tokens [S] bool."""
        is_visual = torch.zeros_like(self.is_text)
        for slot in self.slots:
            is_visual[slot] = True
        return is_visual

    @property
    def n_fixed(self) -> int:
        """Number of visual rows that are always kept."""
        return sum(len(visual.rows) - visual.n_visual for visual in self.visuals)

    def features(self) -> list[Features]:
        """Input of the pruner, one entry per image."""
        text = self.embeds[self.is_text]
        return [
            Features(
                visual=visual.tokens,
                text=text,
                grid=visual.grid,
                **visual.signals,
                **self.signals,
                sample=self.sample if len(self.visuals) == 1 else f"{self.sample}/{k}",
                held=visual.held,
            )
            for k, visual in enumerate(self.visuals)
        ]


@dataclass(frozen=True)
class Short:
    """One prompt after pruning: S' tokens.

    Attributes
    ----------
    ids : Tensor [S]
        Ids of the full prompt, for logits processors that count tokens (repetition penalty).
    embeds : Tensor [S', d]
    position_ids : Tensor [P, S']
    is_visual : Tensor [S'] bool
    deepstack : tuple of Tensor [n_rows, d]
    sample : str
    index : Tensor [S'], optional
        Index of each token in the full prompt.
    """

    ids: Tensor
    embeds: Tensor
    position_ids: Tensor
    is_visual: Tensor
    deepstack: tuple[Tensor, ...] = ()
    sample: str = ""
    index: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Left-padded short prompts, ready for the language model.

    Attributes
    ----------
    embeds : Tensor [B, S', d]
    position_ids : Tensor [B, S'] or [4, B, S']
    attention_mask : Tensor [B, S'] of 0 and 1, or None when nothing is padded
    is_visual : Tensor [B, S'] bool
    deepstack : list of Tensor [rows of all samples, d]
    ids : list of Tensor [S]
    samples : list of str
    """

    embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    is_visual: Tensor
    deepstack: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def language_model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the prefill call."""
        inputs: dict[str, Any] = {
            "inputs_embeds": self.embeds,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }
        if self.deepstack:
            inputs |= {"visual_pos_masks": self.is_visual, "deepstack_visual_embeds": self.deepstack}
        return inputs


def cut(encoded: Encoded, selections: Sequence[Selection], repack: bool) -> Short:
    """Remove the visual tokens that were not selected, with their positions and deepstack rows."""
    embeds = encoded.embeds
    is_visual = torch.zeros_like(encoded.is_text)
    kept = torch.ones_like(encoded.is_text)
    for slot, selection in zip(encoded.slots, selections, strict=True):
        place = slot[selection.indices]
        if selection.n_rows != len(place):
            if not repack:
                raise InputError("rows that belong to no patch have no position to keep: use positions=repack")
            place = slot[: selection.n_rows]
        kept[slot] = False
        kept[place] = True
        is_visual[slot] = True
        if selection.embeds is not None:
            embeds = embeds.index_copy(0, place, selection.embeds.to(embeds))
        if selection.merge is not None:
            embeds = embeds.index_copy(0, place, _kept(embeds[slot], selection))
    deepstack = tuple(
        torch.cat([_kept(*pair) for pair in zip(layers, selections, strict=True)])
        for layers in zip(*(visual.deepstack for visual in encoded.visuals), strict=True)
    )
    index = kept.nonzero()[:, 0]
    return Short(
        ids=encoded.ids,
        embeds=embeds[index],
        position_ids=torch.arange(len(index), device=index.device)[None] if repack else encoded.position_ids[:, index],
        is_visual=is_visual[index],
        deepstack=deepstack,
        sample=encoded.sample,
        index=index,
    )


def _kept(rows: Tensor, selection: Selection) -> Tensor:
    """The kept rows of [n_visual, d], or the merged rows that replace them."""
    return rows[selection.indices] if selection.merge is None else (selection.merge @ rows.float()).to(rows)


def collate(shorts: Sequence[Short]) -> Batch:
    """Pad prompts on the left to the length of the longest one."""
    length = max(len(short.embeds) for short in shorts)
    first = shorts[0]
    embeds = first.embeds.new_zeros(len(shorts), length, first.embeds.shape[-1])
    position_ids = first.position_ids.new_zeros(len(first.position_ids), len(shorts), length)
    attention_mask = first.ids.new_zeros(len(shorts), length)
    is_visual = first.is_visual.new_zeros(len(shorts), length)
    for row, short in enumerate(shorts):
        start = length - len(short.embeds)
        embeds[row, start:] = short.embeds
        position_ids[:, row, start:] = short.position_ids
        attention_mask[row, start:] = 1
        is_visual[row, start:] = short.is_visual
    padded = any(len(short.embeds) < length for short in shorts)
    return Batch(
        embeds=embeds,
        position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
        attention_mask=attention_mask if padded else None,
        is_visual=is_visual,
        deepstack=[torch.cat(layer) for layer in zip(*(s.deepstack for s in shorts if s.deepstack), strict=True)],
        ids=[short.ids for short in shorts],
        samples=[short.sample for short in shorts],
    )
