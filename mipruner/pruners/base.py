"""The contract of a pruner: features of one picture and a number in, a selection out."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.selection import Selection, top_k


def _all_finite(x: Tensor) -> bool:
    """A finite sum has finite terms; it costs a twentieth of looking at each, which is left to sums that overflow."""
    return bool(x.sum(dtype=torch.float32).isfinite() or x.isfinite().all())


class Pruner(ABC):
    """Chooses visual tokens. A method is a dataclass whose fields are its hyperparameters, and overrides `select`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Features` that must be there; adapters compute them only on demand."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Features` that are used where the model has them."""

    @property
    def signals(self) -> frozenset[str]:
        """Every optional field of `Features` that this method reads."""
        return self.needs | self.wants

    def __call__(self, features: Features, n_keep: int) -> Selection:
        """Keep ``n_keep`` of the visual tokens.

        Raises
        ------
        InputError
            If ``n_keep`` is out of range, the text is empty, a feature is not finite, or a needed field is missing.
        """
        if not 1 <= n_keep <= features.n_visual:
            raise InputError(f"cannot keep {n_keep} of {features.n_visual} visual tokens")
        if n_keep == features.n_visual:
            every = torch.arange(n_keep, device=features.visual.device)
            return Selection(every.expand(*features.visual.shape[:-2], n_keep))
        if features.n_text == 0:
            raise InputError("the question is empty: a pruner that reads the text needs at least one text token")
        if not (_all_finite(features.visual) and _all_finite(features.text)):
            raise InputError("the features contain NaN or infinity: check the weights, or load them in a wider dtype")
        if missing := sorted(name for name in self.needs if getattr(features, name) is None):
            raise InputError(f"{type(self).__name__} needs {', '.join(missing)}, and the features carry none")
        return self.select(features, n_keep)

    @abstractmethod
    def select(self, features: Features, n_keep: int) -> Selection:
        """Choose ``n_keep`` of the visual tokens, 1 <= n_keep < n_visual."""


class ScorePruner(Pruner):
    """A pruner that keeps the tokens with the highest score."""

    @abstractmethod
    def score(self, features: Features) -> Tensor:
        """Score [.., n_visual] of every visual token, higher is kept first."""

    def select(self, features: Features, n_keep: int) -> Selection:
        return Selection(top_k(self.score(features), n_keep).sort(-1).values)
