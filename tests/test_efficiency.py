"""The efficiency run on the demo: everything measured, what an engine cannot do said, the floor as defined."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import build, conf, flops, results
from experiments.machine import machine, spread
from experiments.results import ROOT
from experiments.tasks import efficiency, estimate
from experiments.tasks.efficiency import shortest_ms
from mipruner.errors import InputError
from mipruner.models import load

SMALL = ["warmup=1", "repetitions=1", "keeps=[16]", "methods=[none,visionzip,dart,'mi lam=1']"]


def config(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", ["task=efficiency", *overrides]), resolve=True)


def run(tmp_path, capsys, *overrides):
    efficiency.run(config(*overrides, f"out={tmp_path}/record.json"), overrides)
    *_, last = capsys.readouterr().out.strip().splitlines()
    record = json.loads(last)
    assert record == json.loads((tmp_path / "record.json").read_text())
    return record


def test_all_methods_on_all_engines(tmp_path, capsys):
    record = run(tmp_path, capsys, *SMALL)
    rows = {(row["method"], row["engine"]): row for row in record["rows"]}
    engines = {"generate", "pipeline", "engine"}
    assert rows.keys() == {
        *(("none", engine) for engine in engines),
        *(("mi lam=1", engine) for engine in engines),
        *(("visionzip", engine) for engine in engines),  # on a CPU the pipeline answers for the engine
        ("dart", "pipeline"),
    }
    assert record["left_out"] == [
        "dart keep=16 engine=generate: DARTPruner does not prune between encoder and decoder: use the pipeline",
        "dart keep=16 engine=engine: DARTPruner prunes outside of what the engine records: use the pipeline",
    ]
    for (method, engine), row in rows.items():
        stages = {"vision", "scoring", "total"} | ({"generate"} if engine == "generate" else {"prefill", "decode"})
        assert row["latency_ms"].keys() == stages
        assert all(0 < ms["p20"] <= ms["median"] <= ms["p80"] for ms in row["latency_ms"].values())
        assert row["visual_tokens"] == 576
        if method != "dart":
            assert row["visual_tokens_layer_mean"] == (576 if method == "none" else 16)
        assert row["new_tokens"] in (1, 2)
        assert 0 < row["resident_memory_gib"] <= row["peak_memory_gib"]
        assert row["times_floor"] == pytest.approx(row["latency_ms"]["total"]["median"] / row["floor_ms"], abs=0.02)
    assert (
        rows["none", "pipeline"]["latency_ms"]["prefill"]["median"]
        > 2 * (rows["mi lam=1", "pipeline"]["latency_ms"]["prefill"]["median"])
    )
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__


def test_random_weights_and_longer_prompts(tmp_path, capsys):
    record = run(
        tmp_path, capsys, "model=demo_qwen3vl", "weights=random", "n_text=50", "image_size=[280,196]", "warmup=1",
        "repetitions=1", "methods=[mi]", "keeps=[0.5]", "engines=[pipeline,engine,generate]",
    )  # fmt: skip
    assert record["text_tokens"] == 50
    assert [row["engine"] for row in record["rows"]] == ["pipeline", "engine"]
    assert all((row["visual_tokens"], row["visual_tokens_layer_mean"]) == (10 * 7, 35) for row in record["rows"])
    assert "generate takes no deepstack rows" in record["left_out"][0]


@pytest.mark.parametrize("name", conf.names("model"))
def test_random_weights_of_every_shape(name, monkeypatch):
    """Two layers of every model that has a shape: prompt and vision encoder fit, or one sentence says why not."""
    shape = flops.architecture

    def short(name):
        config = shape(name)
        config.text_config.num_hidden_layers = 2
        vision = config.vision_config
        vision.update({"depth": 2} if hasattr(vision, "depth") else {"num_hidden_layers": 2})
        if hasattr(vision, "deepstack_visual_indexes"):
            vision.deepstack_visual_indexes = [0, 1]
        return config

    monkeypatch.setattr(flops, "architecture", short)
    monkeypatch.setattr(build, "device", lambda config: "meta")
    settings = config(f"model={name}", "weights=random", "dataset=demo_canvases")
    try:
        adapter, prompt = efficiency.prepare(settings)
    except InputError as error:
        options = conf.read("model", name)
        assert str(error).startswith(
            "random weights are for llava, qwen3_vl" if "shape" in options else "there is no shape"
        )
        assert options.get("shape", {}).get("model_type") not in flops.STAND_INS
        return
    assert adapter.model.config.model_type in flops.STAND_INS
    pixels = [adapter.preprocess(image) for image in prompt.images]
    pixels = [{k: v.to("meta") if k == "pixel_values" else v for k, v in one.items()} for one in pixels]
    vision = adapter.model.config.vision_config
    if "grid_thw" in pixels[0]:
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        assert pixels[0]["pixel_values"].shape[-1] == width
    else:
        assert pixels[0]["pixel_values"].shape[-2:] == (vision.image_size, vision.image_size)
    assert efficiency.n_text(adapter, prompt) > 5


@pytest.mark.parametrize("override", ["clock=sun", "engines=[pipeline,steam]"])
def test_unknown_words_are_named(override):
    with pytest.raises(InputError, match=r"unknown '(sun|steam)': choose (wall|generate|pipeline)"):
        efficiency.run(config(override))


def test_the_floor_is_bytes_over_bandwidth_and_flops_over_speed():
    adapter = load("experiments/demo/llava", dtype="float32")
    text = adapter.model.config.text_config
    layer = sum(p.numel() for p in adapter.language_model.layers[0].parameters())
    weights = 4 * (layer * text.num_hidden_layers + text.vocab_size * text.hidden_size)
    fast_product = {"copy_gb_per_s": 10.0, "product_tflop_per_s": 1e9}
    assert shortest_ms(adapter, fast_product, 576, 30, 3) == pytest.approx(3 * weights / 10e9 * 1e3, rel=1e-3)
    fast_copy = {"copy_gb_per_s": 1e12, "product_tflop_per_s": 1.0}
    two = [shortest_ms(adapter, fast_copy, 576, n, 1) for n in (100, 200)]
    quadratic = 4 * text.num_hidden_layers * text.hidden_size * (200**2 - 100**2)
    linear = 2 * 100 * (layer - 2 * text.hidden_size) * text.num_hidden_layers
    assert two[1] - two[0] == pytest.approx((linear + quadratic) / 1e12 * 1e3, rel=1e-6)


def test_a_gpu_without_nvidia_smi_is_still_named(monkeypatch):
    """Found out after everything is measured, it would lose all of it."""
    monkeypatch.setattr(results, "device_name", lambda device: "some GPU")
    monkeypatch.setenv("PATH", "")
    assert machine(torch.device("cuda"))["device"] == "some GPU"


def test_spread_is_median_and_the_middle_three_fifths():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 100.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert spread([7.0]) == {"median": 7.0, "p20": 7.0, "p80": 7.0}


def test_estimate_on_the_command_line(capsys):
    estimate.run(config("task=estimate", "model=qwen3vl_8b", "keep=0.25", "n_visual=1024"))
    assert json.loads(capsys.readouterr().out)["n_keep"] == 256
