"""A sweep as jobs of their own, by Hydra's submitit launcher."""

import json
import os

from hydra import compose, initialize_config_dir

from command_line import Fork
from experiments import build
from experiments.cell import run_cell
from experiments.results import ROOT

SWEEP = ("-m", "dataset=demo_pope", "limit=6", "n_masks=0", "device=cpu", "pruner=mi,random")


def launch(tmp_path, *overrides, **env):
    return Fork(*SWEEP, f"results={tmp_path}", *overrides, **env).end()


def test_jobs_of_submitit_leave_the_records_of_a_plain_run(tmp_path):
    status, _, err = launch(tmp_path / "jobs", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert status == 0, err
    assert len(list((tmp_path / "jobs/.sweep/.submitit").glob("*/*_result.pkl"))) == 2
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "jobs").rglob("record.json"))]
    for record, pruner in zip(records, ("mi", "random"), strict=True):
        overrides = [f"pruner={pruner}", *(word for word in SWEEP[1:] if "pruner" not in word)]
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            config = build.resolve(compose("config", [*overrides, f"results={tmp_path / 'plain'}"]))
        plain = run_cell(config, overrides)
        assert all(record[key] == plain[key] for key in ("id", "cell", "metrics", "tokens", "n_samples"))
        assert record["command"].split()[:2] == ["python", "run.py"] and set(overrides) < set(record["command"].split())


def test_what_slurm_is_asked_for(tmp_path):
    """sbatch is played by a script that keeps what it is given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/asked.sh; exit 1'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    overrides = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=2")
    status, *_ = launch(tmp_path / "results", *overrides, PATH=path)
    assert status == 1
    asked = (tmp_path / "asked.sh").read_text()
    for line in ("partition=gpu", "gpus-per-node=2", "cpus-per-task=8", "mem=64GB", "time=240", "array=0-1%2"):
        assert f"#SBATCH --{line}\n" in asked, asked
