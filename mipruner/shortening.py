"""Shortens prompts before and inside a language model.

    with Shortening(language_model, pruner, choose) as run:
        ...prefill and decode, by `generate` or by hand...
    run.per_layer, run.kept

Functions run before and after the language model and each of its layers (`mipruner.intercept`). At each call,
``choose`` selects the kept tokens. Tokens that a `Pruner` drops are removed before the first layer
(`mipruner.short_prompt`). A `DecoderPruner` drops rows between two layers (`mipruner.stages`). The state of one call
belongs to its thread. The cache stores which tokens of its prompt were kept (`mipruner.caches`), and the Shortening
that serves the following calls. So threads, chats and contexts are independent, and a cache whose context has ended is
refused.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import Cache

from mipruner.arguments import SERVED, Cut, Masks
from mipruner.caches import CacheState, length, mark, state_of
from mipruner.errors import InputError
from mipruner.intercept import Arguments, Step, intercept
from mipruner.layer_form import Form
from mipruner.pruners.base import DecoderPruner, Method
from mipruner.short_prompt import Prompts, ShortInputs, build_inputs, follow, left
from mipruner.stages import Layers, Prefill

_active: "WeakKeyDictionary[nn.Module, tuple[Shortening, ...]]" = WeakKeyDictionary()
_own: "ContextVar[tuple[Shortening, ...]]" = ContextVar("mipruner", default=())
_changing = threading.Lock()

Choose = Callable[[dict[str, Any], CacheState | None], Prompts | None]


@dataclass
class Served:
    """One call of the language model.

    Attributes
    ----------
    old, new : CacheState or None
        State of the cache before and after the call.
    short : ShortInputs or None
        The new prompts of the call, if any.
    prefill : Prefill or None
        State of a method that drops rows between layers.
    rest : Tensor [B, k] bool or None
        Which columns after the prompt are not padding; None if there is no padding.
    cut : Cut or None
        The remaining columns of the prompts, if some are dropped.
    """

    old: CacheState | None = None
    new: CacheState | None = None
    short: ShortInputs | None = None
    prefill: Prefill | None = None
    rest: Tensor | None = None
    cut: Cut | None = None
    stack: ExitStack = field(default_factory=ExitStack)


class Shortening:
    """A context in which the prompts of a language model are shortened.

    Parameters
    ----------
    language_model : the text model of a transformers model, ``model.model.language_model``
    pruner : Pruner or DecoderPruner
    choose : callable
        Takes the keyword arguments of the call and the `CacheState` of its cache. Returns `Prompts`, or None if the
        call has no new prompt with images.
    repack : bool
        Whether short prompts are renumbered, see `Adapter`.
    own, shared : bool
        Whether it serves calls of the thread that opened it, and calls of threads without their own context.
    masks : Masks, optional
        Builds masks again for a model that builds them before it calls the language model.
    form : Form, optional
        Checks the decoder layers of a model without an adapter.

    Attributes
    ----------
    per_layer : list of list of int
        Number of visual tokens in each layer in this thread's latest prefill, one list per prompt; empty if none were
        dropped between layers.
    kept : list of Tensor [n_kept]
        Indices of the visual tokens in the last layer, among all visual tokens of the prompt, without merged tokens.

    Raises
    ------
    InputError
        If the cache does not support different layer lengths, a stage is after the last layer, or the attention
        implementation is not sdpa, eager or FlashAttention.
    """

    def __init__(
        self,
        language_model: nn.Module,
        pruner: Method,
        choose: Choose,
        repack: bool = False,
        own: bool = True,
        shared: bool = False,
        masks: Masks | None = None,
        form: Form | None = None,
    ):
        self.masks = masks
        self.model, self.choose, self.repack = language_model, choose, repack
        self.own, self.shared = own, shared
        self.layers = Layers(language_model, pruner, form) if isinstance(pruner, DecoderPruner) else None
        self._here = threading.local()
        self._stack = ExitStack()

    def __enter__(self) -> "Shortening":
        with _changing:
            _active[self.model] = (*_active.get(self.model, ()), self)
        self._stack.callback(self._leave)
        if self.own:
            _own.set((*_own.get(), self))
        self._stack.enter_context(intercept(self.model, Step(self._before_model, self._after_model)))
        for k, layer in enumerate(self.layers.layers if self.layers else ()):
            step = Step(partial(self._before_layer, k), partial(self._after_layer, k))
            self._stack.enter_context(intercept(layer, step))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def _model_type(self) -> str:
        model: Any = self.masks.model if self.masks else self.model
        return model.config.model_type

    def check_alone(self) -> None:
        """Raise `InputError` if another context on the same model serves this thread."""
        others = _active.get(self.model, ())
        if any(other in others and other.shared for other in _own.get()) or any(
            not (self.own or other.own) for other in others if other.shared
        ):
            raise InputError("this model is being pruned already: leave the other mipruner.prune context first")

    def _leave(self) -> None:
        with _changing:
            _active[self.model] = tuple(other for other in _active[self.model] if other is not self)
        _own.set(tuple(other for other in _own.get() if other is not self))

    @property
    def per_layer(self) -> list[list[int]]:
        return getattr(self._here, "per_layer", [])

    @property
    def kept(self) -> list[Tensor]:
        return getattr(self._here, "kept", [])

    @property
    def columns(self) -> Tensor | None:
        """Column [B, n] in the caller's prompt of each row of this thread's latest output; -1 for padding.

        None if the prompt was not shortened.
        """
        return getattr(self._here, "columns", None)

    def serves(self, cache: Cache | None) -> bool:
        """Whether a call on ``cache`` in this thread belongs to this context.

        Raises
        ------
        InputError
            If several contexts could serve it, or its context has ended.
        """
        state = state_of(cache)
        server = _server(self.model, state)
        if state is not None and state.is_staged and server is not state.owner:
            raise InputError(
                "this cache holds a prompt that a method inside the language model pruned in another mipruner.prune "
                "context, which is over: go on inside it, or start with an empty cache"
            )
        return server is self

    # Of the whole model

    def _before_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        cache = kwargs.get("past_key_values")
        self._here.call = self._here.columns = None
        if not self.serves(cache):
            return args, kwargs
        call = Served(old=state_of(cache))
        own = self.masks.given(kwargs) if self.masks else None  # if the model built masks from the caller's mask
        arguments = kwargs if own is None else own
        prompts = self.choose(arguments, call.old)
        if prompts is not None:
            changes = self._take_in(prompts, arguments, call)
        elif call.old is not None:
            changes, call.rest = follow(arguments, call.old)
        else:
            return args, kwargs
        if call.old is not None:
            call.old.serving = True
        self._here.call = call
        if own is not None and changes:
            try:
                changes["attention_mask"] = self._masks(kwargs, own, own | changes, call)
            except BaseException:
                self._after_model(None)
                raise
        return args, kwargs | changes

    def _masks(self, kwargs: dict[str, Any], own: dict[str, Any], short: dict[str, Any], call: Served) -> Any:
        """Masks of the short prompt, or of text that follows it."""
        assert self.masks is not None
        made = kwargs["attention_mask"]
        if call.short is None:
            return self.masks.make(made, own, short, {}, False)
        if call.old is not None:
            raise InputError(
                f"{self._model_type}: the model makes its own masks, and a further image behind a shortened prompt has "
                "no such mask: start with an empty cache; see docs/models.md"
            )
        types, cut = self.masks.types(), call.cut
        return self.masks.make(made, own, short, {k: cut(k, x) for k, x in types.items()} if cut else types, True)

    def _take_in(self, prompts: Prompts, kwargs: dict[str, Any], call: Served) -> dict[str, Any]:
        """Start new prompts: shorten them before the first layer, and prepare the stages between layers."""
        self._here.per_layer, self._here.kept = [], []
        if self.layers is not None:
            self.layers.check(prompts, kwargs)
        call.short = short = build_inputs(prompts, kwargs, call.old, self.repack)
        changes = short.changes
        if changes:
            call.cut = cut = Cut(short.columns, prompts.is_visual, self._model_type)
            others = {name: x for name, x in kwargs.items() if name not in SERVED and name not in changes}
            changes = changes | {name: cut(name, x) for name, x in others.items()}
        if self.layers is not None:
            call.prefill, more = self.layers.begin(prompts, short, kwargs | changes)
            changes = changes | more
            if call.prefill is not None:
                call.prefill.watch(call.stack)
            else:
                self._here.per_layer = [[n] * len(self.layers) for n in short.is_visual.sum(1).tolist()]
                self._here.kept = list(left(short.is_visual, short.columns, prompts.is_visual))
        if changes or call.prefill is not None:
            call.new = CacheState(self, short.removed, short.last, [short.valid], is_open=prompts.is_open)
        return changes

    def _after_model(self, output: Any) -> Any:
        call, self._here.call = getattr(self._here, "call", None), None
        if call is None:
            return output
        call.stack.close()
        if call.old is not None:
            call.old.serving = False
        if output is None or call.short is None:
            return output
        state, prefill = call.new, call.prefill
        if prefill is not None:
            layers = [segment.valid for segment in prefill.segments]
            state = replace(state, layers=layers, renumbered=prefill.renumbers)
            self._here.per_layer, self._here.kept = prefill.per_layer, list(prefill.kept)
        cache = getattr(output, "past_key_values", None)
        if state is not None:
            self._here.columns = prefill.segments[-1].columns if prefill is not None else call.short.columns
            if cache is not None:
                mark(cache, state)
        return output

    # Of one layer

    def _before_layer(self, k: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        call = getattr(self._here, "call", None)
        if call is None or (call.prefill is None and (call.old is None or not call.old.is_staged)):
            return args, kwargs
        if call.prefill is not None and call.prefill.layers.form is not None:
            call.prefill.layers.form.check_call(k, args, kwargs, call.prefill.short.valid, call.prefill.seen)
        hidden = args[0]
        if call.prefill is not None:
            hidden, changes = call.prefill.before_layer(k, hidden, kwargs)
        else:
            assert self.layers is not None
            changes = self.layers.follow(k, hidden, kwargs, call.old, call.rest)
        return (hidden, *args[1:]), kwargs | changes

    def _after_layer(self, k: int, output: Any) -> Any:
        call = getattr(self._here, "call", None)
        if call is None or call.prefill is None or output is None:
            return output
        return call.prefill.after_layer(k, output)


def _server(language_model: nn.Module, state: CacheState | None) -> Shortening | None:
    """The open context that serves a call of this thread on a language model."""
    active = _active.get(language_model, ())
    if state is not None and isinstance(state.owner, Shortening) and state.owner in active:
        return state.owner
    own = [shortening for shortening in _own.get() if shortening in active]
    if own:
        return own[-1]
    shared = [shortening for shortening in active if shortening.shared]
    if len(shared) > 1:
        raise InputError(
            f"{len(shared)} mipruner.prune contexts are open on this model in other threads, and this thread has none: "
            "open one in the thread that calls the model"
        )
    return shared[0] if shared else None


def shorten(
    language_model: nn.Module,
    pruner: DecoderPruner,
    is_visual: Tensor,
    budgets: Sequence[int],
    encoder_attention: Sequence[Tensor | None] | None = None,
) -> Shortening:
    """A `Shortening` of given prompts for one prefill and any number of decode steps.

    Parameters
    ----------
    language_model, pruner
    is_visual : Tensor [B, S] bool
        Visual tokens of the left-padded prompts.
    budgets : sequence of int
        Nominal number of visual tokens to keep of each prompt. A prompt that keeps all tokens is not changed.
    encoder_attention : sequence of Tensor [n_visual], optional
        Encoder attention of each prompt, for methods that need it.
    """
    shortening = Shortening(language_model, pruner, of_prefill(Prompts(is_visual, budgets, encoder_attention)))
    assert shortening.layers is not None
    shortening.layers.stages(list(zip(is_visual.sum(1).tolist(), budgets, strict=True)))
    return shortening


def of_prefill(prompts: Prompts) -> Choose:
    """Callback for `Shortening` if the first call brings ``prompts`` and later calls only continue."""
    return lambda kwargs, state: None if length(kwargs.get("past_key_values")) else prompts
