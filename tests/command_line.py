"""Runs run.py in this process."""

import logging
import sys

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
