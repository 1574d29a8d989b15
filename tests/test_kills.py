"""Kills, full disks and two runs at once; `make test-kills` does a hundred of them."""

import os
import re
import subprocess
import sys

from experiments.results import ROOT


def test_a_run_that_is_killed_or_has_a_full_disk_ends_in_the_same_record(record_property):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/kills.py", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ kills, \d+ files, two runs \[0, [04]\]", done.stdout)
    for accident in (
        "SIGKILL at a random moment or file: samples, masks, record",
        "a full disk at any file that is written",
        "two processes started into one cell",
    ):
        record_property("survives", (accident, "the same command ends in the bytes of a run never disturbed"))
