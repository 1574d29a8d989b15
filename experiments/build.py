"""From a config to the objects it names: a model on its device, a benchmark, a pruner, a budget."""

import json
from functools import lru_cache
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.benchmarks.base import Benchmark, BenchmarkError
from experiments.results import ROOT
from mipruner.models import Adapter, load
from mipruner.pruners import DecoderPruner, Pruner
from mipruner.selection import Auto


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config, with what cannot change a number set to one value, so that it makes no second cell.

    These are the budget of a pruner that keeps everything, the seed where nothing is drawn, and what only keep=auto
    or a single picture reads.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    if "seed" not in config["pruner"] and config["limit"] is None and not config["decoding"]["temperature"]:
        config["seed"] = config["decoding"]["seed"] = 0
    if config["pruner"]["name"] == "none":
        config["keep"] = 1.0
    if config["keep"] != "auto":
        del config["quality"], config["keep_max"]
    del config["image"], config["question"]
    return config


def budget(config: dict[str, Any]) -> int | float | Auto:
    return Auto(config["quality"], config["keep_max"]) if config["keep"] == "auto" else config["keep"]


def device(config: dict[str, Any]) -> str:
    if config["device"] != "auto":
        return config["device"]
    return "cuda" if torch.cuda.is_available() else "cpu"


def model(config: dict[str, Any]) -> Adapter:
    """The adapter of a resolved config; a sweep over pruners loads its model once. Raises `ModelError`."""
    options = config["model"] | {key: config[key] for key in ("positions",) if key in config}
    return _model(json.dumps(options), device(config))


@lru_cache(maxsize=1)
def _model(options: str, where: str) -> Adapter:
    options = json.loads(options)
    options.pop("name")
    local = ROOT / options["path"]
    return load(**options | {"path": local if local.is_dir() else options["path"]}, device=where)


def benchmark(config: dict[str, Any]) -> Benchmark:
    """The benchmark of a resolved config or record; the next cell that names it too gets the same one.

    Raises
    ------
    BenchmarkError
        If its options do not fit.
    """
    return _benchmark(json.dumps(config["dataset"]["benchmark"]))


@lru_cache(maxsize=1)
def _benchmark(options: str) -> Benchmark:
    try:
        return instantiate(json.loads(options))
    except InstantiationException as error:
        raise BenchmarkError(str(error.__cause__ or error)) from error


def pruner(config: dict[str, Any]) -> Pruner | DecoderPruner:
    return instantiate({key: value for key, value in config["pruner"].items() if key != "name"})
