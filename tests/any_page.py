"""The table of docs/models.md, from what the long form of `tests/test_any_model.py` finds: `make models-page`."""

import re
import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING

from any_by_hand import inputs_of, rows_of, seen_by
from any_decoder import INSIDE
from any_long import METHODS, NEVER
from mipruner.models.generic import owner_of

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- types: made by make models-page -->", "<!-- end of types -->"
COLUMNS = ["type", "tokens an image", "methods", "inside the language model"]
COLUMNS += ["beams, two images", "padded batch", "second turn"]
FIXED = {
    "gemma3": lambda c: c.mm_tokens_per_image,
    "gemma3n": lambda c: c.vision_soft_tokens_per_image,
    "idefics2": lambda c: c.perceiver_config.resampler_n_latents,
    "janus": lambda c: (c.vision_config.image_size // c.vision_config.patch_size) ** 2,
    "shieldgemma2": lambda c: c.mm_tokens_per_image,
}
"""Tokens an image, whatever its size."""

PIXELS = {
    "aya_vision": lambda c: c.vision_config.patch_size * c.downsample_factor,
    "cohere2_vision": lambda c: c.vision_config.patch_size * c.downsample_factor,
    "deepseek_vl": lambda c: c.vision_config.patch_size,
    "got_ocr2": lambda c: c.vision_config.patch_size * 4,
    "idefics3": lambda c: c.vision_config.patch_size * c.scale_factor,
    "lighton_ocr": lambda c: c.vision_config.patch_size * c.spatial_merge_size,
    "llama4": lambda c: round(c.vision_config.patch_size / c.vision_config.pixel_shuffle_ratio),
    "mistral3": lambda c: c.vision_config.patch_size * c.spatial_merge_size,
    "ovis2": lambda c: c.vision_config.patch_size * c.vision_config.hidden_stride,
    "paligemma": lambda c: c.vision_config.patch_size,
    "pp_chart2table": lambda c: c.vision_config.patch_size * 4,
    "qianfan_ocr": lambda c: round(one(c.vision_config.patch_size) / c.downsample_ratio),
    "smolvlm": lambda c: c.vision_config.patch_size * c.scale_factor,
    "vipllava": lambda c: c.vision_config.patch_size,
}
"""Pixels along a side of a token, where a token is a square of patches."""

ANY_SHAPE = {"lighton_ocr", "mistral3"}
TILED = {
    "aya_vision",
    "cohere2_vision",
    "got_ocr2",
    "idefics2",
    "idefics3",
    "llama4",
    "ovis2",
    "qianfan_ocr",
    "smolvlm",
}
"""Types whose processor may cut an image into tiles; the number is that of a tile."""

NO_DEFAULT = {"idefics3": "(side / patch / scale)²", "smolvlm": "(side / patch / scale)²"}
"""Types whose default config is of no published model."""


def one(size) -> int:
    return size[0] if isinstance(size, list | tuple) else size


def merge_of(vision) -> int | None:
    """Patches a token along each side."""
    return next(
        (n for name in ("spatial_merge_size", "merge_size") if isinstance(n := getattr(vision, name, 0), int) and n),
        None,
    )


def is_grid(kind: str, model) -> bool:
    """Whether the rows of an image are its grid of patches, merged, and nothing else."""
    px, owner = inputs_of(kind, model)[1], owner_of(model)
    merge = merge_of(getattr(model.config, "vision_config", None))
    if "image_grid_thw" not in px or merge is None:
        return False
    rows = rows_of(kind.split(":")[0], owner, seen_by(owner, px))
    return [len(one) * merge**2 for one in rows] == px["image_grid_thw"].prod(-1).tolist()


def tokens(kind: str, has_grid: bool) -> str:
    """Tokens an image: a number, or a formula in pixels where its rows are a grid of patches."""
    tile = " a tile" if kind in TILED else ""
    if kind in FIXED:
        return f"{FIXED[kind](CONFIG_MAPPING[kind]())}{tile}"
    if kind in PIXELS:
        n = PIXELS[kind](CONFIG_MAPPING[kind]())
        shape = f"(height / {n})(width / {n})" if kind in ANY_SHAPE else f"(side / {n})²"
        return NO_DEFAULT.get(kind, shape) + tile
    if kind == "aria":
        told = CONFIG_MAPPING[kind]().projector_patch_to_query_dict
        return ", ".join(f"{n} of {patches} patches" for patches, n in told.items())
    vision = CONFIG_MAPPING[kind]().vision_config if has_grid else None
    if vision is None or merge_of(vision) is None:
        return "see its processor"
    side = vision.patch_size * merge_of(vision)
    return f"(height / {side})(width / {side})"


def check_tokens(kind: str, model) -> None:
    """Compare what `tokens` says of a type with the rows that its tiny model gives."""
    px, owner, config = inputs_of(kind, model)[1], owner_of(model), model.config
    counts = {len(rows) for rows in rows_of(kind, owner, seen_by(owner, px))}
    n_images = 2 if kind in ("idefics2", "idefics3", "smolvlm") else 1  # all tiles of a sample come together
    side = px["pixel_values"].shape[-1]
    if kind in FIXED:
        assert counts == {n_images * FIXED[kind](config)}, (kind, counts)
    if kind in PIXELS:
        assert counts == {n_images * (side // PIXELS[kind](config)) ** 2}, (kind, counts)
    if kind == "aria":
        patches = (side // config.vision_config.patch_size) ** 2
        assert counts == {config.projector_patch_to_query_dict[patches]}, counts


def told(works: list[str], methods: list[str]) -> str:
    missing = [f"`{name}`" for name in methods if name not in works]
    return f"all {len(methods)}" + (f" but {', '.join(missing)}" if missing else "")


def row(kind: str, found: dict, has_grid: bool) -> str:
    """One line of the table."""
    works, refused = found["inside"]
    inside = told(works, INSIDE) if works else f"no: {refused['fastv']}"
    rest = (found[name].split(":")[0] for name in ("beams", "padded batch", "second turn"))
    assert found["keep=auto"] == "yes" and found["bfloat16"] in ("yes", NEVER)
    name = f"`{kind}`" + (", float32 only" if found["bfloat16"] == NEVER else "")
    return f"| {name} | {tokens(kind, has_grid)} | {told(found['methods'], METHODS)} | {inside} | {' | '.join(rest)} |"


def write(rows: list[str], refused: list[str], unbuilt: list[str]) -> str:
    """Everything between the marks."""
    return "\n".join(
        [
            BEGIN,
            f"transformers {transformers.__version__}, float32 and bfloat16, sdpa, on a CPU; {len(rows)} types:",
            "",
            f"Methods: {', '.join(f'`{name}`' for name in METHODS)}.",
            "",
            f"Inside the language model: {', '.join(f'`{name}`' for name in INSIDE)}.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{'---|' * len(COLUMNS)}",
            *rows,
            "",
            "| refused | why |",
            "|---|---|",
            *refused,
            *(["", "| not pruned | why |", "|---|---|", *unbuilt] if unbuilt else []),
            END,
        ]
    )


def block() -> str:
    """What the page says now between the marks."""
    found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", PAGE.read_text(), re.S)
    return found[0] if found else ""


def main() -> None:
    from any_tiny import CLASSES
    from mipruner.models import FAMILIES
    from test_any_model import NOT_BUILT, found_row, why_refused  # which reads this module

    warnings.simplefilter("ignore")
    rows, refused = [], []
    with torch.no_grad():
        for kind in sorted(set(CLASSES) - set(FAMILIES) - set(NOT_BUILT)):
            reason = why_refused(kind)
            (rows if reason is None else refused).append(
                found_row(kind) if reason is None else f"| `{kind}` | {reason} |"
            )
            print((rows if reason is None else refused)[-1], file=sys.stderr, flush=True)
    text = write(rows, refused, [f"| `{kind}` | {why} |" for kind, why in sorted(NOT_BUILT.items())])
    PAGE.write_text(PAGE.read_text().replace(block(), text))


if __name__ == "__main__":
    main()
