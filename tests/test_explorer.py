"""The explorer without a browser: what it computes is what `Pipeline` computes, and what it refuses is one sentence.

tests/explorer_browser.py drives it in Chromium (`make test-explorer`).
"""

import base64
import http.client
import io
import json
import re
import shlex
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import uvicorn
from hydra import compose, initialize_config_dir
from PIL import Image

from experiments import build
from experiments.explorer import core, panels, server, views
from experiments.explorer.core import Explorer
from experiments.results import ROOT
from experiments.tasks.answer import answer
from experiments.tasks.explorer import listen
from mipruner import pmi
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline
from mipruner.pruners import PRUNERS, ImagePruner
from run import main, quoted

QUESTION = "What color is the snowman ?"
SCENE = 0


@pytest.fixture(scope="module")
def explorer():
    return Explorer(["device=cpu", "decoding.max_new_tokens=4"])


@pytest.fixture(scope="module")
def image(explorer):
    return explorer.scene_image(SCENE)


def url_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


# ----------------------------------------------------------------------------------------------------------------- core


@pytest.mark.parametrize("model", ["demo_llava", "demo_qwen3vl"])
def test_every_panel_is_what_pipeline_gives_and_the_image_is_seen_once(explorer, image, model, monkeypatch):
    adapter, _ = explorer.adapter(model)
    passes, encode = [], adapter.encode
    monkeypatch.setattr(adapter, "encode", lambda *args: passes.append(args) or encode(*args))
    cells = [explorer.cell(name, 20, {}, model) for name in explorer.pruners if name != "none"]
    cells += [explorer.cell("mi", 20, {"support": "vocabulary", "prior": "center"})]
    view = explorer.ask(model, image, f"{model} once", [QUESTION], cells, scene=SCENE)
    assert len(passes) == 1
    view = json.loads(json.dumps(view))
    for question in view["questions"]:
        runs = question["runs"]
        assert [run["pruner"] for run in runs] == ["none", *(cell.pruner for cell in cells)]
        for run, cell in zip(runs, [views.Cell("none", PRUNERS["none"](), 1.0), *cells], strict=True):
            pipeline = Pipeline(adapter, cell.method, cell.keep, Decoding(max_new_tokens=4))
            (told,) = pipeline([Prompt(question["question"], [image])])
            assert (run["answer"], run["kept"]) == (told.text, told.selections[0].indices.tolist()), cell.pruner
            assert run["layer_mean"] == pytest.approx(sum(told.visual_tokens_per_layer) / adapter.n_layers)
            if run["order"] is not None:
                assert sorted(run["order"][:20]) == run["kept"]
    ordered = {run["pruner"] for run in runs if run["order"]}
    assert {"random", "similarity", "attention", "mi", "divprune", "cdpruner", "mmtok"} <= ordered
    assert not ordered & {"none", "mi_attention", "vispruner", "fastv"}


def test_pmi_of_words_and_patches(explorer, image):
    adapter, _ = explorer.adapter("demo_llava")
    view = explorer.ask("demo_llava", image, "words", [QUESTION], [explorer.cell("mi", 16, {})])
    with torch.inference_mode():
        visuals = adapter.encode([adapter.preprocess(image)], frozenset())
        (features,) = adapter.read(Prompt(QUESTION, [image]), visuals, {"words"}).features()
        expected = pmi.cross_pmi(features.visual, features.text)
        table, spelled = views.readable(adapter)
        rows = adapter.model.get_input_embeddings().weight[table]
        whole = pmi.cross_pmi(features.visual, rows)
    (question,) = view["questions"]
    assert question["words"] == ["What", "color", "is", "the", "snowman", "?"]
    assert torch.tensor(question["pmi"]).T.allclose(expected, atol=0.006)
    for patch in (0, 100, 575):
        best = {spelled[k].lower(): whole[patch, k].item() for k in whole[patch].argsort()}  # the largest of a spelling
        best = sorted(best.items(), key=lambda pair: -pair[1])[: views.N_WORDS]
        assert [word for word, _ in view["vocabulary"][patch]] == [word for word, _ in best]
        assert [value for _, value in view["vocabulary"][patch]] == pytest.approx([v for _, v in best], abs=0.006)


def test_answers_are_judged_only_where_the_scene_knows(explorer, image):
    sample = next(one for one in explorer.demo.samples() if one.image_id == "0" and one.text.startswith("What color"))
    cells = [explorer.cell("mi", 16, {}), explorer.cell("random", 1, {})]
    (known, foreign) = explorer.ask("demo_llava", image, "j", [sample.text, "Why ?"], cells, scene=0)["questions"]
    assert known["expected"] == sample.answer
    for run in known["runs"]:
        assert run["right"] == (explorer.demo.correct(sample, run["answer"]) >= 0.5)
    assert foreign["expected"] is None and all(run["right"] is None for run in foreign["runs"])
    (other,) = explorer.ask("demo_llava", image, "j", [sample.text], cells[:1])["questions"]
    assert other["expected"] is None, "an image of one's own has no known answer"


def test_what_one_method_cannot_do_is_said_in_its_panel(explorer, image):
    cells = [explorer.cell("fastv", 1, {"budget_match": "layer_mean"}), explorer.cell("mi", 1, {})]
    view = explorer.ask("demo_llava", image, "x", [QUESTION], cells)
    _, fastv, mi = view["questions"][0]["runs"]
    assert "cannot bring the mean down to 1" in fastv["error"] and len(mi["kept"]) == 1
    panels.saved_page(view)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": [" "]}, "the question is empty"),
        ({"questions": ["a <image> b"]}, "contains the placeholder"),
        ({"model": "gpt"}, "there is no model 'gpt' here: choose demo_llava, demo_qwen3vl"),
        ({"keep": 700}, "asks for more tokens than the 576"),
        ({"keep": 0}, "is not a budget"),
        ({"pruner": "none such"}, "there is no pruner"),
        ({"options": {"colour": 1}}, "mi has no hyperparameter 'colour'"),
        ({"options": {"lam": 2}}, "is not in"),
        ({"options": {"lam": "x"}}, "mi: lam='x' should be a number"),
        ({"options": {"lam": True}}, "should be a number"),
        ({"options": {"aggregation": "mean"}}, "unknown aggregation 'mean': choose max, global"),
        ({"options": {"vocabulary_rows": 2.5}}, "should be a whole number or null"),
        ({"pruner": "fastv", "options": {"layer": 2.5}}, "layer=2.5 should be a whole number"),
        ({"pruner": "dart", "options": {"exact": 1}}, "exact=1 should be true or false"),
    ],
)
def test_the_core_refuses_with_one_sentence(explorer, image, change, message):
    asked = {"model": "demo_llava", "questions": [QUESTION], "keep": 16, "pruner": "mi", "options": {}} | change
    with pytest.raises(InputError, match=message):
        cells = [explorer.cell(asked["pruner"], asked["keep"], asked["options"])]
        explorer.ask(asked["model"], image, "refused", asked["questions"], cells)


def test_threads_get_what_one_after_the_other_gets(explorer):
    """Without the lock, encoder signals of one thread end up in the other's."""
    asked = [(k, name) for k in range(2) for name in ("attention", "vispruner", "fastv")]

    def ask(pair, again):
        k, name = pair
        cells = [explorer.cell(name, 12, {})]
        view = explorer.ask("demo_llava", explorer.scene_image(k), f"{again} {k} {name}", [QUESTION], cells)
        return [(run["answer"], run["kept"]) for run in view["questions"][0]["runs"]]

    alone = [ask(pair, "alone") for pair in asked]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda pair: ask(pair, "together"), asked)) == alone


def test_images_are_held_up_to_a_number(explorer, monkeypatch):
    monkeypatch.setattr(core, "N_HELD", 2)
    cells = [explorer.cell("mi", 1, {})]
    for key in ("a", "b", "a", "c"):
        explorer.ask("demo_llava", explorer.scene_image(1), key, ["Why ?"], cells)
    assert [key for _, key in explorer._seen] == ["a", "c"]


@pytest.mark.parametrize(
    "name", [name for name, cls in PRUNERS.items() if name != "none" and not issubclass(cls, ImagePruner)]
)
def test_the_form_offers_the_dataclass_with_the_values_of_conf(explorer, name):
    offered = explorer.describe()["pruners"][name]["fields"]
    typed = {field["name"]: core.read_value(str(field["value"])) for field in offered}
    assert "prior_table" not in typed
    cell = explorer.cell(name, 8, typed)
    assert cell.changed == {}, "what was not touched is no change"
    config = build.pruner(explorer.compose("demo_llava", name))
    assert cell.method == config
    for field in offered:
        for choice in field["choices"]:
            explorer.cell(name, 8, {field["name"]: choice})


def test_the_commands_do_the_same(explorer, image, tmp_path):
    image.save(tmp_path / "it's.png")
    cell = explorer.cell("mi", 10, {"lam": 0.9})
    (question,) = explorer.ask("demo_llava", image, "command", [QUESTION], [cell])["questions"]
    run = question["runs"][1]
    words = shlex.split(run["command"].replace("IMAGE", shlex.quote(str(tmp_path / "it's.png"))))
    assert "pruner.lam=0.9" in words and "decoding.max_new_tokens=4" in words
    assert "pruner.tau" not in run["command"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", [*map(quoted, words[2:]), f"results={tmp_path}"])
    assert next(answer(build.resolve(cfg), cfg.image, cfg.question)) == run["answer"]
    compile(run["python"], "python lines", "exec")
    assert "mipruner.prune(model, 'mi', keep=10, lam=0.9)" in run["python"]


def test_a_saved_page_holds_no_markup_of_others_and_needs_no_other_host(explorer, image):
    evil = "</script><script>alert(1)</script><!--"
    view = explorer.ask("demo_llava", image, "evil", [f"{evil} ?"], [explorer.cell("mi", 64, {})])
    page = panels.saved_page(view)
    assert page.count("<script") == 2 and "alert(1)" in page and "<!--" not in page
    start = page.index("id=data>") + len("id=data>")
    assert json.loads(page[start : page.index("</script>", start)]) == json.loads(json.dumps(view))
    assert "http://" not in page and "https://" not in page
    assert len(page) < 400_000


# ----------------------------------------------------------------------------------------------------------------- HTTP


@contextmanager
def serving(explorer):
    opened = listen(0)
    server_ = uvicorn.Server(uvicorn.Config(server.application(explorer), log_level="error"))
    thread = threading.Thread(target=server_.run, kwargs={"sockets": [opened]})
    thread.start()
    try:
        yield opened.getsockname()[1]
    finally:
        server_.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def port(explorer):
    with serving(explorer) as port:
        yield port


def send(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers or {})
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


ASKED = {"scene": 0, "model": "demo_llava", "questions": [QUESTION], "budgets": ["16"], "pruners": {"mi": {}}}
JSON = {"Content-Type": "application/json"}


def ask(port, headers=JSON, **change):
    asked = {key: value for key, value in (ASKED | change).items() if value is not None}
    status, body, _ = send(port, "POST", "/ask", json.dumps(asked), headers)
    return status, [json.loads(line) for line in body.splitlines()]


def test_a_question_is_answered_line_by_line(explorer, port, image):
    status, lines = ask(port, budgets=["16", "0.5", "1.0"], pruners={"mi": {"lam": "1.0"}, "random": {"seed": "7"}})
    assert status == 200 and set(lines[-1]) == {"view"}
    runs = lines[-1]["view"]["questions"][0]["runs"]
    assert [run["n_keep"] for run in runs] == [576, 16, 288, 576, 16, 288, 576], "1.0 is everything, not one token"
    assert "pruner.lam=1.0" in runs[1]["command"] and "pruner.seed=7" in runs[4]["command"]
    assert runs[0]["right"] is not None


def test_an_upload_stands_upright_and_never_touches_the_disk(port, tmp_path, monkeypatch):
    pixels = Image.new("RGB", (60, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    status, lines = ask(port, scene=None, image=url_of(pixels, "JPEG", exif=exif))
    assert status == 200 and lines[-1]["view"]["size"] == [40, 60] and not list(tmp_path.iterdir())
    status, lines = ask(port, scene=None, image=url_of(Image.new("RGB", (3000, 1000))))
    assert lines[-1]["view"]["size"] == [1344, 448]


TORN = url_of(Image.effect_noise((80, 80), 90))[:-2000]
TORN = TORN[: len(TORN) - len(TORN.partition(",")[2]) % 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scene": None}, "there is no image"),
        ({"scene": 99}, "there is no scene 99"),
        ({"scene": True}, "there is no image"),
        ({"scene": None, "image": "data:image/png;base64,%%%"}, "base64"),
        ({"scene": None, "image": "/etc/passwd"}, "cannot be read as an image"),
        ({"scene": None, "image": "data:image/png;base64," + base64.b64encode(b"milk").decode()}, "cannot be read"),
        ({"scene": None, "image": TORN}, "cannot be read as an image"),
        ({"scene": None, "image": url_of(Image.new("1", (9000, 8000)))}, "9000 x 8000 pixels: at most 24 megapixels"),
        ({"scene": None, "image": url_of(Image.new("1", (30000, 30000)))}, "cannot be read|at most 24 megapixels"),
        ({"scene": None, "image": {"path": "/etc/passwd"}}, "there is no image"),
        ({"questions": []}, "0 questions: give 1 to 2"),
        ({"questions": ["a", "b", "c"]}, "3 questions: give 1 to 2"),
        ({"questions": "What ?"}, "questions is not a list"),
        ({"questions": [{"a": 1}]}, "questions is not a list"),
        ({"questions": ["x" * 501]}, "at most 500 characters"),
        ({"questions": ["  "]}, "the question is empty"),
        ({"budgets": ["16"] * 2 + [str(k) for k in range(1, 201)]}, "budgets: give 1 to 6"),
        ({"budgets": ["many"]}, "'many' is not a budget"),
        ({"budgets": ["nan"]}, "is not a budget"),
        ({"budgets": ["-3"]}, "is not a budget"),
        ({"pruners": {}}, "0 pruners: choose 1 to 8"),
        ({"pruners": {name: {} for name in PRUNERS}}, "pruners: choose 1 to 8"),
        ({"pruners": ["mi"]}, "pruners is not a table"),
        ({"pruners": {"__class__": {}}}, "there is no pruner"),
        ({"pruners": {"mi": {"lam": "nan"}}}, "is not in"),
        ({"pruners": {"mi": {"prior": "estimated"}}}, "prior"),
    ],
)
def test_a_bad_request_is_one_sentence(port, change, message):
    status, (said,) = ask(port, **change)
    assert status == 400 and re.search(message, said["error"]), said
    assert "\n" not in said["error"] and "Traceback" not in said["error"] and len(said["error"]) < 250


def test_what_only_the_model_can_tell_is_one_line_too(port):
    for change, message in (({"budgets": ["700"]}, "576"), ({"questions": ["a <image> b"]}, "placeholder")):
        status, lines = ask(port, **change)
        assert status == 200 and message in lines[-1]["error"]


def test_other_hosts_and_other_sites_are_refused(port):
    for headers in (
        JSON | {"Host": "evil.example"},
        JSON | {"Host": f"evil.example:{port}"},
        JSON | {"Host": "127.0.0.1.evil.example"},
        JSON | {"Origin": "http://evil.example"},
        JSON | {"Origin": "null"},
        JSON | {"Host": f"localhost:{port}", "Origin": f"http://127.0.0.1:{port}"},
    ):
        assert ask(port, headers)[0] == 403
    for path in ("/", "/offer", "/scene/0"):
        assert send(port, "GET", path, headers={"Host": "evil.example"})[0] == 403
    assert ask(port, JSON | {"Origin": f"http://127.0.0.1:{port}"})[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert ask(port, {"Content-Type": kind})[0] == 415


def test_there_are_no_other_files(port):
    for path in ("/../run.py", "/core.py", "/%2e%2e/core.py", "//etc/passwd", "/static/x", "/scene/x", "/scene/-1"):
        status, body, _ = send(port, "GET", path)
        assert status == 404 and b"def " not in body
    assert send(port, "GET", "/scene/99")[0] == 404
    assert send(port, "GET", "/ask")[0] == 405


def test_every_reply_forbids_foreign_code(port):
    for path in ("/", "/page.js", "/panels.css", "/offer", "/saved.html", "/nowhere"):
        headers = send(port, "GET", path)[2]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "script-src 'self';" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and "Access-Control-Allow-Origin" not in headers
    assert send(port, "GET", "/saved.html")[2]["Content-Type"].startswith("text/plain")


def test_too_much_is_refused_before_it_is_read(port):
    status, (said,) = ask(port, scene=None, image="data:image/png;base64," + "A" * (server.MAX_BYTES * 4 // 3 + 2**17))
    assert status == 413 and said["error"] == "the image is larger than 20 MiB"
    for body in (b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"1"):
        status, reply, _ = send(port, "POST", "/ask", body, JSON)
        assert status == 400 and "request is not" in json.loads(reply)["error"]


class Slow:
    """An explorer whose panels take until they are let go."""

    def __init__(self, explorer):
        self.explorer, self.go, self.entered, self.ended = explorer, threading.Event(), [], []

    def __getattr__(self, name):
        return getattr(self.explorer, name)

    def ask(self, model, image, key, questions, cells, *, scene, tell):
        self.entered.append(questions[0])
        try:
            while not self.go.wait(0.02):
                tell(0, 1)
            return {"asked": questions[0], "size": image.size}
        finally:
            self.ended.append(questions[0])


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_visitors_queue_see_their_place_and_can_leave(explorer):
    slow = Slow(explorer)

    def waiting():
        return json.loads(send(port, "GET", "/offer")[1])["waiting"]

    with serving(slow) as port, ThreadPoolExecutor(3) as pool:
        gone = socket.create_connection(("127.0.0.1", port))
        body = json.dumps(ASKED | {"questions": ["gone"]}).encode()
        head = f"POST /ask HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n"
        gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: slow.entered == ["gone"])
        first = pool.submit(ask, port, questions=["first"], scene=1)
        wait_for(lambda: waiting() == 2)
        second = pool.submit(ask, port, questions=["second"], scene=None, image=url_of(Image.new("RGB", (30, 20))))
        wait_for(lambda: waiting() == 3)
        time.sleep(0.3)
        assert slow.entered == ["gone"], "one at a time"
        gone.close()
        wait_for(lambda: slow.entered == ["gone", "first"])
        assert slow.ended == ["gone"], "work of a visitor who left has ended"
        time.sleep(0.3)
        slow.go.set()
        assert first.result()[1][-1] == {"view": {"asked": "first", "size": [336, 336]}}
        lines = second.result()[1]
        assert lines[0] == {"place": 2} and {"place": 1} in lines
        assert lines[-1] == {"view": {"asked": "second", "size": [30, 20]}}
        wait_for(lambda: waiting() == 0)


def test_a_full_line_and_too_long_a_request_end_in_a_sentence(explorer, monkeypatch):
    slow = Slow(explorer)
    monkeypatch.setattr(server, "MAX_WAITING", 1)
    monkeypatch.setattr(server, "MAX_SECONDS", 1)
    with serving(slow) as port, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, port)
        wait_for(lambda: slow.entered)
        assert "visitors are waiting already" in ask(port)[1][-1]["error"]
        assert "took more than 1 s" in first.result()[1][-1]["error"]


# --------------------------------------------------------------------------------------------------------- command line


def test_words_of_the_command_line(monkeypatch, capsys):
    assert Explorer(["task=explorer", "port=0"]).models == ["demo_llava", "demo_qwen3vl"]
    words = ["task=explorer", "model=demo_qwen3vl", "pruner=random", "keep=3", "pruner.seed=1", "dataset=demo_pope"]
    assert Explorer(words).models == ["demo_qwen3vl"]
    with pytest.raises(InputError, match="colour"):
        Explorer(["colour=red"])
    taken = listen(0)
    messages = {taken.getsockname()[1]: "is not available", 99999: "is not available", "x": "should be a whole number"}
    for port, message in messages.items():
        monkeypatch.setattr(sys, "argv", ["run.py", "task=explorer", f"port={port}"])
        with pytest.raises(SystemExit):
            main()
        error = capsys.readouterr().err
        assert f"error: port={port}" in error and message in error
    taken.close()
