"""Pipeline for models without an adapter: the model's own processor and `generate`, inside `mipruner.prune`.

adapter = mipruner.models.load("google/gemma-3-4b-it")
pipeline_of(adapter, mipruner.pruners.make("mi"), keep=0.25)([Prompt("What is this?", [image])])
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor

from mipruner import draws
from mipruner.decoding import Decoding, before_end, end_ids, inverse
from mipruner.errors import InputError
from mipruner.models.adapter import Adapter
from mipruner.models.generic import ALONE, PAGE, GenericAdapter
from mipruner.pipeline import Answer, Pipeline
from mipruner.prompt import Encoded, Media, Prompt
from mipruner.pruners import DecoderPruner, ImagePruner, Method
from mipruner.pruning import prune
from mipruner.selection import Auto, Selection, budget
from mipruner.timing import Stopwatch


class Draw(LogitsProcessor):
    """Logits processor that selects tokens like `mipruner.decoding.decode`.

    It also records the time of the first logits.
    """

    def __init__(self, decoding: Decoding, samples: Sequence[str], now: Callable[[], float]) -> None:
        self.decoding, self.now = decoding, now
        self.generators = [draws.generator(decoding.seed, sample or str(k)) for k, sample in enumerate(samples)]
        self.prefilled: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prefilled is None:
            self.prefilled = self.now()
        if not self.decoding.temperature:
            return scores
        p = self.decoding.warpers()(cast(torch.LongTensor, input_ids), scores.float()).softmax(-1)
        uniform = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        token = inverse(p, uniform.to(p.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0)


class ProcessorPipeline:
    """`mipruner.pipeline.Pipeline` for a `GenericAdapter`: ``pipeline(prompts)`` answers a batch.

    Every call encodes its images again. Times of ``watch`` start after the processor.

    Parameters
    ----------
    adapter : GenericAdapter
        An adapter with a processor, from `mipruner.models.load`.
    pruner, keep, decoding
        See `Pipeline`.
    """

    def __init__(
        self,
        adapter: GenericAdapter,
        pruner: Method,
        keep: int | float | Auto,
        decoding: Decoding | None = None,
    ) -> None:
        if isinstance(pruner, ImagePruner):
            raise InputError(
                f"{type(pruner).__name__} makes images smaller before the processor, which a "
                f"{adapter.model.config.model_type} without an adapter does by itself; {PAGE}"
            )
        self.adapter, self.pruner, self.keep = adapter, pruner, keep
        self.decoding = decoding or Decoding()
        self.watch = Stopwatch(adapter.device)

    def prepare(self, images: Sequence[Media]) -> None:
        """Nothing: the processor takes the images and the text of a call together, and runs once."""

    def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer ``prompts``; adds the time of each stage to ``watch``.

        Raises
        ------
        InputError
            See `Pipeline`.
        PromptError
            See `GenericAdapter.inputs`; raised before a prompt of the batch is answered.
        """
        groups = [[k for k, prompt in enumerate(prompts) if bool(prompt.images) is shown] for shown in (True, False)]
        if self.adapter.model.config.model_type in ALONE:
            groups = [[k] for k in range(len(prompts))]
        batches = [([prompts[k] for k in members], members) for members in groups if members]
        made = [self.adapter.inputs(batch) for batch, _ in batches]
        answers: dict[int, Answer] = {}
        for (batch, members), inputs in zip(batches, made, strict=True):
            answers |= dict(zip(members, self._answer(batch, inputs), strict=True))
        return [answers[k] for k in range(len(prompts))]

    def _answer(self, prompts: Sequence[Prompt], inputs: dict[str, Any]) -> list[Answer]:
        if not prompts[0].images:
            none = [0] * self.adapter.n_layers
            return [
                Answer(self.adapter.chat.decode(new), new, [], [], 0, [], [], none)
                for new in self._generate(inputs, prompts)
            ]
        queries = [prompt.text if prompt.query is None else prompt.query for prompt in prompts]
        pruning = prune(
            self.adapter.model,
            self.pruner,
            self.keep,
            tokenizer=self.adapter.processor,
            text=queries,
            question=[prompt.question or query for prompt, query in zip(prompts, queries, strict=True)],
            positions=self.adapter.positions,
        )
        pruning.watch = self.watch
        with pruning:
            tokens = self._generate(inputs, prompts)
            rows = zip(prompts, tokens, pruning.encoded, pruning.selections, pruning.per_layer, strict=True)
            return [self._told(*row) for row in rows]

    def _generate(self, inputs: dict[str, Any], prompts: Sequence[Prompt]) -> list[list[int]]:
        """New tokens of each prompt, without end-of-text."""
        model, tokenizer, watch = self.adapter.model, self.adapter.tokenizer, self.watch
        config = copy.deepcopy(model.generation_config)
        config.update(max_new_tokens=self.decoding.max_new_tokens, do_sample=False, num_beams=1, max_length=None)
        config.update(temperature=None, top_p=None, top_k=None)
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        draw = Draw(self.decoding, [prompt.sample for prompt in prompts], watch.now)
        before, start = dict(watch.ms), watch.now()
        out = cast(Any, model).generate(**inputs, generation_config=config, logits_processor=[draw])
        assert draw.prefilled is not None
        inside = sum(watch.ms[stage] - before.get(stage, 0.0) for stage in ("vision", "scoring"))
        watch.ms["prefill"] += 1000 * (draw.prefilled - start) - inside
        watch.ms["decode"] += 1000 * (watch.now() - draw.prefilled)
        return [before_end(row, end_ids(config)) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]

    def _told(
        self, prompt: Prompt, new: list[int], sample: Encoded, chosen: list[Selection], per_layer: list[int]
    ) -> Answer:
        is_decoder = isinstance(self.pruner, DecoderPruner)
        whole = len(sample.visuals) == len(prompt.images)  # not so where each tile of an image has rows of its own
        return Answer(
            text=self.adapter.chat.decode(new),
            tokens=new,
            selections=[Selection(selection.indices.cpu()) for selection in chosen],
            n_visual=[visual.n_visual for visual in sample.visuals],
            n_keep=budget(self.keep, sample.n_visual) if is_decoder else sum(s.n_rows for s in chosen),
            grids=[visual.grid if whole else None for visual in sample.visuals],
            boxes=[self.adapter.box(image.size) for image in prompt.images],
            visual_tokens_per_layer=[sample.n_fixed + n for n in per_layer],
            notes=self.pruner.notes(sample.features()[0]),
        )


def pipeline_of(
    adapter: Adapter, pruner: Method, keep: int | float | Auto, decoding: Decoding | None = None
) -> Pipeline | ProcessorPipeline:
    """A `ProcessorPipeline` for a `GenericAdapter`, a `Pipeline` for other adapters."""
    if adapter.reads_inside:
        return Pipeline(adapter, pruner, keep, decoding)
    assert isinstance(adapter, GenericAdapter)
    return ProcessorPipeline(adapter, pruner, keep, decoding)
