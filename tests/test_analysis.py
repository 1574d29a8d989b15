"""The paper's numbers, and tables and figures from toy records."""

import pytest

from analysis import load

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
