"""The table of docs/models.md, from what the long form of `tests/test_any_model.py` finds: `make models-page`."""

import re
import sys
import warnings
from pathlib import Path

import torch
import transformers

from any_decoder import INSIDE
from any_long import METHODS, NEVER
from any_tokens import tokens

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- types: made by make models-page -->", "<!-- end of types -->"
COLUMNS = ["type", "tokens an image", "methods", "inside the language model"]
COLUMNS += ["beams, two images", "padded batch", "second turn"]


def told(works: list[str], methods: list[str]) -> str:
    missing = [f"`{name}`" for name in methods if name not in works]
    return f"all {len(methods)}" + (f" but {', '.join(missing)}" if missing else "")


def row(kind: str, found: dict) -> str:
    """One line of the table."""
    works, refused = found["inside"]
    inside = told(works, INSIDE) if works else f"no: {refused['fastv']}"
    rest = (found[name].split(":")[0] for name in ("beams", "padded batch", "second turn"))
    assert found["keep=auto"] == "yes" and found["bfloat16"] in ("yes", NEVER)
    name = f"`{kind}`" + (", float32 only" if found["bfloat16"] == NEVER else "")
    return f"| {name} | {tokens(kind)} | {told(found['methods'], METHODS)} | {inside} | {' | '.join(rest)} |"


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
