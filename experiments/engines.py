"""Engines that answer one prompt with a pruner: the pipeline, `mipruner.engine`, and transformers' `generate`."""

from collections.abc import Callable
from typing import Any

import torch

from mipruner.decoding import Decoding, before_end, end_ids
from mipruner.engine import Engine
from mipruner.errors import InputError
from mipruner.models import Adapter, Prompt
from mipruner.pipeline import Pipeline, VisionCache
from mipruner.prompt import collate
from mipruner.pruners import Method, Pruner

Budget = int | float
Run = Callable[[Any], int]
"""Answers the prompt once, with a `Stopwatch` around its stages; returns the number of new tokens."""


def pipeline_engine(adapter: Adapter, pruner: Method, keep: Budget, decoding: Decoding, prompt: Prompt) -> Run:
    pipeline = Pipeline(adapter, pruner, keep, decoding)

    def run(watch: Any) -> int:
        pipeline.cache, pipeline.watch = VisionCache(), watch
        return len(pipeline([prompt])[0].tokens)

    return run


def static_engine(adapter: Adapter, pruner: Method, keep: Budget, decoding: Decoding, prompt: Prompt) -> Run:
    engine = Engine(adapter, pruner, keep, decoding, compiled=adapter.device.type == "cuda")

    def run(watch: Any) -> int:
        engine.watch = watch
        if engine.pipeline is not None:  # on a CPU
            engine.pipeline.cache = VisionCache()
        return len(engine(prompt).tokens)

    return run


def generate_engine(adapter: Adapter, pruner: Method, keep: Budget, decoding: Decoding, prompt: Prompt) -> Run:
    if not isinstance(pruner, Pruner):
        raise InputError(f"{type(pruner).__name__} does not prune between encoder and decoder: use the pipeline")
    model: Any = adapter.model
    pipeline = Pipeline(adapter, pruner, keep, decoding)

    @torch.inference_mode()
    def run(watch: Any) -> int:
        pipeline.cache, pipeline.watch = VisionCache(), watch
        seen = pipeline.see(prompt.images)
        with watch("scoring"):
            encoded = adapter.read(prompt, [seen[id(image)] for image in prompt.images], pruner.signals)
            selections = pipeline.select(encoded)
        with watch("generate"):
            batch = collate([adapter.shorten(encoded, selections)])
            if batch.deepstack:
                raise InputError("generate takes no deepstack rows beside embeddings")
            new = model.generate(
                inputs_embeds=batch.embeds,
                position_ids=batch.position_ids,
                attention_mask=torch.ones_like(batch.is_visual, dtype=torch.long),
                max_new_tokens=decoding.max_new_tokens,
                do_sample=False,
            )[0].tolist()
        return len(before_end(new, end_ids(model.generation_config)))

    return run


ENGINES = {"pipeline": pipeline_engine, "engine": static_engine, "generate": generate_engine}
