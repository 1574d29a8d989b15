"""Trains a demo model on rendered scenes: with LLaVA-1.5's or Qwen3-VL's architecture.

python run.py task=train_demo                        # LLaVA's architecture, for one GPU
python run.py task=train_demo recipe=qwen3vl         # Qwen3-VL's, from nothing, for one GPU
python run.py task=train_demo recipe=qwen3vl_warm    # Qwen3-VL's, from the shipped LLaVA, for two CPU cores
python run.py task=train_demo recipe=smoke           # a minute on a CPU, to see that it runs

The same command resumes an interrupted run from its last checkpoint, with the same final weights. Losses: the answers;
the alignment of each projected patch with the embeddings of the words for its content (MI-Pruner needs this alignment);
the nouns and colours in the image, from CLS (this makes CLS attention meaningful, like contrastive pre-training in
CLIP). The decoder gets all visual tokens or a random part of them, so that it works with pruned prompts.
"""

import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from experiments import conf
from experiments.benchmarks.demo import Demo
from experiments.demo.examples import IGNORE, THINGS, Examples
from experiments.demo.families import FAMILIES, Llava, Visual, take
from experiments.demo.scenes import COLORS, FULL_CANVAS, NOUNS
from experiments.demo.warm_start import warm_start
from experiments.results import ROOT
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import Prompt, load
from mipruner.models.weights import load_weights
from mipruner.pipeline import Pipeline
from mipruner.pruners import NoPruner

TEMPERATURE = 0.07  # of the cosines between patches and words
RECIPE = (
    "architecture", "betas", "canvases", "init", "questions", "seed", "shape", "stages", "weight_decay", "weights",
    "output", "device", "workers", "checkpoint_every", "evaluate",
)  # fmt: skip
NOT_IDENTITY = ("output", "device", "workers", "checkpoint_every", "evaluate")
"""Keys of a recipe that do not change the weights."""


class Learner(nn.Module):
    """The model, a linear head on CLS (removed after training), and the losses.

    Parameters
    ----------
    recipe : dict
        The resolved config.
    """

    image_mean: Tensor
    image_std: Tensor
    thing_ids: Tensor
    color_ids: Tensor

    def __init__(self, recipe: dict[str, Any]):
        super().__init__()
        folder = ROOT / recipe["shape"]
        torch.manual_seed(recipe["seed"])
        config = AutoConfig.from_pretrained(folder)
        for part, changes in recipe["architecture"].items():
            for name, value in changes.items():
                setattr(getattr(config, part), name, value)
        self.model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        self.family = FAMILIES[config.model_type](self.model)
        self.presence = nn.Linear(config.vision_config.hidden_size, len(NOUNS) + len(COLORS))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        words = self.tokenizer.get_vocab()
        statistics = json.loads(next(folder.glob("*processor_config.json")).read_text(encoding="utf-8"))
        statistics = statistics.get("image_processor", statistics)
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(statistics[name])[:, None, None], persistent=False)
        if recipe["init"]:
            teacher = load_weights(AutoModelForImageTextToText, ROOT / recipe["init"], dtype=torch.float32)
            examples = Examples(self.tokenizer, recipe["seed"], Llava.cell, [FULL_CANVAS], 4, 0.5, recipe["questions"])
            batch = examples.collate([examples[index] for index in range(4)])
            warm_start(self.model, teacher, self.normalised(batch["pixels"]), batch["ids"])
        self.register_buffer("thing_ids", torch.tensor([words[word] for word in THINGS]), persistent=False)
        self.register_buffer("color_ids", torch.tensor([words[word] for word in COLORS]), persistent=False)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise pixels [B, 3, height, width] uint8 like the processor of the model."""
        return (pixels.float() / 255 - self.image_mean) / self.image_std

    def losses(self, batch: dict[str, Tensor], stage: dict[str, Any], rng: random.Random) -> dict[str, Tensor]:
        """Mean losses of one batch. ``rng`` draws the visual tokens for the decoder."""
        visual = self.family.see(self.normalised(batch["pixels"]))
        losses = {"alignment": self.alignment(visual.tokens, batch["things"], batch["colors"])}
        if stage["train"] == "vision":
            return losses
        if visual.cls is not None:
            losses["presence"] = F.binary_cross_entropy_with_logits(
                self.presence(visual.cls).float(), batch["presence"]
            )
        n, n_visual = visual.tokens.shape[:2]
        n_kept = max(1, round(rng.choice(stage["visible"]) * n_visual))
        draw = torch.Generator().manual_seed(rng.getrandbits(62))
        kept = torch.rand(n, n_visual, generator=draw).argsort(1)[:, :n_kept].sort(1).values
        if rng.random() < stage["scramble"]:
            order = torch.rand(n, n_visual, generator=draw).argsort(1)
            visual = self.scramble(visual, order.to(visual.tokens.device))
        logits = self.family.read(visual, kept.to(visual.tokens.device), batch["ids"][:, :-1])
        losses["answers"] = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten())
        return losses

    @torch.autocast("cuda", enabled=False)
    def alignment(self, visual: Tensor, things: Tensor, colors: Tensor) -> Tensor:
        """Cross-entropy of a patch's cosines to words: its thing among non-colours, its colour among colours.

        Parameters
        ----------
        visual : Tensor [B, n_visual, d]
        things, colors : Tensor [B, n_visual]
            Ids of the words; IGNORE for a patch without one.
        """
        embeddings = F.normalize(self.model.get_input_embeddings().weight.float(), dim=-1)
        cosines = F.normalize(visual.float(), dim=-1) @ embeddings.T / TEMPERATURE
        is_color = torch.zeros(cosines.shape[-1], dtype=torch.bool, device=cosines.device)
        is_color[self.color_ids] = True
        among_things = cosines.masked_fill(is_color, -torch.inf).flatten(0, 1)
        among_colors = cosines.masked_fill(~is_color, -torch.inf).flatten(0, 1)
        parts = [(among_things, things.flatten()), (among_colors, colors.flatten())]
        losses = (
            F.cross_entropy(scores[ids != IGNORE], ids[ids != IGNORE]) for scores, ids in parts if (ids >= 0).any()
        )
        return sum(losses, start=cosines.new_zeros(()))

    def scramble(self, visual: Visual, order: Tensor) -> Visual:
        """Visual tokens whose part outside the span of the nouns' embeddings is exchanged with other tokens.

        Deepstack rows are not exchanged, so the model has to read colours from them.
        """
        things = self.model.get_input_embeddings().weight[self.thing_ids].detach().float()
        basis = torch.linalg.qr(things.T).Q.to(visual.tokens.dtype)
        own = visual.tokens @ basis @ basis.T
        return Visual(own + take(visual.tokens - own, order), visual.grid, visual.deepstack)

    def optimizer(self, stage: dict[str, Any], recipe: dict[str, Any]) -> torch.optim.AdamW:
        """AdamW for the parameters of a stage, with weight decay on matrices only."""
        trained = self.family.vision_modules if stage["train"] == "vision" else [self]
        self.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                factor = stage["deepstack_lr"] if "deepstack" in name else 1.0
                decay = recipe["weight_decay"] if parameter.ndim > 1 else 0.0
                groups.setdefault((factor, decay), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": ps, "factor": factor, "weight_decay": decay} for (factor, decay), ps in groups.items()],
            betas=tuple(recipe["betas"]),
        )


def learning_rate(step: int, stage: dict[str, Any]) -> float:
    """Linear warm-up, then cosine decay to zero at the end of the stage."""
    if step < stage["warmup"]:
        return stage["lr"] * (step + 1) / stage["warmup"]
    done = (step - stage["warmup"]) / max(1, stage["steps"] - stage["warmup"])
    return stage["lr"] * 0.5 * (1 + np.cos(np.pi * done))


def train(recipe: dict[str, Any]) -> Path:
    """Run all stages, from the last checkpoint if there is one. Returns the folder of the finished model."""
    device = recipe["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    output = Path(recipe["output"])
    output.mkdir(parents=True, exist_ok=True)
    learner = Learner(recipe).to(device)
    checkpoint = Checkpoint(output / "checkpoint.safetensors", recipe)
    done = checkpoint.load_weights(learner)
    first, n_examples = 0, 0
    for number, stage in enumerate(recipe["stages"]):
        start = min(max(done - first, 0), stage["steps"])
        if start < stage["steps"]:
            optimizer = learner.optimizer(stage, recipe)
            if start:
                checkpoint.load_optimizer(optimizer)
            batches = load_examples(learner, recipe, stage, n_examples, start, device)
            title = f"stage {number + 1} of {len(recipe['stages'])}"
            bar = tqdm(batches, title, initial=start, total=stage["steps"], unit="step", file=sys.stderr)
            for step, batch in enumerate(bar, start):
                losses = take_step(
                    learner, optimizer, recipe, stage, step, random.Random(f"{recipe['seed']} {first + step}"), batch
                )
                bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
                if (step + 1) % recipe["checkpoint_every"] == 0 or step + 1 == stage["steps"]:
                    checkpoint.save(learner, optimizer, first + step + 1, losses)
        first += stage["steps"]
        n_examples += stage["steps"] * stage["batch"]
    return export(learner, recipe, output)


def take_step(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
    stage: dict[str, Any],
    step: int,
    rng: random.Random,
    batch: dict[str, Tensor],
) -> dict[str, float]:
    """Do one update and return the losses. Raises FloatingPointError if they are not finite."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, stage) * group["factor"]
    device = batch["ids"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        losses = learner.losses(batch, stage, rng)
    loss = sum(recipe["weights"][name] * value for name, value in losses.items())
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return {name: value.item() for name, value in losses.items()}


def load_examples(
    learner: Learner, recipe: dict[str, Any], stage: dict[str, Any], n_before: int, start: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Batches of a stage from step ``start`` on, rendered by worker processes."""
    examples = Examples(
        learner.tokenizer,
        recipe["seed"],
        learner.family.cell,
        recipe["canvases"],
        stage["batch"],
        stage["crowded"],
        recipe["questions"],
    )
    workers = max(0, (os.cpu_count() or 1) - 1) if recipe["workers"] is None else recipe["workers"]
    loader = DataLoader(
        examples,
        batch_size=stage["batch"],
        sampler=range(n_before + start * stage["batch"], n_before + stage["steps"] * stage["batch"]),
        collate_fn=examples.collate,
        num_workers=workers,
        pin_memory=device == "cuda",
    )
    for batch in loader:
        yield {name: values.to(device, non_blocking=True) for name, values in batch.items()}


class Checkpoint:
    """Weights and optimizer state after a step, in one safetensors file, replaced atomically."""

    def __init__(self, path: Path, recipe: dict[str, Any]):
        self.path = path
        self.recipe = json.dumps(
            {key: value for key, value in recipe.items() if key not in NOT_IDENTITY}, sort_keys=True
        )

    def save(self, learner: Learner, optimizer: torch.optim.Optimizer, step: int, losses: dict[str, float]) -> None:
        tensors: dict[str, Tensor] = {f"weights.{name}": parameter for name, parameter in learner.named_parameters()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"step": str(step), "recipe": self.recipe, "losses": json.dumps(losses)}
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata)
        os.replace(partial, self.path)

    def load_weights(self, learner: Learner) -> int:
        """Load the weights into the learner. Returns the number of finished steps, 0 without a checkpoint.

        Raises
        ------
        ValueError
            If the checkpoint belongs to another recipe.
        """
        if not self.path.exists():
            return 0
        with safe_open(self.path, "pt") as file:
            if file.metadata()["recipe"] != self.recipe:
                raise ValueError(f"{self.path} is of another recipe: remove it, or choose another output=")
            with torch.no_grad():
                for name, parameter in learner.named_parameters():
                    parameter.copy_(file.get_tensor(f"weights.{name}"))
            return int(file.metadata()["step"])

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        with safe_open(self.path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part, _, rest = key.partition(".")
                if part == "optimizer":
                    index, name = rest.split(".")
                    state.setdefault(int(index), {})[name] = file.get_tensor(key)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def export(learner: Learner, recipe: dict[str, Any], output: Path) -> Path:
    """Write the model as a folder for `from_pretrained`: bf16 safetensors, tokenizer and processor.

    Weights have the names of published LLaVA-1.5 checkpoints, which all versions of transformers and vLLM read.
    transformers 5.17 and later save the vision tower under other names.
    """
    folder = output / "model"
    learner.model.to(torch.bfloat16).save_pretrained(folder)
    path = folder / "model.safetensors"
    tower = re.compile(r"^vision_tower\.(?!vision_model\.)")
    weights = {tower.sub("vision_tower.vision_model.", name): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    shape = ROOT / recipe["shape"]
    for file in shape.iterdir():
        if file.name != "README.md" and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    return folder


def evaluate(folder: Path, n_scenes: int, canvases: list, device: str) -> dict[str, dict[str, float]]:
    """Accuracy with all visual tokens on scenes that were not used in training, by density."""
    decoding = Decoding(max_new_tokens=conf.read("dataset", "demo")["max_new_tokens"])
    pipeline = Pipeline(load(folder, dtype="float32", device=device), NoPruner(), 1.0, decoding)
    scores = {}
    for density in ("sparse", "crowded"):
        demo = Demo(density, n_scenes, canvases=canvases)
        samples, predictions = demo.samples(), []
        by_scene: dict[str, list] = {}
        for sample in samples:
            by_scene.setdefault(sample.image_id, []).append(sample)
        for image_id, group in tqdm(by_scene.items(), f"evaluate {density}", unit="scene", file=sys.stderr):
            images = demo.images(image_id)
            prompts = [Prompt(text=sample.text, images=images) for sample in group]
            predictions += [answer.text for answer in pipeline(prompts)]
        scores[density] = demo.metrics(samples, predictions, demo.score(samples, predictions))
    return scores


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    recipe = {key: config[key] for key in RECIPE}
    if recipe["seed"] == 0:
        raise InputError("the demo's scenes have seed 0; train with another")
    try:
        folder = train(recipe)
    except (ValueError, FloatingPointError) as error:
        raise InputError(str(error)) from error
    device = "cuda" if recipe["device"] == "auto" and torch.cuda.is_available() else "cpu"
    scores = evaluate(folder, recipe["evaluate"], recipe["canvases"], device)
    (folder.parent / "evaluation.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
    for density, metrics in scores.items():
        print(density, "  ".join(f"{name} {value:.1f}" for name, value in metrics.items()))
    print(folder)
