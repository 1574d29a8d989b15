"""Reads prompts from the arguments of a model call: the tokens of each image and of the question."""

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from mipruner.decoding import end_ids
from mipruner.errors import InputError
from mipruner.intercept import Call
from mipruner.models.adapter import Adapter, VisionOutput
from mipruner.models.generic import PAGE
from mipruner.prompt import Encoded, Prompt, Tokens, Visual
from mipruner.question import Reader, between_special

RECENT = 8
"""Number of images whose sums over the vocabulary are stored while a context is open."""
FOREIGN = "the images of this prompt were not encoded by this call inside this context"


@dataclass
class Seen:
    """One pass of the vision encoder: the arguments of the model's method, its output, and the captured calls."""

    inputs: dict[str, Any]
    output: VisionOutput
    calls: list[Call]


def see(
    adapter: Adapter,
    method: Callable[..., Any],
    names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: list[Call],
) -> tuple[Any, Seen]:
    """Call the model's own vision method, whose arguments have ``names``, and record the call."""
    out = method(*args, **kwargs)
    inputs = dict(zip(names, args, strict=False)) | kwargs
    inputs = {name: value for name, value in inputs.items() if value is not None}
    return out, Seen(inputs, adapter.read_output(out), calls)


@lru_cache(maxsize=8)
def saved_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the weights, if it is on this machine."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True) if path else None
    except (OSError, ValueError, ImportError):
        return None


def reader_of(tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None, adapter: Adapter) -> Reader | None:
    """A `Reader` that finds questions in token ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    words = cast(PreTrainedTokenizerBase, getattr(tokenizer, "tokenizer", tokenizer))
    marks = [getattr(words, f"{name}_image_token", None) for name in ("start", "end")]
    marks += words.convert_ids_to_tokens(sorted(adapter.around_ids))
    template = words.chat_template or getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return Reader(words, template, [mark for mark in marks if mark])


@dataclass
class Inputs:
    """Reads the prompts of one model.

    Attributes
    ----------
    adapter : Adapter
    reader : Reader, optional
    texts : sequence of str, optional
        The part of each prompt that is T.
    questions : sequence of str, optional
        The part of each T that is the question itself.
    signals : set of str
        Optional fields of `Features` that the method reads.
    """

    adapter: Adapter
    reader: Reader | None
    texts: Sequence[str] | None
    questions: Sequence[str] | None
    signals: frozenset[str]
    recent: deque[Visual] = field(default_factory=lambda: deque(maxlen=RECENT), repr=False)

    def __call__(
        self, ids: Tensor, embeds: Tensor, valid: Tensor, position_ids: Tensor, seen: dict[bool, Seen]
    ) -> list[Encoded]:
        """Prompts of one call, from ids [B, S], embeds [B, S, d], valid [B, S], position_ids [P, B, S]."""
        given = [_each(texts, len(ids)) for texts in (self.texts, self.questions)]
        rows = (valid, ids, embeds, position_ids.unbind(1), self._images(ids, seen), *given)
        return [self._encode(*row) for row in zip(*rows, strict=True)]

    def _images(self, ids: Tensor, seen: dict[bool, Seen]) -> list[list[tuple[Visual, Tensor]]]:
        """Images of each prompt and indices [n_rows] of their rows, from the images that the vision encoder saw."""
        placeholders = self.adapter.is_placeholder(ids)
        n_placeholders = int(placeholders.sum())
        runs = [n for row in placeholders for is_run, n in zip(*_runs(row), strict=True) if is_run]
        queues: dict[int, list[Visual]] = {}
        for kind, k in self.adapter.placeholder_ids.items():
            one = seen.get(kind == "video")
            if one is not None and bool((ids == k).any()):
                pixels = self.adapter.split_pixels(kind == "video", one.inputs, runs)
                visuals = self.adapter.make_visuals(one.output, one.calls, pixels, self.signals)
                queues[k] = [self._known(visual) for visual in visuals] if "vocabulary" in self.signals else visuals
        n_rows = sum(len(visual.rows) for queue in queues.values() for visual in queue)
        copies = n_placeholders // max(n_rows, 1)  # beams: each prompt is repeated
        if n_rows * copies != n_placeholders or len(ids) % copies:
            raise self._refusal(
                f"the prompts have {n_placeholders} visual tokens, and the images encoded for them in this context "
                f"{n_rows}: give pixel values with the prompt, and the prompt in one piece"
            )
        found = []
        for prompt in ids[::copies]:
            free = {k: (prompt == k).nonzero()[:, 0] for k in queues}
            own = []
            while any(len(places) for places in free.values()):
                first = min((k for k in free if len(free[k])), key=lambda k: int(free[k][0]))
                if not queues[first]:
                    raise self._refusal(FOREIGN)
                visual = queues[first].pop(0)
                places, free[first] = free[first].tensor_split([len(visual.rows)])
                own.append((self.adapter.placed(visual, places), places))
            found += [own] * copies
        return found

    def _known(self, visual: Visual) -> Visual:
        """The image with its stored results if the same rows were seen before."""
        for other in list(self.recent):
            if other.tokens.shape == visual.tokens.shape and torch.equal(other.tokens, visual.tokens):
                return replace(visual, held=other.held)
        self.recent.append(visual)
        return visual

    def _encode(
        self,
        valid: Tensor,
        ids: Tensor,
        embeds: Tensor,
        position_ids: Tensor,
        images: list[tuple[Visual, Tensor]],
        text: str | None,
        question: str | None,
    ) -> Encoded:
        """One prompt without its padding."""
        rows = valid.nonzero()[:, 0]
        ids, embeds, position_ids = ids[rows], embeds[rows], position_ids[:, rows]
        places = [torch.searchsorted(rows, place) for _, place in images]
        for (visual, _), place in zip(images, places, strict=True):
            if len(place) != len(visual.rows) or not self.adapter.is_placed(ids[place], embeds[place], visual.rows):
                raise self._refusal(FOREIGN)
        is_text = self._question(text, ids) if images else torch.zeros_like(ids, dtype=torch.bool)
        words = self.reader.words(ids, is_text) if self.reader and "words" in self.signals else []
        is_question = torch.ones(int(is_text.sum()), dtype=torch.bool)
        if question is not None and images:
            assert self.reader is not None
            is_question = self.reader.occurrence(ids, self.adapter.is_placeholder(ids), question)[is_text]
        tokens = Tokens(ids, is_text, is_question, words, self.reader.tokenizer if self.reader else None)
        prompt = Prompt(self.reader.decode(ids[is_text].tolist()) if self.reader else "", ())
        return Encoded(
            ids=ids,
            embeds=embeds,
            position_ids=position_ids,
            slots=tuple(visual.candidates(place) for (visual, _), place in zip(images, places, strict=True)),
            is_text=is_text,
            visuals=tuple(visual for visual, _ in images),
            signals=self.adapter.text_signals(prompt, tokens, self.signals),
            sample=f"{zlib.crc32(ids.cpu().numpy().tobytes()):08x}",
        )

    def _refusal(self, found: str) -> InputError:
        """The error message for a model type without an adapter, with the page to read."""
        model_type = self.adapter.model.config.model_type
        return InputError(found if self.adapter.reads_inside else f"{model_type}: {found}; {PAGE}")

    def is_open(self, sample: Encoded) -> bool:
        """Whether the question of a prompt with images has not ended yet, according to the chat template."""
        if self.texts is not None or self.reader is None or self.reader.template is None or not sample.visuals:
            return False
        return self.reader.is_open(sample.ids, self.adapter.is_placeholder(sample.ids))

    def _question(self, text: str | None, ids: Tensor) -> Tensor:
        """T [S] bool of one prompt."""
        is_visual = self.adapter.is_placeholder(ids)
        if text is not None:
            assert self.reader is not None
            return self.reader.occurrence(ids, is_visual, text)
        if self.reader is not None and self.reader.template is not None:
            return self.reader.latest(ids, is_visual)
        model = self.adapter.model
        ends = set(end_ids(model.generation_config)) - {None}
        configs = (model.config, model.config.get_text_config(), model.generation_config)
        special: set[Any] = {getattr(config, f"{name}_token_id", None) for config in configs for name in ("bos", "pad")}
        special = (special - {None}) | self.adapter.around_ids
        return between_special(ids, is_visual, ends, ends | special)


def _runs(row: Tensor) -> tuple[list[bool], list[int]]:
    """The values of row [S] and the length of each run."""
    values, counts = row.unique_consecutive(return_counts=True)
    return values.tolist(), counts.tolist()


def _each(given: Sequence[str] | None, n_prompts: int) -> list[str | None]:
    """The given text for each prompt."""
    texts: Sequence[str | None] = given or [None]
    if n_prompts % len(texts):
        raise InputError(f"{len(texts)} texts were given, and there are {n_prompts} prompts")
    return [text for text in texts for _ in range(n_prompts // len(texts))]
