"""The report of a GPU: steps that fail or cannot run are said, the others go on, goals are judged."""

import json
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.results import ROOT
from experiments.tasks import gpu_report
from experiments.tasks.gpu_report import Step, goals, page, steps
from mipruner.errors import InputError

CPU = torch.device("cpu")


def test_every_step_ends_in_a_status_and_the_page_says_it(tmp_path):
    def code(text):
        return ["-c", text]

    done = [
        Step("tests", code("print('42 passed')"), 60),
        Step("scaling", code("import sys; print('no memory'); sys.exit(3)"), 60),
        Step("table3", code("import time; print('began', flush=True); time.sleep(60)"), 1.5),
        Step("serving", code("1 / 0"), 60, "vLLM is not installed"),
    ]
    for step in done:
        step.run()
    assert [step.status for step in done] == [
        "passed", "failed with status 3", "stopped after 2 s", "not run: vLLM is not installed",
    ]  # fmt: skip
    text = page(done, tmp_path, False, "python run.py task=gpu_report")
    for said in (
        "42 passed",
        "no memory",
        "began",
        "not run: vLLM is not installed",
        "not measured",
        str(sys.version_info[1]),
    ):
        assert said in text
    assert str(tmp_path) not in text


def test_goals_are_judged_on_a_gpu_only(tmp_path):
    def row(method, engine, ms, times_floor):
        return {"method": method, "engine": engine, "latency_ms": {"total": {"median": ms}}, "times_floor": times_floor}

    rows = [row("mi lam=0.5", "engine", 10, 1.6), row("mi lam=0.5", "generate", 31, 5), row("none", "generate", 49, 2)]
    (tmp_path / "table3.json").write_text(json.dumps({"rows": rows}))
    found = {goal.words: goal.verdict(tmp_path, True) for goal in goals(False)}
    assert found["engine over its floor, MI, Table 3"] == ("1.6 times", "**fail**")
    assert found["engine beside generate on the short prompt"] == ("3.1 times", "pass")
    assert found["engine beside generate unpruned"] == ("4.9 times", "**fail**")
    assert found["memory of that choice"] == ("", "not measured")
    assert goals(False)[-1].verdict(tmp_path, False) == ("4.9 times", "no GPU: says nothing")


@pytest.mark.parametrize("small", [False, True])
def test_every_command_is_one_that_run_py_takes(tmp_path, small):
    every = steps(small, tmp_path, CPU)
    assert sum(step.limit_s for step in every) <= 30 * 60
    for step in every:
        if step.command[0] != "run.py":
            continue
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            config = OmegaConf.to_container(compose("config", step.command[1:]), resolve=True)
        assert config["task"].startswith("experiments.tasks.")
        if step.name.startswith("table"):
            assert {"none", "mi lam=0.5"} <= set(config["methods"])
            assert "engine" in config["engines"] and "generate" in config["engines"]
    assert any("7B" in step.missing for step in every) is not small


def test_an_unknown_step_is_named(tmp_path):
    config = {"out": str(tmp_path / "a.md"), "small": True, "device": "cpu", "steps": ["steam"], "results": "r"}
    with pytest.raises(InputError, match="unknown step 'steam'"):
        gpu_report.run(config)
