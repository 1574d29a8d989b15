"""MI-Pruner: keep the visual tokens that have the most mutual information with the question."""

from mipruner.features import Features
from mipruner.pruners import PRUNERS
from mipruner.pruning import attach, prune
from mipruner.selection import Selection, budget

__all__ = ["PRUNERS", "Features", "Selection", "attach", "budget", "prune"]

__version__ = "0.1.0"
