"""The from-scratch readings against this repository's pruners, and the page of ratios."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import peers
from experiments.results import ROOT
from experiments.tasks import peers as task
from experiments.tasks import scaling
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.pruners import CDPruner, DivPruner, MMTokPruner, VisPruner

CPU = torch.device("cpu")


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", ["task=peers", *overrides]), resolve=True)


@pytest.mark.parametrize(("n_visual", "n_keep"), [(60, 7), (150, 40), (576, 64)])
def test_both_readings_choose_the_same(n_visual, n_keep):
    visual, text = scaling.tokens(n_visual, 256, CPU, seed=1), scaling.tokens(6, 256, CPU, seed=2)
    hidden = scaling.tokens(n_visual, 128, CPU, seed=3)
    attention = torch.rand(n_visual, generator=torch.Generator().manual_seed(4))
    features = Features(visual, text, hidden=hidden, attention=attention)
    ours = {
        peers.divprune(visual, n_keep): DivPruner(),
        peers.cdpruner(visual, task.closeness(visual, text), n_keep): CDPruner(relevance="projection"),
        peers.mmtok(visual, text, hidden, n_keep): MMTokPruner(),
        peers.vispruner(attention, hidden, n_keep): VisPruner(),
    }
    for picks, pruner in ours.items():
        assert torch.equal(picks.sort().values, pruner.select(features, n_keep).indices), pruner


def test_ratios_of_every_method_on_one_page(tmp_path, capsys):
    words = ["sizes=[[48,6],[48,12],[96,12]]", "width=64", "repetitions=2", "n_words=[300]", f"out={tmp_path}/peers"]
    threads = torch.get_num_threads()
    task.run(config(*words), words)
    assert torch.get_num_threads() == threads
    record = json.loads((tmp_path / "peers.json").read_text())
    names = [row["method"] for row in record["rows"] if row["n_visual"] == 48 and row["n_keep"] == 6]
    assert names == [*task.TITLES, "vocabulary_300", "vocabulary_300_again"]
    for row in record["rows"]:
        sized = [r for r in record["rows"] if (r["n_visual"], r["n_keep"]) == (row["n_visual"], row["n_keep"])]
        (product,) = [r for r in sized if r["method"] == "product"]
        assert row["ratio"] == pytest.approx(row["median_ms"] / product["median_ms"], abs=0.05, rel=0.05)
        assert row["peak_mib"] >= 0
    lines = (tmp_path / "peers.md").read_text().splitlines()
    assert lines[0].startswith("| choice | 48 to 6 | 48 to 12 | 96 to 12 | exponent")
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(names)
    assert "mi_again" not in [row["method"] for row in record["rows"] if row["n_visual"] == 96]  # wider than 64
    for said in ("avx512f", "thread", torch.__version__, record["git_commit"]):
        assert said in lines[-1]
    assert (tmp_path / "peers.md").read_text() in capsys.readouterr().out


def test_a_slow_method_is_left_out_and_named():
    options = config("sizes=[[64,8],[128,16]]", "width=64", "repetitions=1", "n_words=[]", "most_s=0.00001")
    rows, left_out = task.measure(options | {"methods": ["mmtok_scratch", "mi"]})
    assert [row["method"] for row in rows] == ["product", "mi", "mmtok_scratch", "product"]
    assert [line.split(":")[0] for line in left_out] == ["mi at 128 tokens to 16", "mmtok_scratch at 128 tokens to 16"]
    with pytest.raises(InputError, match="unknown method 'steam'"):
        task.measure(options | {"methods": ["steam"]})


def test_the_exponent_is_the_slope():
    rows = [{"method": "a", "n_visual": n, "median_ms": 3.0 * n**2.5} for n in (10, 40, 1000)]
    assert task.exponent(rows) == pytest.approx(2.5)
    assert task.expected_ms(rows, "a", 2000) == pytest.approx(3.0 * 2000**2.5)
    assert task.expected_ms(rows, "b", 2000) == 0
