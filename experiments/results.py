"""Stores one record per cell (model x dataset x pruner x budget), so that an interrupted run loses nothing.

    results/<model>/<dataset>/<pruner>/keep=<keep>[,<what differs>]-<id>/
        config.yaml     the resolved config
        samples.jsonl   one line per sample, appended when it is answered
        samples.1.jsonl those of further processes, ..., until they are merged into the first
        record.json     the record below; its presence means that the cell is finished
        masks.png       kept tokens of a few samples

The id is a hash of everything in the resolved config that can change a number, so two cells never mix.

record.json
-----------
schema            int, 1
id                str, the cell's id
cell              {model, dataset, pruner, keep, seed}: the words of the command line
config            the resolved config
command           str, the command that makes it
git_commit        str, with "+" appended when the tree had changes; null outside a repository
versions          {python, torch, transformers, ...}
server            {base_url, model, version, prompt_tokens, request_ms}: only of engine=server; means over samples. Such
                  a record has no tokens, latency_ms, batch_size and peak_memory_gib (null)
device            str, "4 x ..." if that many processes shared the samples
started, finished str, ISO 8601
n_samples         int, the denominator of every metric
failed            [{id, error}], samples that could not be run; they count as wrong
skipped           [str], rows of the data that could not be used, if dataset.on_bad_row=skip left them out
unusable          {empty, unreadable}: answers without a word, and those in which the rule finds no yes, no or letter
reported          {tracker: null, or why it was not}, only if a tracker was asked for
metrics           {name: number}, accuracies in percent, the headline first
standard_errors   {name: number}, of those metrics that are a mean over samples
provenance        {}, further facts of the benchmark about its numbers (the judge)
tokens            {visual, kept, per_layer, layer_mean}: means over samples: visual tokens before pruning, the nominal
                  budget, visual tokens entering each LLM layer, and the mean of that over layers
latency_ms        {vision, scoring, prefill, decode, total}: mean per sample, as measured in the run's batches
notes             {}, how the method ran where that depends on the model (CDPruner: relevance clip or projection)
batch_size        int
peak_memory_gib   float: of the GPU, or of the process on a CPU
waited_for_images float: the share of its time in which the last start of the first process waited for images; null if
                  it had nothing left to answer

samples.jsonl
-------------
id, image_id, task, question, answer, prediction (null if failed), correct (0..1; null until a judge has spoken),
n_visual, grids ([rows, columns] per image), boxes ([left, top, right, bottom] of the image that the grid covers),
n_keep (nominal budget), kept (indices per image, up to the last layer), per_layer, latency_ms, notes,
prompt_tokens and request_ms (of a server, which leaves n_visual to latency_ms null),
error (if failed), image_notes (if an image was shown in another form than it has), digest (of question, answer and
image: an answer to another question of the same id is not used)
"""

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from mipruner.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the system's errors for a disk without room."""
LOCK = ".lock"
MAX_NAME = 100
"""Limit in bytes of a folder's name before the id. File systems allow 255 bytes, some only 143."""
WARN_ABOVE = 0.05
"""Share of empty or unreadable answers above which a warning is printed."""
NOT_IDENTITY = (
    "family",
    "task",
    "batch_size",
    "loader_threads",
    "device",
    "n_masks",
    "results",
    "overwrite",
    "logger",
    "cache",
    "concurrency",
    "max_retries",
    "timeout_s",
)
"""Keys of the config, at any depth, that cannot change a number."""


def cell_id(config: dict[str, Any]) -> str:
    """Eight hex digits of everything in the resolved config that can change a number."""

    def identity(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {key: identity(value) for key, value in node.items() if key not in NOT_IDENTITY}

    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def git_commit() -> str | None:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def begin(overrides: Sequence[str]) -> dict[str, str | None]:
    """Entries of a record that are known at the start: the command, the code that runs, the time."""
    return {"command": command(overrides), "git_commit": git_commit(), "started": now()}


def command(overrides: Sequence[str]) -> str:
    """Command line of these overrides, without the folder of the results."""
    return shlex.join(["python", "run.py", *(word for word in overrides if not word.startswith("out="))])


def parse_method(words: str) -> tuple[str, dict[str, str]]:
    """Parse a method with options: ``"mi lam=1"`` gives ``("mi", {"lam": "1"})``."""
    name, *options = words.split()
    return name, dict(option.split("=", 1) for option in options)


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"CPU, {n} thread{'s' * (n > 1)} of {platform.processor() or platform.machine()}"


def peak_memory_gib(device: torch.device) -> float:
    """Peak allocation on the GPU, or peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def write_atomic(path: Path, text: str) -> None:
    """Write a file, and its folder if there is none, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(path.suffix + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_record(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(record, indent=1) + "\n")


class Cell:
    """The folder of one cell.

    Parameters
    ----------
    config : dict
        The resolved config.
    differs : str
        Text in the folder's name after the budget, such as ``lam=0.8``.
    """

    def __init__(self, config: dict[str, Any], differs: str = ""):
        self.config, self.id = config, cell_id(config)
        words = [config[group]["name"] for group in ("model", "dataset", "pruner")]
        self.cell = dict(zip(("model", "dataset", "pruner"), words, strict=True))
        self.cell |= {"keep": config["keep"], "seed": config["seed"]}
        parent = Path(config["results"]).joinpath(*words)
        found = sorted(parent.glob(f"*-{self.id}"))
        name = re.sub(r"[^\w.,=+-]", "_", f"keep={config['keep']}" + (f",{differs}" if differs else ""))
        name = name.encode()[:MAX_NAME].decode(errors="ignore")
        self.path = found[0] if found else parent / f"{name}-{self.id}"

    @property
    def is_done(self) -> bool:
        return (self.path / "record.json").exists()

    def open(self, overwrite: bool = False) -> None:
        """Create the folder. With ``overwrite``, delete its content."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir() if overwrite else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink()
        write_atomic(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock this cell against other runs; the system releases the lock when the process ends.

        Raises
        ------
        InputError
            If another run uses it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path / LOCK, timeout=0):
                yield
        except Timeout:
            raise InputError(f"another run is answering {self.path}: wait for it, or end it") from None

    def record(self) -> dict[str, Any]:
        return json.loads((self.path / "record.json").read_text(encoding="utf-8"))

    def rows(self) -> list[dict[str, Any]]:
        """Samples answered so far by all processes. An incomplete last line is ignored."""
        lines = [
            line for path in (self._part(0), *self._parts()) if path.exists() for line in path.open(encoding="utf-8")
        ]
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def keep_rows(self, rows: list[dict[str, Any]]) -> None:
        """Replace the samples of all processes on disk."""
        write_atomic(self._part(0), "".join(map(_line, rows)))
        for path in self._parts():
            path.unlink()

    def keep_answers(self, digests: Mapping[str, str]) -> None:
        """Keep the samples on disk that did not fail and have this digest by id. The others are answered again."""
        rows = self.rows()
        self.keep_rows([row for row in rows if "error" not in row and row.get("digest") == digests.get(row["id"])])

    def append(self, rows: Iterable[dict[str, Any]], part: int = 0) -> None:
        """Append samples answered by process number ``part``. They are on disk when this returns."""
        with open(self._part(part), "a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())

    def _part(self, part: int) -> Path:
        return self.path / (f"samples.{part}.jsonl" if part else "samples.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("samples.*.jsonl"))

    def finish(self, record: dict[str, Any]) -> None:
        write_record(self.path / "record.json", record)


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Lines of samples.jsonl of a cell."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def _line(row: dict[str, Any]) -> str:
    """One JSON line in ASCII, so that an interrupted write cannot split a character."""
    return json.dumps(row) + "\n"
