"""Sends requests to a vLLM server, started by this process or already running, and reads its memory."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import openai
from openai import OpenAI

from mipruner.errors import InputError

START_S = 600
"""Time limit in seconds for the start of a server."""
NONE: Mapping[str, str] = MappingProxyType({})
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass
class Reply:
    """Result of one request. ``refused`` is the status and message of a refused request."""

    text: str = ""
    n_prompt: int = 0
    first_s: float = 0.0
    refused: tuple[int, str] | None = None


@dataclass
class Served:
    """A server and its process.

    Attributes
    ----------
    url : str
        URL with ``/v1``.
    process : subprocess.Popen or None
        None if this process did not start the server.
    log : Path or None
    """

    url: str
    process: subprocess.Popen | None = None
    log: Path | None = None

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=0, timeout=600)

    @cached_property
    def model(self) -> str:
        """Name of the served model. Raises `InputError` if the server cannot be reached."""
        try:
            return self.client.models.list().data[0].id
        except (openai.OpenAIError, IndexError) as error:
            raise InputError(f"the server at {self.url} serves no model that can be asked: {error}") from error

    def ask(self, url: str | None, text: str, pruning: dict[str, Any] | None = None, n_tokens: int = 4) -> Reply:
        """Send one question, about the image at ``url`` if given, and read the answer as a stream."""
        content: list[Any] = [{"type": "text", "text": text}]
        if url is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        reply, started = Reply(), time.perf_counter()
        try:
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=n_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={} if pruning is None else {"mm_processor_kwargs": pruning},
            )
            for chunk in stream:
                if chunk.choices and not reply.first_s:
                    reply.first_s = time.perf_counter() - started
                reply.text += "".join(choice.delta.content or "" for choice in chunk.choices)
                reply.n_prompt = chunk.usage.prompt_tokens if chunk.usage else reply.n_prompt
        except openai.APIStatusError as error:
            reply.refused = error.status_code, error.message
        return reply

    def memory_mib(self) -> dict[str, float]:
        """Resident memory (PSS) by name of process; empty if this process did not start the server."""
        found: dict[str, float] = defaultdict(float)
        for pid in _tree(self.process.pid) if self.process else ():
            name, kib = _name_and_pss(pid)
            found[name] += kib / 1024
        return dict(found)


def vllm_version(client: OpenAI) -> str | None:
    """Version of vLLM; other servers do not have this page."""
    try:
        page = str(client.base_url.copy_with(path="/version"))
        return str(httpx.get(page, timeout=5).json()["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def serve(
    model: str,
    setting: dict[str, Any] | None,
    log: Path,
    *options: str,
    environment: Mapping[str, str] = NONE,
    port: int | None = None,
) -> Iterator[Served]:
    """Start vLLM's server, and stop it at the end. Raises `InputError` if it does not start.

    ``environment`` holds defaults for variables that are not set. ``port`` None takes a free port.
    """
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # just left by another server
        try:
            free.bind(("127.0.0.1", port or 0))
        except OSError as error:
            raise InputError(f"port {port} is taken: {error}") from error
        port = free.getsockname()[1]
    words = ["--model", model, "--served-model-name", "served", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--trust-request-mm-kwargs", *options]
    if setting is not None:
        words += ["--hf-overrides", json.dumps({"mipruner": setting})]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
    variables = {**ENVIRONMENT, **environment, **os.environ}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)
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
    raise InputError(f"the server did not start, its log is {log}:\n{log.read_text('utf-8', 'replace')[-2000:]}")


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, task.read_text(encoding="utf-8").split())
    return found


def _name_and_pss(pid: int) -> tuple[str, int]:
    """Name of a process in vLLM and its memory in KiB; nothing if it has just ended."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace").split("\0")
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "", 0
    name = words[0].removeprefix("VLLM::") if words[0].startswith("VLLM::") else "server"
    return name, next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
