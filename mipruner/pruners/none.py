from dataclasses import dataclass

from mipruner.features import Features
from mipruner.pruners.base import Pruner
from mipruner.selection import Selection


@dataclass(frozen=True)
class NoPruner(Pruner):
    """No pruning: keeps every token for every budget."""

    title = "All tokens"
    reads_text = False
    static = True

    def __call__(self, features: Features, n_keep: int) -> Selection:
        return super().__call__(features, features.n_visual)

    def select(self, features: Features, n_keep: int) -> Selection:
        raise AssertionError("never asked for less than everything")
