"""Estimates p(v) by position from the tokens that a finished run kept, and writes a config for `prior=NAME`.

    python run.py dataset.benchmark.seed=100 pruner.lam=1 pruner.support=vocabulary       questions to validate on
    python -m analysis.prior results/demo_llava/demo/mi/keep=16,seed=100* --name demo     writes conf/prior/demo.yaml

A weight is the kept share of the tokens at a position, relative to the kept share of all tokens. Use questions that are
not in the evaluation.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from analysis.command import arguments
from experiments.conf import CONF
from experiments.results import read_answers

SIZE = 8
"""Number of rows and columns of the estimate."""


def estimate(rows: list[dict], size: int = SIZE) -> Tensor:
    """Weights [size, size] of positions in an image, with a mean of about 1, from rows of samples.jsonl.

    Each position starts with one token of average kept share, so that no weight is 0.
    """
    kept, seen = torch.zeros(size, size), torch.zeros(size, size)
    for row in rows:
        for indices, grid in zip(row.get("kept") or [], row.get("grids") or [], strict=True):
            if grid is None:  # several crops have no common grid
                continue
            n_rows, n_columns = grid[-2:]
            token = torch.arange(torch.Size(grid).numel())
            place = (token // n_columns % n_rows * size // n_rows, token % n_columns * size // n_columns)
            seen.index_put_(place, torch.ones(len(token)), accumulate=True)
            chosen = torch.tensor(indices, dtype=torch.long)
            kept.index_put_((place[0][chosen], place[1][chosen]), torch.ones(len(chosen)), accumulate=True)
    share = kept.sum() / seen.sum()
    return (kept + share) / (seen + 1) / share


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("cell", type=Path, help="folder of a finished cell")
    parser.add_argument("--name", required=True, help="the prior is written to conf/prior/NAME.yaml")
    args = parser.parse_args()
    record = json.loads((args.cell / "record.json").read_text(encoding="utf-8"))
    rows = read_answers(args.cell)
    table = "\n".join(f"  - [{', '.join(f'{weight:.2f}' for weight in row)}]" for row in estimate(rows).tolist())
    path = CONF / "prior" / f"{args.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"# @package pruner\n# estimated from {len(rows)} samples by\n#\n#   {record['command']}\n"
        f"#   python -m analysis.prior {args.cell} --name {args.name}\nprior: estimated\nprior_table:\n{table}\n",
        encoding="utf-8",
    )
    print(f"{path}: use it as prior={args.name}")


if __name__ == "__main__":
    main()
