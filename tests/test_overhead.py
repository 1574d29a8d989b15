"""The overhead run: the calls that take turns, and the ratios made of their times."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import build
from experiments.results import ROOT
from experiments.tasks import overhead
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline


def config(*words):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", ["task=overhead", "device=cpu", *words]), resolve=True)


def test_four_calls_take_turns(tmp_path, capsys):
    words = ["batches=[1]", "repetitions=2", "warmup=0", "max_new_tokens=2", "keep=32", f"out={tmp_path}/record.json"]
    overhead.run(config(*words), words)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "record.json").read_text())
    (row,) = record["rows"]
    assert (row["visual_tokens"], row["kept"], record["dtype"]) == (576, 32, "bfloat16")
    assert row["ms"]["cpu"].keys() == {"stock", "everything", "pruned", "ideal"}
    assert 0 < row["encoder_ms"]["cpu"]["pruned"]["median"] < row["ms"]["cpu"]["pruned"]["median"]
    assert row["ms"]["cpu"]["ideal"]["median"] < row["ms"]["cpu"]["stock"]["median"]
    for words, said in {"batches=[10000]": "make batches smaller", "compile=[eyes]": "choose encoder, decoder"}.items():
        with pytest.raises(InputError, match=said):
            overhead.measure(config(words))


def test_parts_are_compiled_for_all_four_calls(monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    words = ["batches=[1]", "repetitions=1", "warmup=0", "max_new_tokens=1", "compile=[encoder,decoder]"]
    record = overhead.measure(config(*words))
    assert compiled == ["CLIPVisionModel", "LlamaModel"]
    assert "demo_llava, bfloat16, encoder compiled, decoder compiled" in overhead.show(record)


def test_the_ratios_are_medians_over_rounds():
    outside = {"stock": [9.0, 18.0, 9.0], "everything": [10.0, 18.0, 9.0]}
    outside |= {"pruned": [3.0, 6.0, 4.0], "ideal": [3.0, 2.0, -1.0]}
    encoder = {"stock": (1.0, 2.0, 1.0), "everything": (2.0, 3.0, 0.5), "pruned": (0.0, 2.0, 0.5), "ideal": (1, 1, 2)}
    pairs = {name: list(zip(outside[name], encoder[name], strict=True)) for name in outside}
    row = overhead.row(1, 576, 64, {"cpu": pairs})
    assert row["ms"]["cpu"]["stock"]["median"] == 10.0  # 9 outside, and a mean of 1 in the encoder
    assert row["encoder_ms"]["cpu"]["pruned"]["median"] == 0.5
    assert row["everything_over_stock"]["cpu"]["median"] == 1.0
    assert row["share_of_ideal_saving"]["cpu"]["median"] == 0.75


@pytest.mark.parametrize("model", ["demo_llava", "demo_qwen3vl"])
def test_the_prompts_are_those_of_the_pipeline(model):
    chosen = config(f"model={model}", "model.dtype=float32")
    adapter, benchmark = build.model(chosen), build.benchmark(chosen)
    prompts = [Prompt(sample.text, benchmark.images(sample.image_id)) for sample in benchmark.samples()[:4:3]]
    inputs = overhead.inputs_of(adapter, prompts)
    with torch.inference_mode():
        new = adapter.model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
        answers = Pipeline(adapter, build.method("none", chosen), 1.0, Decoding(max_new_tokens=1))(prompts)
    assert new.tolist() == [answer.tokens[0] for answer in answers]
