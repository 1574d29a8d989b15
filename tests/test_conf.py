"""Every word of the command line composes, and names something that exists and takes what the file gives it."""

import importlib
import inspect
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments import build, conf, settings
from experiments.results import ROOT, cell_id
from mipruner.models import load
from mipruner.pruners import PRUNERS

CONF = ROOT / "conf"


def words(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def resolved(*overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return build.resolve(compose("config", list(overrides)))


@pytest.mark.parametrize("word", words("model"))
def test_models(word):
    path = ["model.path=folder/any"] if word == "any" else []
    model = resolved(f"model={word}", *path)["model"]
    assert model.pop("name") == word
    importlib.import_module(f"mipruner.models.{model.pop('family')}")
    inspect.signature(load).bind(**model, device="cpu")


@pytest.mark.parametrize("word", words("dataset"))
def test_datasets(word):
    dataset = resolved(f"dataset={word}")["dataset"]
    assert dataset["name"] == word and 0 <= dataset["lam"] <= 1 and dataset["max_new_tokens"] > 0
    benchmark = dataset["benchmark"]
    inspect.signature(build.benchmark_class(benchmark.pop("name"))).bind(**benchmark)


@pytest.mark.parametrize("word", words("pruner"))
def test_pruners(word):
    assert type(build.pruner(resolved(f"pruner={word}"))) is PRUNERS[word]


def test_every_pruner_has_a_file():
    own = [name for name, cls in PRUNERS.items() if cls.__module__.startswith("mipruner.")]
    assert words("pruner") == sorted(own)


@pytest.mark.parametrize("word", words("logger"))
def test_loggers(word):
    assert resolved(f"logger={word}")["logger"]["name"] == word


@pytest.mark.parametrize("word", words("prior"))
def test_priors(word):
    assert build.pruner(resolved(f"prior={word}")).prior == "estimated"


@pytest.mark.parametrize("word", words("ablation"))
def test_ablations(word):
    with initialize_config_dir(str(CONF), version_base=None):
        swept = compose("config", [f"ablation={word}"], return_hydra_config=True).hydra.sweeper.params
    for key, values in swept.items():
        for value in str(values).split(","):
            build.pruner(resolved(f"ablation={word}", "prior=demo", f"{key}={value}"))


def test_lam_comes_from_the_dataset_and_can_be_overridden():
    assert resolved("dataset=gqa")["pruner"]["lam"] == 0.5
    assert resolved("dataset=pope")["pruner"]["lam"] == 1
    assert resolved("dataset=pope", "pruner=mi_attention", "pruner.lam=0.8")["pruner"]["lam"] == 0.8


def test_keep_tells_one_token_from_everything():
    assert [(type(k), k) for k in (resolved(f"keep={word}")["keep"] for word in ("1", "1.0", "0.25"))] == [
        (int, 1),
        (float, 1.0),
        (float, 0.25),
    ]


def test_another_judge_makes_another_cell_however_it_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    openai, own = resolved("dataset=mmvet"), resolved("dataset=mmvet", "judge.base_url=http://localhost:8000/v1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert cell_id(openai) != cell_id(own) == cell_id(resolved("dataset=mmvet"))


def test_a_method_by_its_words_is_that_of_its_file():
    """A task that measures several methods builds them from words such as ``mi lam=1``, without their YAML files."""
    for name in PRUNERS.keys() - {"mi"}:
        assert build.method(name, resolved("dataset=gqa")) == build.pruner(resolved("dataset=gqa", f"pruner={name}"))
    assert build.method("mi lam=1", resolved("dataset=gqa")) == build.pruner(resolved("pruner=mi", "pruner.lam=1"))


@pytest.mark.parametrize("word", words("task"))
def test_every_task_can_be_started_and_says_what_it_does(word):
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("config", [f"task={word}", *["model.path=a"] * (word == "accept")])
    config = OmegaConf.to_container(cfg, resolve=True)
    settings.check(config)
    module = importlib.import_module(config["task"])
    assert list(inspect.signature(module.run).parameters)[:2] == ["config", "overrides"]
    head = (CONF / "task" / f"{word}.yaml").read_text().splitlines()
    assert head[0] == "# @package _global_" and head[1].startswith("# ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["efficiency", "experiment=table3"], "python run.py task=efficiency experiment=table3"),
        (["efficiency", "estimate", "model=qwen3vl_8b"], "python run.py task=estimate model=qwen3vl_8b"),
        (["train_demo"], "python run.py task=train_demo"),
        (["serving", "--soak", "1000"], "python run.py task=serving"),
    ],
)
def test_old_commands_name_the_new_one(old, new):
    command = [sys.executable, "-m", f"experiments.{old[0]}", *old[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().endswith(new)


def test_defaults_by_family_are_what_the_public_code_of_a_method_does_there():
    """Of the method's public code for Qwen-VL; a word of the command line still wins."""
    for model in ("qwen2vl_2b", "qwen25vl_7b", "qwen3vl_30b", "qwen35_9b", "demo_qwen3vl"):
        mmtok = build.pruner(resolved(f"model={model}", "pruner=mmtok"))
        assert (mmtok.tau_text, mmtok.stop_words, mmtok.prefix, mmtok.rounding) == (0.01, False, "Question: ", "down")
        assert build.method("mmtok", resolved(f"model={model}")) == mmtok
        assert build.pruner(resolved(f"model={model}", "pruner=dart")).budget(0.222, 576) // 8 * 8 + 4 == 124
    for model in ("llava15_13b", "llava_onevision_7b", "internvl3_8b", "demo_llava"):
        assert build.pruner(resolved(f"model={model}", "pruner=mmtok")) == PRUNERS["mmtok"]()
        assert build.pruner(resolved(f"model={model}", "pruner=dart")).budget(0.222, 576) // 8 * 8 + 4 == 132
    assert build.pruner(resolved("model=qwen2vl_7b", "pruner=mmtok", "pruner.tau_text=0.5")).tau_text == 0.5


@pytest.mark.parametrize("group", ["model", "dataset"])
def test_titles_tell_models_and_data_sets_apart(group):
    titles = [conf.title(group, name) for name in conf.names(group)]
    assert len(set(titles)) == len(titles) and not set(titles) & set(conf.names(group))


def test_what_describes_a_cell_is_not_in_its_record():
    record = resolved("model=llava15_7b", "dataset=pope")
    assert not set(conf.ABOUT) & (record["model"].keys() | record["dataset"].keys())
    assert all(conf.read("dataset", name)["shown"] for name in words("dataset"))


def test_the_title_of_an_experiment_is_its_first_sentence():
    assert conf.experiment_title("fig4").startswith("Fig. 4: accuracy on GQA over the budget")
    assert conf.experiment_title("table1") == "Table 1: pruning methods on LLaVA-1.5-7B, 64 and 32 tokens"
    assert all(conf.experiment_title(name) for name in words("experiment"))
