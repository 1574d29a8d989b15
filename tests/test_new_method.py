"""A pruner in another package: one file and one YAML, and it runs, is shown and is tested like any other."""

import os
import subprocess
import sys

import pytest

from experiments.results import ROOT

METHOD = '''
from dataclasses import dataclass
from mipruner.pruners.base import ScorePruner

@dataclass(frozen=True)
class NormPruner(ScorePruner):
    """Keeps the tokens with the largest norm."""
    title = "Largest norm"
    cost = "N d"
    power: float = 1.0
    def score(self, features):
        return features.visual.float().norm(dim=-1) ** self.power
'''
FIRST = """
import runpy, sys
import norm_plugin, mipruner
assert "largest_norm" in mipruner.PRUNERS
"""
RUN = "runpy.run_path('run.py', run_name='__main__')"
SHOWN = """
from analysis import compare, figures, load, methods, report, tables
cells = load.cells(results)
assert sorted(cells.method) == ["largest_norm", "random"], cells
assert compare.METHODS["largest_norm"] == "Largest norm"
assert figures.STYLES["largest_norm"][:2] not in [s[:2] for n, s in figures.STYLES.items() if n != "largest_norm"]
row, = [line for line in methods.table(cells).splitlines() if line.startswith("| Largest norm")]
assert "| before the decoder | nothing | N d |" in row, row
assert "Largest norm" in report.page(cells.assign(differs=[set()] * 2), 2)
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "norm_plugin.py").write_text(METHOD)
    info = folder / "norm_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: norm-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mipruner.pruners]\nlargest_norm = norm_plugin:NormPruner\nbroken = norm_plugin:Missing\n"
        "mi = norm_plugin:NormPruner\n"
    )
    (folder / "conf/pruner").mkdir(parents=True)
    (folder / "conf/pruner/largest_norm.yaml").write_text("name: largest_norm\npower: 2.0\n")
    return folder


def python(plugin, *arguments):
    path = os.pathsep.join(map(str, (plugin, ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_it_is_imported_first_runs_and_is_shown(plugin, tmp_path):
    words = [
        "-m", "--config-dir", str(plugin / "conf"), "pruner=largest_norm,random", "keep=8", "limit=2",
        f"results={tmp_path}", "device=cpu",
    ]  # fmt: skip
    run = python(plugin, "-c", f"{FIRST}\nsys.argv[1:] = {words}\n{RUN}\nresults = {str(tmp_path)!r}\n{SHOWN}")
    assert "demo_llava  demo  largest_norm  keep=8" in run.stdout
    assert "broken (norm_plugin:Missing) is left out" in run.stderr
    assert "mi (norm_plugin:NormPruner) is left out: a pruner of this repository has that name" in run.stderr


def test_the_tests_of_all_methods_are_its_tests(plugin):
    files = [f"tests/test_{name}.py" for name in ("pruners", "models", "analysis", "methods")]
    words = "NormPruner or (largest_norm and llava and not next) or every_method"
    done = python(plugin, "-m", "pytest", "-vv", *files, "-k", words, "-p", "no:cacheprovider")
    for file in files:
        assert f"{file}::" in done.stdout
