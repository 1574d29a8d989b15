"""keep=auto through the pipeline: each sample its own number of tokens."""

import numpy as np
import pytest
import torch
from PIL import Image

from mipruner import pmi
from mipruner.decoding import Decoding
from mipruner.engine import Engine
from mipruner.models import Prompt, load
from mipruner.pipeline import Pipeline
from mipruner.pruners import FastVPruner, MIAttentionPruner, MIPruner, SimilarityPruner
from mipruner.selection import Auto
from toy import N_VISUAL, save_toy_model

QUESTIONS = [
    "What color is the sun ?",
    "Is the king to the left of the sun ?",
    "king queen",
    "Is there a cup in the image ?",
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_toy_model(folder)
    return load(folder, dtype="float32")


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (84, 84, 3), dtype=np.uint8))


def prompts(n_images=1):
    return [
        Prompt(text, [noise(10 * k + j) for j in range(n_images)], sample=str(k)) for k, text in enumerate(QUESTIONS)
    ]


def run(adapter, pruner, keep, asked):
    return Pipeline(adapter, pruner, keep, Decoding(max_new_tokens=2))(asked)


@pytest.mark.parametrize("pruner", [MIPruner(0.5), MIPruner(1.0, support="vocabulary"), MIAttentionPruner(0.8)])
@torch.no_grad()
def test_each_sample_keeps_what_its_curve_says(adapter, pruner):
    asked = prompts()
    pipeline = Pipeline(adapter, pruner, Auto(0.3, 20), Decoding(max_new_tokens=2))
    counts = []
    for prompt in asked:
        seen = pipeline.see(prompt.images)
        features = adapter.read(prompt, [seen[id(prompt.images[0])]], pruner.signals).features()[0]
        partition = pmi.log_partition(features.visual, features.vocabulary) if features.vocabulary is not None else None
        gains = pmi.relevance(features.visual, features.text, log_partition=partition).clamp_min(0)
        held = [float(gains.topk(n).values.sum() / gains.sum()) for n in range(1, N_VISUAL + 1)]
        counts.append(min(20, 1 + sum(share < 0.3 for share in held)))
    answers = pipeline(asked)
    assert [len(a.selections[0].indices) for a in answers] == counts
    assert [a.visual_tokens_per_layer[0] for a in answers] == counts
    assert len(set(counts)) > 1, "the questions were to differ in what they need"
    for answer, prompt, n in zip(answers, asked, counts, strict=True):
        alone = run(adapter, pruner, n, [prompt])[0]
        assert torch.equal(answer.selections[0].indices, alone.selections[0].indices)
        assert answer.tokens == alone.tokens


def test_quality_and_the_maximum_bound_it(adapter):
    few, many, most = (run(adapter, MIPruner(), Auto(q, 0.5), prompts()) for q in (0.01, 0.3, 1.0))
    for a, b, c in zip(few, many, most, strict=True):
        counts = [len(answer.selections[0].indices) for answer in (a, b, c)]
        assert 1 <= counts[0] <= counts[1] <= counts[2] <= N_VISUAL // 2
    assert len(most[0].selections[0].indices) == N_VISUAL // 2


def test_several_images_share_the_maximum(adapter):
    for answer in run(adapter, MIPruner(), Auto(0.3, 18), prompts(n_images=3)):
        counts = [len(selection.indices) for selection in answer.selections]
        assert all(1 <= n <= 6 for n in counts)


def test_who_knows_no_pmi_says_so(adapter):
    for pruner in (SimilarityPruner(), FastVPruner()):
        with pytest.raises(ValueError, match=f"{type(pruner).__name__} does not know: use mi"):
            run(adapter, pruner, Auto(0.3, 18), prompts())
    with pytest.raises(ValueError, match="keep=auto is not: use the pipeline"):
        Engine(adapter, MIPruner(), Auto(0.3, 18), Decoding())
