"""Tokens an image of a type without an adapter: a formula with the numbers of its default configuration.

The same formula is applied to the tiny model, and its value is compared with the number of rows that this model gives.
"""

from collections.abc import Callable
from math import ceil, prod
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING

from any_by_hand import inputs_of, rows_of, seen_by
from mipruner.models.generic import owner_of

Config = Any
Pixels = dict[str, Any]


class Formula(NamedTuple):
    """What the page says, of the default configuration; and the rows of each image, of a configuration and pixels."""

    text: Callable[[Config], str]
    rows: Callable[[Config, Pixels], list[int]]


def vision(c: Config) -> Config:
    """The configuration of the vision encoder, which is None in the default one of Gemma 4."""
    return c.vision_config or CONFIG_MAPPING[f"{c.model_type}_vision"]()


def fixed(n: Callable[[Config], int], tile: str = "") -> Formula:
    """A number of tokens, whatever the size of the image."""
    return Formula(lambda c: f"{n(c)}{tile}", lambda c, px: [n(c)] * sizes(px)[0])


def square(pixels: Callable[[Config], int], tile: str = "") -> Formula:
    """A square image or tile; ``pixels`` is the side of a token."""
    return Formula(
        lambda c: f"(side / {pixels(c)})²{tile}", lambda c, px: [(sizes(px)[1] // pixels(c)) ** 2] * sizes(px)[0]
    )


def free(pixels: Callable[[Config], int], tile: str = "") -> Formula:
    """An image of any shape; ``pixels`` is the side of a token."""
    return Formula(
        lambda c: f"(height / {pixels(c)})(width / {pixels(c)}){tile}",
        lambda c, px: [h * w * patch(c) ** 2 // pixels(c) ** 2 for h, w in grids(c, px)],
    )


def named(text: str, rows: Callable[[Config, Pixels], list[int]]) -> Formula:
    """A formula whose numbers are not those of the default configuration, which is of no published model."""
    return Formula(lambda c: text, rows)


def sizes(px: Pixels) -> tuple[int, int]:
    """Number of images or tiles, and their side."""
    pixels = px["pixel_values"]
    return prod(pixels.shape[:-3]), pixels.shape[-1]


def patch(c: Config) -> int:
    size = vision(c).patch_size
    return size[0] if isinstance(size, list | tuple) else size


def grids(c: Config, px: Pixels) -> list[tuple[int, int]]:
    """Patches along both sides of each image."""
    if (grid := px.get("image_grid_thw")) is not None:
        return [(h, w) for _, h, w in grid.tolist()]
    for name in ("spatial_shapes", "target_sizes"):
        if name in px:
            return [(h, w) for h, w in px[name].tolist()]
    if "image_position_ids" in px:
        return [tuple((xy.amax(0) + 1).flip(0).tolist()) for xy in px["image_position_ids"]]
    return [(sizes(px)[1] // patch(c),) * 2] * sizes(px)[0]


def merge(c: Config) -> int:
    """Patches a token along each side."""
    for one in (vision(c), c):
        for name in ("spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size"):
            n = getattr(one, name, None)
            if n:
                return n[0] if isinstance(n, list | tuple) else n
    raise AssertionError(f"{c.model_type}: no size of a merge in its configuration")


def any_resolution(scale: Callable[[Config], float]) -> Callable[[Config, Pixels], list[int]]:
    """Rows of the small image, and of the crops a newline behind each line; no padding is cut off."""

    def rows(c: Config, px: Pixels) -> list[int]:
        side = round(sizes(px)[1] / patch(c) * scale(c))
        crops = [(h // sizes(px)[1], w // sizes(px)[1]) for h, w in px["image_sizes"].tolist()]
        return [side**2 + h * side * (w * side + 1) for h, w in crops]

    return rows


def rate(c: Config) -> float:
    above, below = map(int, c.downsample_rate.split("/"))
    return above / below


def ocr(c: Config) -> int:
    sam = vision(c).sam_config
    return sam.patch_size * 2 ** len(sam.downsample_channels)


def cells(c: Config) -> int:
    """Pixels a code of Emu 3."""
    return 2 ** (len(c.vq_config.channel_multiplier) - 1)


A_TILE = " a tile"
FORMULAS = {
    "aria": Formula(
        lambda c: ", ".join(f"{n} of {patches} patches" for patches, n in c.projector_patch_to_query_dict.items()),
        lambda c, px: [c.projector_patch_to_query_dict[h * w] for h, w in grids(c, px)],
    ),
    "aya_vision": square(lambda c: patch(c) * c.downsample_factor, A_TILE),
    "cohere2_vision": square(lambda c: patch(c) * c.downsample_factor, A_TILE),
    "deepseek_ocr2": named(
        "144 a tile, 256 and 1 for the whole image",
        lambda c, px: [144 * (1 + n) + 1 for n in px["num_local_patches"].tolist()],
    ),
    "deepseek_vl": square(patch),
    "deepseek_vl_hybrid": square(patch),
    "emu3": Formula(
        lambda c: f"(height / {cells(c)})(width / {cells(c)} + 1)",
        lambda c, px: [h // cells(c) * (w // cells(c) + 1) for h, w in px["image_sizes"].tolist()],
    ),
    "fast_vlm": named("(side / stride)²", lambda c, px: [(sizes(px)[1] // 14) ** 2] * sizes(px)[0]),
    "fuyu": Formula(
        lambda c: f"(height / {c.patch_size})(width / {c.patch_size})",
        lambda c, px: [len(one) for one in px["pixel_values"]],
    ),
    "gemma3": fixed(lambda c: c.mm_tokens_per_image),
    "gemma3n": fixed(lambda c: c.vision_soft_tokens_per_image),
    "gemma4": free(lambda c: patch(c) * merge(c)),
    "gemma4_unified": free(lambda c: patch(c) * merge(c)),
    "got_ocr2": square(lambda c: patch(c) * 4, A_TILE),
    "granite4_vision": named("(side / patch · rate)² + lines (columns + 1) of its crops", any_resolution(rate)),
    "granite_docling": square(lambda c: patch(c) * vision(c).scale_factor, A_TILE),
    "hunyuan_vl": Formula(
        lambda c: f"(height / {patch(c) * merge(c)})(width / {patch(c) * merge(c)} + 1) + 2",
        lambda c, px: [h // merge(c) * (w // merge(c) + 1) + 2 for h, w in grids(c, px)],
    ),
    "idefics2": fixed(lambda c: c.perceiver_config.resampler_n_latents, A_TILE),
    "idefics3": named(
        "(side / patch / scale)² a tile", lambda c, px: [(h // c.scale_factor) ** 2 for h, _ in grids(c, px)]
    ),
    "inkling2": Formula(
        lambda c: f"(height / {patch(c) * merge(c)})(width / {patch(c) * merge(c)})",
        lambda c, px: [h * w for h, w in grids(c, px)],
    ),
    "inkling_mm_model": Formula(
        lambda c: f"(height / {patch(c)})(width / {patch(c)})", lambda c, px: [len(px["pixel_values"])]
    ),
    "janus": fixed(lambda c: (vision(c).image_size // patch(c)) ** 2),
    "lfm2_vl": free(lambda c: patch(c) * c.downsample_factor, A_TILE),
    "llama4": square(lambda c: round(patch(c) / vision(c).pixel_shuffle_ratio), A_TILE),
    "llava_next_video": Formula(
        lambda c: f"{(vision(c).image_size // patch(c)) ** 2} + lines (columns + 1) of its crops",
        any_resolution(lambda c: 1),
    ),
    "minicpm_ocr": named("patches / 4 a tile", lambda c, px: [h * w // 4 for h, w in grids(c, px)]),
    "minicpmv4_6": named("patches / 16 a tile", lambda c, px: [h * w // 16 for h, w in grids(c, px)]),
    "minicpmv4_7": named("patches / 16 a tile", lambda c, px: [h * w // 16 for h, w in grids(c, px)]),
    "molmo2": Formula(
        lambda c: f"{ceil(vision(c).image_size[0] / patch(c) / 2) ** 2} + lines columns of its crops",
        lambda c, px: [a * b + h * w for a, b, h, w in px["image_grids"].tolist()],
    ),
    "ovis2": square(lambda c: patch(c) * vision(c).hidden_stride, A_TILE),
    "paligemma": square(patch),
    "perception_lm": named(
        "(side / patch / ratio)² a tile",
        lambda c, px: [(sizes(px)[1] // 14 // c.projector_pooling_ratio) ** 2] * sizes(px)[0],
    ),
    "pp_chart2table": square(lambda c: patch(c) * 4),
    "qianfan_ocr": square(lambda c: round(patch(c) / c.downsample_ratio), A_TILE),
    "shieldgemma2": fixed(lambda c: c.mm_tokens_per_image),
    "step3p7": Formula(
        lambda c: f"(side / {patch(c) * 4})² a tile",
        lambda c, px: [(1 + n) * (sizes(px)[1] // patch(c) // 4) ** 2 for n in px["num_local_patches"].tolist()],
    ),
    "unlimited_ocr": Formula(
        lambda c: f"(side / {ocr(c)})(side / {ocr(c)} + 1) + 1, and lines (columns + 1) of its tiles",
        lambda c, px: [ceil(sizes(px)[1] / ocr(c)) * (ceil(sizes(px)[1] / ocr(c)) + 1) + 1] * sizes(px)[0],
    ),
    "video_llama_3": named(
        "patches",
        lambda c, px: [h * w // m**2 for (h, w), m in zip(grids(c, px), px["image_merge_sizes"].tolist(), strict=True)],
    ),
    "vipllava": square(patch),
}
FORMULAS["smolvlm"] = FORMULAS["idefics3"]
"""By type; the others merge their grid of patches."""

TILES = {"idefics2", "idefics3", "smolvlm", "granite_docling"}
"""Types that give the rows of all tiles of a sample together."""


def formula(kind: str) -> Formula:
    return FORMULAS.get(kind, free(lambda c: patch(c) * merge(c)))


def tokens(kind: str) -> str:
    """Tokens an image, for the page."""
    return formula(kind).text(CONFIG_MAPPING[kind]())


def check_tokens(kind: str, model) -> None:
    """Compare what `tokens` says of a type with the rows that its tiny model gives."""
    px, owner = inputs_of(kind, model)[1], owner_of(model)
    given = [len(rows) for rows in rows_of(kind, owner, seen_by(owner, px))]
    expected = formula(kind).rows(model.config, px)
    if kind in TILES or kind == "inkling_mm_model":
        given, expected = [sum(given)], [sum(expected)]
    assert given == expected, (kind, given, expected)
