"""Base classes of pruners: `Pruner` selects from the features of an image, `DecoderPruner` reduces tokens between
decoder layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.selection import Auto, Selection, budget, top_k


def _all_finite(x: Tensor) -> bool:
    """Whether all elements are finite. The sum is checked first (a finite sum has finite terms), at a twentieth of the
    cost.
    """
    return bool(x.sum(dtype=torch.float32).isfinite() or x.isfinite().all())


class Method:
    """Common base of pruners before and inside the language model: a dataclass whose fields are its hyperparameters."""

    title: ClassVar[str]
    """Name in tables and figures."""

    paper: ClassVar[str | None] = None
    """Link to the paper that proposed the method; None for MI-Pruner and its controls."""

    reads: ClassVar[str] = "nothing"
    reads_text: ClassVar[bool] = True
    """Whether it cannot choose without a question."""
    """Inputs that the choice depends on, in words."""

    cost: ClassVar[str] = "none"
    """Cost of choosing, without the model itself: N visual tokens, T kept, d wide, m words, L decoder layers."""

    static: ClassVar[bool] = False
    """Whether a CUDA graph can hold it: no shape depends on a value, and nothing waits for the device."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Features` that must be there; adapters compute them only on demand."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Features` that are used where the model has them."""

    @property
    def signals(self) -> frozenset[str]:
        """Every optional field of `Features` that this method reads."""
        return self.needs | self.wants

    def notes(self, features: Features) -> dict[str, str]:
        """What a record must say about how the method ran on these features, if that depends on the model."""
        return {}

    def budget(self, keep: int | float | Auto, n_visual: int) -> int:
        """Number of tokens to keep, see `mipruner.selection.budget`; a method whose code rounds otherwise overrides it.

        Raises
        ------
        InputError
            If ``keep`` is not a valid budget, or larger than the number of tokens.
        """
        return budget(keep, n_visual)

    def check(self, features: Features, n_keep: int) -> None:
        """Refuse features that no method can prune. With all tokens kept, anything is accepted.

        Raises
        ------
        InputError
            If ``n_keep`` is out of range, the text is empty, a feature is not finite, or a needed field is missing.
        """
        if not 1 <= n_keep <= features.n_visual:
            raise InputError(f"cannot keep {n_keep} of {features.n_visual} visual tokens")
        if n_keep == features.n_visual:
            return
        if features.n_text == 0 and self.reads_text:
            raise InputError("the question is empty: a pruner that reads the text needs at least one text token")
        if not (_all_finite(features.visual) and _all_finite(features.text)):
            raise InputError("the features contain NaN or infinity: check the weights, or load them in a wider dtype")
        if missing := sorted(name for name in self.needs if getattr(features, name) is None):
            raise InputError(f"{type(self).__name__} needs {', '.join(missing)}, and the features carry none")

    def order(self, features: Features, n_keep: int) -> Tensor | None:
        """Indices [.., n_keep] of the kept tokens, in pick order.

        None if the tokens kept at n are not always among those kept at n + 1: such a method has no order.
        """
        return None

    def s_cross(self, features: Features) -> Tensor:
        """PMI of every visual token with the text, eq. 19 or 21, from which keep=auto sets the budget. [.., n_visual]

        Raises
        ------
        InputError
            If the method does not compute PMI.
        """
        raise InputError(f"keep=auto reads the PMI with the text, which {type(self).__name__} does not know: use mi")


class ImagePruner(Method):
    """Resizes each image before the vision encoder, so that it gives at most its share of the budget.

    Everything that the encoder gives enters the language model. `Adapter.smaller` is what makes an image smaller.
    """


class Pruner(Method, ABC):
    """Selects visual tokens before the language model runs. A method overrides `select`."""

    at_most: ClassVar[bool] = False
    """Whether fewer rows than the budget may enter, where the budget does not fit."""

    def __call__(self, features: Features, n_keep: int) -> Selection:
        """Keep ``n_keep`` of the visual tokens. Raises `InputError` as `check` does."""
        self.check(features, n_keep)
        if n_keep == features.n_visual:
            every = torch.arange(n_keep, device=features.visual.device)
            return Selection(every.expand(*features.visual.shape[:-2], n_keep))
        return self.select(features, n_keep)

    @abstractmethod
    def select(self, features: Features, n_keep: int) -> Selection:
        """Select ``n_keep`` of the visual tokens, 1 <= n_keep < n_visual."""


class ScorePruner(Pruner):
    """A pruner that keeps the tokens with the highest score."""

    @abstractmethod
    def score(self, features: Features) -> Tensor:
        """Score [.., n_visual] of every visual token; the highest are kept."""

    def order(self, features: Features, n_keep: int) -> Tensor:
        return top_k(self.score(features), n_keep)

    def select(self, features: Features, n_keep: int) -> Selection:
        return Selection(self.order(features, n_keep).sort(-1).values)


@dataclass(frozen=True)
class DecoderView:
    """Input of a method inside the decoder: one prompt of n tokens, without padding, at the input of a decoder layer.

    Attributes
    ----------
    layer, n_layers : int
        The layer whose input this is, at least 1, and how many there are.
    n_start : int
        Visual tokens before anything was dropped.
    hidden : Tensor [n, d]
        Input of the layer: the output of the layer before.
    visual : Tensor [n] bool
    attention : callable
        Query rows [r] (indices below n) to the softmaxed attention [n_heads, r, n] of the layer before.
    keys : Tensor [n, n_kv, d_head]
        Keys of the layer before, rotated.
    norm : callable
        The decoder's final norm.
    prompt : Tensor [S, d]
        Input embeddings of the whole prompt, before anything was dropped.
    prompt_visual : Tensor [S] bool
    encoder_attention : Tensor [n_start], optional
        `Features.attention` of the prompt's images, one after the other.
    memory : dict
        State of the method; the same object at every layer of one prompt.
    """

    layer: int
    n_layers: int
    n_start: int
    hidden: Tensor
    visual: Tensor
    attention: Callable[[Tensor], Tensor]
    keys: Tensor
    norm: Callable[[Tensor], Tensor]
    prompt: Tensor
    prompt_visual: Tensor
    encoder_attention: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def n_visual(self) -> int:
        return len(self.visual_rows)

    @property
    def visual_rows(self) -> Tensor:
        """Indices [n_visual] of the visual tokens."""
        return self.visual.nonzero()[:, 0]

    @property
    def text_rows(self) -> Tensor:
        """Indices of the text after the last visual token: question, format sentence and template text."""
        return torch.arange(int(self.visual_rows[-1]) + 1, len(self.visual), device=self.visual.device)


@dataclass(frozen=True)
class Reduction:
    """Which visual tokens of a `DecoderView` are kept or merged.

    Attributes
    ----------
    indices : Tensor [n_keep]
        Kept visual tokens, ascending, in range(n_visual).
    merge : Tensor [n_merged, n_visual], optional
        Weights of new rows that follow the last kept one.
    centres : Tensor [n_merged], optional
        The visual token that each new row stands for where positions are kept.
    """

    indices: Tensor
    merge: Tensor | None = None
    centres: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return len(self.indices) + (0 if self.merge is None else len(self.merge))


@dataclass(frozen=True)
class DecoderPruner(Method, ABC):
    """Drops visual tokens inside the language model: all tokens enter, later layers get fewer.

    Parameters
    ----------
    budget_match : "nominal" or "layer_mean"
        Meaning of a budget T. ``nominal`` is the method's own definition. ``layer_mean`` lets T visual tokens enter a
        layer on average, which is what T tokens before the language model cost.
    """

    budget_match: Literal["nominal", "layer_mean"] = "nominal"

    door: ClassVar[Pruner | None] = None
    """A method that chooses what enters the language model, before this one drops more on the way."""

    renumbers: ClassVar[bool] = False
    """Whether the official code numbers the remaining tokens 0, 1, 2, ... again. Never done with M-RoPE."""

    def __post_init__(self) -> None:
        if self.budget_match not in ("nominal", "layer_mean"):
            raise InputError(f"unknown budget_match {self.budget_match!r}: choose nominal or layer_mean")

    def n_entering(self, n_visual: int, n_keep: int) -> int:
        """How many of ``n_visual`` tokens enter the language model for a budget of ``n_keep``."""
        return n_visual

    @abstractmethod
    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        """{layer: visual tokens that enter it and those after it}, ascending, layers from 1 on."""

    @abstractmethod
    def reduce(self, view: DecoderView, n_keep: int) -> Reduction | None:
        """Select tokens at the input of one layer of `stages`, for a nominal budget of ``n_keep``; None changes
        nothing.
        """

    def entering(self, n_visual: int, n_keep: int, n_layers: int) -> list[int]:
        """Number of visual tokens that enter each layer."""
        entering: list[int] = []
        stages = self.stages(n_visual, n_keep, n_layers)
        for layer in range(n_layers):
            entering.append(stages.get(layer, entering[-1] if entering else n_visual))
        return entering

    def nominal(self, n_visual: int, n_keep: int, n_layers: int) -> int:
        """The method's own budget for a requested ``n_keep``, see ``budget_match``.

        Raises
        ------
        InputError
            If no budget is small enough, because all tokens enter the first layers.
        """
        if self.budget_match == "nominal":
            return n_keep
        mean = {n: sum(self.entering(n_visual, n, n_layers)) / n_layers for n in range(1, n_visual + 1)}
        if mean[1] > n_keep:
            raise InputError(
                f"{type(self).__name__} cannot bring the mean down to {n_keep} visual tokens a layer, the least is "
                f"{mean[1]:.1f}: raise keep, or use budget_match=nominal"
            )
        return min(mean, key=lambda n: (abs(mean[n] - n_keep), n))
