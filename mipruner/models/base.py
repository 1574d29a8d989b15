"""The way of one prompt through a model: pictures -> Visual, + question -> Encoded, + selection -> Short, -> Batch.

An adapter is the only place that knows a model family, and it never branches on the pruner. Everything here is per
sample and unpadded; padding happens once, in `collate`, on the shortened prompts.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.selection import Selection


@dataclass(frozen=True)
class Prompt:
    """One question about one or several pictures.

    Attributes
    ----------
    text : str
        The user's text as sent to the model.
    images : sequence of PIL images
        Each is one picture. The same object in two prompts shares one vision pass.
    query : str, optional
        The part of ``text`` that is T of eq. 2 and may score tokens; all of it by default.
    question : str, optional
        The part of ``text`` that is the question itself, without the answer-format sentence, for the methods that
        read only that; all of it by default.
    sample : str
        Name of the sample, see `Features.sample`.
    """

    text: str
    images: Sequence[Image.Image]
    query: str | None = None
    question: str | None = None
    sample: str = ""


@dataclass(frozen=True)
class Tokens:
    """A rendered prompt with one placeholder a picture.

    Attributes
    ----------
    ids : Tensor [S]
    is_text : Tensor [S] bool
        The tokens of T, eq. 2.
    is_question : Tensor [n_text] bool
        Those of T that belong to the question itself.
    words : list of str
        The tokens of T as strings, see `Features.words`.
    """

    ids: Tensor
    is_text: Tensor
    is_question: Tensor
    words: list[str]


@dataclass(frozen=True)
class Visual:
    """One picture after vision encoder and projector.

    Attributes
    ----------
    tokens : Tensor [n_visual, d]
    grid : (rows, columns) or (frames, rows, columns)
    signals : dict
        The optional fields of `Features` that a pruner asked for and this picture has.
    deepstack : tuple of Tensor [n_visual, d]
        Rows added to the hidden states of the first decoder layers (Qwen3-VL).
    """

    tokens: Tensor
    grid: tuple[int, ...]
    signals: dict[str, Any] = field(default_factory=dict)
    deepstack: tuple[Tensor, ...] = ()

    @property
    def n_bytes(self) -> int:
        held = (self.tokens, *self.signals.values(), *self.deepstack)
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))


@dataclass(frozen=True)
class Encoded:
    """One full-length prompt, embedded: S tokens of which n_visual are visual.

    Attributes
    ----------
    ids : Tensor [S]
    embeds : Tensor [S, d]
    position_ids : Tensor [P, S]
        P is 1, or 4 with M-RoPE (text position, then time, height, width).
    slots : tuple of Tensor [n_visual]
        Where in the prompt each picture's tokens stand.
    is_text : Tensor [S] bool
        The tokens of T, eq. 2.
    visuals : tuple of Visual
    signals : dict
        The optional fields of `Features` that come from the text.
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

    def features(self) -> list[Features]:
        """What a pruner sees, one entry a picture."""
        text = self.embeds[self.is_text]
        return [
            Features(
                visual=visual.tokens,
                text=text,
                grid=visual.grid,
                **visual.signals,
                **self.signals,
                sample=self.sample if len(self.visuals) == 1 else f"{self.sample}/{k}",
            )
            for k, visual in enumerate(self.visuals)
        ]


@dataclass(frozen=True)
class Short:
    """One prompt after pruning: S' tokens.

    Attributes
    ----------
    ids : Tensor [S]
        The ids of the full prompt, for what counts words (a repetition penalty).
    embeds : Tensor [S', d]
    position_ids : Tensor [P, S']
    is_visual : Tensor [S'] bool
    deepstack : tuple of Tensor [n_rows, d]
    """

    ids: Tensor
    embeds: Tensor
    position_ids: Tensor
    is_visual: Tensor
    deepstack: tuple[Tensor, ...] = ()


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
    """

    embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    is_visual: Tensor
    deepstack: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def language_model_inputs(self) -> dict:
        """Keyword arguments of the prefill call."""
        inputs = {
            "inputs_embeds": self.embeds,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask,
        }
        if self.deepstack:
            inputs |= {"visual_pos_masks": self.is_visual, "deepstack_visual_embeds": self.deepstack}
        return inputs


def collate(shorts: Sequence[Short]) -> Batch:
    """Pad on the left to the longest."""
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
        deepstack=[torch.cat(layer) for layer in zip(*(short.deepstack for short in shorts), strict=True)],
        ids=[short.ids for short in shorts],
    )


@contextmanager
def captured(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of ``modules`` in one forward pass, by forward hooks that are gone afterwards."""
    outputs: list[Tensor] = [None] * len(modules)

    def keep(k: int):
        def hook(module, args, output):
            outputs[k] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(k)) for k, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


TEXT = "\N{LEFT WHITE CURLY BRACKET}text\N{RIGHT WHITE CURLY BRACKET}"
"""Stands for the user's text while the template around it is rendered."""


class Adapter(ABC):
    """A loaded stock transformers model and what the pipeline must know of its family.

    Parameters
    ----------
    model : PreTrainedModel
        An untouched ``...ForConditionalGeneration`` in eval mode.
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    image_processor
        A transformers image processor on the PIL backend.
    positions : "repack" or "keep"
        Whether the short prompt is numbered 0, 1, 2, ... or its tokens stay at their original positions.
    prompt : str, optional
        Template with ``{image}`` and ``{text}``; the tokenizer's chat template by default.
    """

    image_processor_class: type
    """Of transformers, on the PIL backend."""
    image_token: str
    """The placeholder that stands once for a picture in the rendered prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor,
        positions: str = "repack",
        prompt: str | None = None,
    ):
        if positions not in ("repack", "keep"):
            raise InputError(f"unknown positions {positions!r}: choose repack or keep")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.positions, self.prompt = positions, prompt
        self.image_token_id = model.config.image_token_id

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def n_layers(self) -> int:
        return self.model.config.text_config.num_hidden_layers

    @property
    def language_model(self) -> nn.Module:
        return self.model.model.language_model

    @abstractmethod
    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Run the image processor; tensors on the CPU."""

    @abstractmethod
    def encode(self, pixels: dict[str, Tensor], signals: Set[str] = frozenset()) -> list[Visual]:
        """Vision encoder and projector over a batch of pictures.

        ``signals`` names optional fields of `Features`; those that this family has are put into `Visual.signals`.
        """

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part (left, top, right, bottom) of a picture of this (width, height) that its grid covers."""
        return (0, 0, *size)

    def position_ids(self, ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """Positions [P, S] of the full prompt."""
        return torch.arange(len(ids), device=ids.device)[None]

    def render(self, n_images: int) -> tuple[str, str]:
        """The prompt before and after the user's text."""
        if self.prompt is not None:
            rendered = self.prompt.format(image=self.image_token * n_images, text=TEXT)
        else:
            content = [{"type": "image"}] * n_images + [{"type": "text", "text": TEXT}]
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        before, after = rendered.split(TEXT)
        return before, after

    def tokenize(self, prompt: Prompt) -> Tokens:
        """Render and tokenize, with one placeholder a picture.

        Raises
        ------
        InputError
            If the text is empty, does not contain the query or the question, or contains the image placeholder.
        """
        query = prompt.text if prompt.query is None else prompt.query
        if not query.strip():
            raise InputError(f"the question of sample {prompt.sample!r} is empty")
        question = prompt.text if prompt.question is None else prompt.question
        for part in (query, question):
            if part not in prompt.text:
                raise InputError(f"{part!r} is not part of the text {prompt.text!r}")
        before, after = self.render(len(prompt.images))
        rendered = before + prompt.text + after
        bos = self.tokenizer.bos_token
        tokens = self.tokenizer(
            rendered,
            return_offsets_mapping=True,
            return_tensors="pt",
            add_special_tokens=not (bos and rendered.startswith(bos)),
        )
        ids, offsets = tokens["input_ids"][0], tokens["offset_mapping"][0]
        if int((ids == self.image_token_id).sum()) != len(prompt.images):
            raise InputError(f"the text of sample {prompt.sample!r} contains the placeholder {self.image_token!r}")

        def within(part: str) -> Tensor:
            start = len(before) + prompt.text.index(part)
            return (offsets[:, 1] > start) & (offsets[:, 0] < start + len(part)) & (offsets[:, 1] > offsets[:, 0])

        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        is_text = within(query) & ~torch.isin(ids, special)
        words = [
            " " * (a == 0 or rendered[a - 1 : a + 1].strip() != rendered[a - 1 : a + 1]) + rendered[a:b].strip()
            for a, b in offsets[is_text].tolist()
        ]
        return Tokens(ids, is_text, within(question)[is_text], words)

    def text_signals(self, prompt: Prompt, tokens: Tokens, signals: Set[str]) -> dict[str, Any]:
        """Those of the named optional fields of `Features` that come from the text."""
        known = {"words": tokens.words, "question": tokens.is_question.to(self.device)}
        return {name: value for name, value in known.items() if name in signals}

    def read(self, prompt: Prompt, visuals: Sequence[Visual], signals: Set[str] = frozenset()) -> Encoded:
        """Embed one full-length prompt around its pictures."""
        tokens = self.tokenize(prompt)
        ids, is_text = tokens.ids, tokens.is_text
        counts = torch.ones_like(ids)
        counts[ids == self.image_token_id] = torch.tensor([len(visual.tokens) for visual in visuals])
        ids = ids.repeat_interleave(counts).to(self.device)
        is_text = is_text.repeat_interleave(counts).to(self.device)
        embeds = self.model.get_input_embeddings()(ids)
        slots = (ids == self.image_token_id).nonzero()[:, 0].split([len(visual.tokens) for visual in visuals])
        for slot, visual in zip(slots, visuals, strict=True):
            embeds[slot] = visual.tokens.to(embeds)
        return Encoded(
            ids=ids,
            embeds=embeds,
            position_ids=self.position_ids(ids, visuals),
            slots=slots,
            is_text=is_text,
            visuals=tuple(visuals),
            signals=self.text_signals(prompt, tokens, signals),
            sample=prompt.sample,
        )

    def shorten(self, encoded: Encoded, selections: Sequence[Selection]) -> Short:
        """Drop the visual tokens that were not selected, with their positions and deepstack rows."""
        embeds = encoded.embeds
        is_visual = torch.zeros_like(encoded.is_text)
        kept = torch.ones_like(encoded.is_text)
        for slot, selection in zip(encoded.slots, selections, strict=True):
            place = slot[selection.indices]
            if selection.n_rows != len(place):
                if self.positions == "keep":
                    raise InputError("rows that belong to no patch have no position to keep: use positions=repack")
                place = slot[: selection.n_rows]
            kept[slot] = False
            kept[place] = True
            is_visual[slot] = True
            if selection.embeds is not None:
                embeds = embeds.index_copy(0, place, selection.embeds.to(embeds))
        deepstack = tuple(
            torch.cat([layer[selection.indices] for layer, selection in zip(layers, selections, strict=True)])
            for layers in zip(*(visual.deepstack for visual in encoded.visuals), strict=True)
        )
        index = kept.nonzero()[:, 0]
        repack = self.positions == "repack"
        return Short(
            ids=encoded.ids,
            embeds=embeds[index],
            position_ids=torch.arange(len(index), device=index.device)[None]
            if repack
            else encoded.position_ids[:, index],
            is_visual=is_visual[index],
            deepstack=deepstack,
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The answer's text, stripped once, here and nowhere else."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
