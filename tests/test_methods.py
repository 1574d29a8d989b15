"""The table of methods: complete, linked, and honest about who is ahead."""

import pandas as pd

from analysis import methods
from mipruner.pruners import PRUNERS


def cells(**accuracies):
    """Records of a demo run: method_keep=accuracy, or (accuracy, mean tokens a layer)."""
    rows = []
    for name, value in accuracies.items():
        method, _, keep = name.rpartition("_")
        accuracy, layer_mean = value if isinstance(value, tuple) else (value, float(keep))
        row = {"method": method, "keep": keep, "layer_mean": layer_mean, "n_samples": 627}
        rows.append(row | {"metrics": {"accuracy": accuracy}, "standard_errors": {"accuracy": 0.7}})
    return pd.DataFrame(rows)


def test_every_method_has_its_facts():
    for cls in PRUNERS.values():
        assert cls.title and (cls.paper is None or cls.paper.startswith("https://"))
        assert ("encoder" in cls.reads and "attention" in cls.reads) is ("attention" in cls().needs)


def test_the_best_is_bold_and_whoever_beats_mi_is_named():
    text = methods.table(
        cells(mi_64=95.7, mi_8=91.5, mmtok_64=94.0, mmtok_8=92.25, fastv_64=(96.1, 234.0), none_576=97.0)
    )
    row = next(line for line in text.splitlines() if "FastV" in line)
    assert "| **96.1** |  |  |  | 234 |" in row
    assert "At 64 tokens FastV 96.1 with 234 tokens a layer beats MI-Pruner's 95.7." in text
    assert "At 8 tokens MMTok 92.2 beats MI-Pruner's 91.5." in text
    assert "At 32" not in text
    assert "627 questions, standard errors 0.7 to 0.7" in text
    assert "At 64 tokens none beats MI-Pruner's 95.7." in methods.table(cells(mi_64=95.7, mmtok_64=95.7))
