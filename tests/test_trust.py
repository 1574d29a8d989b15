"""Records are data: whatever they name, nothing but classes of this repository is made from them."""

import json

import pytest
from hydra import compose, initialize_config_dir

from analysis import figures, load, masks, report, tables
from experiments import build
from experiments.benchmarks.base import BenchmarkError
from experiments.cell import run_cell
from experiments.results import ROOT, Cell
from mipruner.errors import InputError


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("dear")
    return path


@pytest.fixture
def config(tmp_path):
    words = ["dataset=demo_pope", "limit=2", "keep=8", f"results={tmp_path / 'results'}", "n_masks=0", "device=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build.resolve(compose("config", words))


def hostile(victim):
    """Configs of a benchmark that would delete the file, were a name more than a name."""
    call = {"_target_": "os.remove", "path": str(victim)}
    return {
        "a function": {"name": "os.remove", "path": str(victim)},
        "a class path": {"name": "demo"} | call,
        "a judge": {"name": "mmvet", "hub": [], "judge": call},
        "a module beside": {"name": "..results"},
        "the base": {"name": "base"},
        "no text": {"name": ["os.remove"]},
    }


@pytest.mark.parametrize("case", hostile(""))
def test_a_name_is_a_name(victim, case):
    with pytest.raises(BenchmarkError, match=r"there is no benchmark|unexpected keyword argument '(_target_|path)'"):
        build.make_benchmark(**hostile(victim)[case])
    assert victim.exists()


def test_a_decoding_is_a_decoding(config, victim):
    with pytest.raises(InputError, match="Decoding: got an unexpected keyword argument '_target_'"):
        build.decoding(config | {"decoding": {"_target_": "os.remove", "path": str(victim)}})
    assert victim.exists()


def test_no_module_is_imported_to_look_at_it(tmp_path, monkeypatch, victim):
    (tmp_path / "evil.py").write_text(f"import os; os.remove({str(victim)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BenchmarkError, match=r"there is no benchmark 'evil'"):
        build.make_benchmark("evil")
    assert victim.exists()


@pytest.mark.parametrize("command", [masks, report, figures, tables], ids=lambda module: module.__name__)
def test_no_command_runs_what_a_record_names(tmp_path, config, victim, command, monkeypatch, capsys, record_property):
    """A record that somebody handed around, whose benchmark, decoding, judge and pruner delete a file."""
    run_cell(config)
    cell = Cell(config)
    record, call = cell.record(), {"_target_": "os.remove", "path": str(victim)}
    record["config"]["dataset"]["benchmark"] = call | {"name": "os.remove"}
    record["config"]["judge"] = record["config"]["decoding"] = call
    record["config"]["pruner"] |= call
    cell.finish(record)
    other = json.loads(json.dumps(record)) | {"cell": record["cell"] | {"pruner": "random"}}
    second = cell.path.parents[1] / "random" / cell.path.name
    second.mkdir(parents=True)
    (second / "record.json").write_text(json.dumps(other))
    rows = [row | {"correct": 1 - (row["correct"] or 0)} for row in cell.rows()]
    (second / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(load, "settings", lambda config: {})
    results = f"--results={tmp_path / 'results'}"
    words = [str(cell.path)] if command is masks else [results]
    out = tmp_path / "out" / ("x.html" if command is report else "x.png" if command is masks else "")
    monkeypatch.setattr("sys.argv", [command.__name__, *words, f"--out={out}"])
    try:
        command.main()
    except SystemExit as end:
        assert command is masks and end.code == 2
    said = capsys.readouterr().err
    assert victim.exists() and "Traceback" not in said
    if command in (masks, report):
        assert "there is no benchmark 'os.remove'" in said
        what = f"a record of others whose benchmark deletes a file, in {command.__name__}"
        record_property("survives", (what, "there is no benchmark 'os.remove'"))


def test_a_resumed_run_runs_nothing_that_a_record_names(config, victim, capsys):
    run_cell(config)
    record = Cell(config).record()
    record["config"]["dataset"]["benchmark"] = {"_target_": "os.remove", "path": str(victim)}
    Cell(config).finish(record | {"failed": [{"id": "x", "error": "y"}]})
    run_cell(config)
    assert victim.exists() and Cell(config).record()["config"] == config
