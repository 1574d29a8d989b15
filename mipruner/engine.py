"""Fast engine for one prompt at a time: same answers as the pipeline, on static shapes.

    image ── see ──> visual tokens ─┐
    question ─ score ─────────────────┴─> kept tokens ─ prefill ─> token ─ step ─> token ─ step ─> ...

Each of these four is a function of tensors. It is recorded as a CUDA graph and then replayed: `see` and `step` once,
`score` for each number of question tokens, `prefill` for each bucket of prompt lengths. The host uploads token ids
before and reads the answer afterwards. In between it waits only once every `LOOK` tokens, to check whether the answer
has ended. On a CPU nothing can be recorded and static shapes are slower, so the pipeline answers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models.adapter import Adapter
from mipruner.models.llava import LlavaAdapter
from mipruner.pipeline import Answer, Pipeline
from mipruner.prompt import Media, Prompt, Tokens, Visual
from mipruner.pruners import Pruner
from mipruner.pruners.none import NoPruner
from mipruner.selection import Auto, Selection

LOOK = 16
"""Number of tokens between two checks whether the answer has ended."""


class Graph:
    """A function of tensors. On a GPU it is recorded as one CUDA graph.

    Its result is in the memory of the graph and is valid until the next call.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor):
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        if inputs[0].is_cuda:
            with torch.cuda.device_of(inputs[0]):
                self._record([x.clone() for x in inputs])

    def _record(self, inputs: list[Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels and fills caches, which is not allowed during recording
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.inputs, self.graph = inputs, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.function(*inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        if self.graph is None:
            return self.function(*inputs)
        for held, x in zip(self.inputs, inputs, strict=True):
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


@dataclass(frozen=True)
class Layout:
    """A short prompt of n tokens, padded to L after its last token, with room for T new tokens.

    Attributes
    ----------
    n : int
    ids : Tensor [L]
    places : Tensor [n_keep]
        Indices of the visual tokens.
    slots : Tensor [L + T]
        Slot of token k in the cache: 0, 1, 2, ...
    position_ids : Tensor [L + T]
        Position of token k. With positions="keep", those of the visual tokens are filled in after the selection.
    """

    n: int
    ids: Tensor
    places: Tensor
    slots: Tensor
    position_ids: Tensor


class Engine:
    """Engine for one prompt at a time: ``engine(prompt)`` gives the answer of `mipruner.pipeline.Pipeline`.

    Parameters
    ----------
    adapter : Adapter
        LLaVA-1.5 with attn_implementation=sdpa: plain positions, images of one size.
    pruner, keep
        See `Pipeline`.
    decoding : Decoding
        Greedy.
    bucket : int
        Prompts are padded after their last token to a multiple of it. No token attends to the padding.
    longest : int
        Largest number of text tokens of a prompt.
    compiled : bool
        Whether prefill and step are compiled by torch.compile before recording.
    static : bool, optional
        Whether shapes are static; by default only on a GPU. On a CPU with ``static=True`` the functions are called
        without recording (for tests).

    Attributes
    ----------
    pipeline : Pipeline or None
        Answers if shapes are not static.

    Raises
    ------
    InputError
        If the model or the decoding is not supported.
    """

    def __init__(
        self,
        adapter: Adapter,
        pruner: Pruner,
        keep: int | float,
        decoding: Decoding,
        *,
        bucket: int = 64,
        longest: int = 192,
        compiled: bool = False,
        static: bool | None = None,
    ):
        generation, text_config = adapter.model.generation_config, adapter.model.config.text_config
        if decoding.temperature or generation.repetition_penalty not in (None, 1.0):
            raise InputError("the engine decodes greedily: use the pipeline for sampling and penalties")
        if adapter.model.config.model_type != "llava" or text_config._attn_implementation != "sdpa":
            raise InputError("the engine runs LLaVA-1.5 with attn_implementation=sdpa: use the pipeline")
        if not isinstance(pruner, Pruner):
            raise InputError(f"{type(pruner).__name__} prunes outside of what the engine records: use the pipeline")
        if isinstance(keep, Auto):
            raise InputError("the engine's shapes are fixed, and keep=auto is not: use the pipeline")
        self.adapter, self.pruner, self.keep, self.decoding = adapter, pruner, keep, decoding
        self.bucket, self.longest, self.compiled = bucket, longest, compiled
        self.watch: Callable[[str], AbstractContextManager[Any]] = lambda stage: nullcontext()
        """Context around each stage. By default nothing is timed, because a clock makes the host wait."""
        static = adapter.device.type == "cuda" if static is None else static
        self.pipeline = None if static else Pipeline(adapter, pruner, keep, decoding)
        assert isinstance(adapter, LlavaAdapter)
        self.n_visual = adapter.side**2
        self.visual = Visual(rows=torch.empty(self.n_visual, 0), grid=(adapter.side, adapter.side))
        self.n_keep = self.n_visual if isinstance(pruner, NoPruner) else pruner.budget(keep, self.n_visual)
        self.ends = torch.tensor(generation.eos_token_id, device=adapter.device).reshape(-1)
        length = self._padded(longest + self.n_keep + decoding.max_new_tokens)
        if static:
            self.cache = KeyValues(text_config, length, like=adapter.model.lm_head.weight)
        self.graphs: dict[tuple[Any, ...], Graph] = {}
        self.asked: tuple[Media | None, dict[Any, Any]] = None, {}
        """The latest image and its `Features.held`."""

    @torch.inference_mode()
    def __call__(self, prompt: Prompt, pixels: dict[str, Any] | None = None) -> Answer:
        """Answer one prompt. ``pixels`` is the output of ``adapter.preprocess`` for its image, if already computed.

        Raises
        ------
        InputError
            If the prompt has several images or is too long, or the features are not finite.
        """
        if len(prompt.images) != 1:
            raise InputError(f"the engine answers about one image, not {len(prompt.images)}: use the pipeline")
        if self.pipeline is not None:
            self.pipeline.watch = self.watch  # type: ignore[assignment]
            return self.pipeline([prompt])[0]
        tokens = self.adapter.tokenize(prompt, [self.visual])
        if (n_other := len(tokens.ids) - self.n_visual) > self.longest:
            raise InputError(f"the prompt has {n_other} tokens beside the image: raise longest")
        pixels = self.adapter.preprocess(prompt.images[0]) if pixels is None else pixels
        values = self.upload(pixels["pixel_values"].to(self.adapter.model.dtype))
        text_ids, layout = self.upload(tokens.ids[tokens.is_text]), self.layout(tokens.ids)
        with self.watch("vision"):
            visual = self.run(self.see, values)
        with self.watch("scoring"):
            kept, finite = self.select(prompt, tokens, text_ids, visual, pixels)
        with self.watch("prefill"):
            length = len(layout.ids)
            token = self.run(
                self.prefill,
                layout.ids,
                layout.slots[:length],
                layout.position_ids[:length],
                layout.slots[layout.n - 1 : layout.n],
                layout.places,
                kept,
                visual.rows,
            )
        with self.watch("decode"):
            drawn = self.decode(token, layout)
        *new, finite = torch.cat([drawn, finite]).tolist()
        if not finite:
            self.cache.clear()
            raise InputError("the features contain NaN or infinity: check the weights, or load them in a wider dtype")
        ends = self.ends.tolist()
        new = new[: next((k for k, token in enumerate(new) if token in ends), None)]
        return Answer(
            text=self.adapter.chat.decode(new),
            tokens=new,
            selections=[Selection(kept.cpu())],
            n_visual=[self.n_visual],
            n_keep=self.n_keep,
            grids=[self.visual.grid],
            boxes=[self.adapter.box(prompt.images[0].size)],
            visual_tokens_per_layer=[self.n_keep] * self.adapter.n_layers,
        )

    def upload(self, x: Tensor) -> Tensor:
        """Copy to the device from pinned memory, without blocking the host."""
        return x.pin_memory().to(self.adapter.device, non_blocking=True) if self.adapter.device.type == "cuda" else x

    def run(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """Replay the graph of this function for these shapes; record it at the first call."""
        key = (function.__name__, *(x.shape for x in inputs))
        if key not in self.graphs:
            # Not score, whose kernels are fused by hand, nor see, whose hooks Dynamo cannot trace.
            fused = self.compiled and function in (self.prefill, self.step)
            self.graphs[key] = Graph(torch.compile(function) if fused else function, *inputs)
        return self.graphs[key](*inputs)

    def layout(self, ids: Tensor) -> Layout:
        """Lay out the short version of a prompt [S]."""
        start = int(self.adapter.is_placeholder(ids).nonzero()[0])
        ids = torch.cat([ids[: start + self.n_keep], ids[start + self.n_visual :]])
        length = self._padded(len(ids))
        slots = torch.arange(length + self.decoding.max_new_tokens)
        position_ids = slots.clone()
        if self.adapter.positions == "keep":
            position_ids[start + self.n_keep :] += self.n_visual - self.n_keep
        return Layout(
            n=len(ids),
            ids=self.upload(torch.nn.functional.pad(ids, (0, length - len(ids)))),
            places=self.upload(torch.arange(start, start + self.n_keep)),
            slots=self.upload(slots),
            position_ids=self.upload(position_ids),
        )

    def _padded(self, n: int) -> int:
        return -(-n // self.bucket) * self.bucket

    def select(
        self, prompt: Prompt, tokens: Tokens, text_ids: Tensor, visual: Visual, pixels: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Kept visual tokens [n_keep] in prompt order, and whether all features are finite [1]."""
        signals = dict(visual.signals)
        if self.pruner.static and self.pruner.signals <= signals.keys():
            return self.run(self.score, text_ids, visual.rows, *(signals[name] for name in sorted(signals)))
        if "valid" in pixels and "valid" in self.pruner.signals:
            signals["valid"] = pixels["valid"].flatten().to(self.adapter.device)
        signals |= self.adapter.text_signals(prompt, tokens, self.pruner.signals)
        text = self.adapter.model.get_input_embeddings()(text_ids)
        if self.asked[0] is not prompt.images[0]:
            self.asked = prompt.images[0], {}
        features = Features(visual.rows, text, self.visual.grid, **signals, sample=prompt.sample, held=self.asked[1])
        selection = self.pruner(features, self.n_keep)
        if selection.embeds is not None or selection.merge is not None:
            raise InputError(f"{type(self.pruner).__name__} merges tokens: use the pipeline")
        return selection.indices, torch.ones(1, dtype=torch.long, device=text.device)

    def decode(self, token: Tensor, layout: Layout) -> Tensor:
        """The first token [1] and the following ones [max_new_tokens], padded with end-of-text."""
        drawn = self.ends[:1].repeat(self.decoding.max_new_tokens)
        for k in range(self.decoding.max_new_tokens):
            if k:
                here = slice(layout.n - 1 + k, layout.n + k)
                token = self.run(self.step, token, layout.slots[here], layout.position_ids[here])
            drawn[k : k + 1].copy_(token)
            if k % LOOK == LOOK - 1 and torch.isin(drawn[: k + 1], self.ends).any():
                break
        return drawn

    # Recorded functions: they depend only on their arguments, the weights and the cache.

    def see(self, values: Tensor) -> Visual:
        """Encode the image: pixel_values [1, 3, height, width] -> visual tokens [n_visual, d]."""
        return self.adapter.encode([{"pixel_values": values}], self.pruner.signals)[0]

    def score(self, text_ids: Tensor, visual: Tensor, *signals: Tensor) -> tuple[Tensor, Tensor]:
        """Select: ids [n_text], visual tokens [n_visual, d], signals by name -> kept [n_keep], all are finite [1]."""
        text = self.adapter.model.get_input_embeddings()(text_ids)
        finite = (visual.sum(dtype=torch.float32) + text.sum(dtype=torch.float32)).isfinite().long()[None]
        if self.n_keep == self.n_visual:
            return torch.arange(self.n_keep, device=visual.device), finite
        named: dict[str, Any] = dict(zip(sorted(self.pruner.signals), signals, strict=True))
        return self.pruner.select(Features(visual, text, **named), self.n_keep).indices, finite

    def prefill(
        self,
        ids: Tensor,
        slots: Tensor,
        position_ids: Tensor,
        last: Tensor,
        places: Tensor,
        kept: Tensor,
        visual: Tensor,
    ) -> Tensor:
        """Prefill: ids, slots, position_ids [L], last [1], places, kept [n_keep], visual [n_visual, d] -> token [1]."""
        embeds = self.adapter.model.get_input_embeddings()(ids).index_copy(0, places, visual[kept])
        if self.adapter.positions == "keep":
            position_ids = position_ids.index_copy(0, places, places[0] + kept)
        hidden = self._language_model(embeds, slots, position_ids, n_read=len(ids))
        return self._most_likely(hidden[last])

    def step(self, token: Tensor, slot: Tensor, position_id: Tensor) -> Tensor:
        """Decode step: one token [1] at its slot [1] and position [1] -> the next token [1]."""
        embeds = self.adapter.model.get_input_embeddings()(token)
        return self._most_likely(self._language_model(embeds, slot, position_id, n_read=self.cache.length))

    def _language_model(self, embeds: Tensor, slots: Tensor, position_ids: Tensor, n_read: int) -> Tensor:
        """embeds [n, d] at ``slots`` -> hidden states [n, d]; each token reads the slots up to its own."""
        sees = torch.arange(n_read, device=slots.device) <= slots[:, None]
        out = self.adapter.language_model(
            inputs_embeds=embeds[None],
            position_ids=position_ids[None],
            attention_mask=sees[None, None],
            past_key_values=self.cache.at(slots, n_read),
            use_cache=True,
        )
        return out.last_hidden_state[0]

    def _most_likely(self, hidden: Tensor) -> Tensor:
        return self.adapter.model.lm_head(hidden).float().argmax(-1)
