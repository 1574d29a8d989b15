"""Prepares a request before encoding: the question, the budget, each image's share, and the placeholders."""

import contextvars
import dataclasses
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from mipruner.errors import InputError
from mipruner.question import Reader
from mipruner.selection import split_budget
from mipruner_vllm import settings

OWN = ("question_ids", "n_keep", "layout", "media_hash", "sample")
"""Fields that are sent with each image or video to the worker."""

PROFILE = MappingProxyType({"keep": 1.0})
"""Options of the profiling requests that vLLM sends itself before serving; they may include a video."""


@dataclass
class Request:
    """A request during processing."""

    question: list[int]
    keep: int | float
    sample: str = ""
    """Name for random draws, see `mipruner.features.Features.sample`; empty: each image is named after its hash."""
    hashes: dict[str, list[str]] = field(default_factory=dict)
    """Hashes of the images and videos themselves."""


_request: contextvars.ContextVar[Request] = contextvars.ContextVar("mipruner request")


class Questions:
    """Mixin of a vLLM multimodal processor. Does nothing unless the model's config has the setting ``mipruner``.

    vLLM caches encoder output and the KV cache of a prompt by image hash. So the hash includes question, budget and, if
    several images share the budget, their hashes. The image's own hash is sent to the worker, which encodes an image
    once for all questions (`mipruner_vllm.model.VisionRows`).
    """

    placeholders: ClassVar[tuple[str, ...]] = ("<image>",)
    marker: ClassVar[str] = "image_token_id"
    """Name in the config of the placeholder id of an image in a request."""
    video_marker: ClassVar[str | None] = None
    """The same for a video; None if videos are not pruned."""
    is_scored_by_tile: ClassVar[bool] = False
    """Whether each tile has its own budget, as in `mipruner.prune`, which treats tiles as images."""

    @cached_property
    def settings(self) -> settings.Settings | None:
        return settings.read(self.info.get_hf_config())

    @cached_property
    def reader(self) -> Reader:
        tokenizer = self.info.get_tokenizer()
        template = getattr(self.info.get_hf_processor(), "chat_template", None) or tokenizer.chat_template
        return Reader(tokenizer, template, self.placeholders)

    @property
    def markers(self) -> dict[str, str]:
        """Kinds of media that are pruned, and their markers."""
        return {"image": self.marker} | ({"video": self.video_marker} if self.video_marker else {})

    def get_dummy_inputs(self, *args: Any, **kwargs: Any):
        """Inputs for profiling: no question and all rows, which is the maximum for a request."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return inputs if self.settings is None else dataclasses.replace(inputs, hf_processor_mm_kwargs=PROFILE)

    def apply(self, inputs, timing_ctx):
        """Process a request. Raises `InputError` (HTTP 400) for an invalid budget, an empty question or unsupported
        media.
        """
        if self.settings is None:
            if "keep" in inputs.hf_processor_mm_kwargs:
                raise InputError("this server was started without the setting mipruner: keep would change nothing")
            return super().apply(inputs, timing_ctx)
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        keep = kwargs.pop("keep", self.settings.keep)
        settings.check_keep(keep)
        if "pruner" in kwargs:  # a request may say what it relies on
            settings.check_pruner(self.settings.pruner, kwargs.pop("pruner"), kwargs.pop("options", {}))
        if not isinstance(sample := kwargs.pop("sample", ""), str):
            raise InputError(f"sample={sample!r} is not the name of a sample: give a text")
        if inputs.hf_processor_mm_kwargs is not PROFILE:
            self.check_kinds({kind for kind, n in inputs.mm_data_items.get_all_counts().items() if n})
        token = _request.set(Request(self.question(inputs.prompt), keep, sample))
        try:
            return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        finally:
            _request.reset(token)

    def check_kinds(self, kinds: set[str]) -> None:
        """Raise `InputError` for images or videos that this package does not prune."""
        if other := kinds - self.markers.keys():
            raise InputError(
                f"mi-pruner-vllm prunes no {' and '.join(f'{kind}s' for kind in sorted(other))} of a "
                f"{self.info.get_hf_config().model_type}: send the frames as images, or serve without the setting "
                "mipruner"
            )
        if len(kinds) > 1:
            raise InputError("mi-pruner-vllm takes images or videos in a prompt, not both")

    def question(self, prompt: list[int]) -> list[int]:
        """Ids of T, the latest user text of the rendered prompt; none without an image or a video."""
        ids, config = torch.tensor(prompt), self.info.get_hf_config()
        is_visual = torch.isin(ids, torch.tensor([getattr(config, name) for name in self.markers.values()]))
        if not is_visual.any():
            return []
        return ids[self.reader.latest(ids, is_visual)].tolist()

    def _get_mm_hashes(self, inputs):
        hashes = super()._get_mm_hashes(inputs)
        if self.settings is None:
            return hashes
        request = _request.get()
        request.hashes = {kind: list(hashes[kind]) for kind in self.markers if hashes.get(kind)}
        if request.keep == 1.0 and isinstance(request.keep, float):  # the same rows for every question
            return hashes
        every = [one for of_kind in request.hashes.values() for one in of_kind]
        told = repr((request.question, request.keep, every if len(every) > 1 else None, request.sample))
        named = {
            kind: [hashlib.sha256(f"{one}{told}{k}".encode()).hexdigest() for k, one in enumerate(of_kind)]
            for kind, of_kind in request.hashes.items()
        }
        return {**hashes, **named}

    def n_fixed(self, items, k: int) -> int:
        """Number of rows of item k that are not patches, such as newline rows."""
        return 0

    def _maybe_apply_prompt_updates(self, mm_items, mm_res):
        """Divide the budget: here all images and videos have their original placeholders, cached or not."""
        stock = {kind: mm_res.prompt_updates[kind] for kind in self.markers if mm_res.prompt_updates.get(kind)}
        if self.settings is None or not stock:
            return super()._maybe_apply_prompt_updates(mm_items, mm_res)
        request = _request.get()
        spans = {
            kind: [Span.of(one[0].content, self.n_fixed(mm_items[kind], k)) for k, one in enumerate(updates)]
            for kind, updates in stock.items()
        }
        counts = [
            span.tiles() if self.is_scored_by_tile else [span.n_candidates]
            for of_kind in spans.values()
            for span in of_kind
        ]
        flat = [n for one in counts for n in one]
        left = iter(split_budget(self.settings.pruner.budget(request.keep, sum(flat)), flat))
        shares = [list(islice(left, len(one))) for one in counts]
        if shares != counts and not request.question:
            raise InputError("the question is empty or of unknown words only: a pruner needs a text, or send keep=1.0")
        of_each, updates = iter(shares), dict(mm_res.prompt_updates)
        for kind, of_kind in spans.items():
            own = [next(of_each) for _ in of_kind]
            shorter = [span.shorten(sum(share)) for span, share in zip(of_kind, own, strict=True)]
            updates[kind] = [[u.with_content(d) for u in one] for one, d in zip(stock[kind], shorter, strict=True)]
            rest = zip(mm_res.kwargs[kind], request.hashes[kind], own, of_kind, strict=True)
            for k, (item, media_hash, share, span) in enumerate(rest):
                if item is not None:  # else the engine has it under this very hash
                    sample = f"{request.sample}/{k}" if request.sample and len(of_kind) > 1 else request.sample
                    item.update(fields(request.question, share, span, media_hash, sample))
        return super()._maybe_apply_prompt_updates(mm_items, mm_res._replace(prompt_updates=updates))


def fields(
    question: list[int], share: list[int], span: "Span", media_hash: str, sample: str
) -> dict[str, MultiModalFieldElem]:
    """The fields `OWN` of one image or video. The draw is named after the hash if ``sample`` is empty."""
    digest = hashlib.sha256(media_hash.encode())
    texts = digest.digest(), (sample or digest.hexdigest()).encode()
    values = (torch.tensor(question or [0]), torch.tensor(share), span.layout, *map(bytes_of, texts))
    return {
        name: MultiModalFieldElem(value, MultiModalBatchedField(keep_on_cpu=name != "question_ids"))
        for name, value in zip(OWN, values, strict=True)
    }


def bytes_of(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


@dataclass(frozen=True)
class Span:
    """Placeholders of one image or video in the full prompt.

    The positions of words between the rows (newlines, separators of tiles) among the kept tokens are known only after
    the selection. So the whole span from the first to the last row becomes ids of rows, and the worker inserts the
    embeddings of these words.

    Attributes
    ----------
    before, after : list of int
        Ids around the rows.
    image : int
        The id of a row.
    layout : Tensor [n_span]
        The span from first to last row: -1 for a row, else the id of a word.
    n_fixed : int
        Number of rows that are not candidates.
    """

    before: list[int]
    after: list[int]
    image: int
    layout: Tensor
    n_fixed: int

    @classmethod
    def of(cls, content: PromptUpdateDetails, n_fixed: int) -> "Span":
        full = torch.tensor(content.full)
        is_row = torch.ones_like(full, dtype=torch.bool) if content.is_embed is None else content.is_embed(content.full)
        places = is_row.nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1]) + 1
        layout = full[first:last].masked_fill(is_row[first:last], -1)
        return cls(full[:first].tolist(), full[last:].tolist(), int(full[first]), layout, n_fixed)

    @property
    def n_candidates(self) -> int:
        return int((self.layout < 0).sum()) - self.n_fixed

    def tiles(self) -> list[int]:
        """Number of rows in each run of rows without words in between."""
        is_row = torch.nn.functional.pad((self.layout < 0).int(), (1, 1))
        turns = is_row.diff().nonzero()[:, 0]
        return (turns[1::2] - turns[::2]).tolist()

    def shorten(self, n_keep: int) -> PromptUpdateDetails:
        """Placeholders of ``n_keep`` candidates and of everything that is always kept."""
        n_rows = n_keep + len(self.layout) - self.n_candidates
        ids = [*self.before, *[self.image] * n_rows, *self.after]
        is_row = torch.zeros(len(ids), dtype=torch.bool)
        is_row[len(self.before) : len(self.before) + n_rows] = True
        return PromptUpdateDetails(ids, None if is_row.all() else (lambda _: is_row))
