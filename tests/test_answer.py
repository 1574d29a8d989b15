"""run.py with one image of the user's own."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from command_line import Fork
from experiments import build
from experiments.explorer.panels import NOTHING
from experiments.images import open_image
from experiments.results import ROOT
from experiments.tasks import answer as task
from experiments.tasks.answer import answer
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline
from run import quoted


@pytest.fixture
def photo(tmp_path):
    """Left half red, right half blue, and lying on its side as cameras store them."""
    pixels = np.zeros((280, 420, 3), dtype=np.uint8)
    pixels[:, :210, 0] = pixels[:, 210:, 2] = 255
    path = tmp_path / "my photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def config(tmp_path, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build.resolve(compose("config", [f"results={tmp_path}", "device=cpu", *overrides]))


def test_the_answer_is_the_pipelines_and_the_page_shows_what_was_kept(tmp_path, photo):
    settings = config(tmp_path, "keep=30")
    question = "What color is the sun ?"
    text = "\n".join(answer(settings, str(photo), question))
    (told,) = Pipeline(build.model(settings), build.pruner(settings), 30)([Prompt(question, [open_image(photo)])])
    assert text.splitlines()[0] == told.text
    assert "demo_llava  mi  tokens kept 30 of 576" in text and "ms, once warm: vision" in text
    (out,) = (tmp_path / "answers").iterdir()
    assert out.name.startswith("my_photo,demo_llava,mi,keep=30-") and text.endswith(str(out))
    page = out.read_text()
    view = json.loads(page[page.index("id=data>") + len("id=data>") :].partition("</script>")[0])
    assert view["size"] == [280, 420] and view["questions"][0]["question"] == question
    whole, pruned = view["questions"][0]["runs"]
    assert (whole["pruner"], len(whole["kept"])) == ("none", 576)
    assert (pruned["answer"], pruned["kept"]) == (told.text, told.selections[0].indices.tolist())
    assert shlex.split(pruned["command"])[2:] == [
        f"image={photo}", f"question={question}", "model=demo_llava", "pruner=mi", "keep=30",
        "decoding.max_new_tokens=4",
    ]  # fmt: skip


def test_a_page_of_the_full_model_and_one_of_a_budget_that_sets_itself(tmp_path, photo):
    for words, kept in ((["pruner=none"], [576]), (["keep=auto", "pruner.lam=0.8"], [576, None])):
        settings = config(tmp_path, *words)
        out = list(answer(settings, str(photo), "What color is the sun ?"))[-1].strip()
        page = Path(out).read_text(encoding="utf-8")
        runs = json.loads(page[page.index("id=data>") + 8 :].partition("</script>")[0])["questions"][0]["runs"]
        assert [len(run["kept"]) for run in runs] == [n or int(runs[-1]["keep"]) for n in kept]
        assert ("pruner.lam=0.8" in runs[-1]["command"]) == (len(kept) == 2)


def test_an_image_stands_as_the_camera_held_it(photo):
    image = open_image(photo)
    assert image.size == (280, 420) and image.mode == "RGB"
    assert image.getpixel((140, 10)) == (255, 0, 0) and image.getpixel((140, 410)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        ("nowhere.jpg", "What?", "no image nowhere.jpg: give the path"),
        (".", "What?", "no image .: give the path"),
        (None, "What?", "a question needs an image"),
        ("photo", "", "is empty: give question="),
        ("photo", None, "is empty: give question="),
        ("photo", "  ", "is empty: give question="),
        ("text", "What?", "notes.jpg cannot be decoded"),
        ("torn", "What?", "torn.png cannot be decoded"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_message(tmp_path, photo, image, question, message):
    (tmp_path / "notes.jpg").write_text("milk, bread")
    (tmp_path / "torn.png").write_bytes(photo.read_bytes()[:600])
    image = {"photo": photo, "text": tmp_path / "notes.jpg", "torn": tmp_path / "torn.png"}.get(image, image)
    with pytest.raises(InputError, match=message):
        list(answer(config(tmp_path), image and str(image), question))
    assert not (tmp_path / "answers").exists()


def test_the_command_line_takes_any_question(tmp_path, photo):
    asked = (f"image={photo}", "question=What's this, a cup or a king ?", "keep=0.5", f"results={tmp_path}")
    status, out, err = Fork(*asked).end()
    assert status == 0 and "tokens kept 288 of 576" in out and not list(tmp_path.rglob("record.json")), err
    status, _, err = Fork("question=Why ?").end()
    assert status == 1 and "needs an image" in err and "Traceback" not in err


def test_every_question_image_and_setting_has_a_page_of_its_own(tmp_path, photo):
    """And the same command writes the same page again, whatever the names."""
    other = tmp_path / "elsewhere" / photo.name
    other.parent.mkdir()
    Image.new("RGB", (50, 50)).save(other)
    long = tmp_path / ("\u96ea" * 80 + ".png")
    long.write_bytes(photo.read_bytes())
    asked = [(photo, "What ?"), (photo, "What ?"), (photo, "Is it $1 ?"), (other, "What ?"), (long, "What ?")]
    pages = {list(answer(config(tmp_path), str(image), text))[-1].strip() for image, text in asked}
    pages |= {list(answer(config(tmp_path, "pruner.lam=0.9"), str(photo), "What ?"))[-1].strip()}
    assert len(pages) == 5 and all(Path(page).is_file() for page in pages)


def test_an_empty_answer_is_said(tmp_path, photo, monkeypatch):
    monkeypatch.setattr(build.model(config(tmp_path)).chat, "decode", lambda tokens: " ")
    assert next(answer(config(tmp_path), str(photo), "What ?")) == NOTHING


def test_no_page_takes_the_answer_with_it(tmp_path, photo, monkeypatch, capsys, record_property):
    def full(*_):
        raise MemoryError("14 GB")

    monkeypatch.setattr(task, "show_answer", full)
    lines = list(answer(config(tmp_path), str(photo), "What color is the sun ?"))
    assert len(lines) == 3 and "tokens kept 16 of 576" in lines[1]
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning == "warning: the page was not written: MemoryError('14 GB')"
    record_property("survives", ("image= where the page cannot be made", f"the answer is printed; {warning}"))


@pytest.mark.parametrize("size", [(300, 1), (3000, 2000), (4000, 10)])
def test_an_image_of_any_size_and_depth_is_answered(tmp_path, size):
    path = tmp_path / "grey.png"
    Image.fromarray(np.linspace(0, 40000, size[0] * size[1]).reshape(size[::-1]).astype(np.uint16)).save(path)
    lines = list(answer(config(tmp_path), str(path), "What ?"))
    assert lines[1] == "  grey 0 to 40000 shown as black to white" and Path(lines[-1].strip()).stat().st_size < 10**6


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (r"question='STOP' or 'GO' ?", r"question='\'STOP\' or \'GO\' ?'"),
        ("question='Why, then ?'", "question='Why, then ?'"),
        ("question=Who's that, a=b?", r"question='Who\'s that, a=b?'"),
        ("question='a','b'", r"question='\'a\',\'b\''"),
        ("keep=16", "keep=16"),
        ("-m", "-m"),
    ],
)
def test_questions_are_quoted_for_hydra(argument, expected):
    assert quoted(argument) == expected


def test_a_sweep_over_quoted_questions_is_left_to_hydra():
    assert quoted("question='a','b'", is_sweep=True) == "question='a','b'"


@pytest.mark.parametrize(
    "text",
    [
        "Is it $100 (10%) or $90 ?", "'STOP' or 'GO' ?", '"a" {b} [c]', "${oc.env:HOME}", r"\${x} \\${y}", "a=b, c",
        "null", "C:\\temp\\", r"\'", "7", "yes", "two\nlines \\\n",
    ],
)  # fmt: skip
def test_no_character_of_a_question_is_read_by_hydra(text):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", [quoted(f"question={text}")])
    once = OmegaConf.to_container(cfg, resolve=True)
    assert once["question"] == text
    build.resolve(once)


def test_a_path_that_is_there_is_taken_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data, [2024] ${x}").mkdir()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", ["dataset=folder", quoted("dataset.path=my data, [2024] ${x}")])
    assert build.resolve(cfg)["dataset"]["benchmark"]["path"] == "my data, [2024] ${x}"
    assert quoted("dataset=pope") == "dataset=pope"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("dataset.name=möbel", "möbel"),
        ("results=/tmp/結果", "/tmp/結果"),
        ("results=runs (2), old", "runs (2), old"),
        ("model.prompt=USER: {image} {text} ASSISTANT:", "USER: {image} {text} ASSISTANT:"),
        ("model.prompt=null", None),
        ("dataset.sentence=Answer (yes or no), please.", "Answer (yes or no), please."),
        ("dataset.sentence=", ""),
        ("dataset.sentence='Say yes, or no.'", "Say yes, or no."),
    ],
)
def test_a_text_or_a_path_that_is_not_there_yet_is_taken_as_it_stands(word, value):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", ["dataset=folder", quoted(word)])
    assert OmegaConf.select(cfg, word.partition("=")[0]) == value
    assert quoted("model.prompt=vicuna_v1,llava_v1", is_sweep=True) == "model.prompt=vicuna_v1,llava_v1"
