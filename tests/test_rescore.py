"""task=rescore on small made files with the traits of public ones."""

import json

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from analysis import load
from experiments.results import ROOT
from experiments.tasks import rescore
from mipruner.errors import InputError


def config_of(tmp_path, *words):
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", ["task=rescore", "dataset=demo_pope", "pruner=none", f"results={tmp_path}", *words])
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.fixture(scope="module")
def samples():
    from experiments.benchmarks.demo import Demo

    return Demo(tasks=["pope"]).samples()


def record_of(tmp_path, lines, *words):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(lines) + "\n")
    rescore.run(config_of(tmp_path / "results", f"file={file}", *words), ["task=rescore"])
    (path,) = (tmp_path / "results").glob("*/*/*/*/record.json")
    return json.loads(path.read_text()), [json.loads(line) for line in (path.parent / "samples.jsonl").open()]


def line(question_id, text):
    return json.dumps({"question_id": question_id, "prompt": "left alone", "text": text})


def test_answers_with_the_traits_of_public_files(tmp_path, samples, capsys):
    """Missing and repeated ids, reasoning before the answer, line ends and blanks, an answer to no question."""
    right = {s.id: s.answer for s in samples}
    wrong = {"yes": "no", "no": "yes"}
    ids = list(right)
    lines = [line(k, right[k]) for k in ids[5:]]
    lines += [
        line(ids[0], f"<think>yes or no? yes, no.</think>\n\n{right[ids[0]]}\n"),
        line(ids[1], f"  {right[ids[1]]}\n "),
    ]
    lines += [line(ids[2], wrong[right[ids[2]]]), "", line(ids[2], right[ids[2]].capitalize() + ".")]
    lines += [line(ids[3], "")]
    lines += [line("no such question", "yes")]
    record, rows = record_of(tmp_path, lines)
    assert record["failed"] == [{"id": ids[4], "error": "the file has no answer to it"}]
    assert record["unusable"]["empty"] == 1
    assert record["n_samples"] == len(ids) == len(rows)
    by_id = {row["id"]: row for row in rows}
    assert [by_id[k]["correct"] for k in ids[:3]] == [1, 1, 1]
    assert by_id[ids[4]]["correct"] == 0 and by_id[ids[4]]["prediction"] is None
    assert all(by_id[k]["correct"] == 1 for k in ids[5:])
    assert record["provenance"]["answered_again"] == 1 and record["provenance"]["answers_to_no_question"] == 1
    said = capsys.readouterr()
    assert "1 answers came again" in said.err and "1 answers are to no question" in said.err

    cells = load.cells(tmp_path / "results")
    assert cells.metrics[0]["accuracy"] == record["metrics"]["accuracy"], "it stands in tables like any other record"


def test_a_prefix_names_a_part_of_the_questions(tmp_path, samples):
    prefix = samples[0].id[:1]
    part = [s for s in samples if s.id.startswith(prefix)]
    record, rows = record_of(tmp_path, [line(s.id.removeprefix(prefix), s.answer) for s in part], f"prefix='{prefix}'")
    assert len(rows) == len(part) and not record["failed"]
    assert record["metrics"]["accuracy"] == 100


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["no json"], "line 1 is no JSON object"),
        ([json.dumps({"question_id": 1})], "line 1 is no JSON object with question_id and text"),
        ([line("else", "yes")], "no question_id of .* such as 'else' there"),
        ([json.dumps([1])], "line 1"),
    ],
)
def test_files_that_cannot_be_scored(tmp_path, lines, match):
    with pytest.raises(InputError, match=match):
        record_of(tmp_path, lines)
    assert not list(tmp_path.glob("results/*/*/*/*/record.json"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot read the answers"):
        rescore.run(config_of(tmp_path, f"file={tmp_path}/none.jsonl"))
    with pytest.raises(InputError, match="give file"):
        rescore.run(config_of(tmp_path))
