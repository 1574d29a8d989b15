"""Ends a run at random points, and gives it a full disk at every file, until it has finished; prints what came of it.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/kills.py N

The model is loaded once; each run is a fork of this process. A run ends at a random file that it opens, renames or
removes under its results, or at a random time. After each series the folder must be that of a run never disturbed.
The tracker is a module in the place of wandb that writes a line for each of its calls.
"""

import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from analysis.masks import draw_cell
from experiments import build
from experiments.cell import run_cell
from experiments.results import ROOT
from mipruner.errors import InputError
from toy import save_toy_model

TIMED = ("started", "finished", "latency_ms", "peak_memory_gib", "waited_for_images")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
FINISHED, FULL, REFUSED = 0, 3, 4
REPORT = b"\nlog ['masks', 'predictions']\nend 0\n"
LIMIT_S = 60


def config(results: Path, model: Path) -> dict:
    words = [
        f"results={results}",
        f"model.path={model}",
        "logger=wandb",
        "logger.mode=offline",
        "n_masks=2",
        "batch_size=4",
        "keep=4",
        "device=cpu",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        resolved = build.resolve(compose("config", words))
    resolved["dataset"] |= {"name": "toy", "benchmark": {"name": "toy", "n": 12}}
    resolved["decoding"]["max_new_tokens"] = 3
    return resolved


def tracker() -> ModuleType:
    """A module with the calls of wandb that a run makes. Each writes its name into the folder of the run."""

    def init(dir: str, **_) -> SimpleNamespace:
        def write(name: str) -> None:
            with open(f"{dir}/wandb.log", "a", encoding="utf-8") as file:
                file.write(f"{name}\n")

        write("init")
        return SimpleNamespace(
            summary={},
            log=lambda sent: write(f"log {sorted(sent)}"),
            finish=lambda exit_code: write(f"end {exit_code}"),
        )

    module = ModuleType("wandb")
    module.init, module.Table, module.Image = init, dict, str
    return module


def child(settings: dict, act=None) -> int:
    """Process id of a fork that runs the cell; ``act(k)`` is called at its k-th file event under the results."""
    if pid := os.fork():
        return pid
    place, seen = settings["results"], [0]

    def watch(event, args):
        if act and event in EVENTS and args and str(args[0]).startswith(place) and not _reads(event, args):
            seen[0] += 1
            act(seen[0])

    sys.addaudithook(watch)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        run_cell(settings, draw=draw_cell)
        status = FINISHED
    except InputError:
        status = REFUSED
    except OSError as error:
        status = FULL if error.errno == errno.ENOSPC else 1
    except BaseException:
        status = 1
    os._exit(status)


def _reads(event: str, args: tuple) -> bool:
    return event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)


def ended(pid: int) -> int:
    """Exit status of a child; one that has not ended after `LIMIT_S` is killed, and what it was doing is an error."""
    deadline = time.monotonic() + LIMIT_S
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            waits_in = Path(f"/proc/{pid}/wchan").read_text(encoding="utf-8") if sys.platform == "linux" else "?"
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"the run {pid} had not ended after {LIMIT_S} s: it was in {waits_in}")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def content(settings: dict) -> dict[str, bytes]:
    """Every file of the cell, without its times; of the tracker's file the calls of the last run."""
    (folder,) = Path(settings["results"]).glob("*/*/*/*")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    record = json.loads(files["record.json"])
    files["wandb.log"] = files.get("wandb.log", b"").rpartition(b"init")[2]
    reported = record["reported"]["wandb"]
    if reported is not None:  # the tracker had no disk: the evaluation ends, and its record says so
        assert "No space left" in reported
        record["reported"]["wandb"], files["wandb.log"] = None, REPORT
    files["record.json"] = json.dumps({key: value for key, value in record.items() if key not in TIMED}).encode()
    rows = [json.loads(line) for line in files["samples.jsonl"].splitlines()]
    files["samples.jsonl"] = json.dumps([{**row, "latency_ms": None} for row in rows]).encode()
    return files


def kill_at(point: int):
    def act(k: int) -> None:
        if k == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def full_at(point: int):
    def act(k: int) -> None:
        if k == point:
            raise OSError(errno.ENOSPC, "No space left on device")

    return act


def count_events(settings: dict) -> int:
    reader, writer = os.pipe()
    assert ended(child(settings, lambda k: os.write(writer, b"x"))) == FINISHED
    os.close(writer)
    return len(os.read(reader, 10**6))


def main(n_kills: int) -> None:
    torch.set_num_threads(1)
    sys.modules["wandb"] = tracker()
    tqdm.monitor_interval = 0  # no thread whose lock a fork could inherit
    tqdm.set_lock(threading.RLock())  # tqdm shares its own with all forks: a killed one would hold it
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        model, results = Path(scratch) / "model", Path(scratch) / "results"
        save_toy_model(model)
        settings = config(results, model)
        build.model(settings)
        start = time.perf_counter()
        n_events = count_events(settings)
        took, whole = time.perf_counter() - start, content(settings)
        assert "masks.png" in whole and whole["wandb.log"] == REPORT

        def fresh() -> None:
            shutil.rmtree(results)

        def finish(why: str) -> None:
            assert ended(child(settings)) == FINISHED, why
            assert content(settings) == whole, (
                f"{why}: {[name for name in whole if content(settings)[name] != whole[name]]}"
            )

        killed = 0
        while killed < n_kills:
            fresh()
            for _ in range(random.randint(1, 3)):
                point = random.randint(1, n_events)
                if random.random() < 0.5:
                    status = ended(child(settings, kill_at(point)))
                else:
                    pid = child(settings)
                    time.sleep(random.random() * took)
                    os.kill(pid, signal.SIGKILL)
                    status = ended(pid)
                killed += status == -signal.SIGKILL
            finish("after a kill")
        for point in range(1, n_events + 1) if n_kills > 10 else random.sample(range(1, n_events + 1), 4):
            fresh()
            assert ended(child(settings, full_at(point))) in (FULL, FINISHED), f"full disk at file {point}"
            finish(f"full disk at file {point}")
        fresh()
        statuses = sorted(ended(pid) for pid in [child(settings), child(settings)])
        assert statuses in ([FINISHED, FINISHED], [FINISHED, REFUSED]), statuses
        finish("two runs")
        print(f"{killed} kills, {n_events} files, two runs {statuses}: the record of a run never disturbed")


if __name__ == "__main__":
    main(int(sys.argv[1]))
