"""The engine against the pipeline: the same tokens from static shapes, padded prompts and its own cache."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPImageProcessorPil, LlavaConfig

from experiments.benchmarks.demo import Demo
from mipruner import engine as engines
from mipruner import fused
from mipruner.decoding import Decoding
from mipruner.engine import LOOK, Graph
from mipruner.errors import InputError
from mipruner.models import load
from mipruner.models.llava import LlavaAdapter
from mipruner.pipeline import Pipeline
from mipruner.prompt import Prompt
from mipruner.pruners import (
    PRUNERS,
    DownsamplePruner,
    FastVPruner,
    MIAttentionPruner,
    MIPruner,
    NoPruner,
    Pruner,
    VisionZipPruner,
)

DEMO = Path(__file__).resolve().parents[1] / "experiments/demo/llava"
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


@pytest.fixture(scope="module")
def demo():
    return load(DEMO, dtype="float32", device=DEVICE)


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
    expected = [plain([prompt])[0] for prompt in prompts(5)]
    answers = [engine(prompt) for prompt in prompts(5)]
    for answer, truth in zip(answers, expected, strict=True):
        assert answer.tokens == truth.tokens and answer.text == truth.text
        assert torch.equal(answer.selections[0].indices, truth.selections[0].indices)
        assert answer.visual_tokens_per_layer == truth.visual_tokens_per_layer
        assert (answer.n_visual, answer.grids, answer.boxes) == (truth.n_visual, truth.grids, truth.boxes)
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


@pytest.mark.parametrize("pruner", [NoPruner(), MIPruner(), MIAttentionPruner()])
def test_what_is_compiled_compiles_whole(pruner, monkeypatch):
    """And each layer's cache lies in memory of its own, or compiled steps would copy all of it."""
    compiled = []

    def whole(function):
        compiled.append(function.__name__)
        return torch_compile(function, backend="eager", fullgraph=True)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", whole)
    adapter, decoding = tiny(), Decoding(max_new_tokens=4)
    engine = Engine(adapter, pruner, 5, decoding, bucket=8, compiled=True)
    assert len({x.untyped_storage().data_ptr() for pair in engine.cache.layers for x in pair}) == 2 * len(
        engine.cache.layers
    )
    for prompt in prompts(3):
        assert engine(prompt).tokens == Pipeline(adapter, pruner, 5, decoding)([prompt])[0].tokens
    assert set(compiled) == {"prefill", "step"}


WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "lift_fresh")
"""Operations at which the host waits for a GPU, whose shape depends on a value, or that begin on the host."""


class Operations(TorchDispatchMode):
    """Notes the names of all that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation._schema.name.removeprefix("aten::"))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "pruner",
    [NoPruner(), MIPruner(lam=1), MIPruner(aggregation="global"), MIAttentionPruner(lam=1), PRUNERS["similarity"](),
     PRUNERS["attention"]()],
    ids=lambda pruner: type(pruner).__name__,
)  # fmt: skip
def test_nothing_that_is_recorded_waits_for_the_device(pruner, monkeypatch):
    """With lam below 1 a GPU takes the kernels instead, and test_kernels looks at those."""
    seen = []

    def watched(graph, *inputs):
        with Operations() as operations:
            out = graph.function(*inputs)
        seen.append(graph.function.__name__)
        assert not operations.names.intersection(WAITS)
        return out

    monkeypatch.setattr(Graph, "__call__", watched)
    Engine(tiny(), pruner, 5, Decoding(max_new_tokens=3), bucket=8)(prompts(1)[0])
    assert set(seen) == {"see", "score", "prefill", "step"}


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
    lengths = {len(engine.adapter.tokenize(prompt, [engine.visual]).ids) for prompt in several}
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
