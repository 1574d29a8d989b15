"""The judge against a real HTTP server on loopback, MM-Vet through it, and the offline rules."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import pytest
from omegaconf import OmegaConf

from experiments.benchmarks import mmvet
from experiments.benchmarks.base import BenchmarkError, Sample
from experiments.build import make_benchmark
from experiments.judge import Judge
from loopback import content, server

ROOT = Path(__file__).parent.parent
SECRET = "sk-of-the-test-1234567890"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def requests(*texts: str):
    return [lambda attempt, text=text: {"messages": [{"role": "user", "content": text}]} for text in texts]


def test_replies_come_back_in_order_and_equal_questions_are_asked_once(tmp_path):
    def slow_first(request, number):
        time.sleep(0.2 if content(request) == "1" else 0)
        return 200, content(request)

    with server(slow_first) as (url, asked):
        judge = Judge("gpt-x", url, cache=str(tmp_path), concurrency=4)
        assert judge.grade(requests("1", "2", "1", "3"), float) == [1, 2, 1, 3]
        assert sorted(map(content, asked)) == ["1", "2", "3"]
        assert {(request["key"], request["path"]) for request in asked} == {
            (f"Bearer {SECRET}", "/v1/chat/completions")
        }
        provenance = judge.provenance("abc")
    assert provenance["judge"] == "gpt-x"
    assert provenance["judge_models"] == ["gpt-x-0613"]
    assert provenance["judge_prompt"] == "abc"
    assert provenance["judge_unreadable"] == 0
    assert SECRET not in "".join(file.read_text() for file in tmp_path.rglob("*.jsonl")) + json.dumps(provenance)


def test_a_rerun_asks_nothing_and_says_the_same(tmp_path):
    with server(lambda request, number: (200, content(request))) as (url, asked):
        first = Judge("m", url, cache=str(tmp_path))
        first.grade(requests("1", "2"), float)
        again = Judge("m", url, cache=str(tmp_path))
        assert again.grade(requests("1", "2", "3"), float) == [1, 2, 3]
        assert len(asked) == 3
        first.grade(requests("1", "2", "3"), float)
        assert again.provenance("p") == first.provenance("p")
        Judge("other", url, cache=str(tmp_path)).grade(requests("1"), float)
        Judge("m", url, cache=str(tmp_path), max_tokens=99).grade(requests("1"), float)
        assert asked[-1]["max_tokens"] == 99


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_tried_again(tmp_path, status, record_property):
    def stumble(request, number):
        return (status, "try later") if number % 3 != 2 else (200, content(request))

    with server(stumble) as (url, asked):
        judge = Judge("m", url, cache=str(tmp_path), concurrency=1)
        assert judge.grade(requests("1", "2"), float) == [1, 2]
        assert len(asked) == 6
    record_property("survives", (f"a judge that answers {status} twice", "is asked again, with growing pauses"))


def test_a_judge_that_stays_down_is_one_line_and_loses_nothing(tmp_path, record_property):
    down = threading.Event()

    def reply(request, number):
        if number == 3:
            down.set()
        return (500, f"broken, {SECRET}") if down.is_set() else (200, "1")

    with server(reply) as (url, asked):
        judge = Judge("m", url, cache=str(tmp_path), concurrency=1, max_retries=1)
        with pytest.raises(BenchmarkError, match=r"the judge m at .* gave up: .*500.*run the same command") as error:
            judge.grade(requests(*"abcdefgh"), float)
        assert "\n" not in str(error.value) and SECRET not in str(error.value)
        assert [content(request) for request in asked[:5]] == ["a", "b", "c", "d", "d"]
        assert len(asked) <= 7  # one more question may have been under way
        down.clear()
        before = len(asked)
        assert judge.grade(requests(*"abcdefgh"), float) == [1] * 8
        assert {content(request) for request in asked[before:]} == set("defgh")
    record_property("survives", ("a judge that stays down", "its replies are kept; a rerun asks for the others alone"))
    with pytest.raises(BenchmarkError, match=r"gave up: Connection error"):
        Judge("m", url, cache=str(tmp_path), max_retries=0).grade(requests("x"), float)


def test_a_refused_key_is_not_repeated_to_the_user(tmp_path):
    with server(lambda request, number: (401, f"Incorrect API key provided: {SECRET[:6]}***")) as (url, _):
        with pytest.raises(BenchmarkError, match="key in OPENAI_API_KEY is refused") as error:
            Judge("m", url, cache=str(tmp_path)).grade(requests("x"), float)
        assert SECRET[:6] not in str(error.value)


def test_a_key_is_needed_for_openai_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(BenchmarkError, match="needs a key in the environment, OPENAI_API_KEY"):
        Judge("gpt-4.1", cache=str(tmp_path))
    with server(lambda request, number: (200, "1")) as (url, _):
        assert Judge("local", url, cache=str(tmp_path)).grade(requests("x"), float) == [1]


def test_garbage_is_asked_again_five_times_at_most(tmp_path, record_property):
    replies = {"good": ["0.5"], "never": ["I would say so"] * 9, "late": ["", None, "{0.7}", "0.7"]}

    with server(lambda request, number: (200, replies[content(request)].pop(0))) as (url, asked):
        judge = Judge("m", url, cache=str(tmp_path), concurrency=1)
        assert judge.grade(requests("good", "never", "late"), float) == [0.5, None, 0.7]
        assert [content(request) for request in asked] == ["good"] + ["never"] * 5 + ["late"] * 4
        assert judge.provenance("p")["judge_unreadable"] == 1
        fresh = Judge("m", url, cache=str(tmp_path))
        assert fresh.grade(requests("good", "never", "late"), float) == [0.5, None, 0.7]
        assert len(asked) == 10  # the unreadable replies are kept too
    outcome = "is asked five times at most; what stays unreadable is counted in the record"
    record_property("survives", ("a judge that talks instead of grading", outcome))


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b""])
def test_an_endpoint_of_another_kind(tmp_path, body):
    with (
        server(lambda request, number: (200, body)) as (url, _),
        pytest.raises(BenchmarkError, match=r"gave up: .* Its replies so far are kept"),
    ):
        Judge("m", url, cache=str(tmp_path)).grade(requests("x"), float)


def test_a_line_cut_off_by_a_kill(tmp_path):
    with server(lambda request, number: (200, content(request))) as (url, asked):
        Judge("m", url, cache=str(tmp_path), concurrency=1).grade(requests("1", "2"), float)
        file = tmp_path / "m.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        assert Judge("m", url, cache=str(tmp_path)).grade(requests("1", "2", "3"), float) == [1, 2, 3]
        assert sorted(map(content, asked)) == ["1", "2", "2", "3"]
        assert Judge("m", url, cache=str(tmp_path)).grade(requests("1", "2", "3"), float) == [1, 2, 3]
        assert len(asked) == 4


KILLED = """
import sys
from experiments.judge import Judge
requests = [lambda attempt, i=i: {"messages": [{"role": "user", "content": str(i)}]} for i in range(40)]
print(sum(Judge("m", sys.argv[1], cache=sys.argv[2], concurrency=4).grade(requests, float)))
"""


def test_a_kill_in_the_middle(tmp_path, record_property):
    """After SIGKILL a rerun asks only for what had not come back: what is on disk is not asked again."""

    def slow(request, number):
        time.sleep(0.03)
        return 200, content(request)

    with server(slow) as (url, asked):
        command = [sys.executable, "-c", KILLED, url, str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(asked) < 15 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.1)
        before = len(asked)
        lines = (tmp_path / "m.jsonl").read_text().splitlines()
        kept = {content(json.loads(line)["request"]) for line in lines if line.endswith("}")}
        assert 10 <= len(kept) < 40
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert float(done.stdout) == sum(range(40))
        rerun = [content(request) for request in asked[before:]]
        assert sorted(rerun) == sorted({str(i) for i in range(40)} - kept)
    record_property("survives", ("SIGKILL while a judge is asked", "a rerun asks nothing that was answered"))


# -------------------------------------------------------------------------------------------------------------- MM-Vet


def benchmark(judge):
    config = OmegaConf.create({"dataset": OmegaConf.load(ROOT / "conf/dataset/mmvet.yaml"), "judge": judge})
    config.dataset.path = str(ROOT / "tests/data/schemas/mmvet_test.parquet")
    return make_benchmark(**OmegaConf.to_container(config.dataset.benchmark, resolve=True))


def judge_config(url, tmp_path):
    config = OmegaConf.load(ROOT / "conf/judge/openai.yaml")
    return OmegaConf.merge(config, {"base_url": url, "cache": str(tmp_path), "concurrency": 2})


def test_mmvet_samples():
    samples = benchmark({}).samples()
    assert [sample.id for sample in samples] == ["v1_0", "v1_1", "v1_2", "v1_3", "v1_4"]
    assert samples[0].text == samples[0].question == "What is x?"
    assert samples[0].task == "ocr,math"
    assert samples[3].task == "rec,know,gen"
    assert benchmark({}).images(samples[0].image_id)[0].mode == "RGB"


def test_mmvet_through_the_judge(tmp_path):
    grades = {
        "What is x?": "0.5",
        "What is the man doing?": "1.0",
        "How much is it?": "0.0",
        "Which is bigger?": "well",
    }

    def judge(request, number):
        question = content(request).split("\n")[-1 if content(request).endswith("|") else -2].split(" | ")[0]
        return 200, grades[question]

    with server(judge) as (url, asked):
        bench = benchmark(judge_config(url, tmp_path))
        samples = bench.samples()
        predictions = ["x = -1", "reading {question}", "13", None, "the right one"]
        scores = bench.score(samples, predictions)
        assert scores == [0.5, 1, 0, 0, 0]
        metrics = bench.metrics(samples, predictions, scores)
        provenance = bench.provenance()
        first = next(request for request in asked if "reading" in content(request))
        tries = [request for request in asked if "Which is bigger?" in content(request)]
        assert bench.score(samples, predictions) == scores and len(asked) == 3 + 5
    assert next(iter(metrics)) == "score"
    assert metrics["score"] == pytest.approx(30)
    assert (metrics["score_ocr"], metrics["score_math"], metrics["score_rec"]) == pytest.approx((50 / 3, 25, 50))
    assert (metrics["score_only_ocr,math"], metrics["score_only_rec"]) == (25, 100)
    assert metrics["score_bootstrap_low"] <= metrics["score"] <= metrics["score_bootstrap_high"]
    assert bench.standard_errors(samples, scores)["score"] == pytest.approx(metrics["score_bootstrap_sd"], rel=0.2)
    assert set(bench.standard_errors(samples, scores)) <= set(metrics)
    assert provenance["judge"] == "gpt-4.1" and len(provenance["judge_prompt"]) == 12
    assert provenance["judge_unreadable"] == 1
    assert content(first).endswith("\nWhat is the man doing? | reading <OR> studying | reading {question} |")
    assert (first["temperature"], first["max_tokens"]) == (0, 3)
    assert [request["temperature"] for request in tries] == [0, 0.5, 1, 1.5, 2]


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.5", 0.5), ("1", 1), (" 0.3 because", 0.3), ("0", 0), *((r, None) for r in ("", "nan", "1.1", "-0.1", "one"))],
)
def test_mmvet_grade(reply, grade):
    if grade is None:
        with pytest.raises(ValueError):
            mmvet.read_grade(reply)
    else:
        assert mmvet.read_grade(reply) == grade


@pytest.mark.parametrize(
    ("answer", "prediction", "grade"),
    [
        ("-1<AND>-5", "x is 1 and 5", 1),  # a minus sign is punctuation to the VQA rules
        ("7<AND>8", "it is seven.", 0.5),
        ("reading<OR>studying", "He is studying!", 1),
        ("cat<AND>dog<OR>two pets", "I see two pets", 1),
        ("cat<AND>dog<OR>two pets", "I see a cat", 0.5),
        ("art", "a party", 0),
        ("12", "", 0),
    ],
)
def test_mmvet_offline_rule(answer, prediction, grade):
    assert mmvet.offline_grade(answer, prediction) == grade


def test_offline_scores_have_names_of_their_own():
    bench = benchmark({})
    samples = bench.samples()
    scores = bench.score(samples, [sample.answer for sample in samples])
    metrics = bench.metrics(samples, [sample.answer for sample in samples], scores)
    assert next(iter(metrics)) == "offline_score"
    assert all(name.startswith("offline_") for name in metrics)
    assert "not comparable" in bench.provenance()["judge"]


def test_mmvet_of_one_sample():
    bench = benchmark({})
    sample = Sample("1", "q", "q", "12", "i", task="rec")
    assert bench.metrics([sample], ["12"], [1.0]) == {
        "offline_score": 100,
        "offline_score_rec": 100,
        "offline_score_only_rec": 100,
    }
