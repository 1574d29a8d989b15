"""The explorer in headless Chromium, as a visitor uses it: `make test-explorer`.

Every request that the browser makes must go to this machine. Screenshots go to the folder that SCREENSHOTS names.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from experiments.explorer import panels
from experiments.explorer.core import Explorer

ROOT = Path(__file__).parents[1]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUESTION = "What color is the snowman ?"
EVIL = '<img src=x onerror="window.evil=1"> <script>window.evil=1</script></script> ${evil} {{evil}} What is this ?'


@pytest.fixture(scope="module")
def url():
    """A server in a process of its own, ended by the signal that a service manager sends."""
    command = [sys.executable, "-u", "run.py", "task=explorer", "port=0", "device=cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("http://"):
            break
    yield line.split()[0]
    process.terminate()
    assert process.wait(20) in (0, -15)


def browser(folder):
    options = webdriver.ChromeOptions()
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "no-first-run",
        "hide-scrollbars",
    ):
        options.add_argument(f"--{word}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--window-size=1280,1200")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = CHROMIUM
    return webdriver.Chrome(options=options, service=Service(DRIVER))


class Visitor:
    """A browser on the page, and what a person does in it."""

    def __init__(self, url, folder):
        self.driver, self.folder, self.url = browser(folder), folder, url
        self.driver.get(url)
        self.until(lambda: self.value("question"))

    def until(self, condition, seconds=60):
        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: condition())

    def one(self, name):
        return self.driver.find_element(By.ID, name)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def value(self, name):
        return self.one(name).get_property("value")

    def type(self, name, text):
        self.driver.execute_script("document.getElementById(arguments[0]).value = ''", name)
        self.one(name).send_keys(text)

    def ask(self):
        """Text of the state line, or of the error."""
        self.one("go").click()
        self.until(lambda: self.one("go").is_enabled())
        return self.one("error").text or self.one("state").text

    def show_scene(self, number):
        self.driver.execute_script("document.getElementById('scene').value = arguments[0]", number)
        self.driver.execute_async_script("document.getElementById('scene').onchange().then(arguments[0])")

    def choose_pruners(self, *names):
        self.driver.execute_script(
            "for (const box of document.querySelectorAll('input[name=pruner]'))"
            "  box.checked = arguments[0].includes(box.value)",
            names,
        )

    def slide(self, first):
        self.driver.execute_script(
            "const range = document.querySelector('.range'); range.value = arguments[0];"
            "for (const type of ['input', 'change']) range.dispatchEvent(new Event(type))",
            first,
        )

    def heads(self):
        return [head.text for head in self.all(".head") if head.is_displayed()]

    def pixels(self, k):
        """Canvas k [height, width, 4]."""
        script = (
            "const c = document.querySelectorAll('canvas')[arguments[0]];"
            "return [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
        )
        height, width, data = self.driver.execute_script(script, k)
        return np.array(data).reshape(height, width, 4)

    def shoot(self, name, element=None):
        if os.environ.get("SCREENSHOTS"):
            png = element.screenshot_as_png if element else self.driver.get_screenshot_as_png()
            image = Image.open(io.BytesIO(png)).convert("RGB")
            image.save(f"{os.environ['SCREENSHOTS']}/{name}.jpg", quality=85)

    def check(self):
        """Nothing foreign was asked for, and no script failed."""
        logged = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        asked = [m["params"]["request"]["url"] for m in logged if m["method"] == "Network.requestWillBeSent"]
        foreign = [one for one in asked if urlsplit(one).scheme == "http" and urlsplit(one).hostname != "127.0.0.1"]
        schemes = {urlsplit(one).scheme for one in asked}
        assert not foreign and schemes <= {"http", "data", "blob", "file"}, (foreign, schemes)
        expected = "Failed to load resource: the server responded with a status of 400"
        severe = [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        assert [message for message in severe if expected not in message] == []


@pytest.fixture
def visitor(url, tmp_path):
    visitor = Visitor(url, tmp_path)
    try:
        yield visitor
        visitor.check()
    finally:
        visitor.driver.quit()


def test_ask_word_patch_slider_save(visitor):
    visitor.type("question", QUESTION)
    start = time.monotonic()
    told = visitor.ask()
    assert told.startswith("7 panels in") and time.monotonic() - start < 10
    assert visitor.heads()[:3] == ["all tokens 576", "MI-Pruner 64 of 576", "MI-Pruner 16 of 576"]
    answers = [one.text for one in visitor.all(".answer")]
    assert len(answers) == 7 and [one[0] in "=≠" for one in answers] == [False] + [True] * 6
    faded = (visitor.pixels(2)[..., :3].min(-1) > 190).mean()
    assert faded > 0.9, "16 of 576 patches are left"

    chips = {chip.text: chip for chip in visitor.all(".chip")}
    before = visitor.pixels(0)
    chips["snowman"].click()
    assert chips["snowman"].get_attribute("aria-pressed") == "true"
    heated = (visitor.pixels(0) != before).any(-1)
    assert 0.01 < heated.mean() < 0.6
    visitor.shoot("explorer")

    visitor.all("canvas")[0].click()
    said = visitor.all(".said")[0].text
    row, column = map(int, re.match(r"Patch in row (\d+), column (\d+)", said).groups())
    assert {row, column} <= {12, 13} and "in the question: " in said and "in the whole vocabulary: " in said
    visitor.all("canvas")[0].send_keys(Keys.ARROW_RIGHT)
    assert visitor.all(".said")[0].text.startswith(f"Patch in row {row}, column {column + 1}")
    visitor.all("canvas")[0].send_keys(Keys.ESCAPE)
    assert chips["snowman"].get_attribute("aria-pressed") == "false"

    visitor.slide(24)
    assert visitor.heads() == ["all tokens 576", "MI-Pruner 24 of 576", "Similarity 24 of 576", "Attention 24 of 576"]
    a_step = visitor.driver.execute_script(
        "const range = document.querySelector('.range'), start = performance.now();"
        "for (let k = 1; k <= 50; k++) { range.value = k; range.dispatchEvent(new Event('input')) }"
        "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1);"
        "return (performance.now() - start) / 50"
    )
    assert a_step < 50, f"{a_step} ms a redraw"
    visitor.slide(0)

    visitor.one("save").click()
    visitor.until(lambda: list(visitor.folder.glob("*.html")))
    (saved,) = visitor.folder.glob("*.html")
    panels = visitor.pixels(1)
    visitor.driver.get(saved.as_uri())
    visitor.until(lambda: len(visitor.all("canvas")) == 7)
    visitor.until(lambda: (visitor.pixels(1) == panels).all())
    before = visitor.pixels(0)
    next(chip for chip in visitor.all(".chip") if chip.text == "snowman").click()
    assert (visitor.pixels(0) != before).any()
    visitor.slide(9)
    assert visitor.heads()[1] == "MI-Pruner 9 of 576" and not visitor.all("form")
    assert saved.stat().st_size < 400_000


def test_methods_without_an_order_are_asked_again(visitor):
    visitor.choose_pruners("mi", "vispruner")
    visitor.type("budgets", "32")
    visitor.ask()
    visitor.slide(11)
    visitor.until(lambda: "VisPruner 11 of 576" in visitor.heads())
    assert "MI-Pruner 11 of 576" in visitor.heads()


def test_options_of_a_pruner_and_another_model(visitor):
    def set_lam(value):
        visitor.driver.execute_script(
            "document.querySelector('[data-pruner=mi][name=lam]').value = arguments[0]", value
        )

    visitor.driver.execute_script("document.getElementById('model').value = 'demo_qwen3vl'")
    set_lam("0.9")
    assert "panels" in visitor.ask()
    command = visitor.driver.execute_script("return document.querySelectorAll('pre')[1].textContent")
    assert "pruner.lam=0.9" in command and "model=demo_qwen3vl" in command and "mipruner.prune(model, 'mi'" in command
    set_lam("9")
    assert visitor.ask() == "lam=9 is not in [0, 1]"


def test_two_questions_keep_different_patches(visitor):
    texts = visitor.driver.execute_script(
        "return [...document.querySelectorAll('#asked option')].map(one => one.value)"
    )
    first, second = [text for text in texts if text.startswith("What color")][:2]
    visitor.type("question", first)
    visitor.type("second", second)
    assert visitor.ask().startswith("14 panels")
    assert (visitor.pixels(2) != visitor.pixels(9)).any(), "mi at 16 for each question"
    assert (visitor.pixels(6) == visitor.pixels(13)).all(), "attention does not read the question"


def test_the_image_of_readme(visitor):
    """Two questions about scene 8, on which attention, which does not read them, errs: a chosen example."""
    visitor.show_scene(8)
    visitor.choose_pruners("mi", "attention")
    visitor.type("question", "What color is the smiley ?")
    visitor.type("second", "What color is the sword ?")
    visitor.type("budgets", "16")
    assert visitor.ask().startswith("6 panels")
    answers = [one.text for one in visitor.all(".answer")]
    assert answers == ["yellow ✓", "= yellow ✓", "≠ red ✗", "orange ✓", "= orange ✓", "≠ red ✗"]
    visitor.shoot("two_questions", visitor.all(".sides")[0])


def test_an_upload_and_what_is_wrong_with_it(visitor, tmp_path):
    Image.new("RGB", (640, 400), "red").save(tmp_path / "up.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"garbage" * 100)
    visitor.one("file").send_keys(str(tmp_path / "up.png"))
    visitor.until(lambda: "means nothing" in visitor.one("warning").text)
    assert "model=llava15_7b" in visitor.one("warning").text
    visitor.type("question", EVIL)
    assert "panels" in visitor.ask()
    assert visitor.driver.execute_script("return window.evil") is None
    assert visitor.all("#shown h3")[0].text == EVIL and not visitor.all("#shown img, #shown script")
    visitor.one("file").send_keys(str(tmp_path / "bad.png"))
    visitor.until(lambda: "cannot be read as an image" in visitor.one("error").text)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_an_image_is_pasted_or_dropped(visitor, way):
    visitor.driver.execute_async_script(
        "const [way, done] = arguments, canvas = document.createElement('canvas');"
        "canvas.width = 60; canvas.height = 40; canvas.getContext('2d').fillRect(0, 0, 30, 40);"
        "canvas.toBlob(blob => {"
        "  const data = new DataTransfer();"
        "  const options = {bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data};"
        "  data.items.add(new File([blob], 'own.png', {type: 'image/png'}));"
        "  const Kind = way === 'paste' ? ClipboardEvent : DragEvent;"
        "  document.dispatchEvent(new Kind(way, options));"
        "  done();"
        "})",
        way,
    )
    visitor.until(lambda: "means nothing" in visitor.one("warning").text)
    assert visitor.one("preview").get_property("naturalWidth") == 60 and visitor.value("scene") == ""
    visitor.type("question", QUESTION)
    assert "panels" in visitor.ask()
    assert visitor.pixels(0).shape[:2] == (267, 400)


def test_cancel_leaves_what_was_there_and_the_next_question_is_answered(visitor):
    visitor.ask()
    before = visitor.pixels(1)
    visitor.type("question", "What color is the umbrella ?")
    visitor.type("budgets", "128, 64, 48, 32, 16, 8")
    visitor.one("go").click()
    visitor.until(lambda: "panel" in visitor.one("state").text)
    visitor.one("cancel").click()
    visitor.until(lambda: visitor.one("state").text == "cancelled")
    assert visitor.one("go").is_enabled() and not visitor.one("cancel").is_displayed() and not visitor.one("error").text
    assert (visitor.pixels(1) == before).all()
    visitor.type("budgets", "16")
    assert visitor.ask().startswith("4 panels")


def test_the_frame_of_a_notebook(visitor, tmp_path):
    explorer = Explorer(["device=cpu", "decoding.max_new_tokens=4"])
    view = explorer.ask("demo_llava", explorer.scene_image(0), "0", [QUESTION], [explorer.cell("mi", 16, {})], scene=0)
    (tmp_path / "cell.html").write_text(f"<!doctype html><body>{panels.Frame(view)._repr_html_()}</body>")
    visitor.driver.get((tmp_path / "cell.html").as_uri())
    visitor.driver.switch_to.frame(0)
    visitor.until(lambda: len(visitor.all("canvas")) == 2)
    visitor.until(lambda: visitor.pixels(1).any())
    before = visitor.pixels(0)
    next(chip for chip in visitor.all(".chip") if chip.text == "snowman").click()
    assert (visitor.pixels(0) != before).any()
    visitor.driver.switch_to.default_content()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "the question is empty: type one"),
        ({"question": "a <image> b"}, "contains the placeholder"),
        ({"budgets": "700"}, "asks for more tokens than the 576"),
        ({"budgets": "many"}, "'many' is not a budget"),
        ({"budgets": " "}, "0 budgets: give 1 to 6"),
    ],
)
def test_what_cannot_be_asked_is_said_and_the_last_answer_stays(visitor, change, message):
    visitor.ask()
    ((name, text),) = change.items()
    visitor.type(name, text)
    assert message in visitor.ask() and len(visitor.all("canvas")) == 7


def test_two_visitors_at_once_each_see_their_own(url, tmp_path):
    def visit(scene):
        visitor = Visitor(url, tmp_path)
        try:
            visitor.show_scene(scene)
            visitor.ask()
            visitor.check()
            words = [chip.text for chip in visitor.all(".chip")]
            return visitor.value("question"), words, visitor.pixels(0)
        finally:
            visitor.driver.quit()

    with ThreadPoolExecutor(2) as pool:
        (q1, w1, p1), (q2, w2, p2) = pool.map(visit, (1, 2))
    assert q1.split() == w1 and q2.split() == w2 and (p1 != p2).any()


def test_on_a_phone_nothing_sticks_out(visitor):
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    visitor.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    visitor.ask()
    visitor.driver.execute_script("document.querySelector('#shown').scrollIntoView()")
    visitor.shoot("explorer_phone")
    assert visitor.driver.execute_script("return document.documentElement.scrollWidth") <= 390
