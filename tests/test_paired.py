"""Paired differences against a brute-force reading, and their column in the tables."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis import compare, load, paired, tables
from test_analysis import GQA, results, toy_defaults, write_record  # noqa: F401


def write_answers(folder, correct, images):
    rows = [
        {"id": f"q{i}", "image_id": image, "correct": c}
        for i, (c, image) in enumerate(zip(correct, images, strict=True))
    ]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def drawn(seed, n=60, n_images=12):
    generator = np.random.default_rng(seed)
    return (generator.random((2, n)) < [[0.8], [0.6]]).tolist(), [f"i{i}" for i in generator.integers(0, n_images, n)]


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_that_of_a_mean_whose_residuals_are_summed_by_image(tmp_path, seed):
    (ours, theirs), images = drawn(seed)
    for name, correct in (("a", ours), ("b", theirs)):
        (tmp_path / name).mkdir()
        write_answers(tmp_path / name, correct, images)
    mean, error = paired.clustered(paired.gains(tmp_path / "a", tmp_path / "b"))
    gain = [100 * (int(a) - int(b)) for a, b in zip(ours, theirs, strict=True)]
    expected = sum(gain) / len(gain)
    total = 0
    for image in set(images):
        total += sum(g - expected for g, i in zip(gain, images, strict=True) if i == image) ** 2
    n_images = len(set(images))
    assert mean == pytest.approx(expected)
    assert error == pytest.approx(math.sqrt(n_images / (n_images - 1) * total) / len(gain))


def test_one_question_an_image_is_the_usual_standard_error_and_copies_do_not_sharpen_it(tmp_path):
    (ours, theirs), _ = drawn(0)
    for name, copies in (("once", 1), ("thrice", 3)):
        for side, correct in (("a", ours), ("b", theirs)):
            folder = tmp_path / name / side
            folder.mkdir(parents=True)
            write_answers(folder, correct * copies, list(range(60)) * copies)
    once, thrice = (
        paired.clustered(paired.gains(tmp_path / name / "a", tmp_path / name / "b")) for name in ("once", "thrice")
    )
    gain = 100 * (np.array(ours, float) - np.array(theirs, float))
    assert once == pytest.approx((gain.mean(), gain.std(ddof=1) / math.sqrt(60)))
    assert thrice == pytest.approx(once)


def test_one_image_has_no_error(tmp_path):
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        write_answers(tmp_path / side, [True, False], ["i", "i"])
    mean, error = paired.clustered(paired.gains(tmp_path / "a", tmp_path / "b"))
    assert mean == 0 and math.isnan(error)


def test_a_table_compares_with_mi_pruner_only_what_both_answered(results):  # noqa: F811
    images = ["x", "x", "y", "y"]
    mi = write_record(results, "llava15_7b", "gqa", "mi", "64", {"accuracy": 50.0})
    vispruner = write_record(results, "llava15_7b", "gqa", "vispruner", "64", {"accuracy": 75.0})
    write_answers(mi, [True, False, True, False], images)
    write_answers(vispruner, [True, True, True], images[:3])
    table = compare.compare(compare.wanted("table1"), load.cells(results))
    rows = paired.against(table)
    (key,) = rows
    assert key[:3] == (GQA["model"], GQA["keep"], "vispruner")
    assert rows[key][0] == pytest.approx(100 / 3)
    text = tables.markdown(tables.lay_out(table))
    assert "against MI-Pruner" in text and "+33.3 ±" in text and "clustered by image" in text
    assert r"$\pm$" in tables.latex(tables.lay_out(table))
    csv = pd.read_csv(io.StringIO(tables.csv(table)))
    assert csv.against_mi[csv.method == "vispruner"].dropna().unique() == pytest.approx([100 / 3], abs=1e-6)
    assert csv.against_mi[csv.method != "vispruner"].isna().all() and csv.against_mi_error.notna().any()
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_without_answers_there_is_no_column(results):  # noqa: F811
    write_record(results, "llava15_7b", "gqa", "mi", "64", {"accuracy": 50.0})
    write_record(results, "llava15_7b", "gqa", "vispruner", "64", {"accuracy": 75.0})
    assert "against MI-Pruner" not in tables.markdown(
        tables.lay_out(compare.compare(compare.wanted("table1"), load.cells(results)))
    )
