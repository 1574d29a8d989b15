"""Combines two methods: one selects tokens before the language model, the other drops more tokens inside it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners.base import DecoderPruner, DecoderView, Pruner, Reduction
from mipruner.selection import Auto


@dataclass(frozen=True, kw_only=True)
class Composed(DecoderPruner):
    """Two methods in a row: ``before`` selects tokens before the language model, ``inside`` drops more inside it.

    Parameters
    ----------
    before : Pruner
    inside : DecoderPruner
    keep_before : int or float
        Budget of ``before`` per prompt, see `budget`. The budget of the prompt is that of ``inside``.
    """

    budget_match: ClassVar[Literal["nominal"]] = "nominal"  # type: ignore[misc]

    before: Pruner  # type: ignore[misc]
    inside: DecoderPruner
    keep_before: int | float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.before, Pruner) or not isinstance(self.inside, DecoderPruner):
            raise InputError("two methods are one before the language model and one inside it, as in ['mi', 'fastv']")
        if self.inside.budget_match != "nominal":
            raise InputError("of two methods, the budget is what the second leaves: use budget_match=nominal")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.before.needs | self.inside.needs

    @property
    def wants(self) -> frozenset[str]:  # type: ignore[override]
        return self.before.wants | self.inside.wants

    @property
    def renumbers(self) -> bool:  # type: ignore[override]
        return self.inside.renumbers

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        return self.before.reads_text or self.inside.reads_text

    def notes(self, features: Features) -> dict[str, str]:
        return self.before.notes(features) | self.inside.notes(features)

    def s_cross(self, features: Features) -> Tensor:
        return self.before.s_cross(features)

    def n_entering(self, n_visual: int, n_keep: int) -> int:
        n = self.before.budget(self.keep_before, n_visual)
        if n < n_keep:
            raise InputError(f"{n} tokens enter the language model, and {n_keep} are to be left inside: swap them")
        return n

    def budget(self, keep: int | float | Auto, n_visual: int) -> int:
        return self.inside.budget(keep, n_visual)

    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        return self.inside.stages(n_visual, n_keep, n_layers)

    def reduce(self, view: DecoderView, n_keep: int) -> Reduction | None:
        return self.inside.reduce(view, n_keep)
