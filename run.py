"""One cell: a model, a dataset, a pruner, a budget. Skipped if its record is there, resumed if it was cut short.

python run.py                                              # MI-Pruner at 16 of 576 tokens on the demo
python run.py model=qwen3vl_8b dataset=pope keep=0.25
python run.py -m pruner=mi,similarity keep=64,32,16,8      # a sweep; a job a cell on Slurm: hydra/launcher=slurm
torchrun --nproc-per-node 4 run.py model=llava15_7b          # on four GPUs
python run.py image=photo.jpg question="What is this?"     # one picture of your own: see experiments/answer.py
"""

import errno
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from analysis.masks import draw_cell
from experiments import build
from experiments.answer import answer
from experiments.benchmarks.base import BenchmarkError
from experiments.evaluate import evaluate, subset
from experiments.ranks import ALONE, Ranks
from experiments.results import NOT_IDENTITY, ROOT, Cell
from experiments.tracking import track
from mipruner.errors import InputError, ModelError
from mipruner.pipeline import Pipeline


def differs(overrides: Sequence[str], seed: int = 0) -> str:
    """The overrides that a folder's name should show, without groups and what names the folder already.

    ``seed`` is that of the resolved config, which is 0 where nothing is drawn, whatever the command line said.
    """
    shown = [f"seed={seed}"] if seed else []
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip("+~") in ("model", "dataset", "pruner", "ablation", "experiment", "keep", "seed", *NOT_IDENTITY):
            continue
        if key.split(".")[0] not in NOT_IDENTITY:
            shown.append(f"{key.split('.')[-1]}={value}")
    return ",".join(shown)


def check_swept(params: Mapping[str, Any] | None, overrides: Sequence[str]) -> None:
    """Raise `InputError` where a file of conf names values to sweep that Hydra did not take one by one."""
    given = {override.partition("=")[0].strip("+~") for override in overrides}
    if missing := [key for key in params or {} if key not in given]:
        words = [word for word in overrides if word.startswith(("experiment=", "ablation="))]
        raise InputError(f"{' '.join(words)} sweeps {', '.join(missing)}: start it with run.py -m, one at a time")


def run_cell(config: dict[str, Any], overrides: Sequence[str] = (), ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """Run or resume the cell of a config, which these overrides made; returns its record, None for later ranks."""
    ranks.wait()
    cell = Cell(config, differs(overrides, config["seed"]))
    if cell.is_done and not config["overwrite"]:
        if ranks.rank > 0:
            return None
        print(f"finished before: {cell.path} (overwrite=true runs it again)")
        return cell.record()
    benchmark = build.benchmark(config)
    samples = subset(benchmark.samples(), config["limit"], config["shard"], config["seed"])
    choices = build.pruner(config), build.budget(config), build.decoding(config)  # what is wrong ends here
    pipeline = Pipeline(build.model(config), *choices)
    command = shlex.join(["python", "run.py", *overrides])
    if ranks.rank > 0:
        return evaluate(cell, pipeline, benchmark, samples, command, ranks)
    cell.open(config["overwrite"])
    with track(config["logger"], cell) as report:
        record = evaluate(cell, pipeline, benchmark, samples, command, ranks)
        if config["n_masks"]:
            draw_cell(cell.path, benchmark, config["n_masks"])
        report(record)
    return record


def show(record: dict[str, Any], path: str) -> str:
    """The record as a person reads it."""
    cell, tokens, ms = record["cell"], record["tokens"], record["latency_ms"]
    lines = [
        f"{cell['model']}  {cell['dataset']}  {cell['pruner']}  keep={cell['keep']}  ({record['n_samples']} samples)"
    ]
    errors = record["standard_errors"]
    for name, value in record["metrics"].items():
        lines.append(f"  {name:<28}{value:8.2f}" + (f" ± {errors[name]:.2f}" if name in errors else ""))
    if tokens:
        lines.append(
            f"  tokens kept {tokens['kept']:.4g} of {tokens['visual']:.0f}, {tokens['layer_mean']:.1f} a layer"
        )
        stages = "  ".join(f"{stage} {value:.1f}" for stage, value in ms.items())
        lines.append(f"  ms a sample in batches of {record['batch_size']}: {stages}")
    if record["failed"]:
        lines.append(f"  {len(record['failed'])} samples failed and count as wrong, see failed in record.json")
    lines.append(f"  {path}/record.json")
    if os.path.exists(f"{path}/masks.png"):
        lines.append(f"  {path}/masks.png")
    return "\n".join(lines)


@hydra.main(version_base=None, config_path=str(ROOT / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    try:
        config = build.resolve(cfg)
        overrides = list(HydraConfig.get().overrides.task)
        check_swept(HydraConfig.get().sweeper.params, overrides)
        if cfg.image is not None or cfg.question is not None:
            if not any(override.startswith("decoding.max_new_tokens=") for override in overrides):
                config["decoding"]["max_new_tokens"] = 128  # not what some dataset's answers need
            print(answer(config, cfg.image, cfg.question))
            return
        record = run_cell(config, overrides, Ranks.join())
        if record is not None:
            print(show(record, str(Cell(config, differs(overrides, config["seed"])).path)))
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
