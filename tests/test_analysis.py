"""The paper's numbers, and tables and figures from toy records."""

import io
import json
import math
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from itertools import takewhile

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from analysis import compare, figures, load, masks, methods, pages, report, tables
from experiments import conf
from experiments.benchmarks.base import BenchmarkError
from experiments.tasks import heat
from mipruner.errors import InputError

SPLITS = ("random", "popular", "adversarial")
POPE = ("accuracy", "f1", "yes_rate")
ROW = ["table", "model", "keep", "method", "setting"]


@pytest.fixture(scope="module")
def paper():
    return load.paper()


def pope_rows(paper):
    """Each printed row of POPE as ({metric: value}, {metric: notes}, its key)."""
    for key, row in paper[paper.dataset.eq("pope") & ~paper.table.isin(["table3", "table9"])].groupby(ROW, sort=False):
        values = dict(zip(row.metric, row.value, strict=True))
        notes = dict(zip(row.metric, row.notes, strict=True))
        yield values, notes, dict(zip(ROW, key, strict=True))


def test_paper_is_complete(paper):
    printed = {1: 152, 2: 110, 3: 24, 4: 42, 5: 12, 6: 8, 7: 44, 8: 6, 9: 14, 10: 156, 11: 264}
    assert paper.groupby("table").size().to_dict() == {f"table{n}": count for n, count in printed.items()}
    assert not paper.duplicated([*ROW, "dataset", "metric"]).any()
    assert set(paper.notes.explode().dropna()) == set(load.paper_notes())


@pytest.mark.parametrize("metric", POPE)
def test_pope_averages_are_averages_unless_marked(paper, metric):
    for values, notes, key in pope_rows(paper):
        if f"random_{metric}" not in values:
            continue
        average = sum(values[f"{split}_{metric}"] for split in SPLITS) / 3
        if "pope-average-copied" in notes[metric]:
            assert values[metric] == values[f"adversarial_{metric}"] and abs(average - values[metric]) > 0.0099, key
        else:
            assert abs(average - values[metric]) < 0.0099, key  # every number is rounded to two places


def test_pope_f1_follows_from_accuracy_and_yes_rate_unless_marked(paper):
    """Half of the questions have the answer yes, so true positives are (accuracy + yes - 1/2) / 2."""
    for values, notes, key in pope_rows(paper):
        for prefix in ("", *(f"{split}_" for split in SPLITS)):
            if f"{prefix}f1" in values:
                accuracy, f1, yes = (
                    values[f"{prefix}accuracy"] / 100,
                    values[f"{prefix}f1"],
                    values[f"{prefix}yes_rate"],
                )
                impossible = abs(f1 - (accuracy + yes - 0.5) / (yes + 0.5)) > 0.0125
                assert impossible == ("pope-f1-impossible" in notes[f"{prefix}f1"]), (key, prefix)


def test_pope_recall_is_the_same_in_every_split_unless_marked(paper):
    """The splits share their positive questions; a random choice of tokens may differ between them."""
    for values, notes, key in pope_rows(paper):
        if "random_accuracy" in values and key["method"] != "random":
            recall = [values[f"{s}_accuracy"] / 100 + values[f"{s}_yes_rate"] - 0.5 for s in SPLITS]
            marked = {"pope-yes-swapped", "pope-yes-truncated"} & set(notes["random_yes_rate"])
            assert (max(recall) - min(recall) > 0.0125) == bool(marked), key


def test_pope_is_the_same_in_the_main_paper_and_in_the_appendix(paper):
    pope = paper[paper.dataset.eq("pope") & paper.metric.isin(POPE)]
    values = pope.set_index([*ROW[1:], "metric", "table"]).printed.unstack()
    llava, qwen = values[["table1", "table10"]].dropna(), values[["table2", "table11"]].dropna()
    assert len(llava) == 3 * 9 and (llava.table1 == llava.table10).all()
    assert len(qwen) == 3 * 22 and (qwen.table2 == qwen.table11).all()


def test_known_slips(paper):
    def printed(**key):
        (row,) = paper[(paper[list(key)] == list(key.values())).all(axis=1)].itertuples()
        return row.printed, row.notes

    table1 = {"table": "table1", "model": "llava15_7b"}
    at64, at32 = (printed(**table1, keep=k, method="dart", dataset="mme") for k in ("64", "32"))
    assert at64[0] == at32[0] and "dart-mme-repeated" in at64[1] and "mme-count" in at64[1]
    value, notes = printed(**table1, keep="32", method="fastv", dataset="pope", metric="accuracy")
    assert float(value) < 50 and notes == ["fastv-below-chance"]
    value, notes = printed(table="table7", model="llava15_13b", keep="1.0", dataset="gqa")
    assert value == printed(**table1, keep="1.0", dataset="gqa")[0] and notes == ["gqa-13b-is-7b"]
    accuracy = paper[paper.table.eq("table4") & paper.metric.eq("accuracy")]
    mi = accuracy[accuracy.keep.eq("114") & accuracy.method.eq("mi")].value.to_numpy()
    full = accuracy[accuracy.method.eq("none")].value.to_numpy()
    assert round(100 * mi.sum() / full.sum(), 2) == 93.19 and round(100 * (mi / full).mean(), 1) == 87.5


# -------------------------------------------------------------------------------------------------------- toy records


def toy_config(**options):
    pruner = {"name": "mi", "lam": 1.0, "tau": 0.1, "aggregation": "max", "normalization": "softmax"}
    return {"pruner": pruner | options, "text_scope": "user", "limit": None}


@pytest.fixture(autouse=True)
def toy_defaults(monkeypatch):
    monkeypatch.setattr(load, "default_settings", lambda *names: load.settings(toy_config()))


def write_record(results, model, dataset, pruner, keep, metrics, *, seed=0, n=200, errors=None, failed=(), **options):
    """A finished cell; ``options`` are settings of the pruner that are not the default."""
    words = [f"keep={keep}", *(f"{key}={value}" for key, value in options.items())]
    n_kept = 576 if pruner == "none" else int(keep) if "." not in keep else round(float(keep) * 576)
    layer_mean = (2 * 576 + 30 * n_kept) / 32 if pruner == "fastv" else float(n_kept)
    identity = f"{zlib.crc32(repr((words, n, seed)).encode()):08x}"
    folder = results / model / dataset / pruner / f"{','.join(words)}-{identity}"
    folder.mkdir(parents=True)
    record = {
        "schema": 1,
        "id": identity,
        "cell": {"model": model, "dataset": dataset, "pruner": pruner, "keep": json.loads(keep), "seed": seed},
        "config": toy_config(**options),
        "command": f"python run.py model={model} dataset={dataset} pruner={pruner} keep={keep}",
        "git_commit": "0" * 40,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "toy",
        "started": "2026-11-24T10:00:00",
        "finished": f"2026-11-24T10:{n % 60:02d}:00",
        "n_samples": n,
        "failed": [{"id": str(i), "error": "broken image"} for i in failed],
        "metrics": metrics,
        "standard_errors": errors or {},
        "tokens": {"visual": 576.0, "kept": float(n_kept), "per_layer": [layer_mean] * 32, "layer_mean": layer_mean},
        "latency_ms": {"vision": 7.0, "scoring": 0.5, "prefill": 20.0, "decode": 22.0, "total": 49.5},
        "batch_size": 8,
        "peak_memory_gib": 14.5,
    }
    (folder / "record.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results"


def numbers(results, table, **key):
    """The compared rows of a table that have these values."""
    compared = compare.compare(compare.wanted(table), load.cells(results))
    return compared[(compared[list(key)] == list(key.values())).all(axis=1)]


def number(results, table, **key):
    (row,) = numbers(results, table, **key).itertuples()
    return row


GQA = {"model": "llava15_7b", "dataset": "gqa", "keep": "64"}


def test_nothing_measured_leaves_cells_empty_and_lists_every_command(results):
    compared = compare.compare(compare.wanted("table1"), load.cells(results))
    assert compared.ours.isna().all() and (compared["rank"] == 0).all() and (compared.n_seeds == 0).all()
    layout = tables.lay_out(compared)
    assert len(layout.commands) == 19
    assert layout.commands[0] == (
        "python run.py -m model=llava15_7b dataset=gqa,scienceqa,textvqa,mmvet,mme,pope pruner=none keep=1.0"
    )
    assert sum("pruner=random" in command and command.endswith("seed=0,1,2") for command in layout.commands) == 2
    assert "nan" not in tables.markdown(layout) and "nan" not in tables.latex(layout)


def test_a_measured_cell_stands_beside_the_printed_number(results):
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.123}, errors={"accuracy": 0.44}, n=12578)
    row = number(results, "table1", **GQA, method="mi", metric="accuracy")
    assert (row.ours, row.error, row.n_samples, row.printed) == (57.123, 0.44, 12578, "56.88")
    assert row.difference == pytest.approx(0.243)
    layout = tables.lay_out(compare.compare(compare.wanted("table1"), load.cells(results)))
    assert "57.12 ± 0.44<br>paper <u>56.88</u> (+0.24)" in tables.markdown(layout)
    assert r"57.12{\scriptsize  $\pm$ 0.44}" in tables.latex(layout)
    assert not any("dataset=gqa," in line and "pruner=mi keep=64" in line for line in layout.commands)
    assert any("dataset=scienceqa," in line and "pruner=mi keep=64" in line for line in layout.commands)


def test_best_and_second_best_with_ties_and_gaps(results):
    def ranks(**accuracies):
        for method, accuracy in accuracies.items():
            write_record(results, **GQA, pruner=method, metrics={"accuracy": accuracy})
        got = numbers(results, "table1", **GQA).set_index("method")["rank"]
        shutil.rmtree(results)
        return {method: got[method] for method in accuracies}

    assert ranks(fastv=50.0, dart=52.0, mi=51.0) == {"fastv": 0, "dart": 1, "mi": 2}
    assert ranks(fastv=52.001, dart=52.0, mi=51.0) == {"fastv": 1, "dart": 1, "mi": 2}, "equal as printed is a tie"
    assert ranks(fastv=50.0, dart=52.0, mi=50.0) == {"fastv": 2, "dart": 1, "mi": 2}
    assert ranks(mi=52.0) == {"mi": 0}, "a number that stands alone is not best"


def test_all_tokens_is_never_best_and_serves_every_budget(results):
    write_record(results, "llava15_7b", "gqa", "none", "1.0", {"accuracy": 99.0})
    for method, accuracy in {"dart": 52.0, "mi": 51.0}.items():
        write_record(results, **GQA, pruner=method, metrics={"accuracy": accuracy})
    full = number(results, "table1", model="llava15_7b", dataset="gqa", method="none")
    assert full.ours == 99.0 and full.rank == 0
    assert number(results, "table1", **GQA, method="dart").rank == 1


def test_lower_is_better_for_cost_and_nothing_is_best_for_the_yes_rate(results):
    printed = compare.compare(compare.wanted("table3"), load.cells(results)).set_index(
        ["keep", "method", "setting", "metric"]
    )
    assert printed.printed_rank["64", "mi", "lam=1", "latency_ms"] == 1
    assert printed.printed_rank["64", "mi", "lam=0.5", "latency_ms"] == 2
    assert printed.printed_rank["128", "mi", "lam=0.5", "latency_ms"] == 0
    table10 = compare.wanted("table10").pipe(compare.compare, load.cells(results))
    assert (table10[table10.metric.str.endswith("yes_rate")].printed_rank == 0).all()
    assert (table10[table10.metric == "random_f1"].printed_rank == 1).any()


def test_random_is_mean_and_deviation_over_its_seeds(results):
    for seed, accuracy in enumerate([50.0, 52.0, 54.0]):
        write_record(
            results, **GQA, pruner="random", metrics={"accuracy": accuracy}, errors={"accuracy": 3.3}, seed=seed
        )
    row = number(results, "table1", **GQA, method="random")
    assert (row.ours, row.error, row.n_seeds) == (52.0, 2.0, 3)
    shutil.rmtree(results)
    write_record(results, **GQA, pruner="random", metrics={"accuracy": 50.0}, errors={"accuracy": 3.3}, seed=1)
    row = number(results, "table1", **GQA, method="random")
    assert (row.ours, row.error, row.n_seeds) == (50.0, 3.3, 1)
    layout = tables.lay_out(compare.compare(compare.wanted("table1"), load.cells(results)))
    assert "One seed only." in layout.footnotes.values()


def test_an_ablation_never_fills_a_main_table_nor_the_other_way_round(results):
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 55.0}, tau=0.01)
    assert math.isnan(number(results, "table1", **GQA, method="mi").ours)
    assert number(results, "table5", **GQA, setting="tau=0.01").ours == 55.0
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.0})
    assert number(results, "table1", **GQA, method="mi").ours == 57.0
    assert number(results, "table5", **GQA, setting="tau=0.1").ours == 57.0, "the default is the row of its own value"
    assert number(results, "table6", **GQA, setting="normalization=softmax").ours == 57.0
    assert math.isnan(number(results, "table6", **GQA, setting="normalization=minmax").ours)
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 1.0}, tau=0.5, normalization="minmax")
    assert math.isnan(number(results, "table5", **GQA, setting="tau=0.5").ours), "differs in more than tau"


def test_a_record_older_than_an_option_was_made_with_its_default(results, monkeypatch):
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.0})
    monkeypatch.setattr(load, "default_settings", lambda *names: load.settings(toy_config(support="prompt")))
    assert number(results, "table1", **GQA, method="mi").ours == 57.0
    assert load.cells(results).settings[0]["support"] == "prompt"


def test_a_seed_of_the_dataset_makes_other_questions():
    seeds = {"dataset": {"benchmark": {"seed": 1}}, "pruner": {"seed": 2}, "decoding": {"seed": 2}}
    assert load.settings(seeds) == {"dataset.benchmark.seed": 1}


@pytest.mark.parametrize("option", ["results=elsewhere", "judge.concurrency=2", "model.device_map=auto"])
def test_what_changes_no_number_hides_no_cell_from_the_tables(option, real_defaults):
    words = ["model=llava15_7b", "dataset=mmvet", "pruner=mi"]
    with initialize_config_dir(str(load.CONF), version_base=None):
        config = OmegaConf.to_container(compose("config", [*words, option]), resolve=True)
    assert load.settings(config) == load.default_settings("llava15_7b", "mmvet", "mi")


def test_shares_have_two_decimals_whatever_their_prefix(results):
    metrics = {"accuracy": 95.123, "pope_f1": 0.956, "pope_yes_rate": 0.444}
    write_record(results, "demo_llava", "demo_pope", "mi", "16", metrics)
    markdown = tables.markdown(tables.lay_out(compare.compare(compare.wanted("demo_table10"), load.cells(results))))
    assert "| 95.1 | 0.96 | 0.44 |" in markdown


def test_one_token_and_all_tokens_are_different_budgets(results):
    write_record(results, "llava15_7b", "gqa", "mi", "1", {"accuracy": 40.0})
    cells = list(load.cells(results).itertuples())
    assert compare.find(cells, "mi", "1.0") == [] and compare.find(cells, "mi", "1") == cells


def test_of_two_runs_the_one_with_more_samples_counts_and_odd_counts_are_said(results):
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 90.0}, n=50)
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.0}, n=200)
    write_record(results, **GQA, pruner="dart", metrics={"accuracy": 50.0}, n=50, failed=(3, 4))
    assert number(results, "table1", **GQA, method="mi").ours == 57.0
    layout = tables.lay_out(compare.compare(compare.wanted("table1"), load.cells(results)))
    texts = set(layout.footnotes.values())
    assert {"Over 50 samples only.", "2 of 50 samples failed and count as wrong."} <= texts
    assert "Samples: GQA 200." in " ".join(layout.remarks)


def test_nominal_and_layer_mean_tokens_stand_in_their_own_columns(results):
    write_record(results, **GQA, pruner="fastv", metrics={"accuracy": 50.0})
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.0})
    layout = tables.lay_out(compare.compare(compare.wanted("table1"), load.cells(results)))
    start = next(k for k, row in enumerate(layout.table.rows) if isinstance(row, str) and row.endswith("keep 64"))
    rows = {
        row[0][0]: row[1:3] for row in takewhile(lambda row: not isinstance(row, str), layout.table.rows[start + 1 :])
    }
    assert rows["FastV"] == ["64", "96"] and rows["MI-Pruner"] == ["64", "64"] and rows["DART"] == ["", ""]


@pytest.mark.parametrize("name", compare.table_names())
def test_every_table_in_every_format(results, tmp_path, name):
    for want in compare.wanted(name).drop_duplicates(["model", "keep", "method", "dataset"])[::2].itertuples():
        metrics = {metric: 12.3456 for metric in compare.wanted(name).metric.unique()}
        write_record(results, want.model, want.dataset, want.method, want.keep, metrics)
    markdown, latex, csv = (path.read_text() for path in tables.write([name], results, tmp_path / "out"))
    compared = compare.compare(compare.wanted(name), load.cells(results))
    table = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1
    assert len(pd.read_csv(io.StringIO(csv))) == len(compared)
    for printed in compared.printed[compared.printed != ""]:
        assert printed in markdown and printed in latex
    assert latex.count(r"\begin{") == latex.count(r"\end{") == 2
    body = latex[latex.index(r"\toprule") : latex.index(r"\bottomrule")]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    width = 3 + compared.groupby(["dataset", "metric"]).ngroups
    assert all(len(re.findall(r"(?<!\\)&", line)) == width - 1 for line in lines if "multicolumn" not in line)
    assert not re.search(r"(?<![\\])[%#_]", re.sub(r"\\label{.*}", "", latex.split("\n", 1)[1].replace("{!}{%", "")))


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs a LaTeX installation")
def test_latex_compiles(results, tmp_path):
    write_record(results, **GQA, pruner="fastv", metrics={"accuracy": 50.0}, errors={"accuracy": 0.4}, failed=(1,))
    written = tables.write(compare.table_names(), results, tmp_path)
    inputs = "\n".join(rf"\input{{{path.name}}}\clearpage" for path in written if path.suffix == ".tex")
    document = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "all.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout[-2000:]
    assert "Overfull" not in run.stdout


def test_an_unknown_table_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"there is no table 'tabel1'.*table1, table2"):
        compare.wanted("tabel1")


def test_a_broken_record_is_named(results):
    folder = write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.0})
    (folder / "record.json").write_text('{"schema": 1')
    with pytest.raises(ValueError, match=r"record\.json is not a finished record.*delete its folder"):
        load.cells(results)


def write_costs(results, model, rows, date="2026-11-24T10:00:00", device="NVIDIA H100", words=""):
    """A file of task=efficiency: {(method, keep, engine): (median latency, memory)}."""
    folder = results / "efficiency"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python run.py {words}",
        "git_commit": "0" * 40,
        "date": date,
        "machine": {"device": device},
        "clock": "wall",
        "model": model,
        "repetitions": 30,
        "rows": [
            {
                "method": method,
                "keep": keep,
                "engine": engine,
                "visual_tokens": 576,
                "visual_tokens_layer_mean": 64.0,
                "latency_ms": {
                    "vision": {"median": ms / 4},
                    "prefill": {"median": ms / 2},
                    "total": {"median": ms, "p20": ms - 1, "p80": ms + 2},
                },
                "peak_memory_gib": gib,
            }
            for (method, keep, engine), (ms, gib) in rows.items()
        ],
    }
    (folder / f"{model}-{date.replace(':', '')}.json").write_text(json.dumps(record))


def test_costs_fill_the_efficiency_tables_and_the_newest_counts(results):
    write_costs(results, "llava15_7b", {("mi lam=1", 64, "pipeline"): (99.0, 20.0)}, date="2026-11-23T10:00:00")
    rows = {
        ("mi lam=1", 64, "pipeline"): (40.0, 14.0),
        ("mi lam=1", 64, "engine"): (10.0, 15.0),
        ("mi lam=0.5", 64, "pipeline"): (41.0, 14.0),
        ("dart", 128, "pipeline"): (50.0, 14.5),
    }
    write_costs(results, "llava15_7b", rows)
    row = number(results, "table3", keep="64", method="mi", setting="lam=1", metric="latency_ms")
    assert (row.ours, row.error, row.n_kept, row.device, row.rank) == (40.0, 1.5, 64, "NVIDIA H100", 1)
    assert number(results, "table3", keep="128", method="dart", metric="peak_memory_gib").ours == 14.5
    assert math.isnan(number(results, "table3", keep="128", method="mi", setting="lam=1", metric="latency_ms").ours)
    layout = tables.lay_out(compare.compare(compare.wanted("table3"), load.cells(results)))
    assert layout.commands == ["python run.py experiment=table3"]
    assert "Measured on NVIDIA H100, one prompt at a time, median of 30" in " ".join(layout.remarks)
    assert number(results, "demo_table3", keep="64", method="mi", setting="lam=1", metric="latency_ms").n_seeds == 0


def test_costs_of_a_table_are_those_of_its_own_experiment(results):
    """None of another run slips in, newer or longer as it may be: all methods of a table ran side by side."""
    key = ("mi lam=1", 64, "pipeline")
    write_costs(results, "llava15_7b", {key: (40.0, 14.0)}, words="experiment=table3")
    write_costs(results, "llava15_7b", {key: (9.0, 9.0)}, date="2026-11-25T10:00:00", words="clock=cpu keeps=[64]")
    row = {"method": "mi", "setting": "lam=1", "keep": "64", "metric": "latency_ms"}
    assert number(results, "table3", **row).ours == 40.0


# ------------------------------------------------------------------------------------------------------------- figures


def fill(results, source, accuracy=lambda want: 50.0, skip=lambda want: False):
    """A record for every number that a table or experiment wants."""
    for want in compare.wanted(source).drop_duplicates(["model", "dataset", "method", "keep", "setting"]).itertuples():
        if not skip(want):
            options = {
                k: json.loads(v) if v[0].isdigit() else v for k, v in compare.parse_setting(want.setting).items()
            }
            metrics = dict.fromkeys(conf.read("dataset", want.dataset)["shown"], accuracy(want))
            write_record(results, want.model, want.dataset, want.method, want.keep, metrics, **options)


def drawn(figure, ax=0):
    """{label: (x, y)} of the points with error bars in one panel."""
    return {bar.get_label(): tuple(map(list, bar.lines[0].get_data())) for bar in figure.axes[ax].containers}


def test_accuracy_over_budget(results):
    fill(
        results,
        "fig4",
        accuracy=lambda want: 60.0 if want.method == "none" else 10.0 * float(want.keep),
        skip=lambda want: want.method == "dart" or (want.method == "mi" and want.keep == "0.5"),
    )
    figure = figures.draw_figure("fig4", load.cells(results))
    assert [ax.get_title() for ax in figure.axes] == ["Qwen2-VL-7B", "Qwen2.5-VL-7B"]
    lines = drawn(figure)
    assert lines["FastV"] == ([75, 50, 25], [7.5, 5.0, 2.5])
    assert lines["MI-Pruner"][1][::2] == [7.5, 2.5] and math.isnan(lines["MI-Pruner"][1][1]), "a gap, not a guess"
    assert "DART" not in lines
    (full,) = (line for line in figure.axes[0].lines if line.get_label() == "All tokens")
    assert set(full.get_ydata()) == {60.0}


def test_accuracy_over_lam_names_the_best_of_each_budget(results):
    fill(results, "fig6b", accuracy=lambda want: 50 - 10 * abs(float(want.setting.split("=")[1]) - 0.6))
    figure = figures.draw_figure("fig6b", load.cells(results))
    x, y = drawn(figure)["keep 64"]
    assert x == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1] and max(y) == y[6] == 50.0
    assert [(text.get_text(), text.xy) for text in figure.axes[0].texts] == [("50.0", (0.6, 50.0))] * 2


def test_choices_stand_beside_the_papers(results):
    fill(results, "table6", accuracy=lambda want: 70.0 if want.setting.endswith("softmax") else 60.0)
    figure = figures.draw_figure("table6", load.cells(results))
    assert drawn(figure)["normalization = softmax"][1] == [70.0] * 4
    printed = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert printed["normalization = softmax, paper"] == [56.88, 55.78, 69.81, 69.26]


def test_tradeoff_has_a_point_for_every_measured_method(results):
    fill(results, "table1", skip=lambda want: want.method in ("dart", "random"))
    figure = figures.draw_figure("tradeoff", load.cells(results))
    assert len([ax for ax in figure.axes if ax.get_title()]) == 2 * 6
    assert set(drawn(figure)) == {compare.METHODS[m] for m in compare.wanted("table1").method} - {
        "DART",
        "Random",
        "All tokens",
    }
    assert all(x == [49.5] for x, _ in drawn(figure).values())
    costs = {"fastv": 30.0, "mi lam=1": 20.0, "mi lam=0.5": 25.0}
    write_costs(results, "llava15_7b", {(m, 64, "pipeline"): (ms, 14.0) for m, ms in costs.items()})
    figure = figures.draw_figure("tradeoff", load.cells(results))
    points = {method: x for method, (x, _) in drawn(figure).items()}
    assert points == {"MI-Pruner": [20.0], "FastV": [30.0]}, "of MI-Pruner's two costs that of the lam it ran with"


def test_stages_stack_up_per_method(results):
    rows = {("none", 1.0, "pipeline"): (80.0, 14.0), ("dart", 64, "pipeline"): (40.0, 14.0)}
    write_costs(results, "demo_llava", rows)
    figure = figures.draw_figure("demo_fig2", load.cells(results))
    bars = {bar.get_label(): bar.patches for bar in figure.axes[0].containers}
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["DART", "All tokens"]
    assert [bar.get_width() for bar in bars["vision"]] == [10, 20] and [b.get_width() for b in bars["scoring"]] == [
        0,
        0,
    ]
    assert [bar.get_x() for bar in bars["prefill"]] == [10, 20] and [b.get_width() for b in bars["prefill"]] == [20, 40]


def test_figures_are_written_where_something_was_measured(results, tmp_path):
    write_record(results, **GQA, pruner="mi", metrics={"accuracy": 57.0})
    one = figures.write(list(figures.FIGURES), results, tmp_path / "out")
    assert {path.stem for path in one} == {"tradeoff"}, "an ablation needs two values"
    shutil.rmtree(results)
    fill(results, "table5")
    written = figures.write(list(figures.FIGURES), results, tmp_path / "out")
    assert {path.name for path in written} >= {"table5.pdf", "table5.png"}
    assert all(path.stat().st_size > 5_000 for path in written)
    with pytest.raises(ValueError, match=r"no figure 'fig9'.*fig4"):
        figures.draw_figure("fig9", load.cells(results))


def test_every_method_has_a_name_and_a_style():
    from mipruner import PRUNERS

    assert set(PRUNERS) == set(compare.METHODS) == {"none", *figures.STYLES}
    pairs = {(colour, marker) for colour, marker, _ in figures.STYLES.values()}
    assert len(pairs) == len(figures.STYLES), "two methods look the same"


# --------------------------------------------------------------------------------------------------- report and gallery


def sample_row(sample, correct, prediction="yes", question="Is there a cup ?", task="pope", kept=(0, 5)):
    return {
        "id": sample,
        "image_id": sample,
        "task": task,
        "question": question,
        "answer": "yes",
        "prediction": prediction,
        "correct": correct,
        "n_visual": 6,
        "grids": [[2, 3]],
        "boxes": [[0, -10, 60, 50]],
        "kept": [list(kept)],
    }


def test_disagreements_come_first_by_spread_and_never_without():
    answered = [
        {s: sample_row(s, c) for s, c in {"a": 1, "b": 1, "c": 1, "d": 0, "only": 1}.items()},
        {s: sample_row(s, c) for s, c in {"a": 1, "b": 0, "c": 0.6, "d": 0}.items()},
    ]
    assert masks.disagreements(answered, 5) == ["b", "c"]
    assert masks.disagreements(answered, 1) == ["b"]
    assert masks.disagreements(answered[:1], 5) == []


def test_gallery_escapes_what_models_and_data_say():
    evil = "<script>alert('&')</script>"
    rows = {
        "none": sample_row("s", 1.0),
        "mi": sample_row("s", 0.0, prediction=evil, question=evil, task=evil),
        "random": sample_row("s", None) | {"prediction": None, "error": evil},
    }
    rows["none"] |= {"question": evil, "answer": evil, "task": evil, "id": evil}
    text = report.case_html(report.Case("demo_llava", evil, "16", Image.new("RGB", (60, 40)), rows))
    assert "<script" not in text and "alert(&#x27;&amp;&#x27;)" in text
    data = report.gallery_data([report.Case("demo_llava", evil, "16", Image.new("RGB", (60, 40)), rows)])
    assert "<" not in data
    (view,) = json.loads(data)["views"]
    (question,) = view["questions"]
    assert (question["question"], question["expected"], view["grid"]) == (evil, evil, [2, 3])
    whole, pruned, failed = question["runs"]
    assert (whole["right"], pruned["right"], pruned["answer"], pruned["kept"]) == (True, False, evil, [0, 5])
    assert failed["error"] == evil and set(json.loads(data)["images"]) == {view["src"]}


class Page(HTMLParser):
    """Checks that tags are closed in order and collects what a page refers to."""

    VOID = ("meta", "img", "br", "image", "use", "path", "tr", "th", "td", "li", "p", "html", "option", "defs")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_report_of_nothing_is_a_page_with_the_papers_numbers(results):
    text = report.page(load.cells(results), 3)
    Page(text)
    assert "Nothing has been measured yet" in text and "<u>56.88</u>" in text


def test_report_of_toy_records(results, tmp_path, monkeypatch):
    for method, correct in {"none": [1, 1], "mi": [1, 0], "random": [0, 0]}.items():
        keep = "1.0" if method == "none" else "16"
        folder = write_record(results, "demo_llava", "demo", method, keep, {"accuracy": 50.0})
        lines = [json.dumps(sample_row(str(i), c)) for i, c in enumerate(correct)]
        (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")

    class Images:
        def images(self, image_id):
            return [Image.new("RGB", (60, 40), "red")]

    class Nowhere:
        def images(self, image_id):
            raise BenchmarkError("no network")

    monkeypatch.setattr(report.build, "benchmark", lambda config: Nowhere())
    assert next(report.cases(load.cells(results), 3), None) is None, "numbers need no images"
    monkeypatch.setattr(report.build, "benchmark", lambda config: Images())
    text = report.page(load.cells(results), 3)
    page = Page(text)
    assert text.count("<article") == 1 and "sample 0<" in text, "only on the first question do methods disagree"
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("data:", "#")) for link in page.links), "nothing outside the page is needed"
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "3 result records" in text and "<figure><img" in text


def test_a_method_that_is_not_installed_stops_no_report(results, tmp_path):
    for method in ("mi", "somebodys_own"):
        folder = write_record(results, **GQA, pruner=method, metrics={"accuracy": 57.0})
        (folder / "samples.jsonl").write_text(json.dumps(sample_row("0", 1)) + "\n")
    cells = load.cells(results)
    assert "2 result records" in report.page(cells, 1)
    assert figures.write(["tradeoff"], results, tmp_path / "out")


@pytest.mark.parametrize("name", ["demo", "methods"])
def test_a_page_keeps_its_numbers_where_records_are_missing(results, monkeypatch, capsys, name):
    page = pages.ROOT / pages.PAGES[name]
    before = page.read_bytes()
    monkeypatch.setattr("sys.argv", ["pages", name, "--results", str(results)])
    with pytest.raises(SystemExit, match="2"):
        pages.main()
    assert page.read_bytes() == before
    assert f"{pages.PAGES[name]} keeps its part {name}: there are no records" in capsys.readouterr().err
    some = pd.DataFrame({"method": ["mi"] * 2, "keep": methods.BUDGETS[:2]})
    with pytest.raises(ValueError, match=f"no record of mi keep={methods.BUDGETS[2]}.*: python run.py -m experiment="):
        pages.check_complete(some, ["mi"])


def test_footnotes_count_answers_that_are_none_and_rows_left_out(tmp_path):
    folder = write_record(tmp_path, "llava15_7b", "pope", "mi", "64", {"accuracy": 50.0}, n=100)
    record = json.loads((folder / "record.json").read_text())
    record |= {"unusable": {"empty": 2, "unreadable": 40}, "skipped": ["row 3"]}
    (folder / "record.json").write_text(json.dumps(record))
    layout = tables.lay_out(tables.compare(tables.wanted("table1"), load.cells(tmp_path)))
    assert {
        "1 rows of the data could not be used and were left out.",
        "More than 5% of the answers are unreadable.",
    } <= set(layout.footnotes.values())
    assert not any("are empty." in text for text in layout.footnotes.values())
    assert any(line.startswith("Of 100 answers 2 are empty, and in 40 others") for line in layout.remarks)


# --------------------------------------------------------------------------------------- records of the embedded model


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Cells that run.py really ran, on the three scenes of about twelve questions."""
    from experiments.build import resolve
    from experiments.cell import run_cell

    root = tmp_path_factory.mktemp("demo")
    for words in (["pruner=none"], ["pruner=mi", "keep=8"], ["pruner=random", "keep=8"], ["keep=8", "pruner.tau=0.5"]):
        words = ["dataset=demo_pope", "limit=12", f"results={root}", "n_masks=0", *words]
        with initialize_config_dir(str(load.CONF), version_base=None):
            run_cell(resolve(compose("config", words)), words)
    return root


@pytest.fixture
def real_defaults(monkeypatch, toy_defaults):
    monkeypatch.undo()


def test_real_records_are_read_with_what_differs_from_conf(demo, real_defaults):
    cells = load.cells(demo)
    read = sorted((cell.method, cell.keep, cell.n_kept, sorted(cell.differs)) for cell in cells.itertuples())
    assert read == [("mi", "8", 8, []), ("mi", "8", 8, ["tau"]), ("none", "1.0", 576, []), ("random", "8", 8, [])]
    assert all({"accuracy", "total_ms_in_batches"} <= set(metrics) for metrics in cells.metrics)


def test_masks_of_what_is_not_there_is_one_clear_message(demo, tmp_path, monkeypatch, capsys):
    cell = str(load.cells(demo).iloc[0].path)
    for words, message in (
        ([str(tmp_path)], f"{tmp_path} is no folder of a finished cell"),
        ([cell, "--ids", "nope"], f"{cell} has no sample nope; the first is "),
    ):
        monkeypatch.setattr("sys.argv", ["masks", *words, "--out", str(tmp_path / "masks.png")])
        with pytest.raises(SystemExit) as end:
            masks.main()
        assert end.value.code == 2 and message in capsys.readouterr().err
    config = {"cell": cell, "samples": 1, "ids": None, "words": ["zebra"], "out": str(tmp_path / "heat.png")}
    with pytest.raises(InputError, match="zebra is not among the text tokens"):
        heat.run(config, [], masks.draw_heat)
    with pytest.raises(InputError, match="no folder of a finished cell"):
        heat.run(config | {"cell": str(tmp_path / "no*")}, [], masks.draw_heat)


def test_images_of_real_records(demo, real_defaults, tmp_path):
    cells = load.cells(demo)
    paths = list(cells[cells.method != "none"].path)
    benchmark = report.build.benchmark(cells.iloc[0].config)
    read = [masks.read_cell(path) for path in paths]
    sample = masks.choose(list(read[0][1].values()), 1)
    masks.draw(read, benchmark, sample, tmp_path / "masks.png")
    masks.draw_dialogue(read, benchmark, sample[0], tmp_path / "dialogue.png")
    masks.draw_heat(paths[0], heat.word_pmi, tmp_path / "heat.png", ids=sample)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert set(sizes) == {"masks", "dialogue", "heat"} and all(min(size) > 200 for size in sizes.values())
    text = report.page(cells, 2)
    Page(text)
    assert "data:image/jpeg;base64," in text


def test_the_word_pulls_the_patches_of_what_it_names(demo, real_defaults):
    """The demo model was trained to this, so the heat map must show it: the noun's PMI peaks on the object."""
    cells = load.cells(demo)
    cell = cells[cells.method == "mi"].iloc[0]
    benchmark = report.build.benchmark(cell.config)
    hits = []
    for row in masks.read_cell(cell.path)[1].values():
        objects = {o.noun: o.box for o in benchmark.scene(int(row["image_id"])).objects}
        noun = next((word for word in row["question"].split() if word in objects), None)
        if noun:
            words, pmi = heat.word_pmi(cell.config, benchmark, row["id"])
            row_of, column_of = divmod(int(pmi[:, [w.strip() for w in words].index(noun)].argmax()), 24)
            left, top, right, bottom = objects[noun]
            hits.append(left - 14 <= 14 * column_of <= right and top - 14 <= 14 * row_of <= bottom)
    assert len(hits) >= 4 and sum(hits) >= 0.75 * len(hits)


def test_words_of_the_heat_map():
    pmi = np.array([[3.0, 0, 0], [0, 2.0, 1.0], [0, 1.0, 0], [0, 0, 9.0]])
    texts = [" What", " color", " sun"]
    assert masks.shown_words(texts, pmi, [0, 1, 2], []) == [0, 1], "the pivot words of what was kept, in reading order"
    assert masks.shown_words(texts, pmi, [0], ["sun", "What"]) == [0, 2]
    with pytest.raises(ValueError, match="moon is not among the text tokens What color sun"):
        masks.shown_words(texts, pmi, [0], ["moon"])
