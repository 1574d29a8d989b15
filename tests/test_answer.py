"""run.py with one image of the user's own."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from experiments import build
from experiments.results import ROOT
from experiments.tasks.answer import answer, open_photo
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
    text = answer(settings, str(photo), question)
    (told,) = Pipeline(build.model(settings), build.pruner(settings), 30)([Prompt(question, [open_photo(photo)])])
    assert text.splitlines()[0] == told.text
    assert "demo_llava  mi  tokens kept 30 of 576" in text and "ms, once warm: vision" in text
    out = tmp_path / "answers" / "my photo,demo_llava,mi,keep=30.html"
    assert text.endswith(str(out))
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
        out = answer(settings, str(photo), "What color is the sun ?").splitlines()[-1].strip()
        page = Path(out).read_text()
        runs = json.loads(page[page.index("id=data>") + 8 :].partition("</script>")[0])["questions"][0]["runs"]
        assert [len(run["kept"]) for run in runs] == [n or int(runs[-1]["keep"]) for n in kept]
        assert ("pruner.lam=0.8" in runs[-1]["command"]) == (len(kept) == 2)


def test_an_image_stands_as_the_camera_held_it(photo):
    image = open_photo(str(photo))
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
        ("text", "What?", "notes.jpg cannot be read as an image"),
        ("torn", "What?", "torn.png cannot be read as an image"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_message(tmp_path, photo, image, question, message):
    (tmp_path / "notes.jpg").write_text("milk, bread")
    (tmp_path / "torn.png").write_bytes(photo.read_bytes()[:600])
    image = {"photo": photo, "text": tmp_path / "notes.jpg", "torn": tmp_path / "torn.png"}.get(image, image)
    with pytest.raises(InputError, match=message):
        answer(config(tmp_path), image and str(image), question)
    assert not (tmp_path / "answers").exists()


def test_the_command_line_takes_any_question(tmp_path, photo):
    command = [sys.executable, "run.py", f"image={photo}", "question=What's this, a cup or a king ?", "keep=0.5"]
    done = subprocess.run([*command, f"results={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens kept 288 of 576" in done.stdout and not list(tmp_path.rglob("record.json"))
    failed = subprocess.run([*command[:2], "question=Why ?"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 1 and "needs an image" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("question=Who's that, a=b?", r"question='Who\'s that, a=b?'"),
        ("question='a','b'", "question='a','b'"),
        ("keep=16", "keep=16"),
        ("-m", "-m"),
    ],
)
def test_questions_are_quoted_for_hydra(argument, expected):
    assert quoted(argument) == expected
