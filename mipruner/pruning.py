"""Pruning in one line around code that knows nothing of it.

    with mipruner.prune(model, "mi", keep=0.25):
        model.generate(**processor(images=image, text=prompt, return_tensors="pt"))

While the context lasts, three hooks and two wrapped methods of this one model object do what `Pipeline` does by hand:

    get_image_features, get_video_features   note what the vision encoder put out
    model.model                              note the prompt's ids
    model.model.language_model               before: hand over the short prompt, and in later calls positions and a
                                             mask that fit the shortened cache; after: leave a note on that cache

``generate`` goes on to count the tokens of the full prompt; the note on the cache is what translates.
"""

import inspect
import sys
import threading
import warnings
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from mipruner.errors import InputError
from mipruner.models import FAMILIES
from mipruner.models.base import Call
from mipruner.pipeline import Pipeline, by_picture
from mipruner.prompt import Encoded, Prompt, Tokens, Visual
from mipruner.pruners import PRUNERS, DecoderPruner, Pruner
from mipruner.question import Reader, between_special
from mipruner.selection import Auto, Selection, budget
from mipruner.shortening import COURSE, Course, Prompts, Shortening, length

_in_use: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
_entering = threading.Lock()


@contextmanager
def prune(
    model: PreTrainedModel,
    pruner: str | Pruner | DecoderPruner = "mi",
    keep: int | float | Auto = 0.25,
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    text: str | Sequence[str] | None = None,
    positions: str | None = None,
    **options: Any,
) -> Iterator["Pruning"]:
    """Prune the visual tokens of every prompt that ``model`` reads while the context lasts.

    ``generate`` with sampling, beams and streamers, padded batches, several pictures, videos, chats and transformers'
    pipelines work as before, and give what `Pipeline` gives. Afterwards the model is as it was.

    T, the text that scores, is the latest thing that the user says, found by the chat template of ``tokenizer``. If
    none is given, the one saved with the model is used. If there is none either, T is the text from the last picture
    to the next end-of-text id, with the role words that the template may have put there; a warning says so.

    A chat may go on with the cache of an earlier turn: its tokens stay as they were pruned, for the question of that
    turn. A cache that was filled inside a context can only be used inside one. A cached beginning that was not pruned
    is left alone. With a forward pass by hand, mind that the logits are those of the short prompt.

    Threads: `generate` may run in several threads inside one context, and all of them are pruned. Methods inside the
    language model (FastV, ...) take one ``generate`` at a time.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded, of a family in `mipruner.models.FAMILIES`.
    pruner : str or Pruner or DecoderPruner
        A name of `mipruner.PRUNERS`, with its hyperparameters as ``options``, or an instance.
    keep : int, float or Auto
        Budget per prompt, see `mipruner.budget`.
    tokenizer : tokenizer or processor, optional
    text : str or sequence of str, optional
        The part of each prompt that is T, where it is not all that the user says.
    positions : "repack" or "keep", optional
        See `Adapter`; by default what the family's public pruners do.

    Yields
    ------
    Pruning
        What was kept of the latest prompts.

    Raises
    ------
    InputError
        On entering, if the model is of no known family, is being pruned already, or an option does not fit. Inside,
        from the call that cannot be served: a static cache, ``inputs_embeds``, assisted decoding, a text that is not
        in the prompt.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "model"):
        raise InputError(
            f"{type(model).__name__} cannot be pruned: give the transformers model that has generate (of an adapter or "
            "a pipeline, its .model)"
        )
    if model.config.model_type not in FAMILIES:
        raise InputError(
            f"{model.config.model_type!r} has no adapter; there are those for {', '.join(sorted(FAMILIES))}"
        )
    budget(keep, sys.maxsize)
    pruning = Pruning(model, _pruner(pruner, options), keep, tokenizer, text, positions)
    with ExitStack() as stack:
        with _entering:
            if model in _in_use:
                raise InputError("this model is being pruned already: leave the other mipruner.prune context first")
            _in_use.add(model)
            stack.callback(_in_use.discard, model)
        pruning.install(stack)
        yield pruning


def _pruner(pruner: str | Pruner | DecoderPruner, options: dict[str, Any]) -> Pruner | DecoderPruner:
    if not isinstance(pruner, str):
        if options:
            raise InputError(f"{', '.join(options)}: hyperparameters belong to the pruner that was given")
        if not isinstance(pruner, Pruner | DecoderPruner):
            raise InputError(f"{pruner!r} is no pruner: give one of {', '.join(PRUNERS)}, or an instance")
        return pruner
    if pruner not in PRUNERS:
        raise InputError(f"unknown pruner {pruner!r}: choose one of {', '.join(PRUNERS)}")
    try:
        return PRUNERS[pruner](**options)
    except TypeError as error:
        raise InputError(f"{pruner}: {str(error).split('() ')[-1]}") from error


@lru_cache(maxsize=8)
def _saved_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the weights, if it is on this machine."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True) if path else None
    except (OSError, ValueError, ImportError):
        return None


@dataclass
class Seen:
    """One pass of the vision encoder: the arguments of the model's method, what it returned, what was captured."""

    inputs: dict[str, Any]
    features: SimpleNamespace
    calls: list[Call]


class Pruning:
    """The state of one `prune` context.

    Attributes
    ----------
    encoded : list of Encoded
        The latest prompts that had pictures, in full.
    """

    def __init__(self, model, pruner, keep, tokenizer, text, positions):
        self.model, self.inner = model, model.model
        self.adapter = FAMILIES[model.config.model_type](model, None, None, positions=positions)
        self.pipeline = Pipeline(self.adapter, pruner, keep)
        self.texts = [text] if isinstance(text, str) else text
        self.reader = self._reader(_saved_tokenizer(model.name_or_path) if tokenizer is None else tokenizer)
        if text is not None and self.reader is None:
            raise InputError("text is found in the prompt by its tokens: give tokenizer, too")
        if text is None and (self.reader is None or self.reader.template is None):
            warnings.warn(
                "no tokenizer with a chat template is known: T is taken to be the text between the last picture and "
                "the next end-of-text id, role words included. Give tokenizer=, above all for chats of several turns.",
                stacklevel=4,
            )
        self.encoded: list[Encoded] = []
        self._selections: list[list[Selection]] = []
        self._looking = threading.Lock()
        repack = self.adapter.positions == "repack"
        self.shortening = Shortening(self.adapter.language_model, pruner, self._choose, repack)
        self._here = self.shortening.here

    @property
    def selections(self) -> list[list[Selection]]:
        """What was kept of the latest prompts, one list a prompt, one `Selection` a picture."""
        run = self.shortening.run
        if not run.kept:
            return self._selections
        return [by_picture(*pair) for pair in zip(run.kept, self.encoded, strict=True)]

    def install(self, stack: ExitStack) -> None:
        """Put the hooks in place; ``stack`` takes them away."""
        for is_video, name in ((False, "get_image_features"), (True, "get_video_features")):
            if hasattr(self.inner, name):
                own = self.inner.__dict__.get(name)
                setattr(self.inner, name, self._noting(is_video, getattr(self.inner, name)))
                stack.callback(partial(setattr, self.inner, name, own) if own else partial(delattr, self.inner, name))
        stack.callback(self.inner.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        stack.enter_context(self.shortening)

    def _reader(self, tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None) -> Reader | None:
        if tokenizer is None:
            return None
        words = getattr(tokenizer, "tokenizer", tokenizer)
        ids = {getattr(self.model.config, f"{name}_token_id", None) for name in AROUND_PICTURES} - {None}
        marks = [getattr(words, f"{name}_image_token", None) for name in ("start", "end")]
        marks += words.convert_ids_to_tokens(sorted(ids))
        return Reader(words, words.chat_template or getattr(tokenizer, "chat_template", None), [m for m in marks if m])

    # What the hooks do, in the order in which they run

    def _noting(self, is_video: bool, method):
        """The model's own vision method, which also notes what it was given and what it gives."""
        signature = inspect.signature(method)

        @wraps(method)
        def noting(*args, **kwargs):
            here = self._here
            if getattr(here, "looking", False):  # Qwen-VL looks at videos through the method for pictures
                return method(*args, **kwargs)
            here.looking = True
            try:
                with self._looking, self.adapter.watched(is_video, self.pipeline.pruner.signals) as calls:
                    out = method(*args, **kwargs)
            finally:
                here.looking = False
            inputs = {k: v for k, v in signature.bind(*args, **kwargs).arguments.items() if v is not None}
            features = SimpleNamespace(
                pooler_output=out.pooler_output, deepstack_features=getattr(out, "deepstack_features", None)
            )
            here.seen = getattr(here, "seen", {}) | {is_video: Seen(inputs, features, calls)}
            return out

        return noting

    def _before_model(self, model, args, kwargs):
        kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None:
            raise InputError("pruning reads the prompt's input_ids, and this call has inputs_embeds only")
        n_past = length(cache)
        course = getattr(cache, COURSE, None) if n_past else None
        note = course and course.door
        self._here.placed = kwargs.get("position_ids") is not None
        if note is not None and self._here.placed:
            lag = note.lag(kwargs["position_ids"], n_past)
            if lag not in (0, note.removed):
                raise InputError(
                    "this call goes back to a token before the last one, which a shortened cache does not allow: no "
                    "assisted decoding, and a chat goes on from where its cache ends"
                )
            if lag:
                kwargs = kwargs | {
                    name: kwargs[name][..., lag:]
                    for name in ("input_ids", "position_ids", "mm_token_type_ids")
                    if kwargs.get(name) is not None
                }
                if not self.adapter.is_placeholder(kwargs["input_ids"]).any():
                    kwargs = {name: x for name, x in kwargs.items() if name not in PICTURES}
        self._here.ids = kwargs["input_ids"]
        return (), kwargs

    def _choose(self, kwargs: dict[str, Any], course: Course | None) -> Prompts | bool | None:
        """What is kept of the prompts with pictures that a call brings."""
        ids, self._here.ids = getattr(self._here, "ids", None), None
        if ids is None:  # not from the model's own forward: a `Pipeline` on the same model
            return False
        cache, mask, given = (kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        n_past = length(cache)
        answering = n_past > 0 and ids.shape[1] == 1  # whatever the model says, it is no picture
        if answering or not bool(self.adapter.is_placeholder(ids).any()):
            return None
        if getattr(cache, "is_compileable", False) or (mask is not None and getattr(mask, "ndim", 0) != 2):
            raise InputError("a static cache has no room for a shortened prompt: leave cache_implementation at dynamic")
        if given is None:
            n_before = n_past + (course.door.removed if course and course.door else 0)
            given = torch.arange(n_before, n_before + ids.shape[1], device=ids.device)[None]
        valid = (torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]).bool()
        given = (given[None] if given.ndim == 2 else given).expand(-1, *ids.shape)
        rows = (valid, ids, kwargs["inputs_embeds"], given.unbind(1), self._pictures(ids), self._texts(len(ids)))
        self.encoded = [self._encode(*row) for row in zip(*rows, strict=True)]
        prompts, self._selections = self.pipeline.choose(self.encoded, valid)
        self.shortening.run.kept.clear()
        return prompts

    # From the model's arguments to what a pruner sees

    def _pictures(self, ids: Tensor) -> list[list[tuple[Visual, Tensor]]]:
        """The pictures of each prompt with their places in it [n_rows], from those that the vision encoder saw."""
        placeholders = self.adapter.is_placeholder(ids)
        n_placeholders, signals = int(placeholders.sum()), self.pipeline.pruner.signals
        runs = [n for row in placeholders for is_run, n in zip(*_runs(row), strict=True) if is_run]
        queues: dict[int, list[Visual]] = {}
        for kind, k in self.adapter.placeholder_ids.items():
            seen = getattr(self._here, "seen", {}).get(kind == "video")
            if seen is not None and bool((ids == k).any()):
                pixels = self.adapter.unbatch(kind == "video", seen.inputs, runs)
                queues[k] = self.adapter.visuals(seen.features, seen.calls, pixels, signals)
        n_rows = sum(len(visual.rows) for queue in queues.values() for visual in queue)
        copies = n_placeholders // max(n_rows, 1)  # beams: each prompt stands there several times
        if n_rows * copies != n_placeholders or len(ids) % copies:
            raise InputError(
                f"the prompts have {n_placeholders} visual tokens, and the pictures encoded for them in this context "
                f"{n_rows}: give pixel values with the prompt, and no prefill_chunk_size"
            )
        found = []
        for prompt in ids[::copies]:
            free = {k: (prompt == k).nonzero()[:, 0] for k in queues}
            own = []
            while any(len(places) for places in free.values()):
                first = min((k for k in free if len(free[k])), key=lambda k: int(free[k][0]))
                visual = queues[first].pop(0)
                own.append((visual, free[first][: len(visual.rows)]))
                free[first] = free[first][len(visual.rows) :]
            found += [own] * copies
        return found

    def _encode(self, valid, ids, embeds, position_ids, pictures, text) -> Encoded:
        """One prompt without its padding."""
        rows = valid.nonzero()[:, 0]
        ids, embeds, position_ids = ids[rows], embeds[rows], position_ids[:, rows]
        places = [torch.searchsorted(rows, place) for _, place in pictures]
        for (visual, _), place in zip(pictures, places, strict=True):
            if len(place) != len(visual.rows) or not torch.equal(embeds[place], visual.rows.to(embeds)):
                raise InputError("the pictures of this prompt were not encoded by this call inside this context")
        is_visual = self.adapter.is_placeholder(ids)
        is_text = self._question(text, ids, is_visual)
        words = self.reader.words(ids, is_text) if self.reader and "words" in self.pipeline.pruner.signals else []
        tokens = Tokens(ids, is_text, torch.ones(int(is_text.sum()), dtype=torch.bool), words)
        prompt = Prompt(self.reader.decode(ids[is_text].tolist()) if self.reader else "", ())
        return Encoded(
            ids=ids,
            embeds=embeds,
            position_ids=position_ids,
            slots=tuple(
                place if visual.is_candidate is None else place[visual.is_candidate]
                for (visual, _), place in zip(pictures, places, strict=True)
            ),
            is_text=is_text,
            visuals=tuple(visual for visual, _ in pictures),
            signals=self.adapter.text_signals(prompt, tokens, self.pipeline.pruner.signals),
            sample=f"{zlib.crc32(ids.cpu().numpy().tobytes()):08x}",
        )

    def _texts(self, n_prompts: int) -> list[str | None]:
        """The given text of each prompt."""
        given = self.texts or [None]
        if n_prompts % len(given):
            raise InputError(f"{len(given)} texts were given, and there are {n_prompts} prompts")
        return [text for text in given for _ in range(n_prompts // len(given))]

    def _question(self, text: str | None, ids: Tensor, is_visual: Tensor) -> Tensor:
        """T [S] bool of one prompt."""
        if text is not None:
            return self.reader.occurrence(ids, is_visual, text)
        if self.reader is not None and self.reader.template is not None:
            return self.reader.latest(ids, is_visual)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        configs = (self.model.config, self.model.config.text_config, self.model.generation_config)
        names = ("bos", "pad", *AROUND_PICTURES)
        special = {getattr(config, f"{name}_token_id", None) for config in configs for name in names} - {None}
        return between_special(ids, is_visual, ends, ends | special)


AROUND_PICTURES = ("image", "video", "vision_start", "vision_end")
PICTURES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_sizes", "mm_encoder_outputs")


def _runs(row: Tensor) -> tuple[list[bool], list[int]]:
    """The values of row [S] and how often each is repeated."""
    values, counts = row.unique_consecutive(return_counts=True)
    return values.tolist(), counts.tolist()
