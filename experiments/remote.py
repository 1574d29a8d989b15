"""Answers a benchmark through an OpenAI-compatible server. An interrupted run resumes after the last answer.

Each answer is on disk before the next request of its thread starts, so a resumed run sends no answered request again.
The key is read from the environment, OPENAI_API_KEY, and is not stored.
"""

import base64
import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import islice
from statistics import fmean
from typing import Any

import openai
from openai import OpenAI
from PIL import Image
from tqdm import tqdm

from experiments.benchmarks.base import Benchmark, BenchmarkError, Sample, SampleError, sample_digest
from experiments.evaluate import by_length, finish
from experiments.results import Cell
from experiments.served import vllm_version
from mipruner.errors import InputError
from mipruner.models.chat import END_OF_THINKING

MAX_IMAGES = 128
"""Number of encoded images in the cache."""

UNKNOWN = ("n_visual", "grids", "boxes", "kept", "n_keep", "per_layer", "latency_ms")
"""Fields of samples.jsonl that a server does not report; they are null."""


class Server:
    """A chat/completions server, and the request for a sample according to a resolved config.

    Raises
    ------
    InputError
        If the config has settings that a server does not support.
    """

    def __init__(self, config: dict[str, Any]):
        check(config)
        engine = config["engine"]
        self.engine, self.decoding = engine, config["decoding"]
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.client = OpenAI(
            api_key=self.key or "none",
            base_url=engine["base_url"],
            max_retries=engine["max_retries"],
            timeout=engine["timeout_s"],
        )
        self.pruning = setting_of(config, config["keep"]) if config["pruner"]["name"] != "none" else {}
        self.draws = "seed" in config["pruner"]

    def describe(self) -> dict[str, Any]:
        """Name and version of the served model. Raises `BenchmarkError` if the server cannot be reached."""
        try:
            served = [model.id for model in self.client.models.list()]
            wanted = self.engine["served_model"] or (served[0] if len(served) == 1 else None)
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
            raise BenchmarkError(self.explain(error)) from error
        if wanted not in served:
            raise BenchmarkError(
                f"the server at {self.client.base_url} serves {', '.join(served) or 'no model'}: choose one with "
                f"engine.served_model{'' if wanted is None else f', {wanted} is not among them'}"
            )
        return {"base_url": str(self.client.base_url), "model": wanted, "version": vllm_version(self.client)}

    def probe(self, model: str) -> None:
        """Check that the server prunes: send an invalid budget, which the plug-in refuses and other servers ignore.

        Raises
        ------
        BenchmarkError
            If the config has a pruner and the server does not prune.
        """
        pruning, self.pruning = self.pruning, {"keep": 0}
        try:
            self.ask(model, "What is this ?", [encode(Image.new("RGB", (336, 336)))])
            prunes = False
        except openai.BadRequestError as error:
            if pruning and "keep=0" not in str(error):
                raise BenchmarkError(self.explain(error)) from error
            prunes = "keep=0" in str(error)
        except (openai.OpenAIError, ValueError) as error:
            raise BenchmarkError(self.explain(error)) from error
        if pruning and not prunes:
            raise BenchmarkError(
                f"the server at {self.client.base_url} prunes nothing: start it with mi-pruner-vllm and the setting "
                "mipruner, see docs/serving.md"
            )
        self.pruning = pruning or ({"keep": 1.0} if prunes else {})

    def ask(self, model: str, text: str, urls: Sequence[str], sample: str = "") -> tuple[str, int | None]:
        """Send a request. Returns the answer and the number of prompt tokens.

        A random pruner draws by the name of the sample, as in the pipeline.
        """
        content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": text})
        body = {"top_k": self.decoding["top_k"]} if self.decoding["top_k"] else {}
        if self.pruning:
            body["mm_processor_kwargs"] = self.pruning | ({"sample": sample} if self.draws else {})
        completion = self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": content}],
            max_tokens=self.decoding["max_new_tokens"],
            temperature=self.decoding["temperature"],
            top_p=self.decoding["top_p"],
            seed=self.decoding["seed"],
            extra_body=body,
        )
        try:
            answer = completion.choices[0].message.content or ""
            n_prompt = completion.usage.prompt_tokens if completion.usage else None
        except (AttributeError, IndexError, TypeError) as error:
            raise openai.OpenAIError("it does not answer as chat/completions does") from error
        return answer.rpartition(END_OF_THINKING)[2].strip(), n_prompt

    def explain(self, error: Exception) -> str:
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                reason = "the key in OPENAI_API_KEY is refused"
            case openai.APITimeoutError():
                reason = f"no answer within {self.engine['timeout_s']} s (engine.timeout_s)"
            case openai.APIConnectionError():
                reason = "it cannot be reached: start it, or set engine.base_url"
            case openai.BadRequestError() if "trust" in str(error):
                reason = "it takes no keep from a request: start it with --trust-request-mm-kwargs"
            case openai.OpenAIError():
                reason = " ".join(str(error).split())[:300].rstrip(".")
            case _:
                reason = "it does not answer as chat/completions does"
        reason = reason.replace(self.key, "***") if self.key else reason
        return (
            f"the server at {self.client.base_url} gave up: {reason}. The answers so far are kept; run the same "
            "command again to ask for the rest"
        )


def setting_of(config: dict[str, Any], keep: int | float) -> dict[str, Any]:
    """Pruner of a config in the format of the vLLM plug-in."""
    options = {key: value for key, value in config["pruner"].items() if key != "name"}
    return {"keep": keep, "pruner": config["pruner"]["name"], "options": options}


def check(config: dict[str, Any]) -> None:
    """Raise `InputError` for settings that a request cannot carry."""
    if config["keep"] == "auto":
        raise InputError("keep=auto needs engine=pipeline: a server fixes the prompt's length before it sees the image")
    if config["text_scope"] != "user":
        raise InputError("text_scope=question needs engine=pipeline: a server takes all that the user sends as T")
    for key in ("concurrency", "timeout_s"):
        if not config["engine"][key] > 0:
            raise InputError(f"engine.{key}={config['engine'][key]} is not positive")


class Urls:
    """Images as ``data:`` URLs, lossless PNG. The last `MAX_IMAGES` are cached."""

    def __init__(self, benchmark: Benchmark):
        self._lock = threading.Lock()
        self._of = lru_cache(MAX_IMAGES)(lambda image_id: [encode(image) for image in benchmark.images(image_id)])

    def __call__(self, image_id: str) -> list[str]:
        """URL of the image. Raises `SampleError`."""
        with self._lock:
            return self._of(image_id)


def encode(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def evaluate(
    cell: Cell, server: Server, benchmark: Benchmark, samples: Sequence[Sample], begun: dict[str, Any]
) -> dict[str, Any]:
    """Like `experiments.evaluate.evaluate`, with the answers of a server. Kept tokens and stage times are then unknown.

    Raises
    ------
    BenchmarkError
        If the server cannot be reached or refuses. The answers so far are kept.
    """
    samples = by_length(samples)
    description = server.describe()
    server.probe(description["model"])
    answer_rest(cell, server, description["model"], benchmark, samples)
    costs = {"device": "server", "batch_size": None, "peak_memory_gib": None, "waited_for_images": None}
    run = {**begun, **costs, "server": told(description, cell.rows())}
    return finish(cell, benchmark, samples, run)


def answer_rest(cell: Cell, server: Server, model: str, benchmark: Benchmark, samples: Sequence[Sample]) -> None:
    """Send the open requests. Each answer is appended to the cell when it arrives.

    Raises
    ------
    BenchmarkError
        If the server cannot be reached or refuses. The answers so far are kept.
    InputError
        If the benchmark has videos.
    """
    if benchmark.is_video:
        raise InputError("videos need engine=pipeline: engine=server sends images only")
    digests = {sample.id: sample_digest(benchmark, sample) for sample in samples}
    cell.keep_answers(digests)
    done = {row["id"] for row in cell.rows()}
    rest = [sample for sample in samples if sample.id not in done]
    urls = Urls(benchmark)

    def answer(sample: Sample) -> dict[str, Any]:
        row = sample.row() | {"digest": digests[sample.id]}
        try:
            images = urls(sample.image_id)
        except SampleError as error:
            return row | {"error": str(error)}
        started = time.perf_counter()
        prediction, n_prompt = server.ask(model, sample.text, images, sample.id)
        spent = {"request_ms": round(1000 * (time.perf_counter() - started), 3)}
        return (
            row | {"prediction": prediction} | dict.fromkeys(UNKNOWN) | {"prompt_tokens": n_prompt, "notes": {}} | spent
        )

    with (
        tqdm(total=len(rest), unit="q", desc=" ".join(map(str, cell.cell.values())), file=sys.stderr) as bar,
        ThreadPoolExecutor(server.engine["concurrency"]) as pool,
    ):
        try:
            for future in in_flight(pool, answer, rest, server.engine["concurrency"]):
                cell.append([future.result()])
                bar.update()
        except (openai.OpenAIError, ValueError) as error:
            pool.shutdown(cancel_futures=True)
            raise BenchmarkError(server.explain(error)) from error


def in_flight(pool: ThreadPoolExecutor, call, items: Sequence, n: int) -> Iterator[Future]:
    """Results of ``call`` for each item as they finish, with at most n calls at a time.

    A failure does not lose other results.
    """
    waiting = iter(items)
    running = {pool.submit(call, item) for item in islice(waiting, n)}
    failed: list[Future] = []
    while running:
        ended, running = wait(running, return_when=FIRST_COMPLETED)
        failed += [future for future in ended if future.exception()]
        yield from (future for future in ended if not future.exception())
        if not failed:
            running |= {pool.submit(call, item) for item in islice(waiting, len(ended))}
    yield from failed


def told(description: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Facts of the server for the record: model and version, mean prompt tokens and time per request."""
    means = {}
    for name in ("prompt_tokens", "request_ms"):
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = round(fmean(values), 3) if values else None
    return description | means
