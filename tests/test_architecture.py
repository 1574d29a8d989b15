"""Imports go one way: mipruner < experiments < analysis < run.py. No circles.

Plug-ins import mipruner only; the Space is the explorer itself in another host."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "mipruner": {"mipruner"},
    "experiments": {"mipruner", "experiments"},
    "analysis": {"mipruner", "experiments", "analysis"},
    "run": {"mipruner", "experiments", "analysis"},
    "plugins/lmms_eval": {"mipruner"},
    "plugins/vllm": {"mipruner"},
    "plugins/space": {"mipruner", "experiments"},
}
OURS = {"mipruner", "experiments", "analysis", "run", "plugins", "tests"}


def modules(part):
    """{dotted name: file} of a package, of run.py, or of all plug-ins."""
    files = [ROOT / "run.py"] if part == "run" else sorted((ROOT / part).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file, known):
    """Dotted names that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part):
    found = {
        f"{name} imports {target}"
        for name, file in modules(part).items()
        for target in imported(file, {})
        if target.split(".")[0] in OURS - ALLOWED[part]
    }
    assert not found


@pytest.mark.parametrize("part", ["mipruner", "experiments", "analysis"])
def test_there_is_no_circle(part):
    known = modules(part)
    graph = {name: set(imported(file, known)) & known.keys() for name, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_wrong_arrow_and_a_circle_would_be_seen(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text("def f():\n    from analysis import load\n    import experiments.build\n")
    assert list(imported(file, {"analysis.load"})) == ["analysis.load", "experiments.build"]


def test_analysis_loads_no_model():
    """Not by an import of its own, and not through the builder of experiments."""
    for name, file in modules("analysis").items():
        found = {*imported(file, {})}
        models = ("transformers", "mipruner.models", "mipruner.pipeline", "mipruner.pruning")
        assert not [target for target in found if target.startswith(models)], name
        assert "build.model(" not in file.read_text(), name


def test_scripts_of_analysis_share_one_parser():
    for name, file in modules("analysis").items():
        if "def main(" in file.read_text():
            assert "analysis.command.arguments" in {*imported(file, {"analysis.command.arguments": file})}, name
        assert name == "analysis.command" or "argparse" not in {*imported(file, {})}, name


def test_scripts_of_analysis_share_their_words():
    """``--results`` and ``--out`` mean one thing, said in one place; the docstring is the help."""
    for name, file in modules("analysis").items():
        text = file.read_text()
        if name != "analysis.command" and '__name__ == "__main__"' in text:
            assert "arguments(__doc__" in text, name
            assert not [word for word in ('"--results"', '"--out"', "ArgumentParser(") if word in text], name
