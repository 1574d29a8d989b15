"""Checks types and ranges of the command line's keys, and suggests similar names for unknown keys.

pydantic models are used instead of Hydra's structured configs. Structured configs have no ranges and no union with a
word (``keep=auto``), round 2.5 to 2 without an error, and need a class for each file of conf/pruner and conf/dataset,
where users add files.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from experiments.results import ROOT
from mipruner.errors import InputError
from mipruner.pruners import KINDS


def _runs(name: str) -> str:
    try:
        kind = "cpu" if name == "auto" else torch.device(name).type
    except RuntimeError:
        raise ValueError("should be auto, cpu, cuda, cuda:0 or mps") from None
    if kind == "meta":
        raise ValueError("holds no numbers: give auto, cpu, cuda, cuda:0 or mps")
    return name


class _Group(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]


class Model(_Group):
    name: Name | None
    path: Name | None
    revision: Name | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: Name | None = None
    square: bool = False
    thinking: bool | None = None
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None


class Dataset(_Group):
    name: Name
    lam: Annotated[float, Field(ge=0, le=1)]
    max_new_tokens: Positive
    path: Name | None = None


class Decoding(_Group):
    max_new_tokens: Positive
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Natural
    seed: int


class Engine(_Group):
    name: Literal["pipeline", "server"]
    concurrency: Positive = 1
    max_retries: Natural = 0
    timeout_s: Annotated[float, Field(gt=0)] = 1


class Settings(_Group):
    """The resolved config. A task adds its own keys, see `_check_task`."""

    model: Model
    dataset: Dataset
    decoding: Decoding
    engine: Engine
    keep: int | float | Literal["auto"]
    quality: Annotated[float, Field(gt=0, le=1)]
    keep_max: int | float
    positions: Literal["repack", "keep"]
    text_scope: Literal["user", "question"]
    seed: Natural
    limit: Positive | None
    shard: str | None
    image: str | None
    question: str | None
    batch_size: Positive
    loader_threads: Positive
    device: Annotated[str, AfterValidator(_runs)]
    n_masks: Natural
    warmup: Natural = 0
    repetitions: Positive = 1
    results: Name
    overwrite: bool


def check(config: dict[str, Any]) -> None:
    """Raise `InputError` with the key if a value has the wrong type or is out of range."""
    try:
        Settings.model_validate(config)
    except ValidationError as error:
        raise InputError(_words(error)) from None
    _check_task(config)
    path, revision = config["model"]["path"], config["model"].get("revision")
    if path is None and config["model"]["name"] is not None:
        raise InputError("model.path=null: give a folder, or a name on the hub such as google/gemma-3-4b-it")
    if revision is not None and path is not None and ((ROOT / path).is_dir() or Path(path).is_dir()):
        raise InputError(f"model.revision={revision}: {path} is a folder here, and only the hub has revisions")


def _words(error: ValidationError) -> str:
    """The first error; for a value with several possible types, the error of each."""
    told = error.errors(include_url=False)
    first, depth = told[0], 1 + (told[0]["loc"][0] in ("model", "dataset", "decoding", "engine"))
    name, value = ".".join(map(str, first["loc"][:depth])), first["input"]
    said = [one["msg"] for one in told if one["loc"][:depth] == first["loc"][:depth]]
    wanted = " or ".join(dict.fromkeys(re.sub("^(Value error,|Input|String) ", "", words) for words in said))
    return f"{name} is missing" if first["type"] == "missing" else f"{name}={_shown(value)}: it {wanted}"


def _shown(value: Any) -> Any:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _check_task(config: dict[str, Any]) -> None:
    """Raise `InputError` if a key of the task is of another kind than its default."""
    file = ROOT / "conf/task" / f"{config['task'].rpartition('.')[2]}.yaml"
    for key, default in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        kind, value = type(default), config.get(key)
        if key not in config or key in Settings.model_fields or kind not in (*KINDS, list) or default is None:
            continue
        is_number = kind is float and type(value) is int
        if type(value) is not kind and not is_number:
            wanted = KINDS.get(kind) or f"a list such as [{','.join(map(str, default))}]"
            raise InputError(f"{key}={_shown(value)}: it should be {wanted}")


@cache
def keys() -> frozenset[str]:
    """First words of all keys: of conf/config.yaml, of groups, of tasks."""
    groups = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    files = [file for pattern in ("*.yaml", "task/*.yaml", "recipe/*.yaml") for file in (ROOT / "conf").glob(pattern)]
    roots = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    return frozenset(groups.union(*roots)) - {"defaults"}


def check_keys(overrides: Sequence[str]) -> None:
    """Raise `InputError` for an unknown key of the command line, with similar names."""
    for word in overrides:
        key, is_override, _ = word.partition("=")
        first = key.lstrip("+~").split(".")[0].split("/")[0].split("@")[0]
        if not is_override or word.startswith("-") or first in keys():
            continue
        near = get_close_matches(first, sorted(keys()), n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(keys()))}"
        raise InputError(f"unknown key {first!r}: {hint}")
