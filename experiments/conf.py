"""Reads YAML files of conf without Hydra: a file merged with its defaults, titles, shapes."""

import re
from functools import cache
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf

from experiments.results import ROOT

CONF = ROOT / "conf"
ABOUT = ("title", "shown", "shape")
"""Keys of a model or dataset that describe it and do not change a run."""


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def read(group: str, name: str) -> dict[str, Any]:
    """conf/<group>/<name>.yaml merged over the files that its defaults name. Interpolations are not resolved.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    own = yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    merged: Any = OmegaConf.create({})
    for base in own.pop("defaults", []):
        base, _, part = base.partition("@") if isinstance(base, str) else ("_self_", "", "")
        if base != "_self_":
            merged = OmegaConf.merge(merged, {part: read(group, base)} if part else read(group, base))
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(merged, own), resolve=False))


def title(group: str, name: str) -> str:
    """Title of a model or dataset in tables and figures; its name if conf has no such file."""
    return read(group, name).get("title", name) if name in names(group) else name


@cache
def experiment_title(name: str) -> str:
    """First sentence of a file in conf/experiment, after its ``@package`` line; the name if there is no file."""
    path = CONF / "experiment" / f"{name}.yaml"
    if not path.exists():
        return name
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    words = []
    for line in lines:
        if not (text := line.removeprefix("#").strip()):
            break
        words.append(text)
    return re.split(r"\.(?= [A-Z]|$)", " ".join(words))[0]


def without_about(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a model or dataset for a run."""
    return {key: value for key, value in options.items() if key not in ABOUT}


def by_family(default: Any, others: dict[str, Any], *, _root_: DictConfig) -> Any:
    """Value of ``${by_family:a,{qwen_vl:b}}`` in conf/pruner: b for models with ``family: qwen_vl``, else a."""
    return others.get(_root_.model.get("family"), default)


OmegaConf.register_new_resolver("by_family", by_family, replace=True)
