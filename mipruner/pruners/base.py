"""Base classes of pruners: `Pruner` acts before the language model, `DecoderPruner` between decoder layers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.selection import Auto, Selection, budget, top_k


def _all_finite(x: Tensor) -> bool:
    """Whether all elements are finite.

    The sum is checked first: if it is finite, so are all terms. This takes a twentieth of the time.
    """
    return bool(x.sum(dtype=torch.float32).isfinite() or x.isfinite().all())


class Method:
    """Base class of all pruners: a dataclass whose fields are the hyperparameters."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    """For type checkers: subclasses are dataclasses."""

    title: ClassVar[str]
    """Name in tables and figures."""

    paper: ClassVar[str | None] = None
    """Link to the paper of the method; None for MI-Pruner and its baselines."""

    reads: ClassVar[str] = "nothing"
    """Inputs that the selection depends on, in words."""

    reads_text: ClassVar[bool] = True
    """Whether it needs a question."""

    cost: ClassVar[str] = "none"
    """Cost of the selection, without the model: N visual tokens, T kept tokens, width d, m text tokens, L decoder
    layers.
    """

    static: ClassVar[bool] = False
    """Whether it can be recorded as a CUDA graph: no shape depends on a value, and nothing waits for the device."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Features` that the method requires; adapters compute them on demand."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Fields of `Features` that the method uses if the model has them."""

    def __post_init__(self) -> None:
        """Raise `InputError` if a word is not among those of its field."""
        for option in fields(self):
            word, known = getattr(self, option.name), get_args(option.type)
            if get_origin(option.type) is Literal and word not in known:
                raise InputError(f"unknown {option.name} {word!r}: choose {', '.join(known)}")

    @property
    def signals(self) -> frozenset[str]:
        """All optional fields of `Features` that this method reads."""
        return self.needs | self.wants

    def notes(self, features: Features) -> dict[str, str]:
        """Notes for the record about how the method ran on these features, if that depends on the model."""
        return {}

    def budget(self, keep: int | float | Auto, n_visual: int) -> int:
        """Number of tokens to keep, see `mipruner.selection.budget`. A method with another rounding overrides it.

        Raises
        ------
        InputError
            If ``keep`` is not a valid budget, or larger than the number of tokens.
        """
        return budget(keep, n_visual)

    def check(self, features: Features, n_keep: int) -> None:
        """Refuse invalid features. If all tokens are kept, everything is accepted.

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

        None if the method has no order: the tokens kept at n are not always among those kept at n + 1.
        """
        return None

    def s_cross(self, features: Features) -> Tensor:
        """PMI [.., n_visual] of every visual token with the text, eq. 19 or 21, for keep=auto.

        Raises
        ------
        InputError
            If the method does not compute PMI.
        """
        raise InputError(f"keep=auto reads the PMI with the text, which {type(self).__name__} does not know: use mi")


class ImagePruner(Method):
    """Resizes each image before the vision encoder, so that it gives at most its share of the budget.

    All tokens of the encoder are kept. `Pipeline.smaller` resizes the images.
    """


class Pruner(Method):
    """Selects visual tokens before the language model runs. A method overrides `order` or `select`."""

    at_most: ClassVar[bool] = False
    """Whether the method may keep fewer rows than the budget."""

    def __call__(self, features: Features, n_keep: int) -> Selection:
        """Keep ``n_keep`` of the visual tokens. Raises `InputError`, see `check`."""
        self.check(features, n_keep)
        if n_keep == features.n_visual:
            every = torch.arange(n_keep, device=features.visual.device)
            return Selection(every.expand(*features.visual.shape[:-2], n_keep))
        return self.select(features, n_keep)

    def select(self, features: Features, n_keep: int) -> Selection:
        """Select ``n_keep`` of the visual tokens, 1 <= n_keep < n_visual; by default the picks of `order`."""
        picks = self.order(features, n_keep)
        assert picks is not None
        return Selection(picks.sort(-1).values)


class ScorePruner(Pruner, ABC):
    """A pruner that keeps the tokens with the highest score."""

    @abstractmethod
    def score(self, features: Features) -> Tensor:
        """Score [.., n_visual] of every visual token; the highest are kept."""

    def order(self, features: Features, n_keep: int) -> Tensor:
        return top_k(self.score(features), n_keep)


@dataclass(frozen=True)
class DecoderView:
    """Input of a method inside the decoder: one prompt of n tokens, without padding, before a decoder layer.

    Attributes
    ----------
    layer, n_layers : int
        Index of the layer (at least 1), and number of layers.
    n_start : int
        Number of visual tokens before any stage.
    hidden : Tensor [n, d]
        Input of the layer: the output of the previous layer.
    visual : Tensor [n] bool
    attention : callable
        Takes query rows [r] (indices below n). Returns the attention probabilities [n_heads, r, n] of the previous
        layer.
    keys : Tensor [n, n_kv, d_head]
        Keys of the previous layer, after rotary embedding.
    norm : callable
        The decoder's final norm.
    prompt : Tensor [S, d]
        Input embeddings of the prompt before any stage.
    prompt_visual : Tensor [S] bool
    encoder_attention : Tensor [n_start], optional
        `Features.attention` of the prompt's images, concatenated.
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
        Kept visual tokens: ascending indices below n_visual.
    merge : Tensor [n_merged, n_visual], optional
        Weights of new rows, which follow the last kept row.
    centres : Tensor [n_merged], optional
        The visual token whose position each new row gets, if positions are kept.
    """

    indices: Tensor
    merge: Tensor | None = None
    centres: Tensor | None = None

    @property
    def n_rows(self) -> int:
        return len(self.indices) + (0 if self.merge is None else len(self.merge))


@dataclass(frozen=True)
class DecoderPruner(Method, ABC):
    """Drops visual tokens between layers of the language model: the first layers process all tokens.

    Parameters
    ----------
    budget_match : "nominal" or "layer_mean"
        Meaning of a budget T. ``nominal``: the method's own definition. ``layer_mean``: T visual tokens per layer on
        average, the same cost as T tokens before the language model.
    """

    budget_match: Literal["nominal", "layer_mean"] = "nominal"

    before: ClassVar[Pruner | None] = None
    """A method that selects tokens before the language model, in addition to this one."""

    renumbers: ClassVar[bool] = False
    """Whether the public code renumbers the remaining tokens 0, 1, 2, ... Never done with M-RoPE."""

    def n_entering(self, n_visual: int, n_keep: int) -> int:
        """Number of tokens, of ``n_visual``, in the first layer for a budget of ``n_keep``."""
        return n_visual

    @abstractmethod
    def stages(self, n_visual: int, n_keep: int, n_layers: int) -> dict[int, int]:
        """{layer: number of visual tokens from this layer on}, ascending, layers at least 1."""

    @abstractmethod
    def reduce(self, view: DecoderView, n_keep: int) -> Reduction | None:
        """Select tokens before one layer of `stages`, for a nominal budget of ``n_keep``. None keeps all."""

    def entering(self, n_visual: int, n_keep: int, n_layers: int) -> list[int]:
        """Number of visual tokens in each layer."""
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
            If no budget is small enough, because the first layers process all tokens.
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
