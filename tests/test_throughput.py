"""The throughput run: the same answers however they are batched, and faster than one unpruned `generate` a sample."""

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.results import ROOT
from experiments.tasks import throughput


def test_batches_give_the_answers_of_single_samples_and_more_a_second(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "N_PLAIN", 2)
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        words = ["task=throughput", "limit=12", "device=cpu", f"out={tmp_path}/record.json"]
        throughput.run(OmegaConf.to_container(compose("config", words), resolve=True), words)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert record["answers_that_differ"] == []
    assert record["n_samples"] >= 12 and record["n_plain"] == 2 and record["table1_hours"] is None
    assert all(0 <= record["waited_for_images"][way] < 1 for way in ("batches_of_1", "batches"))
    rates = record["questions_per_s"]
    assert rates["plain"] < rates["batches"]
    assert record["times_plain"]["batches"] * rates["plain"] == pytest.approx(rates["batches"])
