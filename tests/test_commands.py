"""What holds for every command and every file of the code."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.results import ROOT
from experiments.usage import CONF, keys, tasks, usage

SCRIPTS = sorted(path.stem for path in (ROOT / "analysis").glob("*.py") if "__main__" in path.read_text("utf-8"))
CODE = [ROOT / "run.py", *(f for name in ("mipruner", "experiments", "analysis") for f in (ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_does(name, monkeypatch, capsys):
    module = import_module(f"analysis.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and module.__doc__.strip().splitlines()[0] in said


@pytest.mark.parametrize("task", tasks())
def test_help_of_every_task_explains_every_key(task):
    said = usage([f"task={task}"], "program")
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("config", [f"task={task}", *["model.path=a"] * (task == "accept")])
    unexplained = [
        key for file in (f"task/{task}", "config") for key, _, says in keys(CONF / f"{file}.yaml") if not says
    ]
    missing = [key for key in config if key != "task" and f"\n  {key}=" not in said and f"\n  {key}." not in said]
    assert not missing and not unexplained
    assert task == "evaluate" or "python run.py" in said.split("Keys of")[0]


def test_help_needs_no_torch_and_a_wrong_task_is_named():
    """Torch takes seconds to import; a module of it that raises shows that nothing asks for it."""
    without = "import runpy, sys; sys.modules['torch'] = sys.modules['hydra'] = None; "
    code = without + "runpy.run_path('run.py', run_name='__main__')"
    for words, status, said in (
        (["--help"], 0, "task=NAME"),
        (["task=efficiency", "--help"], 0, "methods=[none,random"),
        (["experiment=table3", "-h"], 0, "methods=[none,random"),
        (["task=efficency", "--help"], 1, "did you mean efficiency"),
    ):
        run = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == status and said in run.stdout + run.stderr, run


def test_tables_and_the_package_itself_need_no_transformers():
    """Its import takes seconds, and so do those of a client of servers and of what draws."""
    code = "import sys; sys.modules.update(dict.fromkeys(('transformers', 'openai', 'matplotlib'))); "
    code += "import mipruner; from analysis import hard, tables; print(mipruner.budget(0.25, 576))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "144\n", run.stderr


def test_help_may_be_cut_off():
    """As by ``| head``: nobody reads what is printed, and no traceback follows."""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "run.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert run.returncode == 0 and not run.stderr, run


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(path: Path):
    """Ruff's rule sees only a path made in place."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, n = node.func.attr, len(node.args)
            named = any(word.arg == "encoding" for word in node.keywords)
            assert named or (name, n) not in (("read_text", 0), ("write_text", 1)), f"line {node.lineno}"
