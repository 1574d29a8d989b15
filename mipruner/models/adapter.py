"""Model side of a family: from images and token ids to the embeddings of a prompt.

Everything specific to a family is in its adapter. An adapter does not depend on the pruner. `mipruner.models.chat` is
the text side.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import ModelOutput

from mipruner.errors import InputError
from mipruner.fused import row_norm
from mipruner.intercept import Call
from mipruner.models.chat import Chat
from mipruner.prompt import Encoded, Media, Prompt, Short, Tokens, Video, Visual, cut
from mipruner.selection import Selection


@dataclass(frozen=True)
class VisionOutput:
    """Fields of the output of a model's own ``get_image_features`` or ``get_video_features``.

    Attributes
    ----------
    rows : Tensor or sequence of Tensor
        Projected image rows: ``pooler_output`` in transformers.
    deepstack : sequence
        Rows for the first decoder layers, one entry per layer (Qwen3-VL).
    """

    rows: Tensor | Sequence[Tensor]
    deepstack: Sequence[Tensor | Sequence[Tensor]] = ()


class Adapter(ABC):
    """A loaded stock transformers model, with the steps that differ between model families.

    Parameters
    ----------
    model : PreTrainedModel
        An unmodified ``...ForConditionalGeneration`` in eval mode.
    tokenizer : PreTrainedTokenizerBase, optional
        A fast tokenizer. None if the caller renders prompts itself, as with `mipruner.prune`.
    image_processor : optional
        A transformers image processor with the PIL backend. None if the caller computes pixel values itself.
    positions : "repack" or "keep", optional
        ``repack`` numbers the short prompt 0, 1, 2, ...; ``keep`` keeps original positions. By default as in public
        pruning code for the family.
    prompt, system, thinking
        See `Chat`.

    Raises
    ------
    InputError
        If an option has an invalid value, or a tokenizer without chat template is given without ``prompt``.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """Values of ``model_type`` in the config that this class supports. `mipruner.models.FAMILIES` collects them."""
    prompts: ClassVar[dict[str, str]] = {}
    """Prompt templates of the family's own evaluation code, by name."""
    image_processor_class: ClassVar[type[ImageProcessingMixin]]
    """Image processor class of transformers, PIL backend."""
    default_positions: ClassVar[str] = "repack"
    any_size: ClassVar[bool] = False
    """Whether the number of visual tokens follows the image size, so that `ImagePruner` can resize images."""
    static_types: ClassVar[frozenset[str]] = frozenset()
    """Values of ``model_type`` that `Engine` supports: those with `outline`, `most_visual` and `pad`."""
    reads_inside: ClassVar[bool] = True
    """Whether signals of the vision encoder and layers of the language model are supported."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        image_processor: Any,
        positions: str | None = None,
        prompt: str | None = None,
        system: str | None = None,
        thinking: bool = False,
    ):
        self.positions = self.default_positions if positions is None else positions
        if self.positions not in ("repack", "keep"):
            raise InputError(f"unknown positions {positions!r}: choose repack or keep")
        self.model, self.image_processor = model, image_processor
        ids = {"image": model.config.image_token_id, "video": getattr(model.config, "video_token_id", None)}
        self.placeholder_ids: dict[str, int] = {kind: k for kind, k in ids.items() if k is not None}
        self._vocabulary_norm: tuple[tuple[Any, ...] | None, Tensor | None] = (None, None)
        self._chat: Chat | None = None
        if tokenizer is not None:
            placeholders = self.write_placeholders(tokenizer)
            self._chat = Chat(tokenizer, placeholders, self.placeholder_ids.values(), prompt, system, thinking)

    @property
    def chat(self) -> Chat:
        if self._chat is None:
            raise InputError("this adapter has no tokenizer, so it makes no prompts: use mipruner.models.load")
        return self._chat

    @chat.setter
    def chat(self, chat: Chat) -> None:
        self._chat = chat

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chat.tokenizer

    def write_placeholders(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """Text that the chat template writes for each supported kind of media."""
        return {kind: cast(str, tokenizer.convert_ids_to_tokens(k)) for kind, k in self.placeholder_ids.items()}

    @property
    def device(self) -> torch.device:
        """Device of the embeddings during a forward pass; accelerate may move their weights between calls."""
        embeddings: Any = self.model.get_input_embeddings()
        where = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        return embeddings.weight.device if where is None else torch.device(where)

    @property
    def n_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def owner(self) -> nn.Module:
        """The module whose forward puts image rows into the prompt and calls the language model."""
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        return cast(nn.Module, self.owner.language_model)

    @property
    def around_ids(self) -> set[int]:
        """Token ids of image placeholders, and of the begin and end of an image."""
        names = ("image", "video", "vision_start", "vision_end")
        ids = {getattr(self.model.config, f"{name}_token_id", None) for name in names}
        return {k for k in ids if k is not None}

    @abstractmethod
    def preprocess(self, image: Media) -> dict[str, Any]:
        """Run the image processor on one image or video. Returns tensors on the CPU, and ``times`` in seconds for a
        video.
        """

    def n_visual(self, image: Media) -> int:
        """Number of visual tokens of an image, for families with ``any_size``. Their `preprocess` also accepts
        `Smaller`.
        """
        raise NotImplementedError

    @property
    def most_visual(self) -> int:
        """Visual tokens of the largest image."""
        raise NotImplementedError

    def outline(self, pixels: dict[str, Any]) -> Visual:
        """What `encode` makes of one image, with rows of width 0: grid and number of visual tokens."""
        raise NotImplementedError

    def pad(self, pixels: dict[str, Any], n_visual: int) -> dict[str, Tensor]:
        """``pixels`` of an image of at most ``n_visual`` tokens as tensors whose shapes depend on ``n_visual`` alone.

        `encode` takes them instead; of the result only the first rows count, as many as the image has tokens. Where
        all images have one size, they are what they are.
        """
        raise NotImplementedError

    def encode(self, pixels: Sequence[dict[str, Any]], signals: Set[str] = frozenset()) -> list[Visual]:
        """Run vision encoder and projector, one pass over the images and one over the videos.

        ``signals`` names optional fields of `Features`. Those that the family has are stored in `Visual.signals`.
        """
        visuals: dict[int, Visual] = {}
        for is_video in (False, True):
            members = [k for k, one in enumerate(pixels) if ("times" in one) is is_video]
            if members:
                own = [pixels[k] for k in members]
                with self.capture(is_video, signals) as calls:
                    output = self.run_encoder(own)
                found = self.make_visuals(self.read_output(output), calls, own, signals)
                visuals |= zip(members, found, strict=True)
        return [visuals[k] for k in range(len(pixels))]

    @abstractmethod
    def capture(self, is_video: bool, signals: Set[str]) -> AbstractContextManager[list[Call]]:
        """Capture calls inside the vision encoder that are needed to compute the named fields of `Features`."""

    @abstractmethod
    def run_encoder(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        """Call the model's own ``get_image_features`` or ``get_video_features``."""

    def read_output(self, output: Any) -> VisionOutput:
        """The fields that `make_visuals` reads, from the output of `run_encoder`."""
        return VisionOutput(output.pooler_output, getattr(output, "deepstack_features", None) or ())

    def is_placed(self, ids: Tensor, embeds: Tensor, rows: Tensor) -> bool:
        """Whether ``embeds`` at the placeholders ``ids`` equal the image ``rows`` as the model inserts them."""
        return torch.equal(embeds, rows.to(embeds))

    def placed(self, visual: Visual, places: Tensor) -> Visual:
        """``visual`` with what its indices ``places`` [n_rows] in the prompt tell about it."""
        return visual

    @abstractmethod
    def make_visuals(
        self, output: VisionOutput, calls: list[Call], pixels: Sequence[dict[str, Any]], signals: Set[str]
    ) -> list[Visual]:
        """One `Visual` for each of ``pixels``, from the results of `read_output` and `capture`."""

    @abstractmethod
    def split_pixels(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        """The result of `preprocess` for each image, recovered from the arguments of ``get_image_features``.

        ``runs`` are the lengths of the runs of placeholders in the prompts. Some families need them, because their
        arguments do not show where an image ends.
        """

    def lay_out(self, visual: Visual) -> tuple[str, list[int]]:
        """Text that replaces the placeholder of an image or video, and the number of rows of each placeholder token in
        it.
        """
        return self.chat.placeholders["video" if visual.is_video else "image"], [len(visual.rows)]

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Box (left, top, right, bottom) in pixels that the grid covers in an image of ``size`` (width, height)."""
        return (0, 0, *size)

    def position_ids(self, ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """Positions [P, S] of the full prompt."""
        return torch.arange(len(ids), device=ids.device)[None]

    def kinds(self, images: Iterable[Media]) -> list[str]:
        """The kind of each: "image" or "video".

        Raises
        ------
        InputError
            If there is a video and the family does not support videos.
        """
        kinds = ["video" if isinstance(image, Video) else "image" for image in images]
        if unknown := set(kinds) - self.chat.placeholders.keys():
            raise InputError(f"a {self.model.config.model_type} model takes no {unknown.pop()}")
        return kinds

    def tokenize(self, prompt: Prompt, visuals: Sequence[Visual]) -> Tokens:
        """Render and tokenize one prompt, see `Chat.tokenize`."""
        return self.chat.tokenize(prompt, self.kinds(prompt.images), [self.lay_out(visual) for visual in visuals])

    def is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(list(self.placeholder_ids.values()), device=ids.device))

    def text_signals(self, prompt: Prompt, tokens: Tokens, signals: Set[str]) -> dict[str, Any]:
        """The named optional fields of `Features` that come from the language model."""
        known = {
            "words": tokens.words,
            "question": tokens.is_question.to(self.device),
            "vocabulary": self.model.get_input_embeddings().weight,
        }
        if tokens.tokenizer is not None:
            query = prompt.text if prompt.query is None else prompt.query
            known["prefixed"] = lambda prefix: self.embed(prefix + query, tokens.tokenizer)
        found = {name: value for name, value in known.items() if name in signals}
        return found | {"vocabulary_norm": self.vocabulary_norm()} if "vocabulary" in found else found

    def vocabulary_norm(self) -> Tensor:
        """Norms [n_vocabulary] of the input-embedding rows; computed again if the weights have changed."""
        table = cast(Tensor, self.model.get_input_embeddings().weight)
        key = (table.data_ptr(), len(table), 0 if table.is_inference() else table._version)
        known, norm = self._vocabulary_norm
        if norm is None or known != key:
            with torch.no_grad():
                norm = row_norm(table)
            self._vocabulary_norm = key, norm
        return norm

    def embed(self, text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Input-embedding rows [n, d] of a text."""
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return self.model.get_input_embeddings()(ids.to(self.device))

    def read(self, prompt: Prompt, visuals: Sequence[Visual], signals: Set[str] = frozenset()) -> Encoded:
        """Embed one full prompt with its images."""
        tokens = self.tokenize(prompt, visuals)
        ids = tokens.ids.to(self.device)
        embeds = self.model.get_input_embeddings()(ids)
        places = self.is_placeholder(ids).nonzero()[:, 0].split([len(visual.rows) for visual in visuals])
        for place, visual in zip(places, visuals, strict=True):
            embeds[place] = visual.rows.to(embeds)
        return Encoded(
            ids=ids,
            embeds=embeds,
            position_ids=self.position_ids(ids, visuals),
            slots=tuple(visual.candidates(place) for place, visual in zip(places, visuals, strict=True)),
            is_text=tokens.is_text.to(self.device),
            visuals=tuple(visuals),
            signals=self.text_signals(prompt, tokens, signals),
            sample=prompt.sample,
        )

    def shorten(self, encoded: Encoded, selections: Sequence[Selection]) -> Short:
        return cut(encoded, selections, self.positions == "repack")
