"""What holds for every command and every file of the code."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from experiments.results import ROOT

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


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(path: Path):
    """Ruff's rule sees only a path made in place."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, n = node.func.attr, len(node.args)
            named = any(word.arg == "encoding" for word in node.keywords)
            assert named or (name, n) not in (("read_text", 0), ("write_text", 1)), f"line {node.lineno}"
