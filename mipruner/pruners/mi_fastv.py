from dataclasses import dataclass, field

from mipruner.composed import Composed
from mipruner.pruners.fastv import FastVPruner
from mipruner.pruners.mi import MIPruner


@dataclass(frozen=True, kw_only=True)
class MIFastVPruner(Composed):
    """MI-Pruner selects tokens before the language model, FastV reduces them to the budget inside it.

    Parameters
    ----------
    before : MIPruner
    inside : FastVPruner
    keep_before : int or float
        Budget of MI-Pruner, see `budget`; at least the budget inside.
    """

    title = "MI, then FastV"
    reads = "question, decoder attention"
    cost = "that of MI-Pruner for N / 4 tokens, 2 of L layers at N / 4 tokens"

    before: MIPruner = field(default_factory=MIPruner)  # type: ignore[misc]
    inside: FastVPruner = field(default_factory=FastVPruner)
    keep_before: int | float = 0.25

    def n_entering(self, n_visual: int, n_keep: int) -> int:
        return max(n_keep, super().n_entering(n_visual, 1))
