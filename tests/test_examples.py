"""Every benchmark on its own example rows: read, prompted, scored, answered by a model, gone on with after a kill."""

import json
from pathlib import Path
from pkgutil import iter_modules

import datasets
import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments import benchmarks, build
from experiments.benchmarks.base import Benchmark
from experiments.cell import run_cell
from experiments.results import ROOT, Cell

CONF = ROOT / "conf/dataset"


def found():
    """{name of a file of conf/dataset: class}, one of each class."""
    classes = {}
    for file in sorted(CONF.glob("*.yaml")):
        name = yaml.safe_load(file.read_text()).get("benchmark", {}).get("name")
        if name:
            classes.setdefault(build.benchmark_class(name), file.stem)
    return {name: cls for cls, name in classes.items()}


FOUND = found()


def test_every_benchmark_has_a_file_of_conf():
    files = {module.name for module in iter_modules(benchmarks.__path__)}
    shared = {"base", "prompts", "rows", "table"}
    assert {cls.__module__.rpartition(".")[2] for cls in FOUND.values()} == files - shared


@pytest.fixture(params=FOUND)
def example(request, tmp_path, monkeypatch, video_llava):
    """The class, and the config of a run over its examples."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    cls = FOUND[request.param]
    assert cls.examples, f"{cls.__name__} has no example rows"
    folder = tmp_path / "data"
    folder.mkdir()
    words = [f"++dataset.benchmark.{key}={value}" for key, value in cls.write_examples(folder).items()]
    words += [f"model.path={video_llava}", "model.prompt=llava_v1"] if cls.is_video else []
    common = [f"results={tmp_path / 'results'}", "device=cpu", "n_masks=0", "decoding.max_new_tokens=4", "batch_size=1"]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = compose("config", [f"dataset={request.param}", *common, *words])
        if "judge" in config:
            config = compose("config", [f"dataset={request.param}", "judge=offline", *common, *words])
    return cls, build.resolve(config)


def test_a_benchmark_reads_scores_and_runs_its_examples(example, monkeypatch):
    cls, config = example
    benchmark: Benchmark = build.benchmark(config)
    samples = benchmark.samples()
    assert len(samples) == len(cls.examples) and benchmark.samples() == samples and not benchmark.skipped

    for sample, (row, right, wrong) in zip(samples, cls.examples, strict=True):
        asked = row["question"].partition("?")[0].lower()
        assert asked in sample.question.lower() and sample.question in sample.text
        assert sample.content is None or sample.content in sample.text
        assert all(image.mode == "RGB" for image in benchmark.images(sample.image_id))
        assert benchmark.correct(sample, right) == 1 and benchmark.correct(sample, wrong) == 0
    json.dumps([[sample.answer, sample.meta] for sample in samples])
    for answers, expected in (
        ([example.right for example in cls.examples], 100),
        ([example.wrong for example in cls.examples], 0),
        ([None] * len(samples), 0),
    ):
        scores = benchmark.score(samples, answers)
        metrics = benchmark.metrics(samples, answers, scores)
        assert scores == [expected / 100] * len(samples)
        assert next(iter(metrics.values())) == expected
        assert set(benchmark.standard_errors(samples, scores)) <= set(metrics)

    record = run_cell(config)
    assert record["failed"] == [] and record["n_samples"] == len(samples)
    cell = Cell(config)
    whole = {row["id"]: row["prediction"] for row in cell.rows()}
    file = cell.path / "samples.jsonl"
    first, second, *_ = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[: len(second) // 2])
    (cell.path / "record.json").unlink()
    again = run_cell(config)
    assert {row["id"]: row["prediction"] for row in cell.rows()} == whole
    assert again["metrics"] == record["metrics"] and again["id"] == record["id"]


def test_a_benchmark_without_examples_would_fail():
    class Empty(Benchmark):
        samples = images = correct = None

    assert not Empty.examples
    with pytest.raises(NotImplementedError):
        Empty.write_examples(Path())
