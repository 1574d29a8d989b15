"""The demo's trainer: examples that say what is in the image, losses that fall, and a kill that changes nothing."""

import copy
import itertools
import math
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessorPil, Qwen2VLImageProcessorPil

from command_line import Fork
from experiments.demo.examples import IGNORE, Examples, cell_words, choose_questions
from experiments.demo.families import Llava, Qwen3VL, Visual, patchify
from experiments.demo.scenes import COLORS, NOUNS, glyph_mask, make_scene, render, scene_generators
from experiments.tasks.train_demo import RECIPE, Learner, evaluate, learning_rate, load_examples, take_step, train
from mipruner.models import Prompt, load
from mipruner.prompt import collate
from mipruner.selection import Selection

ROOT = Path(__file__).resolve().parents[1]
LLAVA, QWEN = ROOT / "experiments/demo/llava", ROOT / "experiments/demo/qwen3vl"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(name, **changes):
    with initialize_config_dir(version_base=None, config_dir=str(ROOT / "conf")):
        config = OmegaConf.to_container(compose("config", ["task=train_demo", f"recipe={name}"]), resolve=True)
    return {key: config[key] for key in RECIPE} | changes


def examples(**changes):
    options = {"seed": 1, "cell": 14, "canvases": [(336, 336)], "batch": 4, "crowded": 0.5, "n_questions": 9}
    return Examples(AutoTokenizer.from_pretrained(LLAVA), **options | changes)


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize(("density", "cell"), [("sparse", 14), ("crowded", 28)])
def test_cells_are_labelled_with_what_they_show(density, cell):
    labelled = 0
    for index in range(4):
        scene = make_scene(scene_generators(9, index)[0], density)
        things, colors = cell_words(scene, cell)
        for row in range(336 // cell):
            for column in range(336 // cell):
                x, y = column * cell, row * cell
                shares = {}
                for o in scene.objects:
                    left, top, right, bottom = o.box
                    ink = np.asarray(glyph_mask(o.noun, max(right - left, bottom - top))) / 255
                    part = ink[max(0, y - top) : max(0, y + cell - top), max(0, x - left) : max(0, x + cell - left)]
                    shares[o.noun, o.color] = part.sum() / cell**2
                (noun, color), share = max(shares.items(), key=lambda item: item[1])
                if things[row, column] in NOUNS:
                    assert (things[row, column], colors[row, column]) == (noun, color) and share >= 0.05
                    labelled += 1
                else:
                    assert colors[row, column] == ""
                    assert share < 0.05 or things[row, column]  # a sign beside it
        if scene.sign:
            left, top, right, bottom = scene.sign.box
            on_sign = [
                things[row, column]
                for row in range(top // cell, (bottom - 1) // cell + 1)
                for column in range(left // cell, (right - 1) // cell + 1)
            ]
            assert set(scene.sign.digits) & set(on_sign) and "sign" in on_sign
            middle = things[(top + 20) // cell, (left + 19) // cell], things[(top + 20) // cell, (left + 39) // cell]
            assert cell > 14 or middle == tuple(scene.sign.digits)
        else:
            assert not set(things.ravel()) & {"sign", *"0123456789"}
    assert labelled > 40


def test_an_example_holds_its_scene_and_loses_on_answers_only():
    data = examples()
    tokenizer = data.tokenizer
    example = data[3]
    scene_rng, question_rng = scene_generators(1, 3)
    density = "crowded" if scene_rng.random() < 0.5 else "sparse"
    scene = make_scene(scene_rng, density)
    assert (example["pixels"].permute(1, 2, 0).numpy() == np.asarray(render(scene))).all()
    questions = choose_questions(scene, question_rng, 9)
    assert len(set(questions)) == 9 and len({(q.task, q.category) for q in questions}) >= 8
    assert tokenizer.decode(example["ids"]) == " ".join(f"USER: {q.text} ASSISTANT: {q.answer} </s>" for q in questions)
    learnt = example["labels"] != IGNORE
    assert tokenizer.decode(example["labels"][learnt]) == " ".join(f"{q.answer} </s>" for q in questions)
    assert (example["ids"][learnt] == example["labels"][learnt]).all()
    present = [word for word, there in zip((*NOUNS, *COLORS), example["presence"], strict=True) if there]
    assert set(present) == {*scene.nouns, *(o.color for o in scene.objects)}
    again = examples(batch=1)[3]
    assert all(torch.equal(example[name], again[name]) for name in example)


def test_batches_share_a_canvas():
    data = examples(canvases=[(336, 252), (252, 336)], batch=2, cell=28)
    sizes = [tuple(data[i]["pixels"].shape[1:]) for i in range(6)]
    assert sizes == [(252, 336)] * 2 + [(336, 252)] * 2 + [(252, 336)] * 2
    batch = data.collate([data[0], data[1]])
    assert batch["things"].shape == (2, 9 * 12) and batch["ids"].shape == batch["labels"].shape


# ------------------------------------------------------------------------------------------------------------ families


def test_patches_are_those_of_the_image_processor():
    images = [render(make_scene(scene_generators(3, i)[0], canvas=(336, 252))) for i in range(2)]
    processor = Qwen2VLImageProcessorPil.from_pretrained(QWEN)
    expected = processor(images, return_tensors="pt")
    learner = Learner(recipe("qwen3vl_warm", init=None))
    pixels = learner.normalised(torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]))
    patches, grid = patchify(pixels, 14, 2, 2)
    torch.testing.assert_close(patches, expected["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(grid, expected["image_grid_thw"])
    clip = CLIPImageProcessorPil.from_pretrained(LLAVA)(images[0].resize((336, 336)), return_tensors="pt")
    square = torch.from_numpy(np.array(images[0].resize((336, 336)))).permute(2, 0, 1)[None]
    torch.testing.assert_close(learner.normalised(square), clip["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("folder", "family"), [(LLAVA, Llava), (QWEN, Qwen3VL)])
@torch.no_grad()
def test_training_reads_as_the_stock_model_does(folder, family):
    adapter = load(folder, dtype="float32")
    model, tokenizer = adapter.model, adapter.tokenizer
    image = render(make_scene(scene_generators(4, 0)[0], canvas=(336, 336) if family is Llava else (252, 336)))
    inputs = adapter.image_processor(image, return_tensors="pt")
    turns = tokenizer("USER: Is there a sun in the image ? ASSISTANT: yes </s>", add_special_tokens=False).input_ids
    if family is Llava:
        placeholder = [model.config.image_token_id] * 576
        extra = {"pixel_values": inputs["pixel_values"]}
    else:
        n_visual = int(inputs["image_grid_thw"].prod()) // 4
        placeholder = [model.config.vision_start_token_id, *[model.config.image_token_id] * n_visual]
        placeholder += [model.config.vision_end_token_id]
        extra = {**inputs, "mm_token_type_ids": torch.tensor([[0] + [1] * n_visual + [0] * (1 + len(turns))])}
    ids = torch.tensor([placeholder + turns])
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[:, len(placeholder) :]

    ours = family(model)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(getattr(adapter.image_processor, f"image_{x}"))[:, None, None] for x in ("mean", "std"))
    visual = ours.see((pixels - mean) / std)
    every = torch.arange(visual.tokens.shape[1])[None]
    logits = ours.read(visual, every, torch.tensor([turns]))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    fewer = ours.read(visual, every[:, ::3], torch.tensor([turns]))
    assert (fewer - logits).abs().max() > 1e-2


@torch.no_grad()
def test_dropped_tokens_keep_their_place_in_qwens_grid():
    """Hiding tokens in training equals the adapter's pruned prompt, deepstack included."""
    adapter = load(QWEN, dtype="float32")
    image = render(make_scene(scene_generators(4, 1)[0], canvas=(252, 336)))
    kept = torch.tensor([0, 5, 6, 40, 77, 107])
    question = "What color is the sun ?"
    (seen,) = adapter.encode([adapter.preprocess(image)], frozenset())
    encoded = adapter.read(Prompt(text=question, images=[image]), [seen], frozenset())
    short = adapter.shorten(encoded, [Selection(kept)])
    inputs = collate([short]).language_model_inputs()
    expected = adapter.model.lm_head(adapter.language_model(**inputs).last_hidden_state[:, -1])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(getattr(adapter.image_processor, f"image_{x}"))[:, None, None] for x in ("mean", "std"))
    family = Qwen3VL(adapter.model)
    ids = adapter.tokenizer(f"USER: {question} ASSISTANT:", add_special_tokens=False, return_tensors="pt").input_ids
    logits = family.read(family.see((pixels - mean) / std), kept[None], ids)
    torch.testing.assert_close(logits[:, -1], expected, atol=2e-4, rtol=1e-3)


def test_warm_start_sees_almost_what_its_teacher_sees():
    learner = Learner(recipe("qwen3vl_warm"))
    teacher = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32)
    data = examples(seed=8)
    pixels = learner.normalised(data.collate([data[0], data[1]])["pixels"])
    with torch.no_grad():
        expected = teacher.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        patches, grid = patchify(pixels, 14, 2, 2)
        seen = learner.model.model.visual(patches, grid).last_hidden_state.unflatten(0, (2, -1))
    in_merge_order = [
        (2 * row + i) * 24 + 2 * column + j for row in range(12) for column in range(12) for i in (0, 1) for j in (0, 1)
    ]
    assert F.cosine_similarity(seen, expected[:, in_merge_order], dim=-1).mean() > 0.85


# -------------------------------------------------------------------------------------------------------------- losses


def test_alignment_is_the_mean_cross_entropy_of_cosines():
    learner = Learner(recipe("smoke"))
    words = learner.tokenizer.get_vocab()
    visual = torch.randn(1, 4, 320, generator=torch.Generator().manual_seed(0))
    things = torch.tensor([[words["sun"], words["7"], IGNORE, words["sign"]]])
    colors = torch.tensor([[words["red"], IGNORE, IGNORE, IGNORE]])
    embeddings = learner.model.get_input_embeddings().weight.detach().double()

    def cross_entropy(patch, word, among):
        cosines = {
            i: float(patch @ embeddings[i] / patch.norm() / max(embeddings[i].norm(), 1e-9) / 0.07) for i in among
        }
        return math.log(sum(math.exp(c) for c in cosines.values())) - cosines[word]

    color_ids = {words[c] for c in COLORS}
    others = set(words.values()) - color_ids
    rows = visual[0].double()
    expected = np.mean([cross_entropy(rows[i], int(things[0, i]), others) for i in (0, 1, 3)])
    expected += cross_entropy(rows[0], words["red"], color_ids)
    assert learner.alignment(visual, things, colors).item() == pytest.approx(expected, rel=1e-4)
    nothing = torch.full_like(things, IGNORE)
    assert float(learner.alignment(visual, nothing, nothing)) == 0


def test_scramble_moves_all_but_the_things():
    learner = Learner(recipe("smoke"))
    tokens = torch.randn(2, 5, 320, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([[1, 2, 3, 4, 0], [4, 3, 2, 1, 0]])
    deepstack = [torch.randn(2, 5, 320)]
    mixed = learner.scramble(Visual(tokens, (1, 5), deepstack), order)
    things = learner.model.get_input_embeddings().weight[learner.thing_ids]
    torch.testing.assert_close(mixed.tokens @ things.T, tokens @ things.T, atol=1e-4, rtol=1e-3)
    null = torch.linalg.svd(things).Vh[len(things) :]  # directions that no thing has
    for k in range(2):
        for token in range(5):
            other = tokens[k, order[k, token]]
            torch.testing.assert_close(mixed.tokens[k, token] @ null.T, other @ null.T, atol=1e-4, rtol=1e-3)
    assert mixed.deepstack is deepstack


@pytest.mark.parametrize("name", ["smoke", "qwen3vl_warm"])
def test_every_loss_falls(name):
    options = recipe(name, init=None)
    if name != "smoke":
        options["architecture"] = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 4}}
    stage = copy.deepcopy(options["stages"][-1]) | {"batch": 2, "warmup": 0, "lr": 1e-3, "scramble": 0.0}
    stage["visible"] = [0.25]
    learner = Learner(options)
    optimizer = learner.optimizer(stage, options)
    batch = next(load_examples(learner, options | {"workers": 0}, stage, 0, 0, "cpu"))
    steps = [take_step(learner, optimizer, options, stage, 0, random.Random(0), batch) for _ in range(7)]
    assert set(steps[0]) == {"answers", "alignment"} | ({"presence"} if name == "smoke" else set())
    assert steps[-1]["answers"] < 0.7 * steps[0]["answers"]
    assert steps[-1]["alignment"] < 0.9 * steps[0]["alignment"]
    assert "presence" not in steps[0] or steps[-1]["presence"] < 0.8 * steps[0]["presence"]


def test_a_stage_of_the_vision_encoder_leaves_the_decoder_alone():
    options = recipe("qwen3vl_warm", init=None)
    stage = options["stages"][0] | {"batch": 1}
    learner = Learner(options)
    optimizer = learner.optimizer(stage, options)
    before = {name: parameter.clone() for name, parameter in learner.named_parameters()}
    batch = next(load_examples(learner, options | {"workers": 0}, stage, 0, 0, "cpu"))
    losses = take_step(learner, optimizer, options, stage, 0, random.Random(0), batch)
    assert set(losses) == {"alignment"}
    moved = {name for name, parameter in learner.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all(".visual." in name for name in moved)
    last = options["stages"][-1]
    factors = {group["factor"] for group in learner.optimizer(last, options).param_groups}
    assert factors == {1.0, 4.0}


def test_learning_rate_warms_up_and_ends_at_zero():
    stage = {"steps": 100, "warmup": 10, "lr": 1.0}
    rates = [learning_rate(step, stage) for step in range(101)]
    assert rates[:10] == [pytest.approx((k + 1) / 10) for k in range(10)]
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


# -------------------------------------------------------------------------------------------------------------- resume


def test_a_killed_run_ends_in_the_same_weights(tmp_path):
    whole = train(recipe("smoke", output=str(tmp_path / "whole"), device="cpu"))
    process = Fork("task=train_demo", "recipe=smoke", f"output={tmp_path / 'cut'}", "device=cpu")
    checkpoint = tmp_path / "cut/checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.is_running and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send(signal.SIGKILL)
    status, _, errors = process.end()
    assert checkpoint.exists() and status == -signal.SIGKILL, errors
    assert not (tmp_path / "cut/model").exists()
    assert re.search(r"answers=\d", errors) or "step" in errors  # progress is on screen

    resumed = train(recipe("smoke", output=str(tmp_path / "cut"), device="cpu"))
    expected, found = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    shipped_names = load_file(LLAVA / "model.safetensors").keys()
    assert {n for n in found if ".layers." not in n} == {n for n in shipped_names if ".layers." not in n}
    shipped = {path.name for path in LLAVA.iterdir()} - {"README.md"}
    assert {path.name for path in resumed.iterdir()} == shipped
    assert load(resumed).model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="another recipe"):
        train(recipe("smoke", output=str(tmp_path / "cut"), device="cpu", seed=2))


def test_the_accuracy_at_the_end_is_that_of_the_shipped_model():
    scores = evaluate(ROOT / "experiments/demo/llava", 1, [(336, 336)], "cpu")
    assert scores["sparse"]["accuracy"] > 50 and scores.keys() == {"sparse", "crowded"}
