"""run.py as a user meets it: records, resume after a kill, and one clear message for everything that can be wrong."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from analysis.masks import draw_cell
from command_line import Fork, run_main
from experiments import build
from experiments.benchmarks.base import BenchmarkError, SampleError
from experiments.cell import differs, run_cell, show
from experiments.evaluate import by_length, subset
from experiments.results import NOT_IDENTITY, ROOT, Cell, cell_id
from mipruner.errors import InputError, ModelError
from mipruner.models.chat import Chat
from mipruner.models.llava import LlavaAdapter
from mipruner.pipeline import Pipeline
from toy import N_LAYERS, N_VISUAL, Toy, save_toy_model

MODEL = Path(tempfile.mkdtemp(prefix="toy-model-"))
save_toy_model(MODEL)
TIMED = ("started", "finished", "latency_ms", "peak_memory_gib", "waited_for_images", "command")


def config(tmp_path, *overrides, **toy):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose(
            "config",
            [f"results={tmp_path}", f"model.path={MODEL}", "n_masks=0", "batch_size=4", "keep=4", *overrides],
        )
    resolved = build.resolve(cfg)
    resolved["dataset"] = {"name": "toy", "lam": 0.5, "max_new_tokens": 3, "benchmark": {"name": "toy", **toy}}
    resolved["decoding"]["max_new_tokens"] = 3
    return resolved


def command(tmp_path, *overrides):
    toy = ["~dataset.benchmark", "+dataset.benchmark.name=toy", "dataset.name=toy"]
    multirun = [override for override in overrides if override == "-m"]
    overrides = [override for override in overrides if override != "-m"]
    common = [f"model.path={MODEL}", "decoding.max_new_tokens=3", "n_masks=0", f"results={tmp_path}", "batch_size=2"]
    overrides = ["keep=4", *overrides]
    return [sys.executable, "run.py", *multirun, *toy, *common, *overrides]


def cli(monkeypatch, capfd, tmp_path, *overrides):
    """Exit status and stderr of run.py, in this process."""
    status, said = run_main(monkeypatch, capfd, *command(tmp_path, *overrides)[2:])
    return status, said.err


def start(tmp_path, *overrides, **env):
    return Fork(*command(tmp_path, *overrides)[2:], **env)


def untimed(record):
    return {key: value for key, value in record.items() if key not in TIMED}


def rows_untimed(cell):
    return [{k: v for k, v in row.items() if k != "latency_ms"} for row in cell.rows()]


def test_a_record_says_everything_and_a_finished_cell_is_skipped(tmp_path, capsys):
    settings = config(tmp_path)
    record = run_cell(settings)
    assert record == json.loads((Cell(settings).path / "record.json").read_text())
    assert record["n_samples"] == 12 and record["failed"] == []
    assert record["tokens"] == {"visual": N_VISUAL, "kept": 4, "per_layer": [4] * N_LAYERS, "layer_mean": 4}
    assert set(record["latency_ms"]) == {"vision", "scoring", "prefill", "decode", "total"}
    assert record["cell"] == {"model": "demo_llava", "dataset": "toy", "pruner": "mi", "keep": 4, "seed": 0}
    assert len(record["config"]) == len(settings) and record["versions"]["torch"] == torch.__version__
    rows = Cell(settings).rows()
    assert [len(row["kept"][0]) for row in rows] == [4] * 12
    assert "finished before" not in capsys.readouterr().out

    assert run_cell(settings) == record
    assert "finished before" in capsys.readouterr().out
    again = run_cell(settings | {"overwrite": True})
    assert again["finished"] >= record["finished"] and untimed(again)["metrics"] == record["metrics"]


def test_threads_that_load_change_nothing_but_the_wait(tmp_path, monkeypatch):
    """Images come in parallel and are put back in order; one that cannot be read fails for itself."""
    alone = run_cell(config(tmp_path / "alone", "loader_threads=1", n=9))
    assert 0 < alone["waited_for_images"] < 1
    slow, inside, most = Toy.images, [], []

    def images(self, image_id):
        inside.append(image_id)
        most.append(len(inside))
        time.sleep(0.03)
        inside.remove(image_id)
        if image_id == "4":
            raise SampleError("4 is broken")
        return slow(self, image_id)

    monkeypatch.setattr(Toy, "images", images)
    settings = config(tmp_path / "four", "loader_threads=4", n=9)
    assert cell_id(settings) == alone["id"]
    record = run_cell(settings)
    assert max(most) > 1
    assert {failed["error"] for failed in record["failed"]} == {"4 is broken"}
    broken = {failed["id"] for failed in record["failed"]}
    rows = [row for row in rows_untimed(Cell(settings)) if row["id"] not in broken]
    assert rows == [r for r in rows_untimed(Cell(config(tmp_path / "alone", n=9))) if r["id"] not in broken]
    said = show(record | {"waited_for_images": 0.31}, "here")
    assert "waited for images 31% of the time: raise loader_threads" in said
    assert "waited" not in show(record | {"waited_for_images": 0.1}, "here")


def test_a_killed_run_resumes_and_ends_in_the_same_record(tmp_path, record_property):
    status, _, err = start(tmp_path / "whole", "+dataset.benchmark.n=60").end()
    assert status == 0, err

    settings = config(tmp_path / "killed", "batch_size=2", n=60)
    killed = start(tmp_path / "killed", "+dataset.benchmark.n=60")
    folder = tmp_path / "killed" / "demo_llava" / "toy" / "mi"
    while killed.is_running and not any(line for file in folder.glob("*/samples.jsonl") for line in file.open()):
        time.sleep(0.001)
    killed.send(signal.SIGKILL)
    assert killed.end()[0] == -signal.SIGKILL
    (path,) = folder.iterdir()
    done = (path / "samples.jsonl").read_text()
    assert 0 < done.count("\n") < 120, "the kill came too late to show anything"
    assert not (path / "record.json").exists()
    with open(path / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "cut in the mid')

    status, _, err = start(tmp_path / "killed", "+dataset.benchmark.n=60").end()
    assert status == 0, err
    assert (path / "samples.jsonl").read_text().startswith(done[: done.index('"correct"')])

    def read(root):
        (folder,) = (root / "demo_llava" / "toy" / "mi").iterdir()
        record = json.loads((folder / "record.json").read_text())
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        record["config"].pop("results")
        return untimed(record), [{k: v for k, v in row.items() if k != "latency_ms"} for row in rows]

    assert read(tmp_path / "killed") == read(tmp_path / "whole")
    accident = "SIGKILL of run.py while it answers, a line half written"
    record_property("survives", (accident, "the same command goes on, and ends in the record of a run never killed"))
    assert settings["batch_size"] == 2


def test_a_line_may_be_cut_short_anywhere_and_hold_any_character(tmp_path):
    cell = Cell(config(tmp_path))
    cell.open()
    rows = [{"id": str(k), "prediction": "雪\u2028\x85é"} for k in range(2)]
    cell.append(rows)
    path = cell.path / "samples.jsonl"
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.decode().splitlines()] == cell.rows() == rows
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert cell.rows() == rows[: length >= len(whole) // 2]


def test_an_interrupted_run_keeps_what_it_answered(tmp_path, record_property):
    process = start(tmp_path, "+dataset.benchmark.n=2000")
    while process.is_running and not any(line for f in tmp_path.rglob("samples.jsonl") for line in f.open()):
        time.sleep(0.01)
    process.send(signal.SIGINT)
    status, _, err = process.end()
    assert status == 1 and "run the same command again" in err and "Traceback" not in err
    record_property("survives", ("Ctrl-C", err.strip().splitlines()[-1]))
    assert any(line for f in tmp_path.rglob("samples.jsonl") for line in f.open())


def test_two_cells_never_mix(tmp_path):
    base = config(tmp_path)
    changed = {
        "keep": 1,
        "seed": 1,
        "limit": 4,
        "positions": "keep",
        "text_scope": "question",
        "pruner": base["pruner"] | {"lam": 0.8},
        "model": base["model"] | {"dtype": "bfloat16"},
        "decoding": base["decoding"] | {"max_new_tokens": 4},
    }
    ids = [cell_id(base), *(cell_id(base | {key: value}) for key, value in changed.items())]
    assert len(set(ids)) == len(ids)
    assert cell_id(base | {"keep": 1}) != cell_id(base | {"keep": 1.0})
    for key in NOT_IDENTITY:
        assert cell_id(base | {key: "other"}) == cell_id(base)


def test_without_pruning_the_budget_makes_no_second_cell(tmp_path):
    assert config(tmp_path, "pruner=none", "keep=16") == config(tmp_path, "pruner=none", "keep=32")


def test_a_seed_makes_a_cell_only_where_something_is_drawn(tmp_path):
    def seeds(*overrides):
        return [config(tmp_path, f"seed={k}", *overrides) for k in (0, 1)]

    for drawn in ("pruner=random", "limit=8", "decoding.temperature=0.7"):
        first, second = seeds(drawn)
        assert first != second
    first, second = seeds("pruner=mi")
    assert first == second


def test_auto_is_recorded_as_its_mean_and_its_options_make_no_other_cell(tmp_path):
    auto = ["keep=auto", "quality=0.3", "keep_max=0.5"]
    record = run_cell(config(tmp_path, *auto))
    rows = [json.loads(line) for line in next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()]
    counts = [len(row["kept"][0]) for row in rows]
    assert max(counts) <= N_VISUAL // 2
    assert record["cell"]["keep"] == "auto"
    assert record["tokens"]["kept"] == record["tokens"]["layer_mean"] == pytest.approx(sum(counts) / len(counts))
    assert "kept" in show(record, "here")
    assert cell_id(config(tmp_path, "keep=auto", "quality=0.4")) != cell_id(config(tmp_path, *auto))
    assert cell_id(config(tmp_path, "keep=4", "quality=0.4")) == cell_id(config(tmp_path, "keep=4"))


def test_folder_names_show_what_differs():
    overrides = [
        "model=x",
        "keep=16",
        "pruner.lam=0.8",
        "batch_size=2",
        "dataset.benchmark.seed=3",
        "logger.mode=offline",
    ]
    assert differs(overrides) == "lam=0.8,seed=3"
    assert differs(["keep=16", "seed=2"], seed=2) == "seed=2"
    assert differs(["keep=16", "seed=2"], seed=0) == ""


def test_limit_keeps_images_whole_and_shards_share_nothing():
    samples = Toy(10).samples()
    limited = subset(samples, 6, None, seed=0)
    assert len(limited) == 6 and len({s.image_id for s in limited}) == 3
    assert limited == subset(samples, 6, None, seed=0) != subset(samples, 6, None, seed=1)
    shards = [subset(samples, None, f"{k}/3", seed=0) for k in range(3)]
    assert sorted(s.id for shard in shards for s in shard) == sorted(s.id for s in samples)
    for bad in ("3/3", "x", "1"):
        with pytest.raises(InputError, match="not a part such as 0/4"):
            subset(samples, None, bad, seed=0)
    with pytest.raises(InputError, match="no samples"):
        subset(samples, None, "10/11", seed=0)


def test_a_corrupt_image_is_reported_and_stays_in_the_denominator(tmp_path, record_property):
    settings = config(tmp_path, corrupt=[2])
    record = run_cell(settings)
    errors = {failed["id"]: failed["error"] for failed in record["failed"]}
    assert errors == dict.fromkeys(("2-0", "2-1"), "image 2 cannot be decoded")
    assert record["n_samples"] == 12
    rows = {row["id"]: row for row in Cell(settings).rows()}
    assert rows["2-0"]["prediction"] is None and rows["2-0"]["correct"] == 0
    assert "2 samples failed" in show(record, "x")
    outcome = (
        f"the run goes on; its questions count as wrong, and the record lists them: {record['failed'][0]['error']}"
    )
    record_property("survives", ("a corrupt image in a data set", outcome))


def recorded(monkeypatch, cls, name):
    """The arguments of every call of a method from here on."""
    calls, method = [], getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, *args: calls.append(args) or method(self, *args))
    return calls


def test_long_questions_first_and_every_image_once(tmp_path, monkeypatch):
    settings = config(tmp_path, "batch_size=3", n=5)
    loads, pixels = recorded(monkeypatch, Toy, "images"), recorded(monkeypatch, LlavaAdapter, "preprocess")
    passes = recorded(monkeypatch, LlavaAdapter, "run_encoder")
    run_cell(settings)
    assert [row["id"] for row in Cell(settings).rows()] == [f"{k}-{j}" for j in (1, 0) for k in range(5)]
    assert loads == [("0",), ("1",), ("2",), ("3",), ("4",)]
    assert len(pixels) == sum(len(batch) for (batch,) in passes) == 5


def test_images_do_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.evaluate.MAX_IMAGES", 2)
    loads = recorded(monkeypatch, Toy, "images")
    record = run_cell(config(tmp_path, "batch_size=1", n=3))
    assert loads == [("0",), ("1",), ("2",)] * 2 and record["failed"] == []


def test_samples_are_sorted_within_a_window_only(monkeypatch):
    monkeypatch.setattr("experiments.evaluate.WINDOW", 4)
    assert [sample.id for sample in by_length(Toy(n=3).samples())] == ["0-1", "1-1", "0-0", "1-0", "2-1", "2-0"]


def test_if_every_sample_fails_there_is_no_record(tmp_path, record_property):
    settings = config(tmp_path, n=1, corrupt=[0])
    with pytest.raises(BenchmarkError, match="none of the 2 samples could be run; the first: image 0 cannot be deco"):
        run_cell(settings)
    assert not Cell(settings).is_done
    record_property("survives", ("every image of a data set is missing", "one line; there is no record of 0.00"))


def test_failed_samples_are_tried_again(tmp_path, monkeypatch, record_property):
    settings = config(tmp_path, corrupt=[2])
    assert len(run_cell(settings)["failed"]) == 2
    monkeypatch.setattr(
        Toy, "images", lambda self, image_id: [Image.new("RGB", (84, 84), (40 * int(image_id), 90, 160))]
    )
    asked = recorded(monkeypatch, Pipeline, "__call__")
    record = run_cell(settings)
    assert len(asked) == 2 and record["failed"] == []  # the two batches of the image
    whole = run_cell(config(tmp_path / "whole"))
    assert record["metrics"] == whole["metrics"]
    record_property(
        "survives",
        ("an image that comes back", "the same command answers the batches of what had failed"),
    )


@pytest.mark.parametrize("text", [" ", "What is <image> ?", "\u2603\u2603"])
def test_a_question_that_cannot_be_asked_fails_alone(tmp_path, monkeypatch, text, record_property):
    samples = [dataclasses.replace(s, text=text, question=text) if s.id == "4-0" else s for s in Toy().samples()]
    monkeypatch.setattr(Toy, "samples", lambda self: samples)
    record = run_cell(config(tmp_path))
    assert [failed["id"] for failed in record["failed"]] == ["4-0"] and record["n_samples"] == 12
    said = record["failed"][0]["error"]
    assert any(words in said for words in ("is empty", "contains the placeholder '<image>'", "knows none of the char"))
    record_property("survives", (f"a question {text!r} in a data set", f"its sample alone fails: {said}"))


def test_an_image_that_the_processor_refuses_fails_alone(tmp_path, monkeypatch, record_property):
    pixels = LlavaAdapter.preprocess

    def refusing(self, image):
        if image.getpixel((0, 0))[0] == 80:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return pixels(self, image)

    monkeypatch.setattr(LlavaAdapter, "preprocess", refusing)
    record = run_cell(config(tmp_path))
    errors = {failed["id"]: failed["error"] for failed in record["failed"]}
    said = "the model's image processor refuses 2, 84 x 84: absolute aspect ratio must be smaller than 200"
    assert errors == dict.fromkeys(("2-0", "2-1"), said)
    record_property("survives", ("an image that the processor refuses", f"its samples alone fail: {said}"))


def test_two_questions_of_one_id_are_refused(tmp_path, monkeypatch):
    samples = Toy().samples()
    monkeypatch.setattr(Toy, "samples", lambda self: [*samples, dataclasses.replace(samples[0], image_id="3")])
    with pytest.raises(BenchmarkError, match=r"two questions have the id 0-0: 'What color .*' about 0 and .* about 3"):
        run_cell(config(tmp_path))


def test_an_answer_to_another_question_of_the_same_id_is_not_used(tmp_path, monkeypatch):
    settings = config(tmp_path)
    monkeypatch.setattr(Toy, "score", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        run_cell(settings)
    monkeypatch.undo()
    samples = [
        dataclasses.replace(s, text="Is it red ?", question="Is it red ?") if s.id == "1-0" else s
        for s in Toy().samples()
    ]
    monkeypatch.setattr(Toy, "samples", lambda self: samples)
    asked = recorded(monkeypatch, Pipeline, "__call__")
    run_cell(settings)
    assert len(asked) == 1 and "Is it red ?" in [prompt.text for prompt in asked[0][0]]


def test_the_record_is_written_last(tmp_path, monkeypatch, record_property):
    """What a kill cuts off after the answers, masks or tracker, is made up for by the next run."""
    settings = config(tmp_path, "n_masks=1")
    seen = []
    for step in ("draw", "report"):

        def killed(*_, step=step):
            seen.append((step, Cell(settings).is_done))
            raise KeyboardInterrupt

        drawing = killed if step == "draw" else draw_cell
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if step == "report":
                patch.setattr("experiments.tracking.Tracker.report", killed)
            run_cell(settings, draw=drawing)
    assert seen == [("draw", False), ("report", False)]
    asked = recorded(monkeypatch, Pipeline, "__call__")
    run_cell(settings, draw=draw_cell)
    assert not asked and Cell(settings).is_done and (Cell(settings).path / "masks.png").exists()
    accident = "a kill between the last answer and the record"
    record_property(
        "survives", (accident, "the same command draws and reports what is missing, then writes the record")
    )


def test_a_drawing_that_fails_takes_no_answer_with_it(tmp_path, capsys):
    def broken(*_):
        raise MemoryError("14 GB")

    assert run_cell(config(tmp_path, "n_masks=1"), draw=broken)["n_samples"] == 12
    assert "warning: masks.png was not drawn: MemoryError('14 GB')" in capsys.readouterr().err


def test_a_full_disk_while_drawing_leaves_the_cell_open(tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = config(tmp_path, "n_masks=1")
    with pytest.raises(OSError, match="No space left"):
        run_cell(settings, draw=full)
    assert not Cell(settings).is_done and len(Cell(settings).rows()) == 12
    run_cell(settings, draw=draw_cell)
    assert (Cell(settings).path / "masks.png").exists()


def test_one_run_at_a_time_answers_a_cell(tmp_path, record_property):
    settings = config(tmp_path)
    with Cell(settings).alone(), pytest.raises(InputError, match=r"another run is answering .*: wait for it") as error:
        run_cell(settings)
    assert run_cell(settings)["n_samples"] == 12
    said = str(error.value).replace(str(Cell(settings).path), "…")
    record_property("survives", ("two runs of one cell at a time", f"the second ends: {said}"))


def test_answers_that_are_none_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(Chat, "decode", lambda self, tokens: "")
    record = run_cell(config(tmp_path))
    assert record["unusable"] == {"empty": 12, "unreadable": 0}
    assert "warning: 12 of 12 answers are empty" in show(record, "x")


@pytest.mark.parametrize(("mode", "reason"), [("online", "there is no key"), ("offlin", "mode")])
def test_a_tracker_stops_no_evaluation(tmp_path, monkeypatch, capsys, mode, reason, record_property):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    record = run_cell(config(tmp_path, "logger=wandb", f"logger.mode={mode}"))
    assert reason in record["reported"]["wandb"] and record["n_samples"] == 12
    said = capsys.readouterr().err
    warning = next(line for line in said.splitlines() if line.startswith("warning: nothing is reported to wandb"))
    record_property("survives", (f"logger=wandb logger.mode={mode}, no key", f"{warning[:150]}; the run goes on"))


def test_wandbs_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    record = run_cell(config(tmp_path, "logger=wandb"))
    assert record["reported"] == {"wandb": None}


def test_more_tokens_than_exist(tmp_path):
    with pytest.raises(InputError, match="keep=37 asks for more tokens than the 36 there are"):
        run_cell(config(tmp_path, "keep=37"))


def test_nan_features(tmp_path):
    settings = config(tmp_path)
    adapter = build.model(settings)
    bias = adapter.model.model.multi_modal_projector.linear_2.bias
    kept = bias.data.clone()
    try:
        bias.data[0] = float("nan")
        with pytest.raises(InputError, match="NaN"):
            run_cell(settings)
    finally:
        bias.data.copy_(kept)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, record_property):
    settings = config(tmp_path)
    append, calls = Cell.append, []

    def full(self, rows, part=0):
        calls.append(1)
        if len(calls) == 2:
            (self.path / "samples.jsonl").open("a").write('{"id": "half a li')
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path / "samples.jsonl"))
        append(self, rows, part)

    monkeypatch.setattr(Cell, "append", full)
    with pytest.raises(OSError, match="No space left"):
        run_cell(settings)
    monkeypatch.undo()
    assert len(Cell(settings).rows()) == 4
    assert untimed(run_cell(settings))["n_samples"] == 12
    record_property("survives", ("a full disk", "nothing is lost; with room again, the same command goes on"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pruner=fastvv"], "Available options in 'pruner'"),
        (["experiment=table12"], "Available options in 'experiment'"),
        (["ablation=lambda"], "Available options in 'ablation'"),
        (["prior=photos"], "Available options in 'prior'"),
        (["ablation=lam"], "ablation=lam sweeps pruner.lam: start it with run.py -m, one at a time"),
        (["-m", "ablation=lam,tau"], "ablation=lam sweeps pruner.lam: start it with run.py -m, one at a time"),
        (["model.path=./nowhere"], "no folder ./nowhere"),
        (["pruner.lam=2"], "lam=2 is not in [0, 1]"),
        (["pruner.lam=half"], "error: mi: lam='half' should be a number"),
        (["keep=0"], "is not a budget"),
        (["keep=true"], "keep=true: it should be a valid integer or should be a valid number or should be 'auto'"),
        (["keep=auto", "quality=abc"], "quality=abc: it should be a valid number"),
        (["batch_size=0"], "batch_size=0: it should be greater than or equal to 1"),
        (["batch_size=true"], "batch_size=true: it should be a valid integer"),
        (["limit=many"], "limit=many: it should be a valid integer"),
        (["limit=true"], "limit=true: it should be a valid integer"),
        (["n_masks=null"], "n_masks=null: it should be a valid integer"),
        (["n_masks=true"], "n_masks=true: it should be a valid integer"),
        (["seed=true"], "seed=true: it should be a valid integer"),
        (["overwrite=1"], "overwrite=1: it should be a valid boolean"),
        (["pruner.lam=true"], "error: mi: lam=True should be a number"),
        (["+model.square=maybe"], "model.square=maybe: it should be a valid boolean"),
        (["model.path=null"], "model.path=null: give a folder"),
        (["model.path="], "model.path=: it should have at least 1 character"),
        (["model.revision=main"], "is a folder here, and only the hub has revisions"),
        (["model.prompt=vicuna_v2"], "unknown prompt 'vicuna_v2': did you mean vicuna_v1? give one of"),
        (["model.prompt="], "unknown prompt ''"),
        (["text_scope=answer"], "text_scope=answer: it should be 'user' or 'question'"),
        (["decoding.max_new_tokens=0"], "decoding.max_new_tokens=0: it should be greater than or equal to 1"),
        (["decoding.temperature=-1"], "decoding.temperature=-1: it should be greater than or equal to 0"),
        (["task=efficiency", "keeps=64"], "keeps=64: it should be a list such as [64]"),
        (["task=efficiency", "clock=true"], "clock=true: it should be a text"),
        (["task=efficiency", "repetitions=0"], "repetitions=0: it should be greater than or equal to 1"),
        (["task=overhead", "limit=true"], "limit=true: it should be a valid integer"),
        (["device=gpu"], "device=gpu: it should be auto, cpu, cuda, cuda:0 or mps"),
        (["device=cuda:99"], "device=cuda:99: torch finds none here: give auto or cpu"),
        (["device=meta"], "device=meta: it holds no numbers: give auto, cpu, cuda, cuda:0 or mps"),
        (["+keeep=64"], "unknown key 'keeep': did you mean keep or "),
        (["pruner.tua=1"], "Key 'tua' is not in struct"),
        (["+dataset.benchmark.n=0"], "no samples are left"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_one_clear_message(
    monkeypatch, capfd, tmp_path, record_property, overrides, message
):
    status, err = cli(monkeypatch, capfd, tmp_path, *overrides)
    assert status != 0 and message in err and "Traceback" not in err
    said = [
        line for line in err.strip().splitlines() if not line.startswith(("Error executing", "Set the env", "Load"))
    ]
    record_property("says", f"`{' '.join(overrides)}`: {' '.join(said)}")


def test_a_place_that_cannot_be_written_is_one_clear_message(monkeypatch, capfd, record_property):
    status, err = cli(monkeypatch, capfd, "/dev/full/results")
    assert status != 0 and "cannot write /dev/full/results" in err and "Traceback" not in err
    record_property("says", next(line for line in err.splitlines() if "cannot write" in line))


@pytest.mark.parametrize("name", ["EPERM", "ENOENT", "ENAMETOOLONG", "EROFS", "EACCES", "EDQUOT"])
def test_a_write_that_the_system_refuses_is_one_clear_message(monkeypatch, capfd, tmp_path, record_property, name):
    def refuse(*_):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number), str(tmp_path / "samples.jsonl"))

    monkeypatch.setattr(Cell, "open", refuse)
    status, err = cli(monkeypatch, capfd, tmp_path)
    (said,) = (line for line in err.splitlines() if "cannot write" in line)
    assert status != 0 and f"samples.jsonl: {os.strerror(getattr(errno, name))}. What" in said
    assert "Traceback" not in err and ("make room" in said) == (name == "EDQUOT")
    record_property("says", said)


def test_a_cells_name_is_cut_by_its_bytes(tmp_path):
    cell = Cell(config(tmp_path), "sentence=" + "日本語" * 60)
    cell.open()
    assert len(cell.path.name.encode()) <= 143 and cell.path.name.startswith("keep=4,sentence=日本")
    assert cell.path.is_dir() and Cell(config(tmp_path)).path == cell.path


def test_no_home_and_a_terminal_of_ascii(tmp_path, record_property):
    """As in a container whose user is in no list of users."""
    words = ["import pwd, runpy, sys", "pwd.getpwuid = {}.__getitem__", "sys.path.insert(0, '.')"]
    words += [f"sys.argv = {command(tmp_path, 'n_masks=2')[1:]}", "runpy.run_path('run.py', run_name='__main__')"]
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": "tests", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", "\n".join(words)], cwd=ROOT, env=bare, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (record,) = tmp_path.rglob("record.json")
    assert (record.parent / "masks.png").exists() and rb"\xb1" in done.stdout
    for accident in ("no HOME, and no entry in the list of users", "a terminal that is not UTF-8"):
        record_property("survives", (accident, "the run goes on"))


def test_no_network_is_one_clear_message(tmp_path):
    with pytest.raises(ModelError, match="nobody/nothing"):
        run_cell(config(tmp_path, "model.path=nobody/nothing"))


def test_wandb_offline_is_a_run_of_its_own_and_is_closed(tmp_path):
    process = start(
        tmp_path, "logger=wandb", "logger.mode=offline", "-m", "keep=4,2", WANDB_SILENT="true", WANDB_DIR=str(tmp_path)
    )
    status, _, err = process.end()
    assert status == 0, err
    runs = sorted(tmp_path.rglob("run-*.wandb"))
    assert len(runs) == 2 and len({run.parents[2] for run in runs}) == 2
    for file in runs:
        assert b"accuracy" in file.read_bytes() and b"predictions" in file.read_bytes()


def test_one_bad_job_of_a_sweep_does_not_swallow_its_neighbours(monkeypatch, capfd, tmp_path, record_property):
    status, err = cli(monkeypatch, capfd, tmp_path, "-m", "keep=4,600,2")
    assert status != 0 and "keep=600 asks for more tokens" in err and "Traceback" not in err
    assert len(list(tmp_path.rglob("record.json"))) == 2
    record_property("survives", ("a job of a sweep that cannot run", "its neighbours have run"))
