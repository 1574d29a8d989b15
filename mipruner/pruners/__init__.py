"""Pruners, one per file. `PRUNERS` finds all files of this folder and all entry points of the group `mipruner.pruners`.

The class of a pruner has all facts that tests, tables, figures and `mipruner.prune` need. The name of a pruner is the
name of its file or entry point.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isabstract
from pkgutil import iter_modules
from types import ModuleType, NoneType, UnionType
from typing import Any, get_args, get_type_hints

from mipruner.composed import Composed
from mipruner.errors import InputError
from mipruner.pruners.base import DecoderPruner, ImagePruner, Method, Pruner, ScorePruner
from mipruner.selection import Auto

Keep = int | float | Auto

OWN = ("random", "similarity", "attention", "mi_attention", "mi")
"""The paper's own pruners and baselines, in the order of its tables. They come after the published ones."""


def _only_pruner(module: ModuleType) -> type[Method]:
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
        and not isabstract(value)
    )
    return found


def _installed() -> Iterator[tuple[str, type[Method]]]:
    """Pruners of other packages. One that cannot be loaded is left out with a warning; the others still work."""
    for entry in entry_points(group=__name__):
        try:
            cls = entry.load()
            if entry.name in _BUILT_IN:
                raise ValueError("a pruner of this repository has that name")
            if not issubclass(cls, Method) or not hasattr(cls, "title"):
                raise TypeError(f"{entry.value} is no subclass of Pruner, DecoderPruner or ImagePruner with a title")
            yield entry.name, cls
        except Exception as error:
            warnings.warn(f"pruner {entry.name} ({entry.value}) is left out: {error}", stacklevel=2)


class Registry(Mapping[str, type[Method]]):
    """Pruner classes by name: none, then published ones by arXiv number, those without a paper, and `OWN`.

    Pruners of other packages are loaded on first use, so that these packages can import this one.
    """

    @cached_property
    def _found(self) -> dict[str, type[Method]]:
        found = _BUILT_IN | dict(_installed())

        def place(name: str) -> tuple[int, int, str, str]:
            paper = found[name].paper or ""
            group = 0 if name == "none" else 3 if name in OWN else 1 if paper else 2
            return group, OWN.index(name) if name in OWN else 0, paper.rsplit("/")[-1], name

        return {name: found[name] for name in sorted(found, key=place)}

    def __getitem__(self, name: str) -> type[Method]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


_BUILT_IN = {
    module.name: _only_pruner(import_module(f"{__name__}.{module.name}"))
    for module in iter_modules(__path__)
    if module.name != "base"
}
PRUNERS = Registry()
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def make(name: str, **options: Any) -> Method:
    """Create the pruner ``name``, a key of `PRUNERS`, with its hyperparameters. A dict in them stands for a pruner.

    Raises
    ------
    InputError
        If there is no such pruner or option, or the value is invalid.
    """
    if name not in PRUNERS:
        close = get_close_matches(name, PRUNERS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"unknown pruner {name!r}: {hint}choose one of {', '.join(PRUNERS)}")
    try:
        check_kinds(PRUNERS[name], options)
        return PRUNERS[name](**{key: make(**x) if isinstance(x, dict) else x for key, x in options.items()})
    except TypeError as error:
        raise InputError(f"{name}: {str(error).split('() ')[-1]}") from error


def check_kinds(cls: type[Any], options: Mapping[str, Any]) -> None:
    """Raise TypeError if a number, a text, true or false is given to ``cls`` where it takes another of them."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        hints |= get_type_hints(vars(base).get("__init__", base))
    for option in hints.keys() & options:
        hint, value = hints[option], options[option]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not set(kinds) <= KINDS.keys():
            continue
        is_known = isinstance(value, kinds) or (isinstance(value, int) and float in kinds)
        if not is_known or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(f"{option}={value!r} should be {' or '.join(KINDS[kind] for kind in kinds)}")


def parse_pruner(
    pruner: str | Method | Sequence[str | Method], keep: Keep | Sequence[int | float], options: dict[str, Any]
) -> tuple[Pruner | DecoderPruner, Keep]:
    """The pruner that the arguments of `mipruner.prune` name, and the budget of tokens in the last layer.

    Raises
    ------
    InputError
        If a pruner, an option or a budget is invalid, or two methods do not go together.
    """
    if isinstance(pruner, list | tuple):
        if options:
            raise InputError(f"{', '.join(options)}: give hyperparameters to each of the methods, as instances")
        if not isinstance(keep, list | tuple) or len(keep) != len(pruner):
            raise InputError(f"{len(pruner)} methods need a budget each: keep=[0.5, 0.25]")
        if len(pruner) != 2:
            raise InputError(f"{len(pruner)} methods: give one, or one before the language model and one inside it")
        before, inside = (parse_pruner(one, n, {})[0] for one, n in zip(pruner, keep, strict=True))
        return Composed(before=before, inside=inside, keep_before=keep[0]), keep[1]  # type: ignore[arg-type]
    if isinstance(pruner, str):
        return parse_pruner(make(pruner, **options), keep, {})
    if isinstance(pruner, ImagePruner):
        raise InputError(
            f"{type(pruner).__name__} makes the image smaller before the model's processor, which is out of reach "
            "here: give the processor a smaller image, or use run.py"
        )
    if options:
        raise InputError(f"{', '.join(options)}: hyperparameters belong to the pruner that was given")
    if not isinstance(pruner, Pruner | DecoderPruner):
        raise InputError(f"{pruner!r} is no pruner: give one of {', '.join(PRUNERS)}, or an instance")
    if not isinstance(keep, int | float | Auto):
        raise InputError(f"keep={keep!r} are several budgets: one method takes one")
    return pruner, keep


def __getattr__(name: str) -> type[Method]:
    """The class of a pruner of this folder: `from mipruner.pruners import MIPruner`."""
    for cls in _BUILT_IN.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PRUNERS", "DecoderPruner", "ImagePruner", "Method", "Pruner", "ScorePruner", "make"]
