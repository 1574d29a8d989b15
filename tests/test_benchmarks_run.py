"""Benchmarks through run.py's whole path: shards, broken images, judges, videos, options that do not fit."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from clips import write_set, write_video
from experiments import build
from experiments.benchmarks.base import BenchmarkError
from experiments.cell import run_cell
from experiments.results import ROOT, Cell, cell_id
from loopback import content, server
from mipruner.errors import InputError
from mipruner.pipeline import Pipeline

SCHEMAS = ROOT / "tests/data/schemas"


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def config(tmp_path: Path, dataset: str, path: Path, *overrides: str) -> dict:
    common = [f"results={tmp_path / 'results'}", "device=cpu", "n_masks=0", "decoding.max_new_tokens=4"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build.resolve(compose("config", [f"dataset={dataset}", f"dataset.path={path}", *common, *overrides]))


def test_shards_cut_the_work_and_not_an_image(tmp_path):
    ids = []
    for shard in ("0/2", "1/2"):
        settings = config(tmp_path, "pope", SCHEMAS / "pope_test.parquet", f"shard={shard}")
        run_cell(settings)
        ids.append([(row["id"], row["image_id"]) for row in Cell(settings).rows()])
    assert len(ids[0]) + len(ids[1]) == 5
    assert not {image for _, image in ids[0]} & {image for _, image in ids[1]}


def test_a_broken_image_is_listed_and_stays_in_the_denominator(tmp_path):
    source = pq.read_table(SCHEMAS / "pope_test.parquet")
    rows = source.to_pylist()
    rows[0]["image"] = {"bytes": b"not an image", "path": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=source.schema), tmp_path / "pope.parquet")
    record = run_cell(config(tmp_path, "pope", tmp_path / "pope.parquet"))
    assert [failure["id"] for failure in record["failed"]] == ["adversarial/1"]
    assert "COCO_val2014_000000009000 cannot be decoded" in record["failed"][0]["error"]
    assert record["n_samples"] == 5
    assert record["metrics"]["adversarial_accuracy"] <= 50
    assert record["metrics"]["adversarial_yes_rate"] <= 0.5


def test_mmvet_through_a_judge_that_is_down_at_first(tmp_path, monkeypatch):
    """Answers and replies so far are kept; the same command finishes the record without the model."""
    up = False
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    with server(lambda request, number: (200, "0.5") if up or number < 2 else (500, "down")) as (url, asked):
        options = [f"judge.base_url={url}", "judge.max_retries=0", "judge.concurrency=1"]
        settings = config(tmp_path, "mmvet", SCHEMAS / "mmvet_test.parquet", *options)
        with pytest.raises(BenchmarkError, match=r"the judge gpt-4.1 at .* run the same command again"):
            run_cell(settings)
        assert len(Cell(settings).rows()) == 5 and not Cell(settings).is_done
        answered = [row["prediction"] for row in Cell(settings).rows()]
        up, before = True, len(asked)
        monkeypatch.setattr(Pipeline, "__call__", lambda *_: pytest.fail("the model is asked again"))
        record = run_cell(config(tmp_path, "mmvet", SCHEMAS / "mmvet_test.parquet", *options[:2]))
        assert len(asked) - before <= 3 and len({content(request) for request in asked}) == 5
    assert record["metrics"]["score"] == 50
    assert record["provenance"]["judge"] == "gpt-4.1"
    assert [row["prediction"] for row in Cell(settings).rows()] == answered
    assert [row["correct"] for row in Cell(settings).rows()] == [0.5] * 5
    written = "".join(file.read_text() for file in (tmp_path / "results").rglob("*") if file.is_file())
    assert "sk-of-the-test" not in written and len(list((tmp_path / "results/judge").iterdir())) == 1


def test_how_the_judge_is_asked_is_not_part_of_a_cells_identity(tmp_path):
    def identity(*overrides):
        return cell_id(config(tmp_path, "mmvet", SCHEMAS / "mmvet_test.parquet", *overrides))

    assert identity("judge.concurrency=1", "judge.cache=/elsewhere", "judge.max_retries=0") == identity()
    assert identity("judge.model=other") != identity()
    assert identity("judge=offline") != identity()


def test_offline_mmvet_needs_no_key(tmp_path):
    record = run_cell(config(tmp_path, "mmvet", SCHEMAS / "mmvet_test.parquet", "judge=offline"))
    assert next(iter(record["metrics"])) == "offline_score"
    assert "not comparable" in record["provenance"]["judge"]


def test_a_video_set_runs_with_a_missing_and_a_broken_video(tmp_path, video_llava, record_property):
    write_set(tmp_path, 8)
    for name in ("v0", "v1"):
        write_video(tmp_path / f"videos/{name}.mp4", 20)
    (tmp_path / "videos/v2.mp4").write_bytes(b"this is no video")
    options = [f"model.path={video_llava}", "model.prompt=llava_v1", "keep=16"]
    reply = "{'pred': 'yes', 'score': 4}"
    with server(lambda request, number: (200, reply)) as (url, asked):
        settings = config(tmp_path, "msvd", tmp_path, *options, f"judge.base_url={url}")
        record = run_cell(settings)
        assert 1 <= len(asked) <= 4
    assert record["n_samples"] == 8
    assert record["metrics"] == {"accuracy": 50, "score": 2}
    assert record["standard_errors"]["accuracy"] == pytest.approx(100 * (2 / 7) ** 0.5 / 8**0.5)
    assert (record["provenance"]["judge"], record["provenance"]["judge_models"]) == (
        "gpt-3.5-turbo",
        ["gpt-3.5-turbo-0613"],
    )
    assert record["tokens"]["visual"] == 8 * 16 and record["tokens"]["kept"] == 16
    assert [(failure["id"], failure["error"][:12]) for failure in record["failed"]] == [
        ("v2_4", "the video v2"),
        ("v2_5", "the video v2"),
        ("v3_6", "no video v3 "),
        ("v3_7", "no video v3 "),
    ]
    outcome = "the run goes on; their questions count as wrong and are listed in the record"
    record_property("survives", ("a missing and a broken video", outcome))


def test_a_video_set_needs_a_model_that_takes_videos(tmp_path):
    write_set(tmp_path)
    write_video(tmp_path / "videos/v0.mp4", 20)
    with pytest.raises(InputError, match="a llava model takes no video"):
        run_cell(config(tmp_path, "msvd", tmp_path, "judge=offline"))


@pytest.mark.parametrize(
    ("dataset", "overrides", "message"),
    [
        ("mmvet", [], "^the judge gpt-4.1 needs a key in the environment, OPENAI_API_KEY"),
        ("pope", ["dataset.benchmark.scoring=vlmeval"], "^scoring='vlmeval' is not one of llava, lmms_eval$"),
        ("pope", ["dataset.benchmark.prompt=chatty"], "^prompt='chatty' is not one of short_answer, plain$"),
        ("mme", ["dataset.benchmark.cognition=maybe"], "^MME: cognition='maybe' should be true or false$"),
        ("mmvet", ["judge.max_retries=many"], "^Judge: max_retries='many' should be a whole number$"),
        ("pope", ["+dataset.benchmark.colour=red"], "unexpected keyword argument 'colour'"),
    ],
)
def test_options_that_do_not_fit_end_before_the_model_is_loaded(tmp_path, monkeypatch, dataset, overrides, message):
    monkeypatch.setattr(build, "model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(BenchmarkError, match=message):
        run_cell(config(tmp_path, dataset, SCHEMAS / f"{dataset}_test.parquet", *overrides))
