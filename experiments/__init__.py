"""Everything that is measured. `python run.py task=...` starts it; no module here is a command of its own."""

import sys

if sys.argv[:1] == ["-m"]:  # python is looking for the module of `python -m experiments.x`
    module, *words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    if module.startswith(f"{__name__}."):
        task = module.rpartition(".")[2]
        if words[:1] == ["estimate"]:
            task, *words = words
        sys.stderr.write(f"{module} is a task of run.py now: {' '.join(['python run.py', f'task={task}', *words])}\n")
        sys.exit(2)
