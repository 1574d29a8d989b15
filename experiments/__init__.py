"""Benchmarks and measurements. `python run.py task=...` starts them."""

import sys
from pathlib import Path

if sys.argv[:1] == ["-m"]:  # python looks for the module of `python -m experiments.x`, a former command
    module, *words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    task = module.rpartition(".")[2]
    if words[:1] == ["estimate"]:
        task, *words = words
    if module.startswith(f"{__name__}.") and (Path(__file__).parent / "tasks" / f"{task}.py").exists():
        keys = [word for word in words if "=" in word]
        sys.stderr.write(f"{module} is a task of run.py now: {' '.join(['python run.py', f'task={task}', *keys])}\n")
        sys.exit(2)
