"""`mipruner.prune`: prunes the visual tokens of a model inside existing code.

    with mipruner.prune(model, "mi", keep=0.25):
        model.generate(**processor(images=image, text=prompt, return_tensors="pt"))

Inside the context, functions before and after the calls of this model object (`mipruner.intercept`) do the work of
`Pipeline`:

    model                        withhold labels and logits_to_keep until the kept tokens are known
    get_image_features, ...      record the output of the vision encoder
    model.model                  record the ids of the prompt
    model.model.language_model   pass the short prompt on, drop rows between layers (`mipruner.shortening`)

``generate`` counts the tokens of the full prompt; the cache converts these counts (`mipruner.caches`).
"""

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from mipruner.arguments import Masks
from mipruner.caches import CacheState, length, state_of
from mipruner.errors import InputError
from mipruner.inputs import Inputs, reader_of, saved_tokenizer, see
from mipruner.intercept import Arguments, Step, intercept
from mipruner.layer_form import Form
from mipruner.loss import Asked
from mipruner.models import FAMILIES
from mipruner.models.generic import PAGE, GenericAdapter, check
from mipruner.pipeline import Pipeline, per_image
from mipruner.prompt import Encoded
from mipruner.pruners import DecoderPruner, Keep, Method, parse_pruner
from mipruner.selection import Auto, Kept, Selection, budget
from mipruner.short_prompt import Prompts, padding
from mipruner.shortening import Shortening
from mipruner.unwrap import unwrapped

PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_sizes", "mm_encoder_outputs")

UNSERVED = {
    "prefill_chunk_size": "cuts a prompt before its question is known",
} | dict.fromkeys(
    ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"),
    "reads guesses together with the prompt, whose question it then does not end with",
)
"""Options of ``generate`` that are refused for prompts with images, and why."""


def prune(
    model: PreTrainedModel,
    pruner: str | Method | Sequence[str | Method] = "mi",
    keep: int | float | Auto | Sequence[int | float] = 0.25,
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    text: str | Sequence[str] | None = None,
    question: str | Sequence[str] | None = None,
    positions: str | None = None,
    **options: Any,
) -> "Pruning":
    """Prune the visual tokens of every prompt that ``model`` reads, inside a ``with`` block.

    ``generate`` in all its modes, padded batches, several images, videos, chats, forward passes with labels and
    transformers' pipelines work as before. Results equal those of `Pipeline`. After the block the model is restored.

    T, the text that scores visual tokens, is the latest text of the user. It is found by the chat template of
    ``tokenizer``, or of the tokenizer saved with the model. Without any template, T is the text between the last image
    and the next end-of-text token, role words included; a warning is given.

    A chat may continue with the cache of an earlier turn. Tokens that were kept in that turn are not selected again.
    A cache that was filled inside a context can only be used inside one. A cached prefix that was not pruned is not
    changed. A forward pass by hand returns the logits of the short prompt.

    Threads: a block applies to the thread that opens it. It applies to threads without their own block, if no other
    block is open on this model. Two threads may open one block each, with different pruners and budgets.

    Parameters
    ----------
    model : PreTrainedModel
        Loaded, of a family in `mipruner.models.FAMILIES`; also inside PEFT, torch.compile or DistributedDataParallel.
    pruner : str or Pruner or DecoderPruner
        A name of `mipruner.PRUNERS`, with its hyperparameters as ``options``, or an instance. Two of them, one before
        the language model and one inside it, work one after the other: ``["mi", "fastv"], keep=[0.5, 0.25]``.
    keep : int, float or Auto
        Budget per prompt, see `mipruner.budget`. For two methods, a pair: the budget of each.
    tokenizer : tokenizer or processor, optional
    text : str or sequence of str, optional
        The part of each prompt that is T; by default all of the user's latest text.
    question : str or sequence of str, optional
        The part of T that is the question itself, for methods that read only that; all of T by default.
    positions : "repack" or "keep", optional
        See `Adapter`.

    Returns
    -------
    Pruning
        The context. ``print`` shows the kept tokens of the latest prompts.

    Raises
    ------
    InputError
        At once, if the family of the model is not supported or an option is invalid. On entering, if this thread
        already prunes the model. Inside, from a call that is not supported.
    """
    return Pruning(model, pruner, keep, tokenizer, text, question, positions, options)


def attach(model: PreTrainedModel, *args: Any, **options: Any) -> "Pruning":
    """Prune as `prune` does, in all threads, until ``.detach()`` is called on the result.

    A ``with`` block of `prune` in one thread takes precedence.
    """
    return prune(model, *args, **options).attach()


class Pruning:
    """A pruner and budget for one model, as a context or attached until detached. It can be used again.

    Attributes
    ----------
    encoded : list of Encoded
        Full prompts with images of this thread's latest call.
    watch : callable
        Takes the name of a stage ("vision" or "scoring") and returns a context around it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pruner: str | Method | Sequence[str | Method],
        keep: Keep | Sequence[int | float],
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None,
        text: str | Sequence[str] | None,
        question: str | Sequence[str] | None,
        positions: str | None,
        options: dict[str, Any],
    ):
        self._stack: ExitStack | None = None
        self._used = True  # until the arguments are known to be good
        self.model = unwrapped(model)
        methods = pruner if isinstance(pruner, list | tuple) else [pruner]
        self.keep = keep
        self.name = " then ".join(one if isinstance(one, str) else type(one).__name__ for one in methods)
        for one in keep if isinstance(keep, list | tuple) else [keep]:
            budget(cast(Keep, one), sys.maxsize)
        method, kept = parse_pruner(pruner, keep, options)
        family = FAMILIES.get(self.model.config.model_type, GenericAdapter)
        self.adapter = family(self.model, None, None, positions=positions)
        if not self.adapter.reads_inside:
            check(self.model.config.model_type, method)
        self.pipeline = Pipeline(self.adapter, method, kept)
        reader = reader_of(saved_tokenizer(self.model.name_or_path) if tokenizer is None else tokenizer, self.adapter)
        if reader is None and (text is not None or question is not None):
            raise InputError("text and question are found in the prompt by their tokens: give tokenizer, too")
        if text is None and (reader is None or reader.template is None):
            warnings.warn(
                "no tokenizer with a chat template is known: T is taken to be the text between the last image and "
                "the next end-of-text id, role words included. Give tokenizer=, above all for chats of several turns.",
                stacklevel=3,
            )
        self.reader = reader
        self._by_question = method.reads_text or isinstance(method, DecoderPruner)
        texts, questions = ([one] if isinstance(one, str) else one for one in (text, question))
        self._inputs = Inputs(self.adapter, reader, texts, questions, method.signals)
        self.watch: Callable[[str], AbstractContextManager[Any]] = lambda stage: nullcontext()
        outer, inner = type(self.model), type(self.adapter.owner)
        self._names = {"call": _names(outer.forward), "model": _names(inner.forward)}
        self._vision = [f"get_{kind}_features" for kind in ("image", "video") if hasattr(inner, f"get_{kind}_features")]
        self._names |= {name: _names(getattr(inner, name)) for name in self._vision}
        self._here = threading.local()
        self.shortening: Shortening | None = None
        self._used = False

    # When it is active

    def __enter__(self) -> "Pruning":
        return self._open(own=True)

    def __exit__(self, *error: object) -> None:
        self.detach()

    def attach(self) -> "Pruning":
        """Prune from now on, in all threads."""
        return self._open(own=False)

    def detach(self) -> None:
        """Restore the model."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def _open(self, own: bool) -> "Pruning":
        if self._stack is not None:
            raise InputError("this mipruner.prune is open already: make another one for another thread")
        language_model, pruner = self.adapter.language_model, self.pipeline.pruner
        unknown = isinstance(pruner, DecoderPruner) and not self.adapter.reads_inside
        shortening = Shortening(
            language_model,
            pruner,
            self._choose,
            repack=self.adapter.positions == "repack",
            own=own,
            shared=True,
            masks=Masks(self.model, lambda: getattr(self._here, "outer", None)),
            form=Form(self.model.config.model_type, language_model) if unknown else None,
        )
        shortening.check_alone()
        self._used, self.shortening = True, shortening
        vision: dict[str, Callable[..., Any]] = {name: partial(self._look, name) for name in self._vision}
        with ExitStack() as stack:
            stack.enter_context(shortening)
            for module, step in (
                (self.model, Step(self._before_call, self._after_call, {"generate": self._generate})),
                (self.adapter.owner, Step(self._before_model, self._after_model, vision)),
            ):
                stack.enter_context(intercept(module, step))
            self._stack = stack.pop_all()
        return self

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                "mipruner.prune(...) alone prunes nothing: write `with mipruner.prune(...):`, or mipruner.attach(...)",
                stacklevel=2,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise InputError("a mipruner.prune belongs to one model: make another one for the copy")

    def __reduce__(self) -> NoReturn:
        raise InputError("a mipruner.prune belongs to one model in this process: make another one elsewhere")

    # Results

    @property
    def encoded(self) -> list[Encoded]:
        return getattr(self._here, "encoded", [])

    @property
    def selections(self) -> list[list[Selection]]:
        """Selections of this thread's latest prompts: one list per prompt, one `Selection` per image."""
        kept = self.shortening.kept if self.shortening else []
        if not kept:
            return getattr(self._here, "selections", [])
        return [per_image(*pair) for pair in zip(kept, self.encoded, strict=True)]

    @property
    def per_layer(self) -> list[list[int]]:
        """Number of visual tokens that entered each layer, one list for each of this thread's latest prompts."""
        if self.shortening is not None and self.shortening.per_layer:
            return self.shortening.per_layer
        return [[sum(s.n_rows for s in chosen)] * self.adapter.n_layers for chosen in self.selections]

    @property
    def last(self) -> list[Kept]:
        """Kept tokens of each prompt with images in this thread's latest call."""
        return [
            Kept(
                self.reader.decode(sample.ids[sample.is_text].tolist()).strip() if self.reader else "",
                [visual.n_visual for visual in sample.visuals],
                [selection.n_rows for selection in chosen],
            )
            for sample, chosen in zip(self.encoded, self.selections, strict=True)
        ]

    def __str__(self) -> str:
        last = self.last
        if not last:
            return f"{self.name}, keep={self.keep}: no prompt with an image in this thread yet"
        more = f" (and {len(last) - 1} more prompts)" if len(last) > 1 else ""
        return f"{self.name}, keep={self.keep}: {last[0]}{more}"

    # The steps, from the outermost to the innermost

    @property
    def _open_shortening(self) -> Shortening:
        assert self.shortening is not None
        return self.shortening

    def _before_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        self._here.asked = None
        bound = dict(zip(self._names["call"], args, strict=False)) | kwargs
        asked = Asked.of(bound)
        if asked is None or not self._open_shortening.serves(bound.get("past_key_values")):
            return args, kwargs
        self._here.asked = asked
        return (), asked.withhold(bound)

    def _after_call(self, output: Any) -> Any:
        asked, self._here.asked = getattr(self._here, "asked", None), None
        if asked is None or output is None:
            return output
        return asked.answer(self.model, output, self._open_shortening.columns)

    def _generate(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``generate``. Refuses options that split a prompt or read more than the prompt."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if self._open_shortening.serves(kwargs.get("past_key_values")) and ids is not None:
            config = kwargs.get("generation_config") or self.model.generation_config
            asked = {name for name in UNSERVED if kwargs.get(name) or getattr(config, name, None)}
            if asked and bool(self.adapter.is_placeholder(ids).any()):
                name = asked.pop()
                raise InputError(f"{name} {UNSERVED[name]}: leave it out, the prompt is short")
        return method(*args, **kwargs)

    def _look(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the model's own vision method and record its arguments and output."""
        here = self._here
        if getattr(here, "looking", False) or not self._open_shortening.serves(None):
            return method(*args, **kwargs)  # Qwen-VL looks at videos through the method for images
        here.looking, is_video = True, name == "get_video_features"
        try:
            with self.watch("vision"), self.adapter.capture(is_video, self._inputs.signals) as calls:
                out, seen = see(self.adapter, method, self._names[name], args, kwargs, calls)
        finally:
            here.looking = False
        here.seen = getattr(here, "seen", {}) | {is_video: seen}
        return out

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        bound = dict(zip(self._names["model"], args, strict=False)) | kwargs
        cache = bound.get("past_key_values")
        self._here.ids = self._here.outer = None
        if not self._open_shortening.serves(cache):
            return args, kwargs
        if bound.get("input_ids") is None and not length(cache):
            raise InputError("pruning reads the prompt's input_ids, and this call has inputs_embeds only")
        ids = self._here.ids = bound.get("input_ids")
        if ids is not None and state_of(cache) is not None and not bool(self.adapter.is_placeholder(ids).any()):
            bound = {name: value for name, value in bound.items() if name not in PIXELS}  # of an earlier turn
        self._here.outer = bound
        return (), bound

    def _after_model(self, output: Any) -> Any:
        self._here.ids = self._here.outer = None
        return output

    def _choose(self, kwargs: dict[str, Any], state: CacheState | None) -> Prompts | None:
        """Select the tokens of the prompts with images in a call."""
        ids: Tensor | None = getattr(self._here, "ids", None)
        if not self.adapter.reads_inside and getattr(self._here, "outer", None) is None:
            raise InputError(
                f"{self.model.config.model_type}: the language model was called around the model's own forward, where "
                f"nothing tells the image tokens; {PAGE}"
            )
        cache, mask, given = (kwargs.get(name) for name in ("past_key_values", "attention_mask", "position_ids"))
        n_past = length(cache)
        answering = (
            n_past > 0 and ids is not None and ids.shape[1] == 1
        )  # not an image, whatever the token types of the model say
        if ids is None or answering or not bool(self.adapter.is_placeholder(ids).any()):
            return None
        if not self.adapter.reads_inside and getattr(cache, "is_compileable", False):
            raise InputError(
                f"{self.model.config.model_type}: a static cache is only served for {', '.join(sorted(FAMILIES))}: "
                f"leave cache_implementation at dynamic; {PAGE}"
            )
        if getattr(mask, "ndim", 2) != 2 and not getattr(cache, "is_compileable", False):
            raise InputError("pruning takes an attention mask [batch, length] that tells the padding")
        n_before = n_past + (state.removed if state else 0)
        if given is None:
            given = torch.arange(n_before, n_before + ids.shape[1], device=ids.device)[None]
        columns = padding(mask, n_before + ids.shape[1])
        valid = torch.ones_like(ids, dtype=torch.bool) if columns is None else columns[:, -ids.shape[1] :]
        given = (given[None] if given.ndim == 2 else given).expand(-1, *ids.shape)
        with self.watch("scoring"):
            encoded = self._inputs(ids, kwargs["inputs_embeds"], valid, given, getattr(self._here, "seen", {}))
            prompts, selections = self.pipeline.choose(encoded, valid)
        prompts.is_open = self._by_question and any(map(self._inputs.is_open, encoded))
        self._here.encoded, self._here.selections = encoded, selections
        return prompts


def _names(method: Callable[..., Any]) -> list[str]:
    """Names of the arguments without self."""
    return list(inspect.signature(method).parameters)[1:]
