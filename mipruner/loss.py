"""Computes loss and logits that the caller requested by positions in the full prompt."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mipruner.errors import InputError

IGNORED = -100


@dataclass
class Asked:
    """Arguments (labels, logits_to_keep) that are withheld from the model until the kept tokens are known.

    Attributes
    ----------
    labels : Tensor [B, S], optional
    places : int or Tensor [k]
        ``logits_to_keep``: number of last logits, or positions in the full prompt.
    n_items : optional
        ``num_items_in_batch``, the divisor of the loss.
    """

    labels: Tensor | None
    places: int | Tensor
    n_items: Any = None

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> "Asked | None":
        labels, places = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        if labels is None and not isinstance(places, Tensor):
            return None
        if kwargs.get("output_router_logits"):
            raise InputError("labels together with output_router_logits cannot be pruned: leave the router's loss out")
        return cls(labels, places, kwargs.get("num_items_in_batch"))

    def withhold(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}

    def answer(
        self, model: PreTrainedModel, output: ModelOutput | tuple[Any, ...], columns: Tensor | None
    ) -> ModelOutput | tuple[Any, ...]:
        """Output of the model with the requested loss and logits.

        columns [B, S'] is the index of each row in the full prompt; None if nothing was shortened.
        """
        logits = output[0]
        found = {"logits": self.pick(logits, columns)}
        if self.labels is not None:
            found = {"loss": self.loss(model, logits, columns)} | found
        if isinstance(output, tuple):
            return (*found.values(), *output[1:])
        return type(output)(**({**output} | found))

    def loss(self, model: PreTrainedModel, logits: Tensor, columns: Tensor | None) -> Tensor:
        """Loss of the model on the labels of the kept tokens."""
        labels = self.labels
        assert labels is not None
        if columns is not None:
            columns = columns.to(labels.device)
            labels = labels.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, IGNORED)
        options = {} if self.n_items is None else {"num_items_in_batch": self.n_items}
        size = model.config.get_text_config().vocab_size
        return model.loss_function(logits=logits, labels=labels, vocab_size=size, **options)

    def pick(self, logits: Tensor, columns: Tensor | None) -> Tensor:
        """Logits at the requested positions."""
        if not isinstance(self.places, Tensor):
            return logits[:, -self.places :] if self.places else logits
        if columns is None:
            return logits[:, self.places]
        n_full = int(columns.max()) + 1
        places = self.places.to(columns.device)
        places = places.nonzero()[:, 0] if places.dtype == torch.bool else places % n_full
        at = columns[:, None] == places[:, None]
        if not bool(at.any(-1).all()):
            raise InputError("logits_to_keep names a token that was dropped: name tokens of the text")
        rows = at.int().argmax(-1)
        return logits.gather(1, rows[..., None].expand(-1, -1, logits.shape[-1]).to(logits.device))
