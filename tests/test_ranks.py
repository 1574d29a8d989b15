"""Several processes on one cell: the record of a single one, whatever is killed on the way."""

import dataclasses
import os
import signal
import time

import psutil
import pytest
import torch.distributed.run as distributed
from hydra import compose, initialize_config_dir
from torch.distributed.launcher.api import elastic_launch

from command_line import Fork
from experiments import build
from experiments.cell import run_cell
from experiments.ranks import ALONE, Ranks
from experiments.results import ROOT, Cell

TIMED = ("started", "finished", "latency_ms", "peak_memory_gib", "waited_for_images", "command", "device")
OVERRIDES = ("limit=40", "batch_size=2", "device=cpu", "n_masks=0")


@pytest.mark.parametrize("n_items", [0, 1, 3, 7, 64])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_shares_are_a_partition_in_order(n_items, n):
    items = list(range(n_items))
    shares = [Ranks(rank, n).share(items) for rank in range(n)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_waits_for_nobody():
    ALONE.wait()
    assert ALONE.largest(2.5) == 2.5
    assert Ranks.join() == ALONE


class Torchrun(Fork):
    """``torchrun *argv`` whose processes are forks too."""

    def _main(self, argv):
        def launch(config, entrypoint):
            return elastic_launch(dataclasses.replace(config, start_method="fork"), self._rank)

        distributed.elastic_launch = launch
        distributed.main(argv)

    def _rank(self, *argv):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
            print("started again")
        super()._main(argv[argv.index("run.py") + 1 :])


def wait_for_rows(folder, launched):
    """Return when both processes have answered something."""
    while launched.is_running:
        parts = [file for file in folder.rglob("samples*.jsonl") if file.stat().st_size]
        if len(parts) == 2:
            return
        time.sleep(0.002)
    pytest.fail(launched.end()[2])


def test_a_killed_rank_resumes_and_the_record_is_that_of_one_process(tmp_path, record_property):
    words = ["--nproc-per-node=2", "--max-restarts=1", "--standalone", "run.py"]
    launched = Torchrun(*words, f"results={tmp_path / 'two'}", *OVERRIDES)
    wait_for_rows(tmp_path, launched)
    psutil.Process(launched.pid).children()[1].send_signal(signal.SIGKILL)
    (folder,) = (tmp_path / "two").glob("*/*/*/*")
    assert not (folder / "record.json").exists(), "the kill came too late to show anything"
    status, out, err = launched.end()
    assert status == 0, err
    assert out.count("started again") == 2, err
    assert out.count("record.json") == 1, "one of the two speaks"

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = build.resolve(compose("config", [f"results={tmp_path / 'one'}", *OVERRIDES]))
    alone = run_cell(config)
    cells = [Cell(config | {"results": str(tmp_path / name)}) for name in ("one", "two")]
    records = [cell.record() for cell in cells]
    assert records[0] == alone and records[1]["device"].startswith("2 x CPU")
    for record in records:
        record["config"].pop("results")
        assert record["peak_memory_gib"] > 0
    one, two = ({k: v for k, v in record.items() if k not in TIMED} for record in records)
    assert one == two
    rows = [[{k: v for k, v in row.items() if k != "latency_ms"} for row in cell.rows()] for cell in cells]
    assert rows[0] == rows[1] and len(rows[0]) == alone["n_samples"]
    assert sorted(file.name for file in cells[1].path.glob("[!.]*")) == ["config.yaml", "record.json", "samples.jsonl"]
    outcome = "with --max-restarts all start again and share the rest; the record is that of one process"
    record_property("survives", ("SIGKILL of one of two processes under torchrun", outcome))


def test_other_processes_rows_are_read_and_merged(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cell = Cell(build.resolve(compose("config", [f"results={tmp_path}"])))
    cell.open()
    cell.append([{"id": "a"}])
    cell.append([{"id": "c"}], part=2)
    cell.append([{"id": "b"}], part=1)
    with open(cell.path / "samples.2.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "cut sh')
    assert [row["id"] for row in cell.rows()] == ["a", "b", "c"]
    cell.keep_rows(cell.rows())
    assert sorted(path.name for path in cell.path.iterdir()) == ["config.yaml", "samples.jsonl"]
    assert [row["id"] for row in cell.rows()] == ["a", "b", "c"]
