"""Section 4: compares answers of this repository with those of transformers, token for token, on rendered images."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import mipruner
from experiments.accept.report import Line, check, not_run
from experiments.demo.questions import make_questions
from experiments.demo.scenes import make_scene, render
from mipruner.decoding import Decoding, before_end, end_ids
from mipruner.engine import Engine
from mipruner.errors import InputError
from mipruner.models import Adapter, Prompt
from mipruner.pipeline import Answer, Pipeline
from mipruner.prompt import Media
from mipruner.pruners import PRUNERS

NEW_TOKENS = 8
SHARE = 1 / 9
"""Budget of the pruned answers."""


def draw_prompts(adapter: Adapter, n: int) -> list[Prompt]:
    """Render ``n`` scenes with one question each; in several sizes if the model supports images of any size."""
    takes_any = "image_grid_thw" in image_inputs(adapter, Image.new("RGB", (336, 336)))
    canvases = cycle([(336, 336), (280, 280), (336, 252), (252, 336)] if takes_any else [(336, 336)])
    prompts = []
    for k, canvas in zip(range(n), canvases, strict=False):
        scene = make_scene(np.random.default_rng([22, k]), canvas=canvas)
        question = make_questions(scene, np.random.default_rng([22, k, 1]))[0]
        prompts.append(Prompt(question.text, [render(scene)], sample=f"scene {k}"))
    return prompts


def image_inputs(adapter: Adapter, image: Media) -> dict[str, Tensor]:
    """Output of the model's own image processor for one image, by names of the model's arguments."""
    size = getattr(adapter, "image_size", None)
    return dict(adapter.image_processor(images=[image], return_tensors="pt", **({"size": size} if size else {})))


class Stock:
    """The unchanged model, called without the prompt shortening of this repository.

    Parameters
    ----------
    adapter : Adapter
        Provides the model, the image processor and the ids of a prompt, which section 3 checks.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.model: Any = adapter.model

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """Arguments of a stock ``generate``."""
        adapter = self.adapter
        visuals = adapter.encode([adapter.preprocess(image) for image in prompt.images])
        ids = adapter.tokenize(prompt, visuals).ids[None].to(adapter.device)
        images = {name: x.to(adapter.device) for name, x in image_inputs(adapter, prompt.images[0]).items()}
        images = {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in images.items()}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
        if "image_grid_thw" in images:
            inputs["mm_token_type_ids"] = adapter.is_placeholder(ids).int()
        return inputs

    def trimmed(self, tokens: list[int]) -> list[int]:
        """Tokens without end-of-text."""
        return before_end(tokens, end_ids(self.model.generation_config))

    @torch.inference_mode()
    def generate(self, inputs: dict[str, Any]) -> list[int]:
        new = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return self.trimmed(new[0, inputs["input_ids"].shape[1] :].tolist())

    @torch.inference_mode()
    def generate_short(self, inputs: dict[str, Any], kept: Tensor) -> tuple[list[int], list[float]]:
        """Greedy answer to the short prompt, recomputed without a cache at each step, and the margin of each token.

        ``kept`` are indices among the visual tokens. The margin is the difference of the two largest logits.
        """
        model, ids = self.model, inputs["input_ids"][0]
        grids = {name: inputs[name] for name in ("image_grid_thw",) if name in inputs}
        features = model.model.get_image_features(inputs["pixel_values"], **grids)
        places = self.adapter.is_placeholder(ids).nonzero()[:, 0]
        embeds = model.get_input_embeddings()(ids)
        embeds[places] = joined(features.pooler_output).to(embeds)
        stays = torch.ones_like(ids, dtype=torch.bool)
        stays[places] = False
        stays[places[kept]] = True
        is_visual = torch.zeros_like(stays)
        is_visual[places] = True
        embeds, is_visual = embeds[stays], is_visual[stays]
        if self.adapter.positions == "keep":
            planes, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
            positions = torch.cat([torch.arange(len(ids), device=ids.device)[None], planes[:, 0]])[:, stays]
        else:
            positions = torch.arange(int(stays.sum()), device=ids.device)[None]
        deepstack = [joined(layer)[kept] for layer in getattr(features, "deepstack_features", None) or []]
        new, leads = [], []
        for _ in range(NEW_TOKENS):
            extra = {}
            if deepstack:
                extra = {"visual_pos_masks": is_visual[None], "deepstack_visual_embeds": deepstack}
            position_ids = positions[:, None] if len(positions) > 1 else positions
            hidden = model.model.language_model(
                inputs_embeds=embeds[None],
                position_ids=position_ids,
                attention_mask=torch.ones_like(is_visual, dtype=torch.long)[None],  # no packed sequences despite gaps
                use_cache=False,
                **extra,
            ).last_hidden_state
            best = model.lm_head(hidden[0, -1]).float().topk(2)
            leads.append((best.values[0] - best.values[1]).item())
            new.append(int(best.indices[0]))
            if self.trimmed(new) != new:
                break
            embeds = torch.cat([embeds, model.get_input_embeddings()(best.indices[:1])])
            is_visual = torch.cat([is_visual, is_visual.new_zeros(1)])
            following = positions[1:].amax() + 1 if len(positions) > 1 else positions[0, -1] + 1
            step = following.expand(len(positions), 1).clone()
            if len(positions) > 1:
                step[0] = positions[0, -1] + 1
            positions = torch.cat([positions, step], 1)
        return self.trimmed(new), leads


def joined(rows: Tensor | Sequence[Tensor]) -> Tensor:
    """Rows [n_rows, d] of all images, from one tensor [n_rows, d] or [n_images, n, d], or from one tensor per image."""
    return rows.flatten(0, -2) if isinstance(rows, Tensor) else torch.cat(list(rows))


def agree(found: Sequence[int], wanted: Sequence[int], leads: Sequence[float], tolerance: float) -> bool:
    """Whether two answers are equal, or first differ at a token whose margin is within rounding."""
    if list(found) == list(wanted):
        return True
    parting = next(
        (k for k, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]),
        min(len(found), len(wanted)),
    )
    return parting < len(leads) and leads[parting] <= tolerance


def counted(name: str, equal: Sequence[bool], source: str, tolerance: str = "") -> Line:
    return check(name, all(equal), f"{len(equal)} of {len(equal)}", f"{sum(equal)} of {len(equal)}", tolerance, source)


def check_full(adapter: Adapter, n_images: int) -> Iterator[Line]:
    """Compare keep=1.0 with stock ``generate``."""
    prompts, stock, decoding = draw_prompts(adapter, n_images), Stock(adapter), Decoding(max_new_tokens=NEW_TOKENS)
    pipeline = Pipeline(adapter, PRUNERS["mi"](), 1.0, decoding)
    answers = [pipeline([prompt])[0].tokens for prompt in prompts]
    wanted = [stock.generate(stock.inputs(prompt)) for prompt in prompts]
    dtype = str(adapter.model.dtype).removeprefix("torch.")
    same = [found == stocks for found, stocks in zip(answers, wanted, strict=True)]
    yield counted(f"keep=1.0 in {dtype}", same, "transformers' generate, all tokens")


def check_pruned(adapter: Adapter, n_images: int) -> Iterator[Line]:
    """Compare pruned answers (in a batch, in `mipruner.prune`, in the engine) with a short prompt built here."""
    prompts, stock, decoding = draw_prompts(adapter, n_images), Stock(adapter), Decoding(max_new_tokens=NEW_TOKENS)
    pruner = PRUNERS["mi"]()
    pipeline = Pipeline(adapter, pruner, SHARE, decoding)
    alone: list[Answer] = [pipeline([prompt])[0] for prompt in prompts]
    inputs = [stock.inputs(prompt) for prompt in prompts]
    eps = torch.finfo(adapter.model.dtype).eps
    tolerance, words = 64 * eps, f"a choice whose two best logits differ by at most {64 * eps:.1g} may part"
    rows = int(adapter.is_placeholder(inputs[0]["input_ids"]).sum())
    known = "pixel_values" in inputs[0] and rows == sum(alone[0].n_visual) and "image_sizes" not in inputs[0]
    leads: list[list[float]] = [[] for _ in prompts]
    if known:
        short = [
            stock.generate_short(x, a.selections[0].indices.to(adapter.device))
            for x, a in zip(inputs, alone, strict=True)
        ]
        leads = [lead for _, lead in short]
        equal = [agree(a.tokens, new, lead, tolerance) for a, (new, lead) in zip(alone, short, strict=True)]
        yield counted("keep=1/9 against a short prompt built by hand", equal, "language model without cache", words)
    else:
        yield not_run(
            "keep=1/9 against a short prompt built by hand", "this family cuts an image into tiles: tests only"
        )
    together = pipeline(prompts[: max(2, n_images // 4)])
    equal = [agree(b.tokens, a.tokens, lead, tolerance) for a, b, lead in zip(alone, together, leads, strict=False)]
    yield counted("a padded batch against each prompt alone", equal, "Pipeline", words)
    with mipruner.prune(adapter.model, "mi", SHARE, tokenizer=adapter.tokenizer):
        inside = [stock.generate(x) for x in inputs]
    equal = [agree(new, a.tokens, lead, tolerance) for a, new, lead in zip(alone, inside, leads, strict=True)]
    yield counted("mipruner.prune against Pipeline", equal, "Pipeline", words)
    try:
        engine = Engine(adapter, pruner, SHARE, decoding, static=True)
        equal = [
            agree(engine(p).tokens, a.tokens, lead, tolerance) for p, a, lead in zip(prompts, alone, leads, strict=True)
        ]
    except InputError as error:
        yield not_run("the engine against Pipeline", str(error), source="Pipeline")
    else:
        yield counted("the engine against Pipeline", equal, "Pipeline", words)
