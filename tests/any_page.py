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
TOKENS = {
    "aria": "128 at 490 px, 256 at 980 px",
    "aya_vision": "169 a tile",
    "cohere2_vision": "256 a tile",
    "deepseek_vl": "(side / 16)²",
    "deepseek_vl_hybrid": "576",
    "fuyu": "(height / 30)(width / 30)",
    "gemma3": "256",
    "gemma3n": "256",
    "got_ocr2": "256 a tile",
    "idefics2": "64 a tile",
    "idefics3": "169 a tile",
    "janus": "576",
    "lighton_ocr": "(height / 28)(width / 28)",
    "llama4": "144 a tile",
    "mistral3": "(height / 28)(width / 28)",
    "ovis2": "256 a tile",
    "paligemma": "(side / 14)²",
    "pp_chart2table": "256",
    "qianfan_ocr": "256 a tile",
    "shieldgemma2": "256",
    "smolvlm": "(side / patch / scale)² a tile",
    "vipllava": "576",
}
"""Tokens an image, where no grid of patches tells them: of the published sizes, or of the default config."""


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
    """Tokens an image: a formula in pixels where its rows are a grid of patches."""
    if kind in TOKENS:
        return TOKENS[kind]
    vision = CONFIG_MAPPING[kind]().vision_config if has_grid else None
    if vision is None or merge_of(vision) is None:
        return "see its processor"
    side = vision.patch_size * merge_of(vision)
    return f"(height / {side})(width / {side})"


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
            "",
            "| not pruned | why |",
            "|---|---|",
            *unbuilt,
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
