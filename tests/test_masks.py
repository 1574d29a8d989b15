"""Drawing what was kept: any image, any text, and cells that do not belong together."""

import json
import resource

import numpy as np
import pytest
from PIL import Image

from analysis import load, masks
from experiments.explorer.panels import NOTHING

ROW = {
    "id": "a", "image_id": "0", "task": "", "question": "What ?", "answer": "yes", "prediction": "yes", "correct": 1.0,
    "n_visual": 4, "grids": [[2, 2]], "boxes": [[0, 0, 60, 40]], "n_keep": 1, "kept": [[1]],
}  # fmt: skip


class Images:
    def __init__(self, image):
        self.image = image

    def images(self, image_id):
        return [self.image]


def cell(pruner, *rows):
    record = {"cell": {"model": "m", "dataset": "d", "pruner": pruner, "keep": 1, "seed": 0}, "config": {"n_masks": 1}}
    return record, {row["id"]: row for row in rows}


def write(folder, pruner, *rows):
    record, rows = cell(pruner, *rows)
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record | {"config": {"dataset": {"benchmark": {}}}}))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return folder


def test_dropped_patches_fade_and_kept_ones_do_not():
    drawn = np.asarray(masks.overlay(Image.new("RGB", (60, 40), "red"), [0, 0, 60, 40], [2, 2], [1]))
    assert drawn.shape == (40, 60, 3)
    assert drawn[10, 45].tolist() == [255, 0, 0] and drawn[10, 15].tolist() == drawn[30, 45].tolist() == [255, 209, 209]


@pytest.mark.parametrize("size", [(9000, 9000), (20000, 10), (10, 20000), (300, 1), (1, 1)])
def test_any_size_is_drawn_on_a_thumbnail(tmp_path, size, record_property):
    image = Image.new("RGB", size, "red")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = ROW | {"boxes": [[0, 0, *size]]}
    drawn = masks.overlay(image, [0, 0, *size], [24, 24], range(24))
    masks.draw([cell("mi", row)], Images(image), ["a"], tmp_path / "masks.png")
    assert max(drawn.size) <= masks.SIDE and max(Image.open(tmp_path / "masks.png").size) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 2**10, "KiB"
    record_property("survives", (f"an image of {size[0]} x {size[1]}", "its mask is drawn on a thumbnail"))


@pytest.mark.parametrize(
    "text", ["Is it $100 (10%) or $90 ?", "$$ {x} \\frac ^", "${oc.env:HOME}", "<b>%s %(x)d</b>", "\u96ea \U0001f600"]
)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_text_is_drawn_as_it_stands(tmp_path, text):
    row = ROW | {"question": text, "prediction": text, "answer": text}
    image = Images(Image.new("RGB", (60, 40)))
    masks.draw([cell("mi", row)], image, ["a"], tmp_path / "masks.png")
    masks.draw_dialogue([cell("mi", row)], image, "a", tmp_path / "dialogue.png")


def test_an_empty_answer_is_said(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(masks.plt.Axes, "set_title", lambda self, text, **_: titles.append(text))
    masks.draw([cell("mi", ROW | {"prediction": ""})], Images(Image.new("RGB", (60, 40))), ["a"], tmp_path / "m.png")
    assert titles[-1].endswith(f"\n{NOTHING}")


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["masks", *map(str, words)])
    try:
        masks.main()
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_cells_of_other_samples_are_drawn_where_they_meet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(masks.build, "benchmark", lambda config: Images(Image.new("RGB", (60, 40))))
    failed = {key: ROW[key] for key in ("image_id", "task", "question", "answer")} | {"id": "a", "error": "broken"}
    one = write(tmp_path / "one", "mi", ROW, ROW | {"id": "b"})
    two = write(tmp_path / "two", "random", failed, ROW | {"id": "b"}, ROW | {"id": "c"})
    three = write(tmp_path / "three", "none", ROW | {"id": "x"})
    drawn = []
    monkeypatch.setattr(masks, "draw", lambda read, benchmark, samples, out: drawn.append(samples))
    assert run(monkeypatch, capsys, one, two)[0] == 0 and drawn == [["b"]]
    for words, message in (
        ([one, three], "the cells share no sample that can be drawn"),
        ([one, two, "--ids", "c"], f"{one} has no sample c"),
        ([one, two, "--ids", "a"], "a: failed, or its tokens lie on no grid"),
    ):
        status, said = run(monkeypatch, capsys, *words)
        assert status == 2 and message in said


def test_a_data_set_that_is_not_there_and_a_folder_that_is_made(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "one", "mi", ROW)
    record = json.loads((folder / "record.json").read_text())
    options = {"name": "pope", "hub": [], "path": "/nowhere/pope.parquet"}
    record["config"]["dataset"]["benchmark"] = options
    (folder / "record.json").write_text(json.dumps(record))
    status, said = run(monkeypatch, capsys, folder)
    assert status == 2 and "/nowhere/pope.parquet does not exist" in said
    monkeypatch.setattr(masks.build, "benchmark", lambda config: Images(Image.new("RGB", (60, 40))))
    out = tmp_path / "new/folder/masks.png"
    assert run(monkeypatch, capsys, folder, "--out", out)[0] == 0 and out.exists()
    status, said = run(monkeypatch, capsys, folder, "--out", tmp_path / "masks.docx")
    assert status == 2 and "docx" in said


def test_names_in_a_record_are_names():
    for name in ("a,b", "${oc.env:HOME}", "x y=1", "../../etc"):
        assert load.default_settings("demo_llava", name, "mi") == {}
