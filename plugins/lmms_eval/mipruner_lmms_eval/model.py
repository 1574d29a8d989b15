"""Answers requests of lmms-eval through `mipruner.pipeline.Pipeline`."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from mipruner import PRUNERS
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import Prompt, load
from mipruner.pipeline import Pipeline
from mipruner.pruners import make


class Pruned(lmms):
    """Any supported model with any pruner. Only images, at least one per sample; only generation, no likelihoods.

    Parameters
    ----------
    pretrained : str
        Folder or hub id, see `mipruner.models.load`.
    pruner : str
        A name of `mipruner.PRUNERS`.
    keep : int or float
        Budget per prompt, see `mipruner.budget`.
    batch_size : int
    device : str, optional
        By default the device of this process according to accelerate.
    options
        Hyperparameters of the pruner (``lam=1``), or options of `mipruner.models.load` (``prompt=vicuna_v1``).
    """

    def __init__(
        self,
        pretrained: str,
        pruner: str = "mi",
        keep: int | float = 0.25,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__()
        names = {field.name for field in fields(PRUNERS.get(pruner, PRUNERS["none"]))} & options.keys()
        method = make(pruner, **{name: options.pop(name) for name in names})
        self.accelerator = Accelerator()
        self.device = self.accelerator.device if device in (None, "cuda") else device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self.pipeline = Pipeline(load(pretrained, device=str(self.device), **options), method, keep)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests. Requests with the same decoding settings share batches."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(k)
        with tqdm(total=len(requests), disable=self.rank > 0, desc="Model Responding") as bar:
            for members in groups.values():
                options = dict(requests[members[0]].args[1])
                self.pipeline.decoding = decoding(options)
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    told = self.pipeline([self.prompt(requests[k]) for k in batch])
                    answers |= {k: cut(one.text, options.get("until")) for k, one in zip(batch, told, strict=True)}
                    bar.update(len(batch))
        return [answers[k] for k in range(len(requests))]

    def prompt(self, request: Instance) -> Prompt:
        context, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if not visuals or not all(isinstance(visual, Image.Image) for visual in visuals):
            raise InputError(f"sample {doc_id} of {task} has no image, or not only images: nothing to prune")
        return Prompt(context.replace("<image>", "").strip(), visuals, sample=f"{task}/{doc_id}")

    def loglikelihood(self, requests):
        raise NotImplementedError("pruned models generate; tasks that compare likelihoods are not supported")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("pruned models answer one question at a time here")


def decoding(options: dict[str, Any]) -> Decoding:
    """Decoding settings from lmms-eval's generation_kwargs."""
    drawn = options.get("do_sample", True) and options.get("temperature")
    return Decoding(
        max_new_tokens=options.get("max_new_tokens", 128),
        temperature=float(options["temperature"]) if drawn else 0.0,
        top_p=float(options.get("top_p") or 1.0) if drawn else 1.0,
        top_k=int(options.get("top_k") or 0) if drawn else 0,
    )


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
