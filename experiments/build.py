"""Creates the objects that a config names: a model on its device, a benchmark, a pruner, a budget."""

import json
import sys
from copy import deepcopy
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isabstract
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, cast

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from experiments import benchmarks, conf, settings
from experiments.benchmarks.base import Benchmark, BenchmarkError
from experiments.results import ROOT, parse_method
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import FAMILIES, Adapter, load
from mipruner.pruners import Method, check_kinds, make
from mipruner.selection import Auto
from mipruner.selection import budget as n_tokens


def resolve(cfg: DictConfig | dict[str, Any]) -> dict[str, Any]:
    """The resolved config, with one value for keys that cannot change a number.

    So these keys do not create a second cell.

    They are the budget of ``none``, the seed if nothing is random, and keys that only keep=auto or a single image uses.

    Raises
    ------
    InputError
        If a value has the wrong type or is out of range.
    """
    found = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else deepcopy(cfg)
    config = cast(dict[str, Any], found)
    settings.check(config)
    if "seed" not in config["pruner"] and config["limit"] is None and not config["decoding"]["temperature"]:
        config["seed"] = config["decoding"]["seed"] = 0
    config["model"]["name"] = config["model"]["name"] or _name(config["model"]["path"])
    if config["pruner"]["name"] == "none":
        config["keep"] = 1.0
    if config["engine"]["name"] == "pipeline":
        del config["engine"]
    if config["keep"] != "auto":
        del config["quality"], config["keep_max"]
    del config["image"], config["question"]
    for group in ("model", "dataset"):
        config[group] = conf.without_about(config[group])
    return config


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the values of its interpolations."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(config), resolve=True))


def budget(config: dict[str, Any]) -> int | float | Auto:
    """Budget of a resolved config. Raises `InputError` if it is not valid for any image."""
    keep = Auto(config["quality"], config["keep_max"]) if config["keep"] == "auto" else config["keep"]
    n_tokens(keep, sys.maxsize)
    return keep


def device(config: dict[str, Any]) -> str:
    """Device of a resolved config. Raises `InputError` if torch does not find it here."""
    name = config["device"]
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):  # of a device that is not there, of torch without CUDA
        raise InputError(f"device={name}: torch finds none here: give auto or cpu") from None
    return name


def _name(path: str | None) -> str:
    """Name, in records, of a model that is given by its path."""
    if not path:
        raise InputError("model=any needs a model: model.path=google/gemma-3-4b-it, or a folder")
    return Path(path).name


def model(config: dict[str, Any]) -> Adapter:
    """Adapter of a resolved config. A sweep over pruners loads its model once.

    Raises
    ------
    ModelError
        If the model cannot be loaded.
    InputError
        If the model type has no adapter.
    """
    adapter = any_model(config)
    if not adapter.reads_inside:
        raise InputError(
            f"{config['model']['path']} is a {adapter.model.config.model_type}, which has no adapter here and runs by "
            "its own processor and generate: benchmarks and image= question= take it, this task takes only "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return adapter


def any_model(config: dict[str, Any]) -> Adapter:
    """Like `model`, but also for a model type without an adapter."""
    _name(config["model"]["path"])  # raises an error that says what to do if there is none
    options = config["model"] | {key: config[key] for key in ("positions",) if key in config}
    return _model(json.dumps(options), device(config))


@lru_cache(maxsize=1)
def _model(words: str, where: str) -> Adapter:
    options = conf.without_about(json.loads(words))
    for key in ("name", "family"):
        options.pop(key, None)
    return load(**options | {"path": weights(options["path"])}, device=where)


def weights(path: str) -> str:
    """Folder of a model that is part of the repository, or the name on the hub."""
    return str(ROOT / path) if (ROOT / path).is_dir() else path


def benchmark(config: dict[str, Any]) -> Benchmark:
    """Benchmark of a resolved config or record. The next cell with the same benchmark reuses the object.

    Raises
    ------
    BenchmarkError
        If its options are invalid.
    """
    return _benchmark(json.dumps(config["dataset"]["benchmark"]))


@lru_cache(maxsize=1)
def _benchmark(options: str) -> Benchmark:
    return make_benchmark(**{"name": None} | json.loads(options))


def make_benchmark(name: str, **options: Any) -> Benchmark:
    """Create the benchmark ``name``, see `benchmark_class`, and its judge from the options of the judge.

    Raises
    ------
    BenchmarkError
        If there is no such benchmark or option, or a value is invalid.
    """
    cls = benchmark_class(name)
    if options.get("judge"):
        from experiments.judge import Judge  # imports openai, which takes half a second

        options["judge"] = _construct(Judge, options["judge"], BenchmarkError)
    return _construct(cls, options, BenchmarkError)


def benchmark_class(name: str) -> type[Benchmark]:
    """Benchmark class of a file in experiments/benchmarks, or of an entry point of the group `mipruner.benchmarks`.

    Nothing else is imported, because records of other people also name benchmarks. Raises `BenchmarkError`.
    """
    values = []
    if name in [module.name for module in iter_modules(benchmarks.__path__)]:
        module = import_module(f"{benchmarks.__name__}.{name}")
        values = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    values += [entry.load() for entry in entry_points(group="mipruner.benchmarks") if entry.name == name]
    for value in values:
        if isinstance(value, type) and issubclass(value, Benchmark) and not isabstract(value):
            return value
    raise BenchmarkError(
        f"there is no benchmark {name!r}: neither a file of experiments/benchmarks nor an entry point "
        "mipruner.benchmarks"
    )


def pruner(config: dict[str, Any]) -> Method:
    return make(**config["pruner"])


def method(words: str, config: dict[str, Any]) -> Method:
    """Pruner from words such as ``mi lam=1``, with the options of its YAML file for the model, dataset and seed.

    Raises
    ------
    InputError
        If there is no such pruner or option, or the value is invalid.
    """
    name, given = parse_method(words)
    shared = {key: config[key] for key in ("model", "dataset", "seed")}
    file = conf.read("pruner", name) if name in conf.names("pruner") else {"name": name}  # of another package
    options = resolved(shared | {"pruner": file})["pruner"]
    return make(**options | {key: yaml.safe_load(value) for key, value in given.items()})


def decoding(config: dict[str, Any]) -> Decoding:
    """Decoding settings of a resolved config. Raises `InputError`."""
    return _construct(Decoding, config["decoding"], InputError)


def _construct(cls: type[Any], options: Any, error_class: type[Exception]) -> Any:
    try:
        check_kinds(cls, options)
        return cls(**options)
    except TypeError as error:
        raise error_class(f"{cls.__name__}: {str(error).split('() ')[-1]}") from error
    except ValueError as error:
        raise error_class(str(error)) from error
