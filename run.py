"""Runs one task of the command line. Without ``task=`` it evaluates one cell: model, dataset, pruner and budget.

python run.py                                              # MI-Pruner at 16 of 576 tokens on the demo
python run.py model=qwen3vl_8b dataset=pope keep=0.25
python run.py -m pruner=mi,similarity keep=64,32,16,8      # a sweep; a job a cell on Slurm: hydra/launcher=slurm
torchrun --nproc-per-node 4 run.py model=llava15_7b        # on four GPUs
python run.py image=photo.jpg question="What is this?"     # one image of your own
python run.py task=efficiency                              # another task, one per file of conf/task
python run.py task=efficiency --help                       # what a task does, and its keys
"""

import errno
import sys
from importlib import import_module

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from analysis.masks import draw_cell
from experiments.benchmarks.base import BenchmarkError
from experiments.cell import check_swept
from experiments.results import ROOT
from mipruner.errors import InputError, ModelError

EVALUATE, ANSWER = "experiments.tasks.evaluate", "experiments.tasks.answer"
DRAW = {EVALUATE: draw_cell}
"""Drawing functions that tasks are given, since experiments import nothing of analysis."""


@hydra.main(version_base=None, config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        overrides = list(HydraConfig.get().overrides.task)
        check_swept(HydraConfig.get().sweeper.params, overrides)
        asked = cfg.image is not None or cfg.question is not None
        name = ANSWER if cfg.task == EVALUATE and asked else cfg.task
        options = {"draw": DRAW[name]} if name in DRAW else {}
        import_module(name).run(OmegaConf.to_container(cfg, resolve=True), overrides, **options)
    except (InputError, ModelError, BenchmarkError) as error:
        raise CompactHydraException(f"error: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        raise CompactHydraException(
            f"error: cannot write {error.filename or cfg.results}: {error.strerror}. "
            "What was answered so far is kept; make room and run the same command again."
        ) from error


def quoted(argument: str) -> str:
    """A question or a path as Hydra's grammar wants it, with any commas and apostrophes."""
    key, _, value = argument.partition("=")
    if key not in ("question", "image") or value[:1] in ("'", '"'):
        return argument
    return f"{key}='" + value.replace("'", "\\'") + "'"


if __name__ == "__main__":
    sys.argv[1:] = map(quoted, sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: what was answered so far is kept, run the same command again to go on")
