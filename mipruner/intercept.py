"""Runs code before and after each call of one module inside a context.

Hooks do not work here: a graph compiled earlier by torch.compile ignores them, and a copy or a pickle of the model
contains them. So the class of this one object is replaced by a subclass of the same name, as torch's parametrizations
do. The subclass looks up the steps at each call. Compiled graphs check the class: inside the context the module is
traced again, with a graph break at the step, and afterwards the old graph is used again. A copy of the module has the
original class.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

METHODS = ("generate", "get_image_features", "get_video_features")
"""Names of methods, besides the call, that a step may wrap."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

F = TypeVar("F", bound=Callable[..., Any])
outside_graphs: Callable[[F], F] = torch.compiler.disable(
    reason="mipruner works between two graphs: compile without fullgraph=True"
)


@dataclass(frozen=True, eq=False)
class Step:
    """Functions to run at each call of a module.

    Attributes
    ----------
    before : callable, optional
        (args, kwargs) of the caller -> (args, kwargs) of the module.
    after : callable, optional
        Output of the module -> output for the caller. Its argument is None if the module raised.
    methods : dict
        Method name -> function of the module's own method and the arguments.
    """

    before: Callable[[tuple[Any, ...], dict[str, Any]], Arguments] | None = None
    after: Callable[[Any], Any] | None = None
    methods: dict[str, Callable[..., Any]] = field(default_factory=dict)


_steps: "WeakKeyDictionary[nn.Module, tuple[Step, ...]]" = WeakKeyDictionary()
_changing = threading.Lock()


@contextmanager
def intercept(module: nn.Module, step: Step) -> Iterator[None]:
    """Run ``step`` at every call of ``module`` inside the context, in all threads."""
    with _changing:
        if not isinstance(module, Stepped):
            module.__class__ = _stepped(type(module))  # type: ignore[arg-type]
        _steps[module] = (*_steps.get(module, ()), step)
    try:
        yield
    finally:
        with _changing:
            left = tuple(other for other in _steps[module] if other is not step)
            if left:
                _steps[module] = left
            else:
                del _steps[module]
                module.__class__ = type(module).__bases__[1]


if TYPE_CHECKING:
    Mixed = nn.Module
else:
    Mixed = object


class Stepped(Mixed):
    """Mixin of a module that runs its steps at each call."""

    def __init_subclass__(cls) -> None:
        """Prevent transformers from wrapping ``forward`` in checkpointing again for this subclass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Stepped):  # taken by generate before the context ended
            return type(self).__call__(self, *args, **kwargs)
        call = super().__call__
        args, kwargs = _before(self, args, kwargs)
        try:
            output = call(*args, **kwargs)
        except BaseException:
            _after(self, None)
            raise
        return _after(self, output)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (type(self).__bases__[1],), self.__dict__


def _new(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)


@lru_cache
def _stepped(cls: type) -> type:
    own = {name: _around(name, getattr(cls, name)) for name in METHODS if hasattr(cls, name)}
    return type(cls.__name__, (Stepped, cls), own | {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


@outside_graphs
def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    for step in _steps.get(module, ()):
        if step.before is not None:
            args, kwargs = step.before(args, kwargs)
    return args, kwargs


@outside_graphs
def _after(module: nn.Module, output: Any) -> Any:
    for step in reversed(_steps.get(module, ())):
        if step.after is not None:
            output = step.after(output)
    return output


def _around(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @outside_graphs
    @wraps(method)
    def stepped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = partial(method, self)
        for step in _steps.get(self, ()):
            if name in step.methods:
                call = partial(step.methods[name], call)
        return call(*args, **kwargs)

    return stepped


@dataclass(eq=False)
class Call:
    """One forward pass of a module: its keyword arguments and its (first) output."""

    kwargs: dict[str, Any] = field(init=False, repr=False)
    output: Tensor = field(init=False, repr=False)


@contextmanager
def captured(*modules: nn.Module) -> Iterator[list[Call]]:
    """Capture the calls of ``modules`` in one forward pass of this thread. Outputs have no gradient."""
    calls, thread = [Call() for _ in modules], threading.get_ident()

    def before(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        if threading.get_ident() == thread:
            call.kwargs = kwargs
        return args, kwargs

    def after(call: Call, output: Any) -> Any:
        if threading.get_ident() == thread and output is not None:
            call.output = (output[0] if isinstance(output, tuple) else output).detach()
        return output

    with ExitStack() as stack:
        for module, call in zip(modules, calls, strict=True):
            stack.enter_context(intercept(module, Step(partial(before, call), partial(after, call))))
        yield calls
