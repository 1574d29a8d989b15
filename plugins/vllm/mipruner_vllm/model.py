"""Selects the kept rows of each image in the vLLM worker."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mipruner.features import Features
from mipruner.fused import row_norm
from mipruner_vllm import settings
from mipruner_vllm.processor import OWN


class VisionRows:
    """Cache of image rows by image hash: up to ``max_bytes``, the least recently used are removed first.

    The rows are in host memory, which vLLM's memory profile does not use.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.n_bytes, self.n_encoded = max_bytes, 0, 0
        self._held: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, keys: Sequence[bytes], encode: Callable[[list[int]], Sequence[Tensor]]) -> list[Tensor]:
        """Rows of each key. ``encode`` gets the indices of new keys, each once."""
        new = list(dict.fromkeys(key for key in keys if key not in self._held))
        rows = {}
        if new:
            self.n_encoded += len(new)
            rows = dict(zip(new, encode([keys.index(key) for key in new]), strict=True))
        found = [rows[key] if key in rows else self._held[key].to(self._device, non_blocking=True) for key in keys]
        for key in keys:
            self._put(key, rows.get(key))
        return found

    def _put(self, key: bytes, rows: Tensor | None) -> None:
        if key not in self._held:
            self._device = rows.device
            self._held[key] = rows.clone() if rows.device.type == "cpu" else rows.cpu()
            self.n_bytes += rows.nbytes
        self._held.move_to_end(key)
        while self.n_bytes > self.max_bytes:
            _, gone = self._held.popitem(last=False)
            self.n_bytes -= gone.nbytes


class Pruned:
    """Mixin of a vLLM model: computes the rows of each image, scores them against the question, and keeps a part.

    Does nothing unless the model's config has the setting ``mipruner``.
    """

    tiles: ClassVar[str | None] = None
    """Argument with the number of tiles of each image; None if there are no tiles."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.mipruner = settings.read(vllm_config.model_config.hf_config)
        if self.mipruner is not None:
            self.vision_rows = VisionRows(self.mipruner.cache_bytes)

    def embed_multimodal(self, **kwargs: Any):
        own = {name: kwargs.pop(name) for name in OWN if name in kwargs}
        if not own:
            return super().embed_multimodal(**kwargs)
        encode = super().embed_multimodal
        keys = [bytes(key.tolist()) for key in own["media_hash"]]
        rows = self.vision_rows.get(keys, lambda places: encode(**self.part(kwargs, len(keys), places)))
        names = [bytes(name.tolist()).decode() for name in own["sample"]]
        columns = (own["question_ids"], own["n_keep"], own["layout"], self.shapes(kwargs, len(keys)), names)
        return tuple(self.shorten(*one) for one in zip(rows, *columns, strict=True))

    def shapes(self, kwargs: dict[str, Any], n: int) -> Sequence[Any]:
        """Values for `grid` and `place` of each of n images or videos."""
        return [None] * n

    def sizes(self, kwargs: dict[str, Any]) -> list[int] | None:
        """Number of entries of ``pixel_values`` of each image; None if it is one."""
        return None if self.tiles is None else kwargs[self.tiles].view(-1).tolist()

    def part(self, kwargs: dict[str, Any], n: int, places: list[int]) -> dict[str, Any]:
        """Arguments for the images at the indices ``places`` of n."""
        if places == list(range(n)):
            return kwargs
        sizes, chosen = self.sizes(kwargs), {}
        for name, value in kwargs.items():
            if sizes is not None and name.startswith("pixel_") and isinstance(value, Tensor):
                pieces = value.split(sizes)
                chosen[name] = torch.cat([pieces[k] for k in places])
            elif isinstance(value, list):
                chosen[name] = [value[k] for k in places]
            elif isinstance(value, Tensor) and value.ndim and len(value) == n:
                chosen[name] = value[places]
            else:
                chosen[name] = value
        return chosen

    def is_candidate(self, rows: Tensor) -> Tensor:
        """Mask [n_rows] of the rows [n_rows, d] that are patches."""
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)

    def grid(self, n_visual: int, shape: Any) -> tuple[int, ...] | None:
        """([frames,] rows, columns) of the candidates; None if they do not form one grid."""
        return None

    def shorten(
        self, rows: Tensor, question_ids: Tensor, n_keep: Tensor, layout: Tensor, shape: Any, name: str
    ) -> Tensor:
        """Rows [n_kept, d] for the language model, including words between them.

        A random draw depends on the seed and on ``name``: the sample's if the request gives one, else the image's.
        """
        is_candidate = self.is_candidate(rows)
        kept = torch.ones_like(is_candidate)
        places = is_candidate.nonzero()[:, 0]
        shares = n_keep.view(-1).tolist()
        if sum(shares) < len(places):
            text = self.embed_words(question_ids.view(-1))
            kept = ~is_candidate
            for k, (part, share) in enumerate(zip(places.chunk(len(shares)), shares, strict=True)):
                visual = rows[part, : text.shape[1]]  # without Qwen3-VL's columns of deepstack rows
                sample = name if len(shares) == 1 else f"{name}/{k}"
                grid = self.grid(len(part), shape)
                features = Features(visual=visual, text=text, grid=grid, sample=sample, **self.signals)
                kept[part[self.mipruner.pruner(features, share).indices]] = True
        out = self.place(rows, shape)[kept]
        layout = layout.view(-1).to(rows.device)
        is_row = layout < 0
        if is_row.all():
            return out
        stays = torch.ones_like(is_row)
        stays[is_row] = kept
        wide = out.new_empty(int(stays.sum()), out.shape[1])
        wide[is_row[stays]] = out
        wide[~is_row[stays]] = self.embed_words(layout[~is_row]).to(out)
        return wide

    def place(self, rows: Tensor, shape: Any) -> Tensor:
        """Add position information to rows, if the model needs it."""
        return rows

    def embed_words(self, ids: Tensor) -> Tensor:
        """Input embeddings [n, d] from the model's own method, because each tensor-parallel rank has only a part of the
        table.
        """
        return self.get_language_model().embed_input_ids(ids)

    @cached_property
    def signals(self) -> dict[str, Any]:
        """Optional fields of `Features` that do not depend on the request."""
        if "vocabulary" not in self.mipruner.pruner.signals:
            return {}
        n_words = self.config.get_text_config().vocab_size
        device = next(self.get_language_model().parameters()).device
        table = self.embed_words(torch.arange(n_words, device=device))
        return {"vocabulary": table, "vocabulary_norm": row_norm(table)}
