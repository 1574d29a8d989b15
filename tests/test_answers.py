"""The page of answers that pruning changed, and answers side by side in the report."""

import json
import re

import pytest
from PIL import Image

from analysis import answers, load, report
from test_masks import ROW


class Images:
    def images(self, image_id):
        return [Image.new("RGB", (60, 40), "red")]


def write(results, pruner, keep, said, *, scored=False, digest="d", **more):
    folder = results / "m" / "folder" / pruner / f"keep={keep}-{abs(hash(digest)):08x}"[:40]
    folder.mkdir(parents=True)
    cell = {"model": "m", "dataset": "folder", "pruner": pruner, "keep": keep, "seed": 0}
    record = {
        "cell": cell, "metrics": {"accuracy": 50.0} if scored else {}, "standard_errors": {}, "n_samples": len(said),
        "config": {"dataset": {"digest": digest, "benchmark": {}}}, "failed": [], "tokens": {"visual": 4, "kept": 1},
        "latency_ms": None, "batch_size": 1, "device": "toy", "git_commit": None, "command": "", "finished": "",
        "unusable": {"empty": said.count(""), "unreadable": 0},
    } | more  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))
    rows = [
        ROW | {"id": f"q{k}", "question": f"Is <b>{k}</b> $ ?", "answer": None, "prediction": text, "correct": None}
        for k, text in enumerate(said)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def cells(tmp_path):
    return [
        write(tmp_path / "results", "none", 1.0, ["a cup", "red", "two"]),
        write(tmp_path / "results", "mi", 16, ["A cup", "blue", "two"]),
        write(tmp_path / "results", "mi", 8, ["a hat", "green", ""]),
    ]


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(answers.build, "benchmark", lambda config: Images())
    monkeypatch.setattr("sys.argv", ["answers", *map(str, words)])
    try:
        answers.main()
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_the_page_shows_what_pruning_changed_with_every_mask(cells, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "answers.html"
    status, said = run(monkeypatch, capsys, *cells[::-1], "--out", out)
    assert status == 0 and said.startswith("3 of 3 questions are answered differently by some cell.")
    page = out.read_text()
    shown = json.loads(re.search(r"id=cases>(.*?)</script>", page, re.S)[1])
    order = [view["questions"][0]["question"] for view in shown["views"]]
    assert order == ["Is <b>1</b> $ ?", "Is <b>0</b> $ ?", "Is <b>2</b> $ ?"], "what most cells change comes first"
    runs = shown["views"][0]["questions"][0]["runs"]
    assert [(run["pruner"], run["keep"], run["answer"]) for run in runs] == [
        ("none", "1.0", "red"),
        ("mi", "16", "blue"),
        ("mi", "8", "green"),
    ]
    assert runs[1]["kept"] == [1] and runs[1]["right"] is None and list(shown["images"]) == ["0"]
    assert "<b>1</b>" not in page and "1 of 3 answers changed" in page and "1 empty" in page
    assert "http://" not in page and "https://" not in page


def test_alike_answers_are_shown_when_asked_for(cells, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.html"
    assert run(monkeypatch, capsys, *cells[:2], "--out", out)[1].startswith("1 of 3")
    assert out.read_text().count("<article") == 1
    run(monkeypatch, capsys, *cells[:2], "--every", "--out", out)
    assert out.read_text().count("<article") == 3


def test_cells_that_do_not_belong_together(cells, tmp_path, monkeypatch, capsys):
    older = write(tmp_path / "older", "mi", 16, ["a", "b", "c"], digest="other")
    status, said = run(monkeypatch, capsys, cells[0], older)
    assert status == 2 and "answers another version of the data" in said
    other = write(tmp_path / "x", "mi", 16, ["a"], cell={"model": "n", "dataset": "pope", "pruner": "mi", "keep": 16})
    assert "is of n and pope: give cells of one model" in run(monkeypatch, capsys, cells[0], other)[1]
    assert "is no folder of a finished cell" in run(monkeypatch, capsys, tmp_path)[1]


def test_the_report_has_unscored_answers_side_by_side(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "default_settings", lambda *names: {})
    text = report.page(load.cells(tmp_path / "results"), 2)
    table = text[text.index("id=answers") :]
    heads = "<th>all tokens</th><th>MI-Pruner, 16</th><th>MI-Pruner, 8</th>"
    assert heads in table and "<td class=changed-answer>blue</td><td class=changed-answer>green</td>" in table
    assert "<td>A cup</td><td class=changed-answer>a hat</td>" in table and "(empty answer)" in table
    assert "Is &lt;b&gt;0&lt;/b&gt; $ ?" in table
