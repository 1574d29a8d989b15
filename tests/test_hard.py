"""Records restricted to hard questions, from toy records, and the tables and paired differences made of them."""

import json
import math

import pytest

from analysis import hard, load, paired


def write(results, pruner, keep, correct, seed=0):
    folder = results / "demo_llava/demo" / pruner / f"keep={keep}-{seed}"
    folder.mkdir(parents=True)
    rows = [
        {"id": str(k), "image_id": str(k // 2), "task": ("pope", "gqa")[k % 2], "correct": value}
        for k, value in enumerate(correct)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "cell": {"model": "demo_llava", "dataset": "demo", "pruner": pruner, "keep": keep, "seed": seed},
        "config": {"dataset": {"name": "demo"}, "pruner": {"name": pruner}},
        "n_samples": len(rows), "failed": [], "batch_size": 1, "device": "cpu", "git_commit": "0", "command": "c",
        "finished": "now", "provenance": {}, "latency_ms": None, "tokens": None,
        "metrics": {"accuracy": 100 * sum(correct) / len(rows), "pope": 0.0, "f1": 1.0}, "standard_errors": {},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))


@pytest.fixture
def results(tmp_path):
    write(tmp_path / "results", "none", 1.0, [1, 1, 1, 1, 0, 1])
    write(tmp_path / "results", "downsample", 8, [0, 0, 1, 0, 0, 0.4])
    write(tmp_path / "results", "mi", 8, [1, 0, 0, 1, 1, 1])
    write(tmp_path / "results", "random", 8, [0, 0, 0, 0, 0, 1], seed=1)
    write(tmp_path / "results", "mi", 16, [1] * 6)
    return tmp_path / "results"


def test_only_what_all_tokens_get_right_and_downsampling_wrong(results, tmp_path):
    out = tmp_path / "hard"
    (by_budget,) = hard.restrict(results, out).values()
    assert by_budget == {"8": {"0", "1", "3", "5"}}
    cells = {(cell.method, cell.keep): cell for cell in load.cells(out).itertuples()}
    assert set(cells) == {("none", "1.0"), ("downsample", "8"), ("mi", "8"), ("random", "8")}, "16 has no down-sampling"
    mi = cells["mi", "8"]
    assert mi.n_samples == 4 and mi.metrics == {"accuracy": 75.0, "pope": 100.0}, "F1 is no mean over questions"
    assert mi.standard_errors["accuracy"] == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 3))
    assert cells["none", "1.0"].metrics["accuracy"] == 100
    assert cells["downsample", "8"].metrics["accuracy"] == 10, "a score of .4 counts as wrong"
    gain = paired.gains(cells["mi", "8"].path, cells["random", "8"].path)
    assert gain.gain.tolist() == [100, 0, 100, 0]
    hard.restrict(results, out)


def test_nothing_is_hard_without_both(tmp_path):
    write(tmp_path / "results", "none", 1.0, [1, 1])
    with pytest.raises(ValueError, match="run both"):
        hard.restrict(tmp_path / "results", tmp_path / "hard")
    write(tmp_path / "results", "downsample", 8, [0, 1])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("kept")
    with pytest.raises(ValueError, match="other files"):
        hard.restrict(tmp_path / "results", tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").exists()
