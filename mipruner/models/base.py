"""What the pipeline must know of a model family: the steps from pictures and a question to a short prompt.

An adapter is the only place that knows a family, and it never branches on the pruner.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Set
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from mipruner.errors import InputError, PromptError
from mipruner.fused import row_norm
from mipruner.intercept import Call
from mipruner.prompt import Encoded, Picture, Prompt, Short, Tokens, Video, Visual, cut
from mipruner.selection import Selection

TEXT = "\N{LEFT WHITE CURLY BRACKET}text\N{RIGHT WHITE CURLY BRACKET}"
"""Stands for the user's text while the template around it is rendered."""

END_OF_THINKING = "</think>"


class Adapter(ABC):
    """A loaded stock transformers model and what the pipeline must know of its family.

    Parameters
    ----------
    model : PreTrainedModel
        An untouched ``...ForConditionalGeneration`` in eval mode.
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    image_processor
        A transformers image processor on the PIL backend. Both may be None where the model is called by code that has
        rendered the prompt itself (`mipruner.prune`): only what makes a prompt from text and pictures needs them.
    positions : "repack" or "keep", optional
        Whether the short prompt is numbered 0, 1, 2, ... or its tokens stay at their original positions. By default
        what the family's public pruners do.
    prompt : str, optional
        Template with ``{image}`` and ``{text}`` instead of the tokenizer's chat template. The text on each side of a
        picture is then tokenized by itself, as the original LLaVA code does.
    system : str, optional
        System message for the chat template; by default the template's own.
    thinking : bool
        Ask the chat template for a thinking answer, and read what comes after the thinking.
    """

    image_processor_class: ClassVar[type]
    """Of transformers, on the PIL backend."""
    default_positions: ClassVar[str] = "repack"
    reads_inside: ClassVar[bool] = True
    """Whether signals of the vision encoder and the layers of the language model are known."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        image_processor,
        positions: str | None = None,
        prompt: str | None = None,
        system: str | None = None,
        thinking: bool = False,
    ):
        self.positions = self.default_positions if positions is None else positions
        if self.positions not in ("repack", "keep"):
            raise InputError(f"unknown positions {positions!r}: choose repack or keep")
        if prompt is None and tokenizer is not None and tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template: give prompt, a template with {image} and {text}")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.prompt, self.system, self.thinking = prompt, system, thinking
        ids = {"image": model.config.image_token_id, "video": getattr(model.config, "video_token_id", None)}
        self.placeholder_ids = {kind: k for kind, k in ids.items() if k is not None}
        self._vocabulary_norm: tuple[tuple | None, Tensor | None] = (None, None)
        self.placeholders: dict[str, str] = {}
        if tokenizer is not None:
            self.placeholders |= {kind: tokenizer.convert_ids_to_tokens(k) for kind, k in self.placeholder_ids.items()}

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def n_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def owner(self) -> nn.Module:
        """The module whose forward puts image rows into the prompt and calls the language model."""
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        return self.owner.language_model

    @property
    def around_ids(self) -> set[int]:
        """Ids that stand for an image or around one."""
        names = ("image", "video", "vision_start", "vision_end")
        return {getattr(self.model.config, f"{name}_token_id", None) for name in names} - {None}

    @abstractmethod
    def pixels(self, image: Picture) -> dict[str, Any]:
        """Run the image processor over one picture or video; tensors on the CPU, ``times`` if it is a video."""

    def encode(self, pixels: Sequence[dict[str, Any]], signals: Set[str] = frozenset()) -> list[Visual]:
        """Vision encoder and projector, one pass over the pictures and one over the videos.

        ``signals`` names optional fields of `Features`; those that this family has are put into `Visual.signals`.
        """
        visuals: list[Visual | None] = [None] * len(pixels)
        for is_video in (False, True):
            members = [k for k, one in enumerate(pixels) if ("times" in one) is is_video]
            if members:
                for k, visual in zip(members, self.look([pixels[k] for k in members], signals), strict=True):
                    visuals[k] = visual
        return visuals

    def look(self, pixels: Sequence[dict[str, Any]], signals: Set[str]) -> list[Visual]:
        """One pass of the vision encoder and the projector, over pictures or over videos."""
        with self.watched("times" in pixels[0], signals) as calls:
            features = self.features(pixels)
        return self.visuals(features, calls, pixels, signals)

    @abstractmethod
    def watched(self, is_video: bool, signals: Set[str]) -> AbstractContextManager[list[Call]]:
        """Capture in the vision encoder what the named fields of `Features` are made of."""

    @abstractmethod
    def features(self, pixels: Sequence[dict[str, Any]]) -> ModelOutput:
        """What the model's own ``get_image_features`` or ``get_video_features`` returns."""

    def noted(self, out: ModelOutput) -> SimpleNamespace:
        """What `visuals` needs of what the model's own vision method returned."""
        return SimpleNamespace(
            pooler_output=out.pooler_output, deepstack_features=getattr(out, "deepstack_features", None)
        )

    def placed(self, ids: Tensor, embeds: Tensor, rows: Tensor) -> bool:
        """Whether ``embeds`` at the placeholders ``ids`` are what the model makes of ``rows``."""
        return torch.equal(embeds, rows.to(embeds))

    @abstractmethod
    def visuals(
        self, features: ModelOutput, calls: list[Call], pixels: Sequence[dict[str, Any]], signals: Set[str]
    ) -> list[Visual]:
        """One `Visual` for each of ``pixels``, from what `features` returned and `watched` captured."""

    @abstractmethod
    def unbatch(self, is_video: bool, inputs: dict[str, Any], runs: Sequence[int]) -> list[dict[str, Any]]:
        """What `pixels` gives for each picture, back from the arguments of ``get_image_features``.

        ``runs`` are the lengths of the runs of placeholders in the prompts, for the families whose arguments do not
        tell where a picture ends.
        """

    def layout(self, visual: Visual) -> tuple[str, list[int]]:
        """What stands for a picture in the rendered prompt, and how many rows each of its placeholders is."""
        return self.placeholders["video" if visual.is_video else "image"], [len(visual.rows)]

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part (left, top, right, bottom) of a picture of this (width, height) that its grid covers."""
        return (0, 0, *size)

    def position_ids(self, ids: Tensor, visuals: Sequence[Visual]) -> Tensor:
        """Positions [P, S] of the full prompt."""
        return torch.arange(len(ids), device=ids.device)[None]

    def kinds(self, images: Iterable[Picture]) -> list[str]:
        """Whether each is an "image" or a "video".

        Raises
        ------
        InputError
            If the family takes no videos and one is there.
        """
        kinds = ["video" if isinstance(image, Video) else "image" for image in images]
        if unknown := set(kinds) - self.placeholders.keys():
            raise InputError(f"a {self.model.config.model_type} model takes no {unknown.pop()}")
        return kinds

    def render(self, images: Sequence[Picture]) -> tuple[str, str]:
        """The prompt before and after the user's text, with one placeholder a picture."""
        kinds = self.kinds(images)
        if self.prompt is not None:
            rendered = self.prompt.format(image="".join(self.placeholders[kind] for kind in kinds), text=TEXT)
        else:
            content = [*({"type": kind} for kind in kinds), {"type": "text", "text": TEXT}]
            messages = [{"role": "user", "content": content}]
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": self.system})
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=self.thinking
            )
        before, after = rendered.split(TEXT)
        return before, after

    def check_text(self, prompt: Prompt) -> None:
        """Look at the text of one prompt before it goes into a batch with others.

        Raises
        ------
        PromptError
            If the text is empty, contains a placeholder, or the tokenizer leaves nothing of it.
        """
        query = prompt.text if prompt.query is None else prompt.query
        if not query.strip():
            raise PromptError(f"the question of sample {prompt.sample!r} is empty")
        for placeholder in self.placeholders.values():
            if placeholder in prompt.text:
                raise PromptError(f"the text of sample {prompt.sample!r} contains the placeholder {placeholder!r}")
        ids = self.tokenizer(query, add_special_tokens=False)["input_ids"]
        if not set(ids) - set(self.tokenizer.all_special_ids):
            raise PromptError(f"the tokenizer knows none of the characters of {query!r}, sample {prompt.sample!r}")

    def tokenize(self, prompt: Prompt, visuals: Sequence[Visual]) -> Tokens:
        """Render and tokenize.

        Raises
        ------
        InputError
            If the text does not contain the query or the question, or as in `check_text`.
        """
        self.check_text(prompt)
        query = prompt.text if prompt.query is None else prompt.query
        question = prompt.text if prompt.question is None else prompt.question
        for part in (query, question):
            if part not in prompt.text:
                raise InputError(f"{part!r} is not part of the text {prompt.text!r}")

        before, after = self.render(prompt.images)
        layouts = [self.layout(visual) for visual in visuals]
        a_placeholder = re.compile("|".join(map(re.escape, self.placeholders.values())))
        texts = iter(text for text, _ in layouts)
        before = a_placeholder.sub(lambda match: next(texts), before)
        rendered = before + prompt.text + after
        ids, offsets = self.tokenize_text(rendered, a_placeholder)

        def within(part: str) -> Tensor:
            start = len(before) + prompt.text.index(part)
            return (offsets[:, 1] > start) & (offsets[:, 0] < start + len(part)) & (offsets[:, 1] > offsets[:, 0])

        special = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        is_text = within(query) & ~torch.isin(ids, special)
        words = [
            " " * (a == 0 or rendered[a - 1 : a + 1].strip() != rendered[a - 1 : a + 1]) + rendered[a:b].strip()
            for a, b in offsets[is_text].tolist()
        ]
        counts = torch.ones_like(ids)
        counts[self.is_placeholder(ids)] = torch.tensor([n for _, runs in layouts for n in runs], dtype=counts.dtype)
        return Tokens(
            ids.repeat_interleave(counts),
            is_text.repeat_interleave(counts),
            within(question)[is_text],
            words,
            self.tokenizer,
        )

    def tokenize_text(self, rendered: str, a_placeholder: re.Pattern) -> tuple[Tensor, Tensor]:
        """Ids [S] and where in ``rendered`` they come from, [S, 2]."""
        ids, offsets, start = [], [], 0
        pieces = re.split(f"({a_placeholder.pattern})", rendered) if self.prompt is not None else [rendered]
        bos = self.tokenizer.bos_token
        for k, piece in enumerate(pieces):
            with_bos = k == 0 and not (bos and rendered.startswith(bos))
            tokens = self.tokenizer(piece, return_offsets_mapping=True, add_special_tokens=with_bos)
            ids += tokens["input_ids"]
            offsets += [(start + a, start + b) for a, b in tokens["offset_mapping"]]
            start += len(piece)
        return torch.tensor(ids), torch.tensor(offsets)

    def is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(list(self.placeholder_ids.values()), device=ids.device))

    def text_signals(self, prompt: Prompt, tokens: Tokens, signals: Set[str]) -> dict[str, Any]:
        """Those of the named optional fields of `Features` that come from the language model's side."""
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
        """Norms of the rows of the input embeddings [n_vocabulary]; taken anew where the weights have changed."""
        table = self.model.get_input_embeddings().weight
        key = (table.data_ptr(), len(table), 0 if table.is_inference() else table._version)
        if self._vocabulary_norm[0] != key:
            with torch.no_grad():
                self._vocabulary_norm = key, row_norm(table)
        return self._vocabulary_norm[1]

    def embed(self, text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Input-embedding rows [n, d] of a text by itself."""
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return self.model.get_input_embeddings()(ids.to(self.device))

    def read(self, prompt: Prompt, visuals: Sequence[Visual], signals: Set[str] = frozenset()) -> Encoded:
        """Embed one full-length prompt around its pictures."""
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
            slots=tuple(
                place if visual.is_candidate is None else place[visual.is_candidate]
                for place, visual in zip(places, visuals, strict=True)
            ),
            is_text=tokens.is_text.to(self.device),
            visuals=tuple(visuals),
            signals=self.text_signals(prompt, tokens, signals),
            sample=prompt.sample,
        )

    def shorten(self, encoded: Encoded, selections: Sequence[Selection]) -> Short:
        return cut(encoded, selections, self.positions == "repack")

    def decode(self, tokens: Sequence[int]) -> str:
        """The answer's text, stripped once, here and nowhere else. Thinking that does not end has no answer."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if self.thinking:
            text = text.rpartition(END_OF_THINKING)[2] if END_OF_THINKING in text else ""
        return text.strip()
