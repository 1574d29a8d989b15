"""The load on a server: its table and record, against one on this machine. tests/test_vllm.py asks a real vLLM."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.results import ROOT
from experiments.tasks import serving
from mipruner.errors import InputError


def config_of(tmp_path, *overrides):
    words = ["task=serving", "keeps=[1.0,16]", "concurrency=[2]", "questions=[2]", "requests=3", "device=cpu"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(
            compose("config", [*words, f"out={tmp_path}/load.json", *overrides]), resolve=True
        )


@pytest.fixture
def started(monkeypatch):
    """What servers would have been started with."""
    calls = []

    @contextmanager
    def serve(path, setting, log, *options):
        calls.append((path, setting, options))
        yield serving.Served("http://127.0.0.1:9/v1", None, Path(log))

    def ask(client, url, text, keep=None, n_tokens=4):
        return serving.Reply("yes", 586 if calls[-1][1]["keep"] == 1.0 else 26, 0.01)

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(serving, "ask", ask)
    monkeypatch.setattr(serving.Served, "memory_mib", lambda self: 100.0)
    monkeypatch.setattr(serving, "installed_vllm", lambda: "0.32.0")
    return calls


def test_each_budget_gets_a_server_and_a_row_beside_the_first(started, tmp_path, capsys):
    serving.run(config_of(tmp_path, "server='--max-model-len 1024'"), ["task=serving", "requests=3"])
    record = json.loads((tmp_path / "load.json").read_text())
    assert [setting["keep"] for _, setting, _ in started] == [1.0, 16]
    for path, setting, options in started:
        assert Path(path).is_dir() and setting["pruner"] == "mi" and setting["options"]["lam"] == 0.5
        assert options == ("--dtype", "float32", "--max-model-len", "1024")
    assert [row["ratios"]["prompt_tokens"] for row in record["rows"]] == [1, 26 / 586]
    assert record["command"].startswith("python run.py task=serving") and record["versions"]["vllm"] == "0.32.0"
    printed = capsys.readouterr().out
    assert "| 2 | 2 | 16 |" in printed and "(0.04)" in printed


def test_where_vllm_is_not_installed_the_message_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "installed_vllm", lambda: None)
    with pytest.raises(InputError, match="not installed"):
        serving.run(config_of(tmp_path))
