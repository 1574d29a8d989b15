"""Sections 1 and 2: checks machine and packages, files of the checkpoint, and loaded weights."""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from experiments.accept.report import Line, check, not_run
from experiments.flops import architecture, build
from experiments.results import versions
from mipruner.errors import InputError, ModelError
from mipruner.models import Adapter
from mipruner.models.hub import locate

TESTED = {"python": ((3, 11), (3, 12)), "torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 23))}
"""Oldest and newest minor version in the tests of this repository."""

HEADROOM = 1.2
"""Memory for activations and the allocator, as a factor on weights and KV cache."""


def free_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) / 2**20


def check_environment(config: dict[str, Any], device: torch.device, cost: dict[str, Any] | None) -> Iterator[Line]:
    """Lines of section 1. ``cost`` is the result of `estimate` for the model; None if its shape is unknown."""
    model = config["model"]
    yield check("device", True, "cuda or cpu", torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    for package, version in {"python": platform.python_version(), **versions()}.items():
        if package in TESTED:
            oldest, newest = TESTED[package]
            minor = tuple(int(part) for part in version.split(".")[:2])
            span = f"{'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))}"
            yield check(f"version of {package}", oldest <= minor <= newest, span, version, source="tests")
    if cost is None:
        yield not_run("memory", "no shape of this model is known before it is loaded", source="task=estimate")
    else:
        need = HEADROOM * (cost["weights_gib"] + cost["kv_cache_mib"]["full"] / 1024)
        free = free_gib(device)
        yield check(
            "memory", free >= need, f"at least {need:.1f} GiB free", f"{free:.1f} GiB", source="task=estimate x 1.2"
        )
    dtype = model["dtype"]
    fits = dtype != "bfloat16" or device.type == "cpu" or torch.cuda.is_bf16_supported()
    yield check("dtype", fits, dtype, f"{dtype} is {'' if fits else 'not '}supported by the device")
    kind = model["attn_implementation"]
    there = kind != "flash_attention_2" or importlib.util.find_spec("flash_attn") is not None
    yield check("attention implementation", there, kind, kind if there else "the package flash-attn is not installed")


def check_weights(config: dict[str, Any], load: Callable[[], Adapter]) -> Iterator[Line]:
    """Lines of section 2: files, checksums, and all weights. ``load`` loads the model for all sections."""
    model = config["model"]
    try:
        folder = locate(model["path"], model["revision"])
    except ModelError as error:
        yield check("files", False, "a folder or a hub id that can be reached", error)
        return
    yield check("files", True, "config.json, a tokenizer and all safetensors", folder)
    yield revision(folder, model["revision"])
    yield from checksums(folder)
    transformers_logging.set_verbosity_error()
    source = "the checkpoint against transformers"
    try:
        loaded = load().model
    except ModelError as error:
        yield check("all weights are loaded", False, "none missing, none unexpected", error, source=source)
        return
    yield check("all weights are loaded", True, "none missing, none unexpected", "all", source=source)
    try:
        shape = build(architecture(model["name"]), torch.bfloat16)
    except InputError as error:
        shape, reason = None, str(error)
    if model.get("quantization"):
        shape, reason = None, "quantized weights have other shapes"
    if shape is None:
        yield not_run("shapes of all tensors", reason)
    else:
        wanted = {name: tuple(p.shape) for name, p in shape.named_parameters()}
        have = {name: tuple(p.shape) for name, p in loaded.named_parameters()}
        wrong = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
        found = f"{len(have)} tensors, {len(wrong)} of another shape" + (f", first {wrong[0]}" if wrong else "")
        yield check("shapes of all tensors", not wrong, f"those of {model['name']}", found, source="conf/model")
    yield statistics(loaded)


def revision(folder: Path, asked: str | None) -> Line:
    if folder.parent.name != "snapshots":
        return not_run("revision", "a folder that is not of the hub's cache has no revision", expected=asked or "any")
    return check("revision", asked in (None, folder.name), asked or "any", folder.name)


def checksums(folder: Path) -> Iterator[Line]:
    """Compare the SHA-256 of each weight file with its name in the hub's cache, and the total size with the index."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        stated = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        held = sum(tensor_bytes(file) for file in files)
        if stated is None:
            yield not_run("size of the weights", "the index states none")
        else:
            yield check(
                "size of the weights", int(stated) == held, f"{stated} bytes", f"{held} bytes", source=index.name
            )
    blobs = [(file, file.resolve().name) for file in files if file.is_symlink() and len(file.resolve().name) == 64]
    if not blobs:
        yield not_run("SHA-256 of the weight files", "only files in the hub's cache carry their checksum")
        return
    wrong = [file.name for file, name in blobs if sha256(file) != name]
    found = f"{len(blobs) - len(wrong)} of {len(blobs)} equal" + (f", not {', '.join(wrong)}" if wrong else "")
    yield check("SHA-256 of the weight files", not wrong, "that of the hub", found, source="names in the hub's cache")


def tensor_bytes(file: Path) -> int:
    """Number of bytes of the tensors in a safetensors file, without its header."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size - 8 - header


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def statistics(model: torch.nn.Module) -> Line:
    """Check that weights are finite and no matrix is constant (left at zero, or filled by a failed conversion)."""
    odd, count = [], 0
    for name, weight in model.named_parameters():
        values, count = weight.detach().float(), count + 1
        if not values.isfinite().all():
            odd.append(f"{name} is not finite")
        elif weight.ndim > 1 and values.amax() == values.amin():
            odd.append(f"{name} is constant")
    found = f"{count} tensors, all so" if not odd else f"{len(odd)} of {count} not so: {odd[0]}"
    return check("statistics of all tensors", not odd, "finite, matrices not constant", found)
