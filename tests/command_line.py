"""Runs run.py in this process or in a fork of it.

A process of its own would import transformers again, for seconds.
"""

import logging
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
from pathlib import Path

import torch
from tqdm import tqdm

import run
from experiments.results import ROOT


def run_main(monkeypatch, capfd, *argv):
    """Exit status and what was printed (out, err)."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    monkeypatch.chdir(ROOT)
    try:
        run.main()
        status = 0
    except SystemExit as error:
        status = error.code
    return status, capfd.readouterr()


class Fork:
    """``python run.py *argv`` as a fork, to be watched and killed."""

    def __init__(self, *argv, **env):
        self._said = tempfile.TemporaryDirectory()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(argv, env))
        self._process.start()

    def _run(self, argv, env):
        torch.set_num_threads(1)  # the threads of the parent are not in its fork
        tqdm.set_lock(threading.RLock())  # the lock of the parent is shared: a killed fork would hold it for ever
        for number in (1, 2):
            os.dup2(os.open(f"{self._said.name}/{number}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
        logging.getLogger().handlers.clear()
        os.environ.update(env)
        os.chdir(ROOT)
        self._main(argv)

    def _main(self, argv):
        sys.argv = ["run.py", *argv]
        runpy.run_path("run.py", run_name="__main__")

    @property
    def pid(self):
        return self._process.pid

    @property
    def is_running(self):
        return self._process.is_alive()

    def send(self, signal):
        os.kill(self.pid, signal)

    def end(self):
        """Wait. Exit status, negative for a signal, and what was printed to out and err."""
        self._process.join()
        with self._said as folder:
            return self._process.exitcode, *(Path(folder, name).read_text(encoding="utf-8") for name in "12")
