"""Fast engine for one prompt at a time: same answers as the pipeline, on static shapes.

    image ── see ──> visual tokens ─┐
    question ─ score ─────────────────┴─> kept tokens ─ prefill ─> token ─ step ─> token ─ step ─> ...

Each of these four is a function of tensors. It is recorded as a CUDA graph and then replayed: `see` for each bucket of
image sizes, `prefill` and `step` for each bucket of prompt lengths, `score` for each number of question tokens. For
images of any size, `score` is not recorded, because pairs of image and question sizes rarely repeat. The host uploads
image and token ids before and reads the answer afterwards. In between it waits only once every `LOOK` tokens, to check
whether the answer has ended. On a CPU nothing can be recorded and static shapes are slower, so the pipeline answers.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mipruner.decoding import Decoding, before_end
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.graphs import Graph, KeyValues
from mipruner.models.adapter import Adapter
from mipruner.pipeline import Answer, Pipeline
from mipruner.prompt import Batch, Media, Prompt, Tokens, Visual
from mipruner.pruners import Method, Pruner
from mipruner.pruners.none import NoPruner
from mipruner.selection import Auto, Selection

LOOK = 16
"""Number of tokens between two checks whether the answer has ended."""


@dataclass(frozen=True)
class Layout:
    """A short prompt of n tokens, padded to L after its last token, with room for T new tokens.

    Attributes
    ----------
    n : int
    ids : Tensor [L]
    is_visual : Tensor [L] bool
    places : Tensor [n_keep]
        Indices of the visual tokens.
    slots : Tensor [L + T]
        Slot of token k in the cache: 0, 1, 2, ...
    position_ids : Tensor [P, L + T]
        Position of token k. With positions="keep", those of the visual tokens are filled in after the selection.
    visual_position_ids : Tensor [P, n_visual], optional
        Positions of all visual tokens, with positions="keep".
    """

    n: int
    ids: Tensor
    is_visual: Tensor
    places: Tensor
    slots: Tensor
    position_ids: Tensor
    visual_position_ids: Tensor | None


class Engine:
    """Engine for one prompt at a time: ``engine(prompt)`` gives the answer of `mipruner.pipeline.Pipeline`.

    Parameters
    ----------
    adapter : Adapter
        An adapter of a type in its ``static_types``, with attn_implementation=sdpa.
    pruner, keep
        See `Pipeline`.
    decoding : Decoding
        Greedy.
    bucket : int
        Prompts are padded after their last token to a multiple of it, and images to such a number of visual tokens.
        Above 16 buckets the steps are larger, at most an eighth of the length. No token or patch attends to the
        padding.
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
        pruner: Method,
        keep: int | float,
        decoding: Decoding,
        *,
        bucket: int = 64,
        longest: int = 192,
        compiled: bool = False,
        static: bool | None = None,
    ):
        generation, config = adapter.model.generation_config, adapter.model.config
        if decoding.temperature:
            raise InputError("the engine decodes greedily: use the pipeline for sampling")
        if config.model_type not in adapter.static_types:
            raise InputError(f"the engine does not run {config.model_type} models: use the pipeline")
        if {config.text_config._attn_implementation, config.vision_config._attn_implementation} != {"sdpa"}:
            raise InputError("the engine needs attn_implementation=sdpa: use the pipeline")
        if set(getattr(config.text_config, "layer_types", None) or ()) - {"full_attention"}:
            raise InputError("the engine needs a language model of full attention in all layers: use the pipeline")
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
        self.ends = torch.tensor(generation.eos_token_id, device=adapter.device).reshape(-1)
        self.penalty = generation.repetition_penalty or 1.0
        length = self._padded(longest + self.budget(adapter.most_visual)) + decoding.max_new_tokens
        if static:
            weight = adapter.model.lm_head.weight
            self.cache = KeyValues(config.text_config, length, like=weight)
            self.said = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
            """The words of prompt and answer [n_vocabulary], on which a repetition penalty falls."""
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
        self.adapter.kinds(prompt.images)  # a video to a family without videos is an error of the user's
        pixels = self.adapter.preprocess(prompt.images[0]) if pixels is None else pixels
        outline = self.adapter.outline(pixels)
        tokens = self.adapter.tokenize(prompt, [outline])
        if (n_other := len(tokens.ids) - outline.n_visual) > self.longest:
            raise InputError(f"the prompt has {n_other} tokens beside the image: raise longest")
        padded = self.adapter.pad(pixels, self._padded(outline.n_visual))
        values = {name: self.upload(x) for name, x in padded.items()}
        text_ids, layout = self.upload(tokens.ids[tokens.is_text]), self.layout(tokens.ids, outline)
        with self.watch("vision"):
            seen = self.run(self.see, **values).first(outline.n_visual)
            visual = replace(outline, rows=seen.rows, signals=seen.signals, deepstack=seen.deepstack)
        with self.watch("scoring"):
            kept, finite = self.select(prompt, tokens, text_ids, visual)
        with self.watch("prefill"):
            rows, layout = self.place(visual, kept, layout)
            token = self.start(layout, rows)
        with self.watch("decode"):
            drawn = self.decode(token, layout)
        *new, finite = torch.cat([drawn, finite]).tolist()
        if not finite:
            self.cache.clear()
            raise InputError("the features contain NaN or infinity: check the weights, or load them in a wider dtype")
        new = before_end(new, self.ends.tolist())
        return Answer(
            text=self.adapter.chat.decode(new),
            tokens=new,
            selections=[Selection(kept.cpu())],
            n_visual=[outline.n_visual],
            n_keep=len(kept),
            grids=[outline.grid],
            boxes=[self.adapter.box(prompt.images[0].size)],
            visual_tokens_per_layer=[len(kept)] * self.adapter.n_layers,
        )

    def budget(self, n_visual: int) -> int:
        """Number of kept tokens of an image."""
        return n_visual if isinstance(self.pruner, NoPruner) else self.pruner.budget(self.keep, n_visual)

    def upload(self, x: Tensor) -> Tensor:
        """Copy to the device from pinned memory, without blocking the host."""
        return x.pin_memory().to(self.adapter.device, non_blocking=True) if self.adapter.device.type == "cuda" else x

    def run(self, function: Callable[..., Any], *inputs: Tensor, **named: Tensor) -> Any:
        """Replay the graph of this function for these shapes; record it at the first call."""
        key = (function.__name__, *(x.shape for x in inputs), *((name, x.shape) for name, x in named.items()))
        if key not in self.graphs:
            # Not score, whose kernels are fused by hand, nor see, whose hooks Dynamo cannot trace.
            fused = self.compiled and function in (self.prefill, self.step)
            self.graphs[key] = Graph(torch.compile(function) if fused else function, *inputs, **named)
        return self.graphs[key](*inputs, **named)

    def layout(self, ids: Tensor, visual: Visual) -> Layout:
        """Lay out the short version of a prompt [S] around one image."""
        n_visual, n_keep = visual.n_visual, self.budget(visual.n_visual)
        start = int(self.adapter.is_placeholder(ids).nonzero()[0])
        index = torch.cat([torch.arange(start + n_keep), torch.arange(start + n_visual, len(ids))])
        n, length = len(index), self._padded(len(index))
        slots = torch.arange(length + self.decoding.max_new_tokens)
        if len(slots) > self.cache.length:
            raise InputError(f"the short prompt has {n} tokens, for which there is no room: raise longest")
        places, position_ids, visual_position_ids = slots[start : start + n_keep], slots[None], None
        if self.adapter.positions == "keep":
            full = self.adapter.position_ids(ids, [visual])
            after = full[:, -1:] + 1 + torch.arange(len(slots) - n)
            position_ids = torch.cat([full[:, index], after], 1)
            visual_position_ids = self.upload(full[:, start : start + n_visual])
        return Layout(
            n=n,
            ids=self.upload(pad(ids[index], (0, length - n))),
            is_visual=self.upload(torch.zeros(length, dtype=torch.bool).index_fill(0, places, True)),
            places=self.upload(places),
            slots=self.upload(slots),
            position_ids=self.upload(position_ids),
            visual_position_ids=visual_position_ids,
        )

    def _padded(self, n: int) -> int:
        step = self.bucket * max(1, 1 << max(0, (n // self.bucket).bit_length() - 4))
        return -(-n // step) * step

    def place(self, visual: Visual, kept: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        """Kept rows at their places in the prompt [1 + n_deepstack, L, d], zero at text, and the layout with positions.

        It depends on the number of kept tokens, so it is not recorded.
        """
        rows = torch.stack([visual.rows, *visual.deepstack])[:, kept]
        placed = rows.new_zeros(len(rows), len(layout.ids), rows.shape[-1]).index_copy_(1, layout.places, rows)
        if layout.visual_position_ids is None:
            return placed, layout
        own = layout.position_ids.index_copy(1, layout.places, layout.visual_position_ids[:, kept])
        return placed, replace(layout, position_ids=own)

    def start(self, layout: Layout, rows: Tensor) -> Tensor:
        """The first token [1]."""
        length = len(layout.ids)
        if self.penalty != 1:
            self.said.zero_().index_fill_(0, layout.ids[: layout.n], True)
        return self.run(
            self.prefill,
            layout.ids,
            layout.slots[:length],
            layout.position_ids[:, :length],
            layout.slots[layout.n - 1 : layout.n],
            layout.is_visual,
            rows,
        )

    def select(self, prompt: Prompt, tokens: Tokens, text_ids: Tensor, visual: Visual) -> tuple[Tensor, Tensor]:
        """Kept visual tokens [n_keep] in prompt order, and whether all features are finite [1]."""
        signals = dict(visual.signals)
        if self.pruner.static and self.pruner.signals <= signals.keys():
            named = [signals[name] for name in sorted(signals)]
            if self.adapter.any_size:
                return self.score(text_ids, visual.rows, *named)
            return self.run(self.score, text_ids, visual.rows, *named)
        signals |= self.adapter.text_signals(prompt, tokens, self.pruner.signals)
        text = self.adapter.model.get_input_embeddings()(text_ids)
        if self.asked[0] is not prompt.images[0]:
            self.asked = prompt.images[0], {}
        features = Features(visual.rows, text, visual.grid, **signals, sample=prompt.sample, held=self.asked[1])
        selection = self.pruner(features, self.budget(visual.n_visual))
        if selection.embeds is not None or selection.merge is not None:
            raise InputError(f"{type(self.pruner).__name__} merges tokens: use the pipeline")
        return selection.indices, torch.ones(1, dtype=torch.long, device=text.device)

    def decode(self, token: Tensor, layout: Layout) -> Tensor:
        """The first token [1] and the following ones [max_new_tokens], padded with end-of-text."""
        drawn = self.ends[:1].repeat(self.decoding.max_new_tokens)
        for k in range(self.decoding.max_new_tokens):
            if k:
                here = slice(layout.n - 1 + k, layout.n + k)
                token = self.run(self.step, token, layout.slots[here], layout.position_ids[:, here], layout.slots)
            drawn[k : k + 1].copy_(token)
            if k % LOOK == LOOK - 1 and torch.isin(drawn[: k + 1], self.ends).any():
                break
        return drawn

    # Recorded functions: they depend only on their arguments, the weights and the cache.

    def see(self, **pixels: Tensor) -> Visual:
        """Encode the image: result of `Adapter.pad` -> visual tokens [n_rows, d]."""
        return self.adapter.encode([pixels], self.pruner.signals)[0]

    def score(self, text_ids: Tensor, visual: Tensor, *signals: Tensor) -> tuple[Tensor, Tensor]:
        """Select: ids [n_text], visual tokens [n_visual, d], signals by name -> kept [n_keep], all are finite [1]."""
        text = self.adapter.model.get_input_embeddings()(text_ids)
        finite = (visual.sum(dtype=torch.float32) + text.sum(dtype=torch.float32)).isfinite().long()[None]
        n_keep = self.budget(len(visual))
        if n_keep == len(visual):
            return torch.arange(n_keep, device=visual.device), finite
        named: dict[str, Any] = dict(zip(sorted(self.pruner.signals), signals, strict=True))
        return self.pruner.select(Features(visual, text, **named), n_keep).indices, finite

    def prefill(
        self,
        ids: Tensor,
        slots: Tensor,
        position_ids: Tensor,
        last: Tensor,
        is_visual: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Prefill: ids, slots, is_visual [L], position_ids [P, L], last [1], rows [1 + n_deep, L, d] -> token [1]."""
        embeds = torch.where(is_visual[:, None], rows[0], self.adapter.model.get_input_embeddings()(ids))
        return self._most_likely(self._language_model(embeds, slots, position_ids, slots, rows[1:])[last])

    def step(self, token: Tensor, slot: Tensor, position_ids: Tensor, slots: Tensor) -> Tensor:
        """Decode step: one token [1] at its slot [1], position_ids [P, 1], reads ``slots`` [n] -> next token [1]."""
        embeds = self.adapter.model.get_input_embeddings()(token)
        if self.penalty != 1:
            self.said.index_fill_(0, token, True)
        return self._most_likely(self._language_model(embeds, slot, position_ids, slots))

    def _language_model(
        self, embeds: Tensor, slots: Tensor, position_ids: Tensor, read: Tensor, deepstack: Iterable[Tensor] = ()
    ) -> Tensor:
        """embeds [n, d] at ``slots`` -> hidden states [n, d]; each token reads those of ``read`` up to its own."""
        batch = Batch(
            embeds=embeds[None],
            position_ids=position_ids if len(position_ids) == 1 else position_ids[:, None],
            attention_mask=(read <= slots[:, None])[None, None],
            # The batch's one row instead of a mask, whose shape would depend on its values: text gets zeros added.
            is_visual=torch.zeros(1, dtype=torch.long, device=slots.device),
            deepstack=list(deepstack),
        )
        cache = self.cache.at(slots, len(read))
        out = self.adapter.language_model(**batch.language_model_inputs(), past_key_values=cache, use_cache=True)
        return out.last_hidden_state[0]

    def _most_likely(self, hidden: Tensor) -> Tensor:
        logits = self.adapter.model.lm_head(hidden).float()
        if self.penalty != 1:
            penalized = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.said, penalized, logits)
        return logits.argmax(-1)
