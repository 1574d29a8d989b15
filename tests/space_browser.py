"""The explorer's Space in headless Chromium: `make test-space`. It runs from the folder that `make space` makes."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from explorer_browser import EVIL, QUESTION, Visitor, browser

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    subprocess.run(["make", "-s", "space", f"OUT={folder}"], cwd=ROOT, check=True)
    process = subprocess.Popen(
        [sys.executable, "-u", "app.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    for line in process.stdout:
        said.append(line)
        if "http://" in line:
            break
    else:
        pytest.fail("".join(said))
    yield line.split()[-1]
    process.terminate()
    process.wait(20)


class Guest(Visitor):
    """A browser on the Space."""

    def __init__(self, url, folder):
        self.driver, self.folder, self.url = browser(folder), folder, url
        self.driver.get(url)
        self.until(lambda: self.field("question").get_property("value"))

    def field(self, name):
        return self.driver.find_element(By.CSS_SELECTOR, f"#{name} input, #{name} textarea")

    def fill(self, name, text):
        self.field(name).send_keys(Keys.CONTROL, "a")
        self.field(name).send_keys(text, Keys.TAB)

    def ask_for(self, question):
        self.fill("question", question)
        self.one("go").click()
        self.until(lambda: [head.text for head in self.all("#shown h3") if head.text.startswith(question)])


@pytest.fixture
def guest(url, tmp_path):
    guest = Guest(url, tmp_path)
    try:
        yield guest
        guest.check()
    finally:
        guest.driver.quit()


def test_ask_word_and_slider(guest):
    guest.ask_for(QUESTION)
    guest.until(lambda: len(guest.all("#shown canvas")) == 7)
    assert guest.heads()[:3] == ["all tokens 576", "MI-Pruner 64 of 576", "MI-Pruner 16 of 576"]
    before = guest.pixels(0)
    assert (guest.pixels(2)[..., :3].min(-1) > 190).mean() > 0.9, "16 of 576 patches are left"
    next(chip for chip in guest.all(".chip") if chip.text == "snowman").click()
    assert (guest.pixels(0) != before).any()
    guest.shoot("space")
    guest.slide(9)
    assert guest.heads()[1] == "MI-Pruner 9 of 576"


def test_an_upload_a_script_and_a_corrupt_file(guest, tmp_path):
    Image.new("RGB", (640, 400), "red").save(tmp_path / "up.png")
    guest.driver.find_element(By.CSS_SELECTOR, "#file input[type=file]").send_keys(str(tmp_path / "up.png"))
    guest.until(lambda: "up" in guest.one("file").text and "png" in guest.one("file").text)
    guest.ask_for(EVIL)
    assert guest.driver.execute_script("return window.evil") is None
    assert not guest.all("#shown img, #shown script")


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("budgets", "700", "asks for more tokens than the 576"),
        ("budgets", "many", "'many' is not a budget"),
        ("question", "a <image> b", "contains the placeholder"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(guest, field, text, message):
    guest.fill(field, text)
    guest.one("go").click()
    guest.until(lambda: message in guest.driver.find_element(By.TAG_NAME, "body").text)


def test_a_corrupt_file_is_one_sentence(guest, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"garbage" * 100)
    guest.driver.find_element(By.CSS_SELECTOR, "#file input[type=file]").send_keys(str(tmp_path / "bad.png"))
    guest.until(lambda: "bad" in guest.one("file").text)
    guest.one("go").click()
    guest.until(lambda: "cannot be read as an image" in guest.driver.find_element(By.TAG_NAME, "body").text)
