"""Adapters on the two trained models of the repository, where what is wrong shows in the answers."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from experiments.benchmarks.demo import Demo
from experiments.results import ROOT
from mipruner import PRUNERS, prune
from mipruner.decoding import Decoding
from mipruner.models import FAMILIES, Prompt, load
from mipruner.pipeline import Pipeline, VisionCache
from mipruner.pruners import NoPruner

DEMO = ROOT / "experiments/demo"


def test_the_demo_llava_answers_as_its_own_processor_and_generate():
    processor = AutoProcessor.from_pretrained(DEMO / "llava")
    model = AutoModelForImageTextToText.from_pretrained(DEMO / "llava", dtype=torch.float32).eval()
    benchmark = Demo(n_scenes=2)
    samples = [s for task in ("pope", "gqa", "scienceqa") for s in benchmark.samples() if s.task == task][::5]
    images = [benchmark.images(s.image_id)[0] for s in samples]
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": s.text}]}]
        for s, image in zip(samples, images, strict=True)
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]
    pipeline = Pipeline(load(DEMO / "llava", dtype="float32"), NoPruner(), 1.0, Decoding(max_new_tokens=4))
    prompts = [Prompt(s.text, [image]) for s, image in zip(samples, images, strict=True)]
    assert [answer.text for answer in pipeline(prompts)] == expected
    assert len(set(expected)) > 3


def test_the_demo_llava_has_the_names_of_published_checkpoints():
    """Names that only new transformers read gave older ones a random vision tower, and vLLM none."""
    with safe_open(DEMO / "llava/model.safetensors", "pt") as file:
        names = set(file.keys())
    tower = {name for name in names if name.startswith("vision_tower.")}
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert {"language_model.model.embed_tokens.weight", "multi_modal_projector.linear_1.weight"} <= names


def test_the_demo_qwen3vl_answers_and_needs_each_deepstack_row_at_its_token(monkeypatch):
    """Accuracy in %: 96 with all tokens on canvases of four sizes; rows moved by 5 or 7 tokens cost colours most."""
    adapter = load(DEMO / "qwen3vl", dtype="float32")
    canvases = [(336, 336), (280, 280), (336, 252), (252, 336)]
    benchmark = Demo(canvases=canvases, n_objects=(6, 10), n_scenes=6, seed=1)
    samples = benchmark.samples()
    colours = [s for s in samples if s.text.startswith("What color")]
    images = {s.image_id: benchmark.images(s.image_id)[0] for s in samples}

    def accuracy(pipeline, samples):
        answers = pipeline([Prompt(s.text, [images[s.image_id]], sample=s.id) for s in samples])
        right = [benchmark.correct(s, answer.text) for s, answer in zip(samples, answers, strict=True)]
        return 100 * sum(right) / len(right)

    plain = Pipeline(adapter, NoPruner(), 1.0, Decoding(max_new_tokens=3))
    assert abs(accuracy(plain, samples) - 96) < 2
    quarter = Pipeline(adapter, PRUNERS["mi"](lam=0.8), 0.25, Decoding(max_new_tokens=3))
    assert abs(accuracy(quarter, samples) - 96.3) < 2

    encode = adapter.encode
    full = accuracy(plain, colours)
    for places in (5, 7):

        def rolled(pixels, signals, places=places):
            visuals = encode(pixels, signals)
            return [replace(v, deepstack=tuple(layer.roll(places, 0) for layer in v.deepstack)) for v in visuals]

        plain.cache = VisionCache()
        monkeypatch.setattr(adapter, "encode", rolled)
        assert full - accuracy(plain, colours) >= 15


@pytest.mark.filterwarnings("ignore:'llava' is not among")
def test_the_demo_llava_without_its_adapter_drops_the_same_tokens_between_layers(monkeypatch):
    """Trained weights in bfloat16: what `Form` checks holds for them, and the selection is that of the family."""
    processor = AutoProcessor.from_pretrained(DEMO / "llava")
    model = AutoModelForImageTextToText.from_pretrained(DEMO / "llava", dtype=torch.bfloat16).eval()
    (image,) = Demo(n_scenes=1).images(Demo(n_scenes=1).samples()[0].image_id)
    inputs = processor(images=image, text="<image>\nWhat color is the circle?", return_tensors="pt").to(torch.bfloat16)
    kept = []
    for _ in range(2):
        for method in ("fastv", "sparsevlm", "dart"):
            with prune(model, method, 0.25, tokenizer=processor, positions="keep") as pruning, torch.no_grad():
                model(**inputs)
            kept.append((pruning.per_layer, [s.indices.tolist() for s in pruning.selections[0]]))
        monkeypatch.delitem(FAMILIES, "llava", raising=False)
    assert kept[:3] == kept[3:]
    assert all(per_layer[0][-1] < per_layer[0][0] == 576 for per_layer, _ in kept)
