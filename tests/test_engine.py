"""The engine against the pipeline: the same tokens from static shapes, padded prompts and its own cache."""

from contextlib import nullcontext
from copy import copy, deepcopy
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessorPil, LlavaConfig

import tiny as families
from experiments.benchmarks.demo import Demo
from mipruner import engine as engines
from mipruner import fused
from mipruner.decoding import Decoding
from mipruner.engine import LOOK
from mipruner.errors import InputError
from mipruner.graphs import Graph
from mipruner.models import load
from mipruner.models.llava import LlavaAdapter
from mipruner.pipeline import Pipeline
from mipruner.prompt import Prompt
from mipruner.pruners import (
    PRUNERS,
    AttentionPruner,
    DownsamplePruner,
    FastVPruner,
    MIAttentionPruner,
    MIPruner,
    NoPruner,
    Pruner,
    SimilarityPruner,
    VisionZipPruner,
)

DEMO = Path(__file__).resolve().parents[1] / "experiments/demo/llava"
DEMO_QWEN = DEMO.parent / "qwen3vl"
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Engine = partial(engines.Engine, static=True)
"""As on a GPU."""


def tiny(n_layers=2, seed=0):
    """A LLaVA with random weights, grouped heads and 16 visual tokens, whose greedy answers wander."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    config = LlavaConfig(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": n_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "initializer_range": 0.5,
        },
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval().to(DEVICE)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaAdapter(model, tokenizer, processor)


def prompts(n):
    """Questions of different lengths about two images, spread over the demo."""
    benchmark = Demo(n_scenes=2)
    samples = benchmark.samples()[:: max(1, len(benchmark.samples()) // n)]
    loaded = {image_id: benchmark.images(image_id) for image_id in {s.image_id for s in samples}}
    return [Prompt(s.text, loaded[s.image_id], sample=s.id) for s in samples]


def of_many_sizes():
    """Questions of different lengths about images of other sizes each, two of them in one bucket."""
    sizes = [(140, 84), (84, 84), (84, 140), (56, 140), (112, 112), (84, 84)]
    texts = ["What color is it ?", "Which of the two is larger, the first or the second ?", "Why ?"]
    return [Prompt(texts[k % 3], [families.make_image(k, *size)], sample=str(k)) for k, size in enumerate(sizes)]


def check_alike(engine, plain, asked):
    for prompt in asked:
        answer, truth = engine(prompt), plain([prompt])[0]
        assert answer.tokens == truth.tokens and answer.text == truth.text
        assert torch.equal(answer.selections[0].indices, truth.selections[0].indices)
        assert answer.visual_tokens_per_layer == truth.visual_tokens_per_layer
        assert (answer.n_visual, answer.n_keep, answer.grids, answer.boxes) == (
            truth.n_visual, truth.n_keep, truth.grids, truth.boxes
        )  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, dtype="float32", device=DEVICE)


@pytest.fixture(scope="module")
def demo_qwen():
    return load(DEMO_QWEN, dtype="float32", device=DEVICE)


@pytest.mark.parametrize("name", ["none", "mi", "similarity", "divprune", "attention", "mi_attention", "vispruner"])
@pytest.mark.parametrize("family", QWEN)
def test_images_of_any_size_give_the_pipelines_tokens(family, name):
    """With windows in the encoder, and rows for several layers of the language model, where the family has them."""
    adapter, decoding = families.tiny(family), Decoding(max_new_tokens=6)
    pruner = PRUNERS[name]()
    check_alike(
        Engine(adapter, pruner, 0.4, decoding, bucket=8), Pipeline(adapter, pruner, 0.4, decoding), of_many_sizes()
    )


@pytest.mark.parametrize(("pruner", "keep"), [(MIPruner(), 0.25), (MIPruner(), 9), (NoPruner(), 1.0)])
def test_the_demo_of_any_size_answers_alike(demo_qwen, pruner, keep):
    canvases = [[336, 336], [280, 280], [336, 252], [252, 336]]
    benchmark, decoding = Demo(n_scenes=4, canvases=canvases), Decoding(max_new_tokens=4)
    by_image = {sample.image_id: sample for sample in benchmark.samples()}
    asked = [Prompt(sample.text, benchmark.images(name), sample=sample.id) for name, sample in by_image.items()]
    assert len({prompt.images[0].size for prompt in asked}) == 4
    check_alike(Engine(demo_qwen, pruner, keep, decoding), Pipeline(demo_qwen, pruner, keep, decoding), asked)


def test_images_of_one_bucket_share_a_graph():
    """Nothing is recorded anew for another size, number of kept tokens or question in it."""
    engine = Engine(families.tiny("qwen3_vl"), MIPruner(lam=1), 0.5, Decoding(max_new_tokens=2), bucket=128)
    asked = of_many_sizes()
    counts = {engine(prompt).n_keep for prompt in asked}
    names = [name for name, *_ in engine.graphs]
    assert len(counts) > 2
    assert [names.count(name) for name in ("see", "prefill", "step", "score")] == [1, 1, 1, 0]


def test_a_large_image_is_padded_by_at_most_an_eighth():
    engine = Engine(families.tiny("qwen3_vl"), MIPruner(), 0.5, Decoding(max_new_tokens=2), bucket=64)
    sizes = [engine._padded(n) for n in range(1, 16385)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 64
    assert all(n <= size < max(n + 64, n * 1.125 + 1) for n, size in enumerate(sizes, 1))


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_repetition_penalty_is_the_pipelines(family):
    adapter = tiny() if family == "llava" else families.tiny(family)
    asked, decoding = prompts(3) if family == "llava" else of_many_sizes()[:3], Decoding(max_new_tokens=8)
    engine = Engine(adapter, MIPruner(), 5, decoding, bucket=8)
    free = [engine(prompt).tokens for prompt in asked]
    generation = adapter.model.generation_config
    before = generation.repetition_penalty
    try:
        generation.repetition_penalty = 1.7
        engine, plain = Engine(adapter, MIPruner(), 5, decoding, bucket=8), Pipeline(adapter, MIPruner(), 5, decoding)
        check_alike(engine, plain, asked)
        assert [engine(prompt).tokens for prompt in asked] != free
    finally:
        generation.repetition_penalty = before


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, cls in PRUNERS.items()
        if issubclass(cls, Pruner) and cls not in (VisionZipPruner, DownsamplePruner)
    ],
)
@pytest.mark.parametrize("positions", ["repack", "keep"])
def test_tiny_models_give_the_pipelines_tokens(name, positions):
    adapter = tiny()
    adapter.positions = positions
    decoding = Decoding(max_new_tokens=2 * LOOK + 3)
    plain = Pipeline(adapter, PRUNERS[name](), 5, decoding)
    engine = Engine(adapter, PRUNERS[name](), 5, decoding, bucket=8, longest=40)
    check_alike(engine, plain, prompts(5))
    answers = [engine(prompt) for prompt in prompts(5)]
    assert len({tuple(answer.tokens) for answer in answers}) > 1


def test_an_answer_ends_at_the_end_of_text():
    adapter = tiny()
    decoding = Decoding(max_new_tokens=LOOK + 4)
    prompt = prompts(1)[0]
    free = Engine(adapter, MIPruner(), 5, decoding, bucket=8)(prompt).tokens
    for k in (0, 3, LOOK + 1):
        adapter.model.generation_config.eos_token_id = [free[k], adapter.tokenizer.eos_token_id]
        assert Engine(adapter, MIPruner(), 5, decoding, bucket=8)(prompt).tokens == free[: free.index(free[k])]


@pytest.mark.parametrize(("pruner", "keep"), [(MIPruner(), 16), (NoPruner(), 16)])
def test_the_demo_answers_alike_in_float32(demo, pruner, keep):
    decoding = Decoding(max_new_tokens=4)
    plain, engine = Pipeline(demo, pruner, keep, decoding), Engine(demo, pruner, keep, decoding, bucket=32, longest=64)
    for prompt in prompts(3):
        assert engine(prompt).tokens == plain([prompt])[0].tokens


def test_the_demo_answers_alike_in_bfloat16():
    """On these prompts no two words are as likely as each other to bfloat16."""
    adapter = load(DEMO, dtype="bfloat16", device=DEVICE)
    decoding = Decoding(max_new_tokens=4)
    plain, engine = Pipeline(adapter, MIPruner(), 64, decoding), Engine(adapter, MIPruner(), 64, decoding)
    for prompt in prompts(4):
        assert engine(prompt).tokens == plain([prompt])[0].tokens


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_compiled_and_recorded_the_demo_answers_alike(demo):
    decoding = Decoding(max_new_tokens=4)
    plain, engine = Pipeline(demo, MIPruner(), 16, decoding), Engine(demo, MIPruner(), 16, decoding, compiled=True)
    for prompt in prompts(3) * 2:
        assert engine(prompt).tokens == plain([prompt])[0].tokens


@pytest.mark.parametrize(("family", "pruner"), [("llava", MIAttentionPruner()), ("qwen3_vl", MIPruner())])
def test_what_is_compiled_compiles_whole(family, pruner, monkeypatch):
    """And each layer's cache lies in memory of its own, or compiled steps would copy all of it."""
    compiled = []

    def whole(function):
        compiled.append(function.__name__)
        return torch_compile(function, backend="eager", fullgraph=True)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", whole)
    adapter, decoding = tiny() if family == "llava" else families.tiny(family), Decoding(max_new_tokens=4)
    engine = Engine(adapter, pruner, 5, decoding, bucket=64, compiled=True)
    assert len({x.untyped_storage().data_ptr() for pair in engine.cache.layers for x in pair}) == 2 * len(
        engine.cache.layers
    )
    for prompt in prompts(2) if family == "llava" else of_many_sizes()[:2]:
        assert engine(prompt).tokens == Pipeline(adapter, pruner, 5, decoding)([prompt])[0].tokens
    assert set(compiled) == {"prefill", "step"}


class OnDevice(TorchDispatchMode):
    """Refuses what a recording may not hold: data that begins on the host and comes to the device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta:
            from_host = [x for x in args if isinstance(x, torch.Tensor) and not x.is_meta and x.dim()]
            assert not from_host and "lift_fresh" not in str(operation), operation
        return out


@pytest.mark.parametrize(
    ("family", "pruner"),
    [
        *product(
            ["llava"],
            [NoPruner(), MIPruner(lam=1), MIPruner(aggregation="global"), MIAttentionPruner(lam=1), SimilarityPruner()],
        ),
        *product(QWEN, [NoPruner(), AttentionPruner()]),
    ],
)
def test_nothing_that_is_recorded_reads_a_value(family, pruner, monkeypatch):
    """On a device without values, nothing can: neither wait for one nor take a shape from it.

    With lam below 1 a GPU takes the kernels instead, and test_kernels looks at those.
    """
    adapter, decoding = tiny() if family == "llava" else families.tiny(family), Decoding(max_new_tokens=3)
    adapter.model.generation_config.repetition_penalty = 1.3
    twin = copy(adapter)
    twin.model = deepcopy(adapter.model).to("meta")
    empty, seen = Engine(twin, pruner, 5, decoding, bucket=8), []

    def watched(graph, *inputs, **named):
        name = graph.function.__name__
        blank, blank_named = [x.to("meta") for x in inputs], {key: x.to("meta") for key, x in named.items()}
        with OnDevice():
            getattr(empty, name)(*blank, **blank_named)
        seen.append(name)
        return graph.function(*inputs, **named)

    monkeypatch.setattr(Graph, "__call__", watched)
    prompt = prompts(1)[0] if family == "llava" else of_many_sizes()[0]
    try:
        Engine(adapter, pruner, 5, decoding, bucket=8)(prompt)
    finally:
        adapter.model.generation_config.repetition_penalty = None
    assert set(seen) == {"see", "prefill", "step"} | ({"score"} if family == "llava" else set())


def test_after_features_that_are_not_finite_answers_are_as_before():
    adapter, prompt = tiny(), prompts(1)[0]
    engine = Engine(adapter, MIPruner(), 5, Decoding(max_new_tokens=6), bucket=8)
    expected = engine(prompt).tokens
    bias = adapter.model.model.multi_modal_projector.linear_2.bias
    sound = bias.detach().clone()
    with torch.no_grad():
        bias[3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        engine(prompt)
    with torch.no_grad():
        bias.copy_(sound)
    assert engine(prompt).tokens == expected


def test_prompts_of_one_bucket_share_a_graph():
    engine = Engine(tiny(), MIPruner(), 5, Decoding(max_new_tokens=2), bucket=32, longest=64)
    several = prompts(8)
    outline = engine.adapter.outline({})
    lengths = {len(engine.adapter.tokenize(prompt, [outline]).ids) for prompt in several}
    for prompt in several:
        engine(prompt)
    names = [name for name, *_ in engine.graphs]
    assert len(lengths) > 1
    assert [names.count(name) for name in ("see", "prefill", "step")] == [1, 1, 1]


def test_pixels_may_be_given():
    engine = Engine(tiny(), MIPruner(), 5, Decoding(max_new_tokens=5))
    prompt = prompts(1)[0]
    pixels = engine.adapter.preprocess(prompt.images[0])
    assert engine(prompt, pixels).tokens == engine(prompt).tokens


def test_what_the_engine_cannot_do_it_says():
    adapter, prompt = tiny(), prompts(1)[0]
    with pytest.raises(InputError, match="greedily"):
        Engine(adapter, MIPruner(), 5, Decoding(temperature=0.5))
    with pytest.raises(InputError, match="one image, not 2"):
        Engine(adapter, MIPruner(), 5, Decoding())(Prompt(prompt.text, [*prompt.images] * 2))
    with pytest.raises(InputError, match="raise longest"):
        Engine(adapter, MIPruner(), 5, Decoding(), longest=4)(prompt)
    with pytest.raises(InputError, match="does not run qwen3_5 models"):
        Engine(families.tiny("qwen3_5"), MIPruner(), 5, Decoding())
    with pytest.raises(InputError, match="not a video"):
        Engine(families.tiny("qwen3_vl"), MIPruner(), 5, Decoding())(Prompt("Why ?", [families.video(4, 3)]))
    with pytest.raises(InputError, match="takes no video"):
        Engine(adapter, MIPruner(), 5, Decoding())(Prompt("Why ?", [families.video(4, 3)]))
    with pytest.raises(InputError, match="merges tokens"):
        Engine(adapter, VisionZipPruner(), 5, Decoding())(prompt)
    with pytest.raises(InputError, match="use the pipeline"):
        Engine(adapter, FastVPruner(), 5, Decoding())
    with torch.no_grad():
        adapter.model.model.multi_modal_projector.linear_2.bias[3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        Engine(adapter, MIPruner(), 5, Decoding(max_new_tokens=2))(prompt)
    adapter.model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="sdpa"):
        Engine(adapter, MIPruner(), 5, Decoding())


def test_the_vocabulary_is_summed_over_once_an_image(demo, monkeypatch):
    """In the pipeline and in the engine; with the picks of a pipeline that has seen nothing before."""
    calls = []
    plain = fused.log_partition
    monkeypatch.setattr(fused, "log_partition", lambda *args, **kwargs: (calls.append(args), plain(*args, **kwargs))[1])
    pruner, keep, decoding = MIPruner(0.5, support="vocabulary"), 16, Decoding(max_new_tokens=4)
    loaded = {id(prompt.images): prompt.images for prompt in prompts(8)}.values()
    texts = [prompt.text for prompt in prompts(2)]
    asked = [Prompt(text, images) for images in loaded for text in texts]
    fresh = [Pipeline(demo, pruner, keep, decoding)([prompt])[0] for prompt in asked]
    assert len(calls) == len(asked) == 4
    pipeline, engine = Pipeline(demo, pruner, keep, decoding), Engine(demo, pruner, keep, decoding)
    for answer in (lambda prompt: pipeline([prompt])[0], engine):
        calls.clear()
        for prompt, expected in zip(asked, fresh, strict=True):
            found = answer(prompt)
            assert found.tokens == expected.tokens
            assert torch.equal(found.selections[0].indices, expected.selections[0].indices)
        assert len(calls) == 2
    norm = demo.vocabulary_norm()
    assert demo.vocabulary_norm() is norm
    with torch.no_grad():
        demo.model.get_input_embeddings().weight.mul_(2)
        assert torch.equal(demo.vocabulary_norm(), 2 * norm)
        demo.model.get_input_embeddings().weight.div_(2)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU shapes are static")
def test_on_a_cpu_the_pipeline_answers(demo, monkeypatch):
    """Static shapes are no gain there; what the engine refuses on a GPU it refuses all the same."""
    decoding, stages = Decoding(max_new_tokens=4), []
    engine = engines.Engine(demo, MIPruner(), 16, decoding)
    engine.watch = lambda stage: (stages.append(stage), nullcontext())[1]
    expected = Pipeline(demo, MIPruner(), 16, decoding)(prompts(1))[0]
    monkeypatch.setattr(engines.Engine, "prefill", None)
    found = engine(prompts(1)[0])
    assert found.tokens == expected.tokens and engine.graphs == {}
    assert stages == ["vision", "scoring", "prefill", "decode"]
    with pytest.raises(InputError, match="one image, not 2"):
        engine(Prompt("Which ?", prompts(1)[0].images * 2))
    with pytest.raises(InputError, match="use the pipeline"):
        engines.Engine(demo, FastVPruner(), 16, decoding)
