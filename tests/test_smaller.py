"""Down-sampling and resizing: which grid, which means, and what a smaller image gives."""

import math
from itertools import product

import pytest
import torch

from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline
from mipruner.prompt import Smaller
from mipruner.pruners import DownsamplePruner, NoPruner, ResizePruner
from mipruner.pruning import prune
from mipruner.selection import Auto, grid_within
from tiny import make_image, tiny, video


@pytest.mark.parametrize(
    ("n", "height", "width", "grid"),
    [
        (64, 24, 24, (8, 8)),
        (128, 24, 24, (11, 11)),
        (32, 24, 24, (5, 6)),
        (16, 24, 24, (4, 4)),
        (1, 24, 24, (1, 1)),
        (32, 10, 20, (4, 8)),
        (9, 1, 10, (1, 9)),
        (2, 640, 12800, (1, 2)),
    ],
)
def test_the_grid(n, height, width, grid):
    assert grid_within(n, height, width) == grid


def test_the_grid_fits_and_has_the_shape_of_the_image():
    for n, height, width in product((1, 2, 7, 64, 100, 391), (3, 10, 24), (3, 17, 40)):
        if n > height * width:
            continue
        rows, columns = grid_within(n, height, width)
        assert 1 <= rows * columns <= n and rows <= height and columns <= width
        square = math.sqrt(n * height / width)
        assert abs(rows - square) < 1.001 or abs(columns - n / square) < 1.001 or 1 in (rows, columns)


def averaged(x, rows, columns):
    """Means over equal areas by brute force: every cell cut into small squares that lie in one old cell each."""
    height, width = len(x), len(x[0])
    fine_y, fine_x = math.lcm(height, rows), math.lcm(width, columns)
    total = [[0.0] * columns for _ in range(rows)]
    for i, j in product(range(fine_y), range(fine_x)):
        total[i * rows // fine_y][j * columns // fine_x] += x[i * height // fine_y][j * width // fine_x]
    return [value * rows * columns / fine_y / fine_x for line in total for value in line]


@pytest.mark.parametrize(("height", "width", "n"), [(24, 24, 64), (24, 24, 32), (7, 10, 12), (5, 5, 24), (3, 8, 1)])
def test_downsampled_rows_are_means_by_area_at_their_centres(height, width, n):
    x = torch.randn(height * width, 3, generator=torch.Generator().manual_seed(0))
    chosen = DownsamplePruner()(Features(x, x[:2], grid=(height, width)), n)
    rows, columns = grid_within(n, height, width)
    assert chosen.n_rows == rows * columns == len(chosen.indices)
    table = x.view(height, width, 3).double()
    for k in range(3):
        assert (chosen.merge @ x)[:, k].tolist() == pytest.approx(
            averaged(table[..., k].tolist(), rows, columns), abs=1e-5
        )
    for index, (i, j) in zip(chosen.indices.tolist(), product(range(rows), range(columns)), strict=True):
        y, z = divmod(index, width)
        assert abs((y + 0.5) / height - (i + 0.5) / rows) <= 0.5 / height + 1e-9
        assert abs((z + 0.5) / width - (j + 0.5) / columns) <= 0.5 / width + 1e-9


@pytest.mark.parametrize(("n", "rows"), [(24, 24), (13, 12), (3, 3), (2, 2)])
def test_frames_of_a_video_are_averaged_alike_and_together_where_they_are_too_many(n, rows):
    x = torch.randn(3 * 4 * 5, 2)
    chosen = DownsamplePruner()(Features(x, x[:2], grid=(3, 4, 5)), n)
    assert chosen.n_rows == rows
    assert torch.allclose(chosen.merge.sum(-1), torch.ones(rows))
    if rows == 3:
        assert torch.allclose(chosen.merge @ x, x.view(3, 20, 2).mean(1), atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_means_enter_at_the_positions_of_their_centres_deepstack_rows_too(family):
    adapter, prompt = tiny(family), Prompt("what is it", [make_image(1, 280, 224)])
    pipeline = Pipeline(adapter, DownsamplePruner(), 7, Decoding(max_new_tokens=3))
    seen = pipeline.see(prompt.images)
    encoded = adapter.read(prompt, list(seen.values()))
    (chosen,) = pipeline.select(encoded)
    assert 1 < chosen.n_rows <= 7
    short, visual = adapter.shorten(encoded, [chosen]), encoded.visuals[0]
    assert torch.allclose(short.embeds[short.is_visual], chosen.merge @ visual.tokens, atol=1e-5)
    for ours, layer in zip(short.deepstack, visual.deepstack, strict=True):
        assert torch.allclose(ours, chosen.merge @ layer, atol=1e-5)
    if adapter.positions == "keep":
        assert torch.equal(
            short.position_ids[:, short.is_visual], encoded.position_ids[:, encoded.slots[0][chosen.indices]]
        )
    (answer,) = pipeline([prompt])
    assert answer.n_keep == chosen.n_rows and answer.visual_tokens_per_layer == [chosen.n_rows] * adapter.n_layers


def test_crops_have_no_grid_to_average():
    adapter = tiny("llava_next")
    with pytest.raises(InputError, match="needs grid"):
        Pipeline(adapter, DownsamplePruner(), 7)([Prompt("what is it", [make_image(1, 280, 224)])])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_resized_image_is_the_answer_of_the_smaller_image_itself(family, monkeypatch):
    """By hand: the image scaled to the pixels of that grid, through the processor without its own scaling."""
    adapter, image = tiny(family), make_image(1, 300, 200)
    side = adapter.merge * adapter.model.config.vision_config.patch_size
    full = Pipeline(adapter, NoPruner(), 1.0).see([image])[id(image)].n_visual
    pipeline = Pipeline(adapter, ResizePruner(), 8, Decoding(max_new_tokens=4))
    one, two = pipeline([Prompt("what is it", [image]), Prompt("what is that", [image])])
    rows, columns = grid_within(8, 200, 300)
    assert one.n_visual == [full] and one.grids == [(rows, columns)] and one.n_keep == rows * columns <= 8 < full
    assert one.visual_tokens_per_layer == [rows * columns] * adapter.n_layers
    assert len(pipeline.cache._held) == 1, "the same image at the same size is seen once"

    small = image.resize((columns * side, rows * side), adapter.image_processor.resample)
    monkeypatch.setattr(adapter, "image_size", {"shortest_edge": 1, "longest_edge": small.width * small.height})
    (expected,) = Pipeline(adapter, NoPruner(), 1.0, Decoding(max_new_tokens=4))([Prompt("what is it", [small])])
    assert (one.tokens, one.n_keep) == (expected.tokens, expected.n_visual[0])
    assert two.text != "" or one.text != ""


def test_resizing_shares_the_budget_and_leaves_small_images_alone():
    adapter = tiny("qwen3_vl")
    large, small = make_image(1, 300, 200), make_image(2, 80, 80)
    counts = [adapter.n_visual(image) for image in (large, small)]
    seen = Pipeline(adapter, NoPruner(), 1.0).see([large, small])
    assert counts == [seen[id(image)].n_visual for image in (large, small)]
    (prompt,) = Pipeline(adapter, ResizePruner(), 0.5).smaller([Prompt("what", [large, small])])
    assert all(isinstance(image, Smaller) for image in prompt.images)
    assert sum(math.prod(image.grid) for image in prompt.images) <= round(0.5 * sum(counts))
    (prompt,) = Pipeline(adapter, ResizePruner(), 1.0).smaller([Prompt("what", [large, small])])
    assert prompt.images == [large, small]


def test_where_resizing_is_refused():
    llava, qwen = tiny("llava"), tiny("qwen3_vl")
    with pytest.raises(InputError, match="scales every image to sizes of its own"):
        Pipeline(llava, ResizePruner(), 8)
    with pytest.raises(InputError, match="not videos"):
        Pipeline(qwen, ResizePruner(), 8)([Prompt("what", [video(1, 4)])])
    with pytest.raises(InputError, match="keep=auto"):
        Pipeline(qwen, ResizePruner(), Auto(0.5, 8))([Prompt("what", [make_image(1, 300, 200)])])
    for pruner in ("resize", ResizePruner()):
        with pytest.raises(InputError, match="give the processor a smaller image"):
            prune(qwen.model, pruner, keep=8)
