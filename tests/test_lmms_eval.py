"""The plug-in inside lmms-eval itself, in an environment of its own: `make test-lmms-eval`. Skipped in any other."""

import io
import json

import pytest

pytest.importorskip("mipruner_lmms_eval", reason="lmms-eval lives in an environment of its own: make test-lmms-eval")

import lmms_eval.evaluator
import pandas as pd
from lmms_eval.models import get_model, list_available_models
from lmms_eval.tasks import TaskManager
from mipruner_lmms_eval.model import Pruned, cut, decoding

from experiments.benchmarks.demo import Demo
from experiments.results import ROOT
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import Prompt, load
from mipruner.pipeline import Pipeline
from mipruner.pruners import MIPruner

DEMO = str(ROOT / "experiments/demo/llava")
TASK = """
task: demo_scenes
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.images
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false, until: ["\\n"]}}
process_results: !function scenes.score
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
FUNCTIONS = """
import io
from PIL import Image


def images(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]


def score(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Twenty questions of the demo as an lmms-eval task of the user's own."""
    folder, benchmark = tmp_path_factory.mktemp("task"), Demo(density="crowded", n_scenes=2, seed=7)
    samples = benchmark.samples()[:20]
    rows = []
    for sample in samples:
        file = io.BytesIO()
        benchmark.images(sample.image_id)[0].save(file, "PNG")
        rows.append({"image": file.getvalue(), "question": sample.text, "answer": sample.answer})
    pd.DataFrame(rows).to_parquet(folder / "scenes.parquet")
    (folder / "demo_scenes.yaml").write_text(TASK.format(data=folder / "scenes.parquet"))
    (folder / "scenes.py").write_text(FUNCTIONS)
    return folder, benchmark, samples


def test_lmms_eval_finds_the_model_by_its_entry_point():
    assert "mipruner" in list_available_models()
    assert get_model("mipruner") is Pruned


def test_a_task_scores_what_the_pipeline_answers(scenes):
    folder, benchmark, samples = scenes
    found = lmms_eval.evaluator.simple_evaluate(
        model="mipruner",
        model_args=f"pretrained={DEMO},pruner=mi,keep=16,lam=0.8,dtype=float32",
        tasks=["demo_scenes"],
        batch_size=8,
        device="cpu",
        task_manager=TaskManager(include_path=str(folder), model_name="mipruner"),
        log_samples=True,
    )
    pipeline = Pipeline(load(DEMO, dtype="float32"), MIPruner(lam=0.8), 16, Decoding(max_new_tokens=4))
    prompts = [Prompt(s.text, benchmark.images(s.image_id)) for s in samples]
    expected = [answer.text for k in range(0, 20, 8) for answer in pipeline(prompts[k : k + 8])]
    told = [sample["filtered_resps"][0] for sample in found["samples"]["demo_scenes"]]
    assert told == expected
    right = sum(text == sample.answer for text, sample in zip(expected, samples, strict=True)) / 20
    assert found["results"]["demo_scenes"]["right,none"] == pytest.approx(right)
    assert right > 0.7, json.dumps(told)


def test_options_reach_the_pruner_or_the_model():
    with pytest.raises(InputError, match="unknown pruner 'mmi'"):
        Pruned(DEMO, pruner="mmi")
    with pytest.raises(InputError, match="lam=2 is not in"):
        Pruned(DEMO, lam=2)
    with pytest.raises(InputError, match="unexpected keyword argument 'lamda'"):
        Pruned(DEMO, lamda=1, device="cpu")
    assert Pruned(DEMO, device="cpu", prompt="vicuna_v1").pipeline.adapter.chat.prompt.startswith("A chat")


def test_generation_options_of_lmms_eval():
    assert decoding({"temperature": 0, "do_sample": False, "top_p": 0.5, "max_new_tokens": 7}) == Decoding(7)
    assert decoding({"temperature": 0.7, "top_p": 0.8, "top_k": 20}) == Decoding(128, 0.7, 0.8, 20)
    assert decoding({"temperature": 0.7, "do_sample": False, "top_p": None}) == Decoding(128)
    assert cut("yes\nno", "\n") == "yes" and cut("a. b; c", [";", "."]) == "a" and cut(" a ", None) == "a"
