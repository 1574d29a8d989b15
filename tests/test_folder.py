"""dataset=folder: tables and images as people have them, made here."""

import json

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from experiments import build
from experiments.benchmarks.base import BenchmarkError, SampleError, digest, read_samples
from experiments.benchmarks.folder import Folder, letter, vqa_accuracy
from experiments.cell import run_cell
from experiments.results import ROOT, Cell


def table(folder, rows, name="questions.jsonl"):
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    for k, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 30), colour).save(folder / f"photos/{k}.png")
    text = "\n".join(map(json.dumps, rows)) if isinstance(rows, list) else rows
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


ROW = {"question": "What color is it ?", "image": "photos/0.png"}


def test_a_csv_of_windows_with_its_mark_and_lists(tmp_path):
    text = (
        "\ufeffquestion,image,answer,choices,category,id\r\n"
        '"Which, of these ?",photos/0.png,red,"[""red"", ""blue""]",colour,a\r\n'
        "Which one ?,photos/0.png|photos/1.png,B,red|blue,pair,b\r\n"
    )
    bench = Folder(str(table(tmp_path, text, "questions.csv")))
    one, two = bench.samples()
    assert (bench.scoring, one.id, one.answer, two.answer) == ("choice", "a", "A", "B")
    assert one.text.splitlines()[:3] == ["Which, of these ?", "A. red", "B. blue"]
    assert [len(bench.images(sample.image_id)) for sample in (one, two)] == [1, 2]
    assert bench.metrics([one, two], ["A", "A"], bench.score([one, two], ["A", "A"])) == {
        "accuracy": 50,
        "accuracy_colour": 100,
        "accuracy_pair": 0,
    }


@pytest.mark.parametrize(
    ("more", "scoring", "right", "wrong"),
    [
        ({"answer": "Red"}, "exact", "red.", "dark red"),
        ({"answer": "yes"}, "yes_no", "Yes, it is", "no"),
        ({"answers": ["red", "crimson"]}, "vqa", "the red", "blue"),
        ({"choices": ["red", "blue"], "answer": "blue"}, "choice", "(b) blue", "a"),
    ],
)
def test_the_scoring_follows_the_columns(tmp_path, more, scoring, right, wrong):
    bench = Folder(str(table(tmp_path, [ROW | more])))
    assert bench.scoring == scoring
    (sample,) = bench.samples()
    assert (bench.correct(sample, right), bench.correct(sample, wrong)) == (1, 0)


def test_the_hubs_image_folder(tmp_path):
    folder = table(tmp_path / "x/test", "file_name,question,answer\nphotos/1.png,What ?,blue\n", "metadata.csv")
    (sample,) = Folder(str(folder.parent)).samples()
    assert sample.image_id == "photos/1.png"


def test_letters_and_vqa_accuracy():
    assert [letter(text, ["red", "a dog"]) for text in ("b", "A.", "(B)", "A dog", "a cat", "C", "")] == [
        *("B", "A", "B", "B"),
        *(None, None, None),
    ]
    assert vqa_accuracy("red", ["red", "blue"]) == 1
    assert vqa_accuracy("red", ["red"] * 2 + ["blue"] * 8) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([ROW | {"question": None}], {}, r"row 1 of .*questions.jsonl: question is null: "),
        ([ROW, ROW | {"question": "  "}], {}, r"row 2 of .*: question is '  ': is empty"),
        ([{"question": "What ?"}], {}, r"row 1 of .*: image is missing; it has question"),
        ([ROW], {"scoring": "exact"}, r"row 1 of .*: it has no answer, which dataset.scoring=exact needs"),
        ([ROW | {"answer": "red"}], {"scoring": "yes_no"}, r"the answer is 'red', not yes or no"),
        (
            [ROW | {"answer": "red"}],
            {"scoring": "choice"},
            r"row 1 of .*: it has no choices, which dataset.scoring=choice needs",
        ),
        ([ROW | {"answer": "C", "choices": ["red", "blue"]}], {}, r"the answer 'C' is none of its choices"),
        ([ROW | {"answer": "A", "choices": ["red"]}, ROW | {"answer": "red"}], {}, r"row 2 of .*: it has no choices"),
        ([ROW | {"id": "a"}, ROW, ROW | {"id": "a"}], {}, r"row 3 of .*: its id 'a' is that of row 1. Correct it, or"),
        ([ROW, [1, 2]], {}, r"row 2 of .*: it is \[1, 2\], not columns with values"),
        ([], {}, r"questions.jsonl has no rows"),
        ("{", {}, r"questions.jsonl cannot be read"),
    ],
)
def test_a_bad_row_is_named_when_it_is_read(tmp_path, rows, options, message):
    with pytest.raises(BenchmarkError, match=message):
        read_samples(Folder(str(table(tmp_path, rows)), **options))


@pytest.mark.parametrize("bad", [{"question": None}, {"answer": None}, {"answer": "C"}, {"id": "a"}, {"choices": []}])
def test_bad_rows_can_be_skipped(tmp_path, bad):
    row = ROW | {"choices": ["red", "blue"], "answer": "A"}
    bench = Folder(str(table(tmp_path, [row | {"id": "a"}, row | bad])), on_bad_row="skip")
    assert [sample.id for sample in read_samples(bench)] == ["a"] and len(bench.skipped) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("question;image;answer\nWhich, then ?;photos/0.png;red\n", "red"),
        ('question, image, answer\n"Which, then ?", photos/0.png, red\n', "red"),
        ("question,image,answer\nWhich ?,photos/0.png,red, or so\n", "row 1 of .*: it has more cells than columns"),
        ("question,image,choices,answer\nWhich ?,photos/0.png,[red],A\n", r"choices is '\[red\]': is no list: write"),
        ("question,image\nWelche Farbe ist schön ?,photos/0.png\n".encode("latin-1"), "questions.csv is not UTF-8"),
    ],
)
def test_a_csv_as_spreadsheets_write_it(tmp_path, text, answer):
    bench = Folder(str(table(tmp_path, text, "questions.csv")), sentence="")
    if answer == "red":
        (sample,) = read_samples(bench)
        assert (sample.text, sample.answer, sample.image_id) == ("Which, then ?", ["red"], "photos/0.png")
        return
    with pytest.raises(BenchmarkError, match=answer):
        read_samples(bench)


def test_no_folder_and_no_table(tmp_path):
    for path, message in ((None, "set dataset.path=mydata"), ("nowhere", "no folder nowhere"), (tmp_path, "no questi")):
        with pytest.raises(BenchmarkError, match=message):
            Folder(path and str(path)).samples()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "photos/../../secret.png", "photos/link.png"])
def test_no_path_leads_out_of_the_folder(tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    folder = table(tmp_path / "mine", [ROW | {"image": name}])
    (folder / "photos/link.png").symlink_to(tmp_path / "secret.png")
    bench = Folder(str(folder))
    (sample,) = bench.samples()
    with pytest.raises(SampleError, match="lies outside of"):
        bench.images(sample.image_id)


@pytest.mark.parametrize(
    ("name", "why"), [("é" * 200 + ".png", "File name too long"), ("photos/\0.png", "embedded null")]
)
def test_a_name_that_no_file_can_have(tmp_path, name, why):
    bench = Folder(str(table(tmp_path, [ROW, ROW | {"image": name}])))
    good, bad = read_samples(bench)
    assert digest(bench, [good, bad])
    with pytest.raises(SampleError, match=f"there is no image .*: {why}"):
        bench.images(bad.image_id)
    assert bench.images(good.image_id)


def test_the_data_belongs_to_the_cell(tmp_path):
    """Another answer or another image of the same name is another cell."""
    folder, digests = table(tmp_path, [ROW | {"answer": "red"}]), []

    def look():
        bench = Folder(str(folder))
        digests.append(digest(bench, read_samples(bench)))

    look()
    table(folder, [ROW | {"answer": "blue"}])
    look()
    Image.new("RGB", (40, 30), "blue").save(folder / "photos/0.png")
    look()
    assert len(set(digests)) == 3


def test_a_folder_runs(tmp_path):
    rows = [ROW | {"answer": "red"}, {"question": "What color is it ?", "image": "photos/9.png", "answer": "blue"}]
    folder = table(tmp_path / "mine", rows)
    common = ["dataset=folder", f"dataset.path={folder}", f"results={tmp_path / 'results'}", "device=cpu", "n_masks=0"]

    def config(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            return build.resolve(compose("config", [*common, "decoding.max_new_tokens=4", *overrides]))

    settings = config()
    record = run_cell(settings)
    assert record["n_samples"] == 2 and record["provenance"] == {"scoring": "exact"}
    assert [failed["error"] for failed in record["failed"]] == [f"there is no image {folder / 'photos/9.png'}"]
    first = Cell(settings).path
    (folder / "photos/9.png").write_bytes((folder / "photos/1.png").read_bytes())
    settings = config()
    assert run_cell(settings)["failed"] == [] and Cell(settings).path != first
    assert run_cell(config("dataset.scoring=none"))["metrics"] == {}
