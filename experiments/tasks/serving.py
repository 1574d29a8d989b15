"""Measure load on a vLLM server with mi-pruner-vllm: throughput, time to first token and memory.

    python run.py task=serving                             the demo
    python run.py task=serving model=llava15_7b requests=400
    python run.py task=serving soak=1000                   mixed budgets, images and bad requests, 32 at a time

Every budget has a server of its own, so that its memory is its own, and is asked about the same images. Every number
stands beside its ratio to the first budget.
"""

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import openai
import torch
from openai import OpenAI
from tqdm import tqdm

from experiments import build, results
from experiments.benchmarks.demo import Demo
from experiments.machine import machine
from experiments.remote import encode, setting_of
from mipruner.errors import InputError

START_S = 600
"""A server that does not answer within this time has failed to start."""


@dataclass
class Served:
    """A server that this process started."""

    url: str
    process: subprocess.Popen
    log: Path

    def memory_mib(self) -> float:
        """Resident memory of its processes, each page once (PSS)."""
        return sum(_pss_kib(pid) for pid in _tree(self.process.pid)) / 1024


@contextmanager
def serve(model: str, setting: dict[str, Any] | None, log: Path, *options: str) -> Iterator[Served]:
    """vLLM's server on a free port of this machine, stopped at the end. Raises RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", model, "--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--trust-request-mm-kwargs", *options]
    if setting is not None:
        words += ["--hf-overrides", json.dumps({"mipruner": setting})]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment | os.environ, start_new_session=True
        )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield Served(f"http://127.0.0.1:{port}/v1", process, log)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_up(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start, its log is {log}:\n{log.read_text()[-2000:]}")


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


@dataclass
class Reply:
    """What came of one request; ``error`` is the status of one that was refused."""

    text: str = ""
    n_prompt: int = 0
    first_s: float = 0.0
    error: int | None = None


def ask(client: OpenAI, url: str | None, text: str, keep: Any = None, n_tokens: int = 4) -> Reply:
    """Send one question and read the answer as a stream."""
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if url is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {} if keep is None else {"mm_processor_kwargs": {"keep": keep}}
    reply, started = Reply(), time.perf_counter()
    try:
        stream = client.chat.completions.create(
            model="served",
            messages=[{"role": "user", "content": content}],
            max_tokens=n_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        for chunk in stream:
            if chunk.choices and not reply.first_s:
                reply.first_s = time.perf_counter() - started
            reply.text += "".join(choice.delta.content or "" for choice in chunk.choices)
            reply.n_prompt = chunk.usage.prompt_tokens if chunk.usage else reply.n_prompt
    except openai.APIStatusError as error:
        reply.error = error.status_code
    return reply


def scenes(n_scenes: int, n_questions: int, seed: int) -> list[tuple[str, str]]:
    """(image, question) pairs, the questions of an image one after the other."""
    demo = Demo(n_scenes=n_scenes, seed=seed)
    asked = []
    for image_id in map(str, range(n_scenes)):
        texts = [sample.text for sample in demo.samples() if sample.image_id == image_id]
        url = encode(demo.images(image_id)[0])
        asked += [(url, texts[k % len(texts)]) for k in range(n_questions)]
    return asked


@contextmanager
def watched(served: Served) -> Iterator[list[float]]:
    """Memory in MiB, read five times a second while the context lasts."""
    seen, ended = [served.memory_mib()], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            seen.append(served.memory_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def measure(served: Served, asked: Sequence[tuple[str, str]], concurrency: int) -> dict[str, float]:
    """Requests a second, time to first token, prompt tokens and peak memory of one load."""
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=600)
    with watched(served) as memory, ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        replies = list(pool.map(lambda one: ask(client, *one), asked))
        spent = time.perf_counter() - started
    if failed := sum(reply.error is not None for reply in replies):
        raise RuntimeError(f"{failed} of {len(replies)} requests failed, the server's log is {served.log}")
    first_ms = sorted(1000 * reply.first_s for reply in replies)
    return {
        "requests_per_s": len(asked) / spent,
        "first_token_ms_median": median(first_ms),
        "first_token_ms_p95": first_ms[min(len(first_ms) - 1, int(0.95 * len(first_ms)))],
        "prompt_tokens": sum(reply.n_prompt for reply in replies) / len(replies),
        "peak_memory_mib": max(memory),
    }


def load(config: dict[str, Any], path: str, log: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each budget, concurrency and number of questions an image; ratios are to the first budget."""
    rows = []
    for keep in config["keeps"]:
        with serve(path, setting_of(config, keep), log, *options) as served:
            measure(served, scenes(2, 2, seed=99), 2)  # warms up
            cells = [(c, q) for q in config["questions"] for c in config["concurrency"]]
            for seed, (concurrency, n_questions) in enumerate(tqdm(cells, f"keep={keep}", file=sys.stderr)):
                n_scenes = -(-config["requests"] // n_questions)
                asked = scenes(n_scenes, n_questions, seed=100 + seed)[: config["requests"]]
                cell = {"keep": keep, "concurrency": concurrency, "questions": n_questions}
                rows.append(cell | measure(served, asked, concurrency))
    for row in rows:
        base = next(r for r in rows if (r["concurrency"], r["questions"]) == (row["concurrency"], row["questions"]))
        row["ratios"] = {name: row[name] / base[name] for name in MEASURED}
    return rows


MEASURED = {
    "requests_per_s": "requests/s",
    "first_token_ms_median": "first token, median",
    "first_token_ms_p95": "first token, p95",
    "prompt_tokens": "prompt tokens",
    "peak_memory_mib": "peak memory",
}
"""Field of a row: its name in the table."""


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: each number, and in brackets its ratio to the first budget in the same run."""
    lines = [
        f"`{record['command']}`, {record['requests']} requests a row, {record['machine']['device']}, "
        f"vLLM {record['versions']['vllm']}. "
        f"Ratios are to keep={record['rows'][0]['keep']} in the same run.",
        "",
        "| questions an image | concurrency | keep | " + " | ".join(MEASURED.values()) + " |",
        "|" + "---|" * (3 + len(MEASURED)),
    ]
    for row in sorted(record["rows"], key=lambda row: (row["questions"], row["concurrency"])):
        units = {"requests_per_s": "", "prompt_tokens": "", "peak_memory_mib": " MiB"}
        values = [f"{row[name]:.4g}{units.get(name, ' ms')} ({row['ratios'][name]:.2f})" for name in MEASURED]
        lines.append(f"| {row['questions']} | {row['concurrency']} | {row['keep']} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------- soak

BAD = (0, 1.5, 100_000, "many", None, [1])
"""Budgets that are none; each must be refused with 400."""


@dataclass
class Soak:
    """What came of many mixed requests."""

    asked: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


def soak(served: Served, n_requests: int, concurrency: int = 32, seed: int = 0) -> Soak:
    """Mixed budgets, images, text-only and bad requests: every answer is compared with that of the same one alone.

    Memory is read before, and after each tenth of the requests.
    """
    client = OpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=600)
    kinds = [(*one, keep) for one in scenes(12, 4, seed) for keep in (64, 16, 8)] + [
        (None, "What color is the sun ?", None)
    ]
    alone = [ask(client, url, text, keep) for url, text, keep in kinds]
    rng, found = random.Random(seed), Soak(memory_mib=[served.memory_mib()])
    chosen = [rng.randrange(len(kinds)) for _ in range(n_requests)]
    bad = {k: rng.choice(BAD) for k in range(n_requests) if rng.random() < 0.1}

    def one(k: int) -> None:
        url, text, keep = kinds[chosen[k]]
        if k in bad and url is not None:
            refused = ask(client, url, text, bad[k] if bad[k] is not None else "null").error == 400
            found.refused += refused
            if not refused:
                found.wrong.append(f"keep={bad[k]!r} was not refused")
        elif (reply := ask(client, url, text, keep)).text != alone[chosen[k]].text or reply.error is not None:
            found.wrong.append(f"{text!r} at {keep}: {reply}, alone {alone[chosen[k]]}")
        found.asked += 1

    tenth = max(1, n_requests // 10)
    with ThreadPoolExecutor(concurrency) as pool:
        for start in tqdm(range(0, n_requests, tenth), "soak", file=sys.stderr):
            list(pool.map(one, range(start, min(start + tenth, n_requests))))
            found.memory_mib.append(served.memory_mib())
    return found


def installed_vllm() -> str | None:
    """Its version."""
    return next((each.version for each in metadata.distributions() if each.name in ("vllm", "vllm-cpu")), None)


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    if (version := installed_vllm()) is None:
        raise InputError("task=serving starts vLLM, which is not installed here: see docs/serving.md")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a server is stopped on the way out
    name = f"{config['model']['name']}-{datetime.now(UTC).isoformat(timespec='seconds').replace(':', '')}.json"
    out = Path(config["out"] or Path(config["results"]) / "serving" / name)
    out.parent.mkdir(parents=True, exist_ok=True)
    path, log = build.weights(config["model"]["path"]), out.with_suffix(".log")
    options = ["--dtype", config["model"]["dtype"], *shlex.split(config["server"])]
    if config["soak"]:
        with serve(path, setting_of(config, 1.0), log, *options) as served:
            found = soak(served, config["soak"])
        memory = " ".join(f"{value:.0f}" for value in found.memory_mib)
        print(f"{found.asked} requests, {found.refused} bad ones refused, {len(found.wrong)} wrong; MiB: {memory}")
        sys.exit("\n".join(found.wrong[:5]) or None)
    record = {
        "command": results.command(overrides),
        "git_commit": results.git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": results.versions() | {"vllm": version},
        "machine": machine(torch.device(build.device(config))),
        "model": config["model"]["name"],
        "requests": config["requests"],
        "rows": load(config, path, log, options),
    }
    results.write_atomic(out, json.dumps(record, indent=1) + "\n")
    print(table(record))
    print(out)
