"""Every file of conf/experiment composes, every word in it exists, and its head says how to run it and its cost."""

from itertools import cycle, islice
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis import compare, figures, load
from experiments import build
from mipruner.selection import budget

FILES = sorted((load.CONF / "experiment").glob("*.yaml"))
SWEEPS = [path for path in FILES if "hydra" in yaml.safe_load(path.read_text())]
COSTS = [path for path in FILES if path not in SWEEPS]
PAPER = [*(f"table{n}" for n in range(1, 12)), "fig4", "fig6a", "fig6b"]


def test_the_paper_is_covered_and_everything_has_a_demo_version():
    names = {path.stem for path in FILES}
    assert set(PAPER) <= names
    assert {f"demo_{name}" for name in PAPER} <= names
    costs = {"table3", "table9", "demo_table3", "demo_table9", "demo_table9_qwen3vl"}
    assert {path.stem for path in COSTS} == costs


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_head(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    command = "python run.py -m" if path in SWEEPS else "python run.py"
    assert head[0] == "# @package _global_"
    assert any(line.startswith(f"#   {command} experiment={path.stem}") for line in head)
    if path.stem in PAPER:
        assert any("Cost" in line for line in head)
    if path.stem.startswith("table"):
        assert any(f"{path.stem.split('_')[0]} in analysis/paper.csv" in line for line in head)


def jobs(path: Path) -> list[list[str]]:
    """So many jobs of a sweep that every value of every key is in one."""
    swept = compare.sweep(yaml.safe_load(path.read_text(encoding="utf-8")))
    columns = [[f"{key}={value}" for value in values] for key, values in swept.items()]
    longest = max(map(len, columns))
    return [list(words) for words in zip(*(islice(cycle(column), longest) for column in columns), strict=True)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_dry_run_of_a_sweep(path):
    with initialize_config_dir(str(load.CONF), version_base=None):
        for words in jobs(path):
            composed = compose("config", [f"experiment={path.stem}", *words], return_hydra_config=True)
            assert composed.hydra.mode is None, "started by -m, not by the file"
            config = build.resolve(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))
            build.pruner(config)
            assert 1 <= budget(build.budget(config), 2048) <= 2048
            assert config["dataset"]["lam"] == (0.5 if config["dataset"]["name"] in OPEN_ENDED else 1)


OPEN_ENDED = [path.stem for path in (load.CONF / "dataset").glob("demo*.yaml")]
OPEN_ENDED += ["gqa", "mmvet", "tgif", "msvd", "msrvtt"]


@pytest.mark.parametrize("path", COSTS, ids=lambda path: path.stem)
def test_dry_run_of_an_efficiency_table(path):
    with initialize_config_dir(str(load.CONF), version_base=None):
        config = OmegaConf.to_container(compose("config", [f"experiment={path.stem}"]), resolve=True)
    assert config["task"] == "experiments.tasks.efficiency"
    for method in config["methods"]:
        build.method(method, config)


@pytest.mark.parametrize("name", [name for name in PAPER if name.startswith("table")])
def test_a_table_of_the_paper_is_filled_by_its_experiment(name):
    """Every cell that paper.csv prints a number of is swept, under the same words."""

    def words(frame):
        return set(frame[["model", "keep", "method", "setting", "dataset"]].itertuples(index=False, name=None))

    files = [path.stem for path in FILES if path.stem in (name, f"{name}_qwen3vl", f"{name}_thinking")]
    swept = set().union(*(words(compare.from_experiment(file)) for file in files))
    assert words(compare.wanted(name)) <= swept


def test_every_figure_has_its_source():
    for _, source in figures.FIGURES.values():
        assert not compare.wanted(source).empty


def test_make_reproduces_every_table_and_figure():
    makefile = (load.CONF.parent / "Makefile").read_text().replace("\\\n", " ")

    def listed(variable):
        (line,) = (line for line in makefile.splitlines() if line.startswith(f"{variable} = "))
        return set(line.split()[2:])

    sweeps = {path.stem for path in SWEEPS}
    assert listed("DEMO_METHODS") | listed("DEMO_ABLATIONS") == {name for name in sweeps if name.startswith("demo_")}
    assert listed("PAPER") == {name for name in sweeps if name.startswith(("table", "fig"))}
