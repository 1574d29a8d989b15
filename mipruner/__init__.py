"""MI-Pruner: keep the visual tokens that have the most mutual information with the question."""

from typing import TYPE_CHECKING, Any

from mipruner.features import Features
from mipruner.pruners import PRUNERS
from mipruner.selection import Selection, budget

if TYPE_CHECKING:
    from mipruner.pruning import attach, prune

__all__ = ["PRUNERS", "Features", "Selection", "attach", "budget", "prune"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `prune` and `attach` when they are used, because transformers takes seconds to import."""
    if name not in ("attach", "prune"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mipruner import pruning

    return getattr(pruning, name)
