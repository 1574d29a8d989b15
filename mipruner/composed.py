"""Two methods one after the other: one chooses what enters the language model, one drops more inside it."""

from collections.abc import Sequence
from dataclasses import dataclass

from mipruner.errors import InputError
from mipruner.pruners.base import DecoderPruner, DecoderView, Pruner, Reduction
from mipruner.selection import budget


@dataclass(frozen=True, init=False)
class Composed(DecoderPruner):
    """``door`` keeps ``keep`` of an image's tokens, ``inside`` brings what entered down to the budget of the prompt."""

    door: Pruner
    inside: DecoderPruner
    keep: int | float

    def __init__(self, pruners: Sequence[Pruner | DecoderPruner], keep: int | float):
        if len(pruners) != 2 or not isinstance(pruners[0], Pruner) or not isinstance(pruners[1], DecoderPruner):
            raise InputError("two methods are one before the language model and one inside it, as in ['mi', 'fastv']")
        for name, value in (("door", pruners[0]), ("inside", pruners[1]), ("keep", keep), ("budget_match", "nominal")):
            object.__setattr__(self, name, value)

    @property
    def needs(self) -> frozenset[str]:
        return self.door.needs | self.inside.needs

    @property
    def wants(self) -> frozenset[str]:
        return self.door.wants | self.inside.wants

    @property
    def renumbers(self) -> bool:
        return self.inside.renumbers

    @property
    def reads_text(self) -> bool:
        return self.door.reads_text or self.inside.reads_text

    def n_entering(self, n_visual: int, n_keep: int) -> int:
        n = budget(self.keep, n_visual)
        if n < n_keep:
            raise InputError(f"{n} tokens enter the language model, and {n_keep} are to be left inside: swap them")
        return n

    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        return self.inside.stages(n_visual, n_keep, n_layers)

    def reduce(self, view: DecoderView, n_keep: int) -> Reduction | None:
        return self.inside.reduce(view, n_keep)

    def nominal(self, n_visual: int, n_keep: int, n_layers: int) -> int:
        return self.inside.nominal(n_visual, n_keep, n_layers)
