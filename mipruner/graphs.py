"""Static parts of the engine: a function recorded as a CUDA graph, and a KV cache of fixed buffers."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


class Graph:
    """A function of tensors. On a GPU it is recorded as one CUDA graph.

    Its result is in the memory of the graph and is valid until the next call.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, **named: Tensor):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        first = next(chain(inputs, named.values()))
        if first.is_cuda:
            with torch.cuda.device_of(first):
                self._record([x.clone() for x in inputs], {name: x.clone() for name, x in named.items()})

    def _record(self, inputs: list[Tensor], named: dict[str, Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and fills caches, which is not allowed during recording
                self.function(*inputs, **named)
        torch.cuda.current_stream().wait_stream(side)
        self.inputs, self.graph = [*inputs, *named.values()], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*inputs, **named)

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        if self.graph is None:
            return self.function(*inputs, **named)
        for held, x in zip(self.inputs, chain(inputs, named.values()), strict=True):
            held.copy_(x)
        self.graph.replay()
        return self.outputs


class KeyValues:
    """KV cache of the language model: fixed buffers [1, kv_heads, length, head_dim], two per layer."""

    def __init__(self, config: PreTrainedConfig, length: int, like: Tensor):
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, length, width)
        # Separate tensors: compiled code writes to them in place, but would copy one large tensor.
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)]
        self.length = length

    def at(self, slots: Tensor, n_read: int) -> "KeyValues":
        """The same buffers for a call that writes its tokens to ``slots`` and reads the first ``n_read`` slots."""
        self.slots, self.n_read = slots, n_read
        return self

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        held_keys, held_values = self.layers[layer]
        held_keys.index_copy_(2, self.slots, keys)
        held_values.index_copy_(2, self.slots, values)
        return held_keys[:, :, : self.n_read], held_values[:, :, : self.n_read]

    def clear(self) -> None:
        """Zero the buffers.

        A masked slot has attention weight 0, but 0 x NaN is NaN, so one NaN would reach every later answer.
        """
        for buffer in chain.from_iterable(self.layers):
            buffer.zero_()
