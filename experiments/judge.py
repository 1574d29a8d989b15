"""Judge: a chat model behind an OpenAI-compatible endpoint. Every reply is stored on disk.

Replies are stored by request, so a rerun or a resumed run sends no request twice. The benchmark defines requests and
reads replies. The key is read from the environment, OPENAI_API_KEY, and is not stored.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import openai
from openai import OpenAI
from tqdm import tqdm

from experiments.benchmarks.base import BenchmarkError, Sample

Reading = TypeVar("Reading")
ATTEMPTS = 5
"""Number of attempts for a question whose reply cannot be read."""


def prompt_hash(*texts: str) -> str:
    """Hash of a prompt for the record, twelve hex digits."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


OFFLINE = {"judge": "offline: whole words, not comparable with a judge's score"}
"""Facts for the record of a benchmark without its judge."""


def grades(
    judge: "Judge | None",
    samples: Sequence[Sample],
    predictions: Sequence[str | None],
    request: Callable[[Sample, str, int], dict[str, Any]],
    read: Callable[[str], Reading],
    offline: Callable[[str, str], Reading],
) -> list[Reading | None]:
    """Grades by the judge, or without one by ``offline`` from answer and prediction. None for a failed sample."""
    answered = [(s, p) for s, p in zip(samples, predictions, strict=True) if p is not None]
    found: Sequence[Reading | None] = (
        judge.grade([partial(request, *pair) for pair in answered], read)
        if judge
        else [offline(sample.answer, prediction) for sample, prediction in answered]
    )
    rest = iter(found)
    return [None if prediction is None else next(rest) for prediction in predictions]


class Replies:
    """Replies by hash of the request, in a file with one JSON object per line.

    Each line is appended in one write, so processes can share the file. An incomplete last line is ignored.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.by_key: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    reply = json.loads(line)
                    self.by_key[reply["key"]] = reply
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, reply: dict[str, Any]) -> None:
        line = b"\n" + json.dumps(reply, ensure_ascii=False).encode() + b"\n"  # the first \n ends an incomplete line
        with self.lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line)
            finally:
                os.close(file)
            self.by_key[reply["key"]] = reply


class Judge:
    """A chat model that grades answers.

    Parameters
    ----------
    model : str
        Name of the model at the endpoint.
    base_url : str, optional
        URL of the endpoint; None is OpenAI. Any chat/completions server works; a local one needs no key.
    cache : str
        Folder of the replies, one file per model.
    concurrency : int
        Number of parallel requests.
    max_retries : int
        Retries of a request after a temporary failure (429, 5xx, no connection), with growing waits.
    max_tokens : int, optional
        Overrides the benchmark's limit, for a judge with thinking.

    Raises
    ------
    BenchmarkError
        If the endpoint is OpenAI and there is no key.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        cache: str = "results/judge",
        concurrency: int = 8,
        max_retries: int = 8,
        timeout_s: float = 60,
        max_tokens: int | None = None,
    ):
        self.model, self.concurrency, self.max_tokens = model, concurrency, max_tokens
        self.key = os.environ.get("OPENAI_API_KEY", "")
        self.client = OpenAI(api_key=self.key or "none", base_url=base_url, max_retries=max_retries, timeout=timeout_s)
        self.base_url = str(self.client.base_url)
        if not self.key and self.base_url.startswith("https://api.openai.com"):
            raise BenchmarkError(
                f"the judge {model} needs a key in the environment, OPENAI_API_KEY; or set judge.base_url to a server "
                "of your own; or take judge=offline, whose scores are not comparable"
            )
        self.replies = Replies(Path(cache) / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', model)}.jsonl")
        self.models: set[str] = set()
        self.unreadable = 0

    def provenance(self, prompt: str) -> dict[str, Any]:
        """Facts for the record: name of the judge, exact models that answered, hash of the prompt."""
        return {
            "judge": self.model,
            "judge_base_url": self.base_url,
            "judge_models": sorted(self.models),
            "judge_prompt": prompt,
            "judge_unreadable": self.unreadable,
        }

    def grade(
        self, requests: Sequence[Callable[[int], dict[str, Any]]], read: Callable[[str], Reading]
    ) -> list[Reading | None]:
        """The read value of each reply; None after five unreadable replies. Equal requests are sent once.

        Parameters
        ----------
        requests : sequence of callable
            Each returns the arguments of chat/completions, without the model, for attempt 0, 1, ...
        read : callable
            Reads the value of a reply. Raises ValueError if it cannot be read.

        Raises
        ------
        BenchmarkError
            If the judge cannot be reached or refuses. The replies so far are kept.
        """
        self.models = set()
        keys = [self._key(request(0), 0) for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        readings: dict[str, Reading | None] = {}
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures: dict[str, Future] = {
                key: pool.submit(self._read_one, request, read) for key, request in distinct.items()
            }
            try:
                for key, future in tqdm(
                    futures.items(), f"judge {self.model}", unit="q", disable=None, file=sys.stderr
                ):
                    readings[key] = future.result()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, openai.OpenAIError):
                    raise BenchmarkError(self._explain(error)) from error
                raise
        self.unreadable = sum(readings[key] is None for key in keys)
        return [readings[key] for key in keys]

    def _read_one(self, request: Callable[[int], dict[str, Any]], read: Callable[[str], Reading]) -> Reading | None:
        for attempt in range(ATTEMPTS):
            reply = self._ask(request(attempt), attempt)
            self.models.add(reply["model"])
            try:
                return read(reply["reply"])
            except ValueError:
                continue
        return None

    def _key(self, request: dict[str, Any], attempt: int) -> str:
        asked = [self.base_url, self.model, self.max_tokens, request, attempt]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _ask(self, request: dict[str, Any], attempt: int) -> dict[str, Any]:
        key = self._key(request, attempt)
        if key not in self.replies.by_key:
            bound = {"max_tokens": self.max_tokens} if self.max_tokens else {}
            completion = self.client.chat.completions.create(model=self.model, **(request | bound))
            try:
                reply, model = completion.choices[0].message.content or "", completion.model
            except (AttributeError, IndexError, TypeError) as error:
                raise openai.OpenAIError("the endpoint does not answer as chat/completions does") from error
            self.replies.add({"key": key, "model": model or self.model, "request": request, "reply": reply})
        return self.replies.by_key[key]

    def _explain(self, error: openai.OpenAIError) -> str:
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            reason = "the key in OPENAI_API_KEY is refused"
        else:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            reason = reason.replace(self.key, "***") if self.key else reason
        return (
            f"the judge {self.model} at {self.base_url} gave up: {reason}. Its replies so far are kept; run the same "
            "command again to ask for the rest"
        )
