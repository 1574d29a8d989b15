"""Reads and checks the setting ``mipruner`` of ``--hf-overrides`` before the model is loaded."""

from dataclasses import dataclass, field
from typing import Any

import torch

from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners import PRUNERS, DecoderPruner, Method, Pruner, make
from mipruner.selection import budget

GRID = frozenset({"grid"})
GRIDS = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
"""Families whose image tokens form one grid."""


@dataclass(frozen=True)
class Settings:
    """The content of ``mipruner`` in the model's config.

    Attributes
    ----------
    pruner : Pruner
    keep : int or float
        Budget of a request without its own, see `mipruner.selection.budget`.
    cache_bytes : int
        Limit in bytes of the vision rows of each worker, in host memory.
    """

    pruner: Pruner
    keep: int | float
    cache_bytes: int = field(default=2**30)


def read(config: Any) -> Settings | None:
    """Settings in a model's config; None if there are none.

    Raises
    ------
    InputError
        For an invalid budget, or an invalid option.
    """
    given = getattr(config, "mipruner", None)
    if given is None:
        return None
    if not isinstance(given, dict) or (unknown := given.keys() - {"pruner", "keep", "options", "cache_bytes"}):
        raise InputError(
            f"mipruner={given!r} is not a setting{_named(unknown) if isinstance(given, dict) else ''}: "
            'give {"pruner": "mi", "keep": 0.25, "options": {"lam": 0.5}}'
        )
    keep = given.get("keep", 1.0)
    check_keep(keep)
    pruner = make(given.get("pruner", "mi"), **given.get("options", {}))
    return Settings(pruner, keep, given.get("cache_bytes", Settings.cache_bytes))


def check_runs(pruner: Method, model_type: str) -> None:
    """Raise `InputError` for a pruner that vLLM cannot run."""
    provided = frozenset({"vocabulary"}) | (GRID if model_type in GRIDS else frozenset())
    if reason := why_not(pruner, provided):
        name = next(name for name, cls in PRUNERS.items() if cls is type(pruner))
        head = f"pruner={name!r} cannot run in vLLM with a {model_type}"
        raise InputError(f"{head}: {reason}. {methods(provided)}")


def why_not(pruner: Method, provided: frozenset[str]) -> str | None:
    """Reason why vLLM cannot run a pruner on tokens, text and the fields ``provided``; None if it can.

    The method is tried on a few artificial tokens, so errors of `select` appear before the model is loaded.
    """
    if isinstance(pruner, DecoderPruner):
        return "it drops tokens inside the decoder"
    if not isinstance(pruner, Pruner):
        return "it makes the image smaller before it is encoded, which the sender of the image can do"
    if lacking := pruner.needs - provided:
        if lacking == GRID:
            return "it needs image tokens on one grid, which those of this model are not"
        return "it reads what the vision encoder computes inside, which vLLM does not return"
    rows = torch.eye(16)
    known = {"grid": (4, 4), "vocabulary": rows}
    try:
        chosen = pruner(Features(rows, rows[:3], **{name: known[name] for name in pruner.needs & provided}), 4)
    except InputError as error:
        return str(error)
    if chosen.indices.shape[-1] != 4 or chosen.embeds is not None or chosen.merge is not None:
        return "it does not select as many tokens as the budget says, and vLLM sets the prompt's length beforehand"
    return None


def methods(provided: frozenset[str]) -> str:
    """Pruners that run, and the others with the reason."""
    reasons: dict[str | None, list[str]] = {}
    for name, cls in PRUNERS.items():
        reasons.setdefault(why_not(cls(), provided), []).append(name)
    can = ", ".join(reasons.pop(None))
    return f"These can: {can}. These cannot: " + "; ".join(f"{', '.join(n)} ({why})" for why, n in reasons.items())


def check_pruner(running: Pruner, name: Any, options: Any) -> None:
    """Raise `InputError` if a request names another pruner than that of the server."""
    if not isinstance(name, str) or not isinstance(options, dict):
        raise InputError(f"pruner={name!r} with options={options!r} is none: give a name and a mapping")
    if (asked := make(name, **options)) != running:
        raise InputError(f"this server prunes with {running}, and the request asks for {asked}: restart it with that")


def check_keep(keep: Any) -> None:
    """Raise `InputError` for an invalid budget."""
    if keep == "auto":
        raise InputError(
            "keep='auto' cannot run in vLLM: it needs the length of the prompt before the image is encoded. Give a "
            "fraction in (0, 1] or a whole number of tokens"
        )
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not keep > 0:
        raise InputError(f"keep={keep!r} is not a budget: give a fraction in (0, 1] or a whole number of tokens")
    budget(keep, max(1, int(keep)) if isinstance(keep, int) else 1)


def _named(unknown: set[str]) -> str:
    return f" (unknown: {', '.join(sorted(map(str, unknown)))})"


def checked(stock: type) -> type:
    """vLLM's own config hook of an architecture, followed by that of this package."""

    class Checked(stock):
        checks_mipruner = True

        @classmethod
        def verify_and_update_config(cls, vllm_config) -> None:
            super().verify_and_update_config(vllm_config)
            config = vllm_config.model_config.hf_config
            if (settings := read(config)) is not None:
                check_runs(settings.pruner, config.model_type)
                _use_own_cpu_worker(vllm_config.parallel_config)

    return Checked


def _use_own_cpu_worker(parallel_config) -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and parallel_config.worker_cls == "auto":
        parallel_config.worker_cls = "mipruner_vllm.cpu.Worker"
