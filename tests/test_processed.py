"""Models without an adapter through their own processor: `mipruner.processed`, `load` and run.py with model=any."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoConfig, LlavaProcessor

import mipruner
from any_recipes import OVERRIDES
from any_saved import NEEDS, save
from any_tiny import build, config_of
from mipruner.decoding import Decoding
from mipruner.errors import InputError, ModelError
from mipruner.models import Prompt, load
from mipruner.models.generic import GenericAdapter
from mipruner.pipeline import Pipeline
from mipruner.processed import ProcessorPipeline, pipeline_of
from mipruner.pruners import make
from tiny import make_image, prompts_of, tiny, video

OLDER = ["torchvision"] if transformers.__version__.startswith("5.17.") else []
NEEDED = {"gemma3": [], "idefics3": OLDER, "paddleocr_vl": OLDER} | NEEDS
KINDS = [kind for kind, packages in NEEDED.items() if all(map(find_spec, packages))]
"""Types whose processors run here: three everywhere, all where torchvision is (`make test-vllm`)."""
TILES = ("idefics3", "smolvlm", "llama4")
"""Types whose processors divide an image into tiles."""
PROMPTS = [
    Prompt("What is this?", [make_image(0, 120, 80)], sample="a"),
    Prompt("no image", [], sample="b"),
    Prompt(
        "Here are two.\nWhich of them is larger?\nAnswer in one word.",
        [make_image(1, 120, 80), make_image(2, 90, 150)],
        query="Which of them is larger?\nAnswer in one word.",
        question="Which of them is larger?",
        sample="c",
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def adapter(request, folders):
    return load(folders[request.param], dtype="float32")


def stock(adapter, prompt):
    """The untouched model on what its processor makes of one conversation."""
    content = [{"type": "image", "image": image} for image in prompt.images] + [{"type": "text", "text": prompt.text}]
    inputs = adapter.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(torch.float32)
    out = adapter.model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_everything_kept_is_the_untouched_model(adapter):
    told = pipeline_of(adapter, make("none"), 1.0, Decoding(max_new_tokens=6))(PROMPTS)
    for answer, prompt in zip(told, PROMPTS, strict=True):
        tokens = stock(adapter, prompt)
        assert answer.tokens == (tokens[: tokens.index(2)] if 2 in tokens else tokens)


def test_a_batch_is_each_prompt_alone(adapter):
    pipeline = pipeline_of(adapter, make("mi"), 0.25, Decoding(max_new_tokens=6))
    together = pipeline(PROMPTS)
    for answer, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = pipeline([prompt])
        assert answer.tokens == alone.tokens
        assert [s.indices.tolist() for s in answer.selections] == [s.indices.tolist() for s in alone.selections]
        assert sum(len(s.indices) for s in answer.selections) == answer.n_keep == round(sum(answer.n_visual) / 4)
    assert all(pipeline.watch.ms[stage] > 0 for stage in ("vision", "scoring", "prefill", "decode"))


def test_the_query_scores_and_the_question_is_told_apart(adapter, monkeypatch):
    pipeline, seen = pipeline_of(adapter, make("cdpruner"), 0.25, Decoding(max_new_tokens=1)), []
    monkeypatch.setattr("mipruner.pipeline.Pipeline.select", spy(Pipeline.select, seen))
    pipeline([PROMPTS[2]])
    (sample,) = seen
    decode = adapter.tokenizer.decode
    assert decode(sample.ids[sample.is_text]) == PROMPTS[2].query
    assert decode(sample.ids[sample.is_text][sample.signals["question"]]) == PROMPTS[2].question


def spy(method, seen):
    def noted(self, encoded):
        seen.append(encoded)
        return method(self, encoded)

    return noted


@pytest.mark.parametrize("decoding", [Decoding(6), Decoding(6, temperature=0.7, top_p=0.9, top_k=40, seed=3)])
@pytest.mark.parametrize("method", ["mi", "fastv"])
def test_a_model_that_has_an_adapter_says_the_same_without_it(monkeypatch, decoding, method):
    family = tiny("llava")
    monkeypatch.setattr(family.tokenizer, "image_token", "<image>", raising=False)
    processor = LlavaProcessor(
        family.image_processor,
        family.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=family.tokenizer.chat_template,
        num_additional_image_tokens=1,
    )
    generic = GenericAdapter(family.model, family.tokenizer, processor, positions="repack")
    prompts = prompts_of("llava")
    expected = Pipeline(family, make(method), 0.25, decoding)(prompts)
    told = ProcessorPipeline(generic, make(method), 0.25, decoding)(prompts)
    for one, other in zip(told, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.n_visual == other.n_visual
        assert one.n_keep == other.n_keep
        assert one.grids == other.grids
        assert one.visual_tokens_per_layer == other.visual_tokens_per_layer
        assert [s.indices.tolist() for s in one.selections] == [s.indices.tolist() for s in other.selections]


def test_what_cannot_be_answered_is_one_clear_message(folders):
    adapter = load(folders["gemma3"], dtype="float32")
    pipeline = pipeline_of(adapter, make("mi"), 0.25)
    with pytest.raises(InputError, match="gemma3 has no adapter, and takes images only"):
        adapter.kinds([video(0, 2)])
    with pytest.raises(InputError, match="contains the placeholder '<image_soft_token>'"):
        pipeline([Prompt("What is <image_soft_token>?", [make_image(0, 80, 80)], sample="a")])
    with pytest.raises(InputError, match="runs by its own processor"):
        Pipeline(adapter, make("mi"), 0.25)([PROMPTS[0]])
    with pytest.raises(InputError, match="only image rows and text are known"):
        pipeline_of(adapter, make("visionzip"), 0.25)([PROMPTS[0]])
    spoken = load(folders["gemma3"], dtype="float32", system="Be brief.")
    assert "Be brief." in spoken.chat.render([])[0]


def test_a_processor_that_does_not_load_is_one_clear_message(folders, tmp_path):
    folder = shutil.copytree(folders["gemma3"], tmp_path / "other")
    (folder / "processor_config.json").unlink()
    with pytest.raises(ModelError, match="no processor of gemma3 that loads: Can't load image processor"):
        load(folder)
    if not find_spec("torchvision"):
        config_of("glm4v", OVERRIDES).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            '{"image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"}'
        )
        with pytest.raises(
            ModelError, match="processor of glm4v needs a package that does not import here, torchvision"
        ):
            load(folder)
    AutoConfig.for_model("blip-2").save_pretrained(folder)
    with pytest.raises(ModelError, match="'blip-2', which cannot be pruned"):
        load(folder)


def cli(monkeypatch, capfd, *overrides):
    pytest.importorskip("hydra")  # the library alone is tested with the oldest transformers
    from command_line import run_main

    return run_main(monkeypatch, capfd, "model=any", *overrides)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_makes_a_record(kind, folders, tmp_path, monkeypatch, capfd):
    words = ["dataset=demo", "limit=2", "keep=0.25", "batch_size=3", "model.dtype=float32", f"results={tmp_path}"]
    status, said = cli(monkeypatch, capfd, f"model.path={folders[kind]}", *words)
    assert status == 0, said.err
    (path,) = tmp_path.glob("*/demo/mi/*/record.json")
    record = json.loads(path.read_text())
    assert record["cell"]["model"] == path.parts[-5] == Path(folders[kind]).name
    assert record["tokens"]["kept"] == pytest.approx(record["tokens"]["visual"] / 4, abs=1)
    assert not record["failed"] and record["metrics"] and record["latency_ms"]["decode"] > 0
    assert (path.parent / "masks.png").exists() is (kind not in TILES)  # which lie on no single grid


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_processor_runs_once_per_batch_and_what_it_refuses_fails_alone(adapter, monkeypatch, is_refused):
    pytest.importorskip("scipy")  # the library alone is tested with the oldest transformers
    from experiments.benchmarks.base import Sample
    from experiments.evaluate import ImageLoader, answer_batch

    images, runs = [make_image(k, 120, 80) for k in range(4)], []
    pixels = type(adapter.image_processor).preprocess

    def counted(self, given, *args, **kwargs):
        shown = [image for own in given for image in (own if isinstance(own, list) else [own])]
        runs.append(len(shown))
        if is_refused and images[1] in shown:
            raise ZeroDivisionError("image of width 0")
        return pixels(self, given, *args, **kwargs)

    monkeypatch.setattr(type(adapter.image_processor), "preprocess", counted)
    names = [str(k) for k in range(4)]
    samples = [Sample(id=k, text="Why?", question="Why?", answer="", image_id=k, task="t") for k in names]
    bench = SimpleNamespace(is_video=False, images=lambda name: [images[int(name)]])
    pipeline = pipeline_of(adapter, make("mi"), 0.25, Decoding(max_new_tokens=2))
    with ThreadPoolExecutor(1) as pool:
        shown, errors = ImageLoader(bench, pipeline, pool).load(samples)
        rows = answer_batch(pipeline, samples, shown, errors, "prompt")
    assert runs == ([4, 1, 1, 1, 1] if is_refused else [4])
    failed, kind = {row["id"]: row["error"] for row in rows if "error" in row}, adapter.model.config.model_type
    said = f"the processor of {kind} refuses the text with images of 120 x 80: image of width 0"
    assert failed == ({"1": said} if is_refused else {})
    assert sum(row["prediction"] is not None for row in rows) == 4 - is_refused


def test_the_command_line_says_what_is_missing(folders, monkeypatch, capfd):
    status, said = cli(monkeypatch, capfd)
    assert status == 1 and "model=any needs a model: model.path=" in said.err
    status, said = cli(monkeypatch, capfd, f"model.path={folders['gemma3']}", "task=throughput", "dataset=demo")
    assert status == 1 and "this task takes only" in said.err


def test_an_image_of_ones_own(folders, tmp_path, monkeypatch, capfd):
    make_image(0, 120, 80).save(tmp_path / "photo.png")
    words = [f"image={tmp_path}/photo.png", "question=Why?", "keep=4", f"results={tmp_path}", "model.dtype=float32"]
    status, said = cli(monkeypatch, capfd, f"model.path={folders['gemma3']}", *words)
    assert status == 0 and "tokens kept 4 of 16" in said.out


def test_prune_tells_the_question_apart(folders):
    adapter = load(folders["gemma3"], dtype="float32")
    with (
        torch.no_grad(),
        mipruner.prune(adapter.model, "cdpruner", 4, tokenizer=adapter.processor, question="not there"),
        pytest.raises(InputError, match="'not there' is not in the prompt"),
    ):
        adapter.model.generate(**adapter.inputs([PROMPTS[0]]), max_new_tokens=1)
    with pytest.raises(InputError, match="give tokenizer, too"):
        mipruner.prune(build("gemma3", OVERRIDES), "mi", 4, question="Why?")
