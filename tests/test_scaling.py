"""The sweep over sizes: every method chooses what it should, rows say their conditions, and the figure draws them."""

import csv
import json

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis import scaling as figure
from experiments.flops import Decoder, architecture
from experiments.results import ROOT
from experiments.tasks import scaling
from mipruner.errors import InputError

SMALL = ["n_visual=[32,64]", "keeps=[8,0.5]", "width=48", "repetitions=2", "device=cpu"]


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", ["task=scaling", *overrides]), resolve=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scaling") / "rows.csv"
    threads = torch.get_num_threads()
    scaling.run(config(*SMALL, f"out={path}"))
    torch.set_num_threads(threads)
    return path


def test_every_method_at_every_size(path):
    rows = list(csv.DictReader(path.open()))
    sizes = {(int(row["n_visual"]), int(row["n_keep"])) for row in rows}
    assert sizes == {(32, 8), (32, 16), (64, 8), (64, 32)}
    assert len(rows) == len(sizes) * len(scaling.METHODS)
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["peak_gib"]) >= 0
        assert row["device"] and row["torch"] == torch.__version__ and row["dtype"] == "float32"
    one = next(row for row in rows if row["n_visual"] == "64" and row["n_keep"] == "8")
    other = next(row for row in rows if row["n_visual"] == "64" and row["n_keep"] == "32")
    decoder = Decoder.of(architecture("llava15_7b").text_config)
    flops = [decoder.prefill_flops(64 + 60) - decoder.prefill_flops(k + 60) for k in (8, 32)]
    ratio = float(one["prefill_saved_ms"]) / float(other["prefill_saved_ms"])
    assert ratio == pytest.approx(flops[0] / flops[1], rel=1e-3)


def test_a_recorded_method_chooses_the_same():
    visual, text = (scaling.tokens(n, 48, torch.device("cpu"), seed) for n, seed in ((60, 1), (5, 2)))
    assert scaling.recorded(scaling.mi, visual, text, 20)().tolist() == scaling.mi(visual, text, 20).tolist()
    assert scaling.methods(torch.device("cuda")).keys() - scaling.methods(torch.device("cpu")).keys() == {
        "mi_graph",
        "mi_relevance_graph",
    }


@pytest.mark.parametrize("method", [m for m in scaling.METHODS if m is not scaling.product], ids=lambda m: m.__name__)
def test_methods_choose_as_many_as_asked(method):
    visual, text = (scaling.tokens(n, 48, torch.device("cpu"), seed) for n, seed in ((60, 1), (5, 2)))
    picks = method(visual, text, 20)
    assert len(set(picks.tolist())) == 20


def test_slow_methods_are_left_out_of_larger_images(tmp_path, capsys):
    scaling.run(config(*SMALL, f"out={tmp_path}/rows.csv", "most_s=0"))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {(row["n_visual"], row["n_keep"]) for row in rows} == {(32, 8), (32, 16)}


def test_the_figure_draws_the_newest_rows_of_one_device(path, tmp_path):
    rows = pd.read_csv(path)
    older = rows.assign(date="2020-01-01", median_ms=1e6)
    pd.concat([rows, older]).to_csv(tmp_path / "both.csv", index=False)
    read = figure.read(tmp_path / "both.csv")
    assert len(read) == len(rows) and read.median_ms.max() < 1e6
    left, right = figure.draw(read, share=0.5, n_keep=8).axes
    (line,) = [line for line in left.lines if line.get_label() == "MI, λ = 0.5"]
    expected = rows[rows.method.eq("mi") & rows.n_keep.isin([16, 32])].median_ms
    assert line.get_ydata().tolist() == expected.tolist()
    assert len(right.lines) == len(scaling.METHODS) + 1

    pd.concat([rows, rows.assign(device="another")]).to_csv(tmp_path / "mixed.csv", index=False)
    with pytest.raises(ValueError, match="one at a time"):
        figure.read(tmp_path / "mixed.csv")


def test_unknown_options_are_named(tmp_path):
    with pytest.raises(InputError, match="unknown method 'fastv'"):
        scaling.run(config("methods=[mi,fastv]", f"out={tmp_path}/rows.csv"))
