"""Runs one task of the command line. Without ``task=`` it evaluates one cell: model, dataset, pruner and budget.

python run.py                                              # MI-Pruner at 16 of 576 tokens on the demo
python run.py model=qwen3vl_8b dataset=pope keep=0.25
python run.py -m pruner=mi,similarity keep=64,32,16,8      # a sweep; one job per cell on Slurm: hydra/launcher=slurm
torchrun --nproc-per-node 4 run.py model=llava15_7b        # on four GPUs
python run.py image=photo.jpg question="What is this?"     # one image of your own
python run.py task=efficiency                              # another task, one per file of conf/task
python run.py task=efficiency --help                       # what a task does, and its keys
"""

import errno
import os
import re
import sys
from functools import partial
from importlib import import_module
from io import TextIOWrapper
from typing import Any

from experiments.usage import usage

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):  # before torch is imported, which takes seconds
    try:
        print(usage(sys.argv[1:], __doc__), flush=True)
    except KeyError as error:
        sys.exit(f"error: {error.args[0]}")
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit()

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from experiments.benchmarks.base import BenchmarkError
from experiments.cell import check_swept
from experiments.results import FULL, ROOT
from experiments.settings import check, check_keys
from mipruner.errors import InputError, ModelError

EVALUATE, ANSWER, HEAT = (f"experiments.tasks.{name}" for name in ("evaluate", "answer", "heat"))
PLAIN = re.compile(r"[\w./+-]*", re.ASCII)
WORD = re.compile(r"[\w./+-]*")
QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@hydra.main(version_base=None, config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        overrides = list(HydraConfig.get().overrides.task)
        check_keys(overrides)
        check_swept(HydraConfig.get().sweeper.params, overrides)
        asked = cfg.image is not None or cfg.question is not None
        name = ANSWER if cfg.task == EVALUATE and asked else cfg.task
        options = {"draw": partial(draw, name)} if name in (EVALUATE, HEAT) else {}
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        check(config)
        import_module(name).run(config, overrides, **options)
    except (InputError, ModelError, BenchmarkError) as error:
        raise CompactHydraException(f"error: {error}") from error
    except OSError as error:
        if error.errno not in (*FULL, *REFUSED):
            raise
        advice = "make room" if error.errno in FULL else "put this right"
        raise CompactHydraException(
            f"error: cannot write {error.filename or cfg.results}: {error.strerror}. "
            f"What was answered so far is kept; {advice} and run the same command again."
        ) from error


def draw(task: str, *args: Any, **options: Any) -> None:
    """Draw what a task asks for. Experiments must not import analysis, and matplotlib is imported only here."""
    from analysis.masks import draw_cell, draw_heat

    function: Any = draw_heat if task == HEAT else draw_cell
    function(*args, **options)


def quoted(argument: str, is_sweep: bool = False) -> str:
    """Quote a question, a template, a path or a word with letters outside ASCII for Hydra's grammar.

    A value that is already in Hydra's quotes is not changed; in a sweep, also a list of them.
    """
    key, _, value = argument.partition("=")
    is_free = key in ("results", "out") or (key in ("model.prompt", "dataset.sentence") and not is_sweep)
    is_free = is_free or os.path.exists(value) or bool(WORD.fullmatch(value))
    is_text = key in ("question", "image", "cell") or (is_free and not PLAIN.fullmatch(value))
    if not is_text or re.fullmatch(rf"{QUOTED}(,{QUOTED})*" if is_sweep else QUOTED, value, re.S):
        return argument
    value = re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda match: 2 * match[1] + (r"\'" if match[2] else ""), value)
    return f"{key}='{value}'"


if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    is_sweep = bool({"-m", "--multirun"} & set(sys.argv))
    sys.argv[1:] = [quoted(argument, is_sweep) for argument in sys.argv[1:]]
    try:
        check_keys(sys.argv[1:])
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: what was answered so far is kept, run the same command again to go on")
