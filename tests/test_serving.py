"""The load on a server: its table and record, against one on this machine. tests/test_vllm.py asks a real vLLM."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoTokenizer

from experiments import build, served, soak
from experiments.results import ROOT, Cell
from experiments.tasks import agreement, serving
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
    def serve(path, setting, log, *options, environment):
        calls.append((path, setting, options))
        yield served.Served("http://127.0.0.1:9/v1", None, Path(log))

    def ask(self, url, text, pruning=None, n_tokens=4):
        return served.Reply("yes", 586 if calls[-1][1]["keep"] == 1.0 else 26, 0.01)

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(served.Served, "ask", ask)
    monkeypatch.setattr(served.Served, "memory_mib", lambda self: {"server": 60.0, "Worker": 40.0})
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


def test_a_running_server_is_asked_with_the_budget_in_the_request(monkeypatch, tmp_path, capsys):
    asked = []

    def ask(self, url, text, pruning=None, n_tokens=4):
        asked.append((self.url, url, pruning["keep"]))
        return served.Reply("yes", 586 if pruning["keep"] == 1.0 else 26, 0.01)

    monkeypatch.setattr(served.Served, "ask", ask)
    monkeypatch.setattr(serving, "vllm_version", lambda client: "0.32.0")
    serving.run(config_of(tmp_path, "url=http://127.0.0.1:9/v1"))
    images = {keep: {image for _, image, k in asked if k == keep} for keep in (1.0, 16)}
    assert {url for url, _, _ in asked} == {"http://127.0.0.1:9/v1"}
    assert images[1.0] and not images[1.0] & images[16]  # or the second budget finds the images of the first encoded
    assert json.loads((tmp_path / "load.json").read_text())["rows"][1]["peak_memory_mib"] is None
    assert "| 26 (0.04) | - |" in capsys.readouterr().out


def test_random_weights_of_four_layers_are_a_checkpoint_without_weights(tmp_path):
    options = serving.random_weights("llava15_7b", 4, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert options == ("--load-format", "dummy") and not list(tmp_path.glob("*.safetensors"))
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (4, 4096)
    assert config.vision_config.num_hidden_layers == 24
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<image>") == config.image_token_id


def test_a_soak_sees_an_answer_about_another_image_and_a_bad_request_that_is_answered(monkeypatch):
    def ask(self, url, text, pruning=None, n_tokens=4):
        keep = pruning and pruning["keep"]
        if url == soak.BROKEN or keep in (0, 1.5, 100_000, "many", "auto", [1]):
            return served.Reply(refused=(400, "keep"))
        return served.Reply(self.table.get(url, f"{url}"))

    monkeypatch.setattr(served.Served, "ask", ask)
    monkeypatch.setattr(served.Served, "table", {}, raising=False)
    monkeypatch.setattr(served.Served, "memory_mib", lambda self: {"server": 60.0})
    server, questions = served.Served("http://127.0.0.1:9/v1"), [(f"image {k}", "What ?") for k in range(4)]
    found = soak.soak(server, questions, lambda keep: {"keep": keep}, 100)
    assert found.asked == 100 and found.wrong == [] and found.refused > 3 and len(found.memory_mib) == 11

    reply = served.Reply("image 2")
    for kind in (("image 1", "What ?", 16), ("image 1", "What ?", 0), (soak.BROKEN, "What ?", None)):
        found = soak.Soak(memory_mib=[{}])
        soak.judge(found, kind, reply, {("image 1", "What ?", 16): "image 1"})
        assert len(found.wrong) == 1 and found.refused == 0
        assert found.table().endswith("The memory of a server that runs already is not known.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n_layers=4"], "weights=random"),
        (["weights=random", "url=http://127.0.0.1:9/v1"], "leave url out"),
        (["pruner=none"], "no budgets to compare"),
        (["weights=random", "model=qwen2vl_2b"], "random weights are for"),
    ],
)
def test_what_does_not_go_together_is_said(started, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        serving.run(config_of(tmp_path, *words))


def test_the_cells_of_an_agreement_are_those_of_run_py(tmp_path):
    """Or stored answers would be computed again."""
    words = [f"results={tmp_path}", "pruner=similarity", "seed=1"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = OmegaConf.to_container(compose("config", [*words, "task=agreement", "keeps=[32,8]"]))
        alone = [build.resolve(compose("config", [*words, f"keep={keep}"])) for keep in (32, 8)]
    found = [build.resolve(one) for one in agreement.cells(config, "similarity")]
    assert [Cell(one).path for one in found] == [Cell(one).path for one in alone]


def test_where_vllm_is_not_installed_the_message_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "installed_vllm", lambda: None)
    with pytest.raises(InputError, match="not installed"):
        serving.run(config_of(tmp_path))
