"""Evaluation through a server, against one on this machine that answers, fails and lies as servers do."""

import json
import re
import signal
import threading
import time
from collections import Counter

import pytest
from hydra import compose, initialize_config_dir

from command_line import Fork
from experiments import build
from experiments.benchmarks.base import BenchmarkError
from experiments.benchmarks.demo import Demo
from experiments.cell import run_cell, show
from experiments.results import ROOT, Cell
from loopback import server
from mipruner.errors import InputError


def config_of(tmp_path, url, *overrides):
    words = ["engine=server", f"engine.base_url={url}", f"results={tmp_path}", "dataset.benchmark.n_scenes=2"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build.resolve(compose("config", [*words, "engine.max_retries=2", *overrides]))


def text_of(request):
    return request["messages"][0]["content"][-1]["text"]


def is_probe(request):
    return request.get("mm_processor_kwargs", {}).get("keep") == 0


def good(request, _):
    """A server with the plug-in: it refuses the probe, and says yes."""
    return (400, "keep=0 is not a budget") if is_probe(request) else (200, "yes")


def test_a_record_has_the_scores_of_the_answers_and_null_for_what_a_server_does_not_tell(tmp_path):
    with server(good) as (url, asked):
        config = config_of(tmp_path, url)
        record = run_cell(config)
        n = record["n_samples"]
        assert len(asked) == n + 1
        again = run_cell(config)
    assert again == record and record["failed"] == []
    rows = {row["id"]: row for row in Cell(config).rows()}
    assert len(rows) == n
    assert record["metrics"]["pope"] == pytest.approx(
        100
        * sum(r["answer"] == "yes" for r in rows.values() if r["task"] == "pope")
        / sum(r["task"] == "pope" for r in rows.values())
    )
    assert all(row["kept"] is None and row["per_layer"] is None for row in rows.values())
    assert record["tokens"] is record["latency_ms"] is record["peak_memory_gib"] is None
    assert record["server"]["version"] == "1.2.3" and record["server"]["model"] == "demo"
    assert record["server"]["prompt_tokens"] == 7
    assert "demo at http" in show(record, "x")
    request = asked[1]
    assert request["mm_processor_kwargs"]["keep"] == 16 and request["mm_processor_kwargs"]["pruner"] == "mi"
    assert request["mm_processor_kwargs"]["options"]["lam"] == 0.5
    assert request["max_tokens"] == 4 and request["temperature"] == 0
    assert request["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, "out of order"), "out of order"),
        ((429, "slow down"), "slow down"),
        ((401, "who are you"), "OPENAI_API_KEY is refused"),
        ((400, "the prompt is too long"), "too long"),
        ((200, b"<html>welcome</html>"), "does not answer as chat/completions does"),
        ((200, b"{}"), "does not answer as chat/completions does"),
    ],
)
def test_a_server_that_fails_ends_in_one_message_and_nothing_is_asked_twice(tmp_path, reply, message):
    broken = threading.Event()
    broken.set()

    def fails_later(request, number):
        return reply if broken.is_set() and number >= 9 and not is_probe(request) else good(request, number)

    with server(fails_later) as (url, asked):
        config = config_of(tmp_path, url, "engine.concurrency=2")
        with pytest.raises(BenchmarkError, match=f"(?s){message}.*run the same command again"):
            run_cell(config)
        answered = {row["id"] for row in Cell(config).rows()}
        assert 0 < len(answered) <= 8
        broken.clear()
        before = len(asked)
        record = run_cell(config)
    assert len(asked) - before == record["n_samples"] - len(answered) + 1  # the probe
    assert len({row["id"] for row in Cell(config).rows()}) == record["n_samples"]


def test_a_request_that_fails_once_is_tried_again(tmp_path):
    seen = Counter()

    def every_second(request, number):
        seen[text_of(request)] += 1
        return (500, "busy") if seen[text_of(request)] == 1 else good(request, number)

    with server(every_second) as (url, _):
        assert run_cell(config_of(tmp_path, url, "engine.concurrency=4"))["failed"] == []


def test_a_server_that_is_down_slow_or_of_other_models_is_said(tmp_path):
    with pytest.raises(BenchmarkError, match="cannot be reached"):
        run_cell(config_of(tmp_path, "http://127.0.0.1:9/v1", "engine.max_retries=0"))

    def slow(request, number):
        time.sleep(0 if is_probe(request) else 1.0)
        return good(request, number)

    with server(slow) as (url, _):
        with pytest.raises(BenchmarkError, match=r"no answer within 0\.2 s"):
            run_cell(config_of(tmp_path, url, "engine.max_retries=0", "engine.timeout_s=0.2"))
        with pytest.raises(BenchmarkError, match="serves demo: choose one"):
            run_cell(config_of(tmp_path, url, "engine.served_model=other"))


def test_a_server_that_prunes_nothing_is_not_taken_for_one_that_does(tmp_path):
    with server(lambda *_: (200, "yes")) as (url, _), pytest.raises(BenchmarkError, match="prunes nothing"):
        run_cell(config_of(tmp_path, url))

    def trusts_nobody(request, _):
        return (400, "needs --trust-request") if "mm_processor_kwargs" in request else (200, "yes")

    with server(trusts_nobody) as (url, asked):
        with pytest.raises(BenchmarkError, match="--trust-request-mm-kwargs"):
            run_cell(config_of(tmp_path, url))
        run_cell(config_of(tmp_path, url, "pruner=none"))
    assert "mm_processor_kwargs" not in asked[-1]
    with server(good) as (url, asked):  # one that prunes by default is told to keep everything
        run_cell(config_of(tmp_path, url, "pruner=none"))
    assert asked[-1]["mm_processor_kwargs"] == {"keep": 1.0}


def test_a_random_pruner_is_told_the_sample_and_no_other_is(tmp_path):
    """By which the pipeline draws."""
    told = {}
    for name in ("random", "mi"):
        with server(good) as (url, asked):
            config = config_of(tmp_path, url, f"pruner={name}")
            run_cell(config)
        told[name] = [request["mm_processor_kwargs"].get("sample") for request in asked if not is_probe(request)]
    assert sorted(told["random"]) == sorted({row["id"] for row in Cell(config).rows()})
    assert set(told["mi"]) == {None}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keep=auto", "keep=auto needs engine=pipeline"),
        ("text_scope=question", "text_scope=question needs"),
        ("engine.concurrency=0", r"engine\.concurrency=0"),
    ],
)
def test_what_a_request_cannot_say_is_refused(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run_cell(config_of(tmp_path, "http://127.0.0.1:9/v1", override))


def test_a_benchmark_of_videos_is_refused_before_a_question_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(Demo, "is_video", True)
    with server(good) as (url, asked), pytest.raises(InputError, match="videos need engine=pipeline"):
        run_cell(config_of(tmp_path, url))
    assert all(map(is_probe, asked))


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    with server(good) as (url, asked):
        run_cell(config_of(tmp_path, url))
    assert asked[0]["key"] == "Bearer sk-hidden"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "sk-hidden" in path.read_text()]
    with server(lambda *_: (400, "bad key sk-hidden")) as (url, _), pytest.raises(BenchmarkError) as caught:
        run_cell(config_of(tmp_path, url))
    assert "sk-hidden" not in str(caught.value) and "***" in str(caught.value)


def test_a_run_killed_at_any_request_asks_nothing_twice_that_was_answered(tmp_path):
    release = threading.Event()

    def stops(request, number):
        if number == 8:
            release.wait(60)  # the rest is under way when the run is killed
        return good(request, number)

    with server(stops) as (url, asked):
        words = ["engine=server", f"engine.base_url={url}", f"results={tmp_path}", "dataset.benchmark.n_scenes=2"]
        process = Fork(*words, "engine.concurrency=1")
        deadline = time.monotonic() + 100
        while len(asked) < 9 and process.is_running and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send(signal.SIGKILL)
        status, _, errors = process.end()
        release.set()
        assert status == -signal.SIGKILL and re.search("demo_llava demo mi", errors), errors
        (file,) = tmp_path.rglob("samples.jsonl")
        answered = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(answered) == 7
        before = len(asked)
        record = run_cell(config_of(tmp_path, url, "engine.concurrency=1"), words)
        assert len(asked) - before == record["n_samples"] - 7 + 1
