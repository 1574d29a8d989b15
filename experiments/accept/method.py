"""Section 5: checks MI-Pruner's picks on stored features, and its fast path against the plain path."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from experiments.accept.report import Line, check, not_run
from mipruner import pmi, selection
from mipruner.features import Features
from mipruner.models import Adapter
from mipruner.pruners.mi import MIPruner

FIXTURE = Path(__file__).with_name("picks.safetensors")
N_KEEP = 16


def stored_cases() -> Iterator[tuple[str, dict[str, Any], dict[str, Any], list[int]]]:
    """Name, hyperparameters, fields of `Features` and kept indices of each stored case."""
    with safe_open(str(FIXTURE), "pt") as file:
        features = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 safe_open is no mapping
        for name, case in json.loads(file.metadata()["cases"]).items():
            yield name, case["options"], features, case["kept"]


def check_method(adapter: Adapter) -> Iterator[Line]:
    device = adapter.device
    for name, options, tensors, kept in stored_cases():
        features = Features(**{key: x.to(device) for key, x in tensors.items()})
        found = MIPruner(**options)(features, N_KEEP).indices.tolist()
        shared = len(set(found) & set(kept))
        yield check(f"picks of mi, {name}", found == kept, kept, f"{shared} of {len(kept)} shared", "", FIXTURE.name)
    width = cast(Tensor, adapter.model.get_input_embeddings().weight).shape[1]
    for n_visual, n_keep in ((576, 64), (1024, 256)):
        yield compare_fast(n_visual, n_keep, width, device)
    if device.type != "cuda":
        yield not_run("Triton kernels against the plain path", f"the device is {device.type}: kernels need a GPU")


def compare_fast(n_visual: int, n_keep: int, width: int, device: torch.device) -> Line:
    """Compare the picks of the default path (kernels on a GPU, fused elsewhere) with `pmi` and `selection.greedy`."""
    generator = torch.Generator().manual_seed(n_visual)
    visual = torch.randn(n_visual, width, generator=generator).to(device)
    text = torch.randn(12, width, generator=generator).to(device)
    pruner = MIPruner(lam=0.5)
    found = pruner(Features(visual, text), n_keep).indices.tolist()
    plain = selection.greedy(
        pmi.relevance(visual, text, pruner.tau, pruner.aggregation, pruner.normalization),
        pmi.self_pmi(visual, pruner.tau, pruner.normalization),
        n_keep,
        pruner.lam,
    )
    wanted = plain.sort().values.tolist()
    shared = len(set(found) & set(wanted))
    name = f"{'kernels' if device.type == 'cuda' else 'fused path'} at {n_visual} x {width} to {n_keep}"
    return check(name, found == wanted, f"the plain path's {n_keep}", f"{shared} of {n_keep} shared")
