"""The plug-in inside vLLM itself, in an environment of its own: `make test-vllm`. Skipped in any other.

Every answer is compared with that of `Pipeline`, token for token, in float32.
"""

import gc
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

pytest.importorskip("mipruner_vllm", reason="vLLM lives in an environment of its own: make test-vllm")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where tests can look at its model
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from mipruner_vllm import processor, settings
from mipruner_vllm.model import VisionRows
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from experiments import build
from experiments.benchmarks.base import BenchmarkError
from experiments.benchmarks.demo import Demo
from experiments.cell import run_cell
from experiments.results import ROOT, Cell
from experiments.served import serve
from experiments.soak import soak
from experiments.tasks.serving import scenes
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.models import Prompt, load
from mipruner.pipeline import Pipeline
from mipruner.pruners import PRUNERS

LLAVA, QWEN = str(ROOT / "experiments/demo/llava"), str(ROOT / "experiments/demo/qwen3vl")
MI = {"pruner": "mi", "keep": 1.0, "options": {"lam": 0.5}}
CANVASES = [(336, 336), (280, 280), (336, 252), (252, 336)]
BUDGETS = {LLAVA: (576, 64, 16, 8), QWEN: (1.0, 1 / 4, 1 / 9, 1 / 18)}


SHARED = {
    LLAVA: {"max_num_batched_tokens": 160, "limit_mm_per_prompt": {"image": 2}},  # pieces end inside images
    QWEN: {},
}
"""Options of the engine of each demo model that several tests use."""
shared = {}
"""The engine that is open now, by its folder, and what closes it: vLLM has one engine per process."""


def close_shared():
    for _, opened in [*shared.values()]:
        opened.close()
    shared.clear()


def engine_of(folder):
    if folder not in shared:
        opened = ExitStack()
        shared[folder] = opened.enter_context(engine(folder, **SHARED[folder])), opened
    return shared[folder][0]


@pytest.fixture
def llava():
    return engine_of(LLAVA)


@pytest.fixture
def qwen():
    return engine_of(QWEN)


@pytest.fixture(scope="module", autouse=True)
def closed_at_the_end():
    yield
    close_shared()


@contextmanager
def engine(folder, setting=MI, **options):
    close_shared()
    options = {"max_model_len": 1024, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True} | options
    overrides = {} if setting is None else {"mipruner": setting}
    llm = LLM(folder, hf_overrides=overrides, disable_log_stats=False, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def message(text, *images):
    content = [*({"type": "image_pil", "image_pil": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def rendered(llm, messages):
    """The prompt as a text, for `LLM.generate`."""
    content = [{"type": part["type"].split("_")[0], "text": part.get("text")} for part in messages[0]["content"]]
    said = [{"role": "user", "content": content}, *messages[1:]]
    for turn in said[1:]:
        if isinstance(turn["content"], str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
    template = llm.get_tokenizer().apply_chat_template
    return template(said, tokenize=False, add_generation_prompt=True)


def ask(llm, messages, keep=None, n=4, **sampling):
    """The outputs of ``messages``, each with what was kept of each image's tokens if a budget is given."""
    options = {} if keep is None else {"mm_processor_kwargs": {"keep": keep}}
    sampling = SamplingParams(max_tokens=n, temperature=0, **sampling)
    return llm.chat(messages, sampling, use_tqdm=False, **options)


def tokens(outputs, end=2):
    return [[t for t in out.outputs[0].token_ids if t != end] for out in outputs]


@cache
def questions(folder):
    """(text, image) of every question of the demo."""
    options = {"canvases": CANVASES, "n_objects": (6, 10), "n_scenes": 20} if folder == QWEN else {}
    demo = Demo(**options)
    images = {s.image_id: demo.images(s.image_id)[0] for s in demo.samples()}
    return [(s.text, images[s.image_id]) for s in demo.samples()]


@cache
def pipeline_of(folder):
    """One for all budgets, so it encodes an image once."""
    return Pipeline(load(folder, dtype="float32"), PRUNERS["mi"](), 1.0)


def expected(folder, asked, keep, pruner="mi", names=None, n=4, **options):
    pipeline = pipeline_of(folder)
    pipeline.pruner, pipeline.keep, pipeline.decoding = PRUNERS[pruner](**options), keep, Decoding(max_new_tokens=n)
    names = names or [""] * len(asked)
    prompts = [Prompt(text, list(images), sample=name) for (text, *images), name in zip(asked, names, strict=True)]
    return [a.tokens for k in range(0, len(prompts), 16) for a in pipeline(prompts[k : k + 16])]


SHARES = pytest.mark.parametrize("share", [8, pytest.param(1, marks=pytest.mark.slow)], ids=["an eighth", "all"])


def agrees_on_the_demo(llm, folder, share):
    """Slow: all of the questions, 618 and 309 at four budgets each."""
    asked, rows = questions(folder)[::share], model_of(llm).vision_rows
    before = rows.n_encoded
    for keep in BUDGETS[folder]:
        outputs = ask(llm, [message(*one) for one in asked], keep)
        assert tokens(outputs) == expected(folder, asked, keep, lam=0.5), keep
    assert rows.n_encoded - before <= len({id(image) for _, image in asked})  # once each


@pytest.mark.timeout(900)
@SHARES
def test_the_questions_of_the_llava_demo_are_answered_as_by_pipeline(llava, share):
    agrees_on_the_demo(llava, LLAVA, share)


def picked(folder, n):
    asked = questions(folder)
    return asked[:: len(asked) // n][:n]


def test_one_question_never_gets_the_tokens_that_were_kept_for_another(llava, monkeypatch):
    """The encoder's cache and the prefix cache go by an image's hash: two questions, two budgets, one image."""
    image = questions(LLAVA)[0][1]
    asked = [(text, image) for text, other in questions(LLAVA) if other is image]
    for keep in (16, 8, 16):
        assert tokens([ask(llava, [message(*one)], keep)[0] for one in asked]) == expected(LLAVA, asked, keep, lam=0.5)

    def by_image_alone(self, inputs):
        hashes = super(processor.Questions, self)._get_mm_hashes(inputs)
        processor._request.get().hashes = {"image": list(hashes["image"])}
        return hashes

    monkeypatch.setattr(processor.Questions, "_get_mm_hashes", by_image_alone)
    other = questions(LLAVA)[-1][1]
    asked = [(text, other) for text, image in questions(LLAVA) if image is other]
    assert tokens([ask(llava, [message(*one)], 16)[0] for one in asked]) != expected(LLAVA, asked, 16, lam=0.5)


def test_mixed_budgets_text_only_requests_and_a_warm_prefix_cache(llava):
    asked, keeps = picked(LLAVA, 24), [64, 16, 8, 1.0]
    texts = [rendered(llava, message(*one)) for one in asked]
    alone = tokens(ask(llava, [message("What color is the sun ?")]))[0]
    found = {}
    for _ in range(2):
        sent = [(k, {"keep": keep}) for k in range(24) for keep in keeps if (k + len(str(keep))) % 2]
        words = {"prompt": rendered(llava, message("What color is the sun ?"))}
        prompts = [
            {"prompt": texts[k], "multi_modal_data": {"image": asked[k][1]}, "mm_processor_kwargs": kwargs}
            for k, kwargs in sent
        ]
        mixed = [prompt for one in prompts for prompt in (one, words)]
        outputs = tokens(llava.generate(mixed, SamplingParams(max_tokens=4, temperature=0), use_tqdm=False))
        assert outputs[1::2] == [alone] * len(sent)
        for (k, kwargs), out in zip(sent, outputs[::2], strict=True):
            found.setdefault(kwargs["keep"], {})[k] = out
    for keep, outs in found.items():
        assert list(outs.values()) == expected(LLAVA, [asked[k] for k in outs], keep, lam=0.5)


def test_prompts_are_as_long_as_the_budget_says_and_several_images_share_it(llava):
    first, second = questions(LLAVA)[0], questions(LLAVA)[-1]
    pair = (first[0], first[1], second[1])
    for keep, n in ((0.75, 864), (64, 64), (7, 7), (0.125, 144)):
        (out,) = ask(llava, [message(*pair)], keep)
        assert (
            sum(token == llava.get_tokenizer().convert_tokens_to_ids("<image>") for token in out.prompt_token_ids) == n
        )
        assert tokens([out]) == expected(LLAVA, [pair], keep, lam=0.5)


@pytest.mark.parametrize("keep", [0, -1, 1.5, 577, "many", "auto", None, True, [1]])
def test_a_bad_budget_is_refused_and_the_engine_lives_on(llava, keep):
    one = questions(LLAVA)[0]
    with pytest.raises(ValueError, match="keep"):
        llava.chat([message(*one)], mm_processor_kwargs={"keep": keep}, use_tqdm=False)
    assert tokens(ask(llava, [message(*one)], 16)) == expected(LLAVA, [one], 16, lam=0.5)


def test_a_request_may_say_which_pruner_it_relies_on(llava):
    one = message(*questions(LLAVA)[0])
    told = {"keep": 16, "pruner": "mi", "options": {"lam": 0.5, "tau": 0.1}}
    assert tokens(
        llava.chat([one], SamplingParams(max_tokens=4, temperature=0), mm_processor_kwargs=told, use_tqdm=False)
    )
    for wrong in ({"pruner": "similarity"}, {"pruner": "mi", "options": {"lam": 0.6}}, {"pruner": 3}):
        with pytest.raises(ValueError, match=r"this server prunes with MIPruner|is none"):
            llava.chat([one], mm_processor_kwargs={"keep": 16} | wrong, use_tqdm=False)


def test_a_question_of_unknown_words_is_refused_unless_all_is_kept(llava):
    image = questions(LLAVA)[0][1]
    with pytest.raises(ValueError, match="question is empty"):
        ask(llava, [message("xyzzy", image)], 16)
    assert ask(llava, [message("xyzzy", image)], 1.0)


def test_the_latest_turn_is_the_question(llava):
    (text, image), (later, _) = questions(LLAVA)[:2]
    said = [*message(text, image), {"role": "assistant", "content": "red"}, *message(later)]
    ids = llava.llm_engine.renderer.mm_processor.question(
        llava.get_tokenizer()(rendered(llava, said), add_special_tokens=False)["input_ids"]
    )
    assert ids == llava.get_tokenizer()(later, add_special_tokens=False)["input_ids"]


def test_an_image_is_encoded_once_however_many_questions(llava):
    rows, image = model_of(llava).vision_rows, Demo(seed=7, n_scenes=1).images("0")[0]
    before = rows.n_encoded
    for keep in (16, 8):
        ask(llava, [message(text, image) for text, _ in picked(LLAVA, 12)], keep)
    assert rows.n_encoded == before + 1
    assert rows.n_bytes <= rows.max_bytes
    assert rows.n_bytes == sum(held.untyped_storage().nbytes() for held in rows._held.values())


def test_the_least_recently_used_rows_go_first():
    rows, encoded = VisionRows(max_bytes=2 * 40), []

    def encode(places):
        encoded.extend(places)
        return [torch.full((2, 5), float(place)) for place in places]

    for keys in ([b"a", b"b", b"a"], [b"a"], [b"c"], [b"b"]):  # b was the least recently used when c came
        assert len(rows.get(keys, encode)) == len(keys)
    assert encoded == [0, 1, 0, 0] and rows.n_bytes == 80


# ------------------------------------------------------------------------------------------------------------ settings


def stock_outputs(expected_class):
    """Prompt ids, new ids, of a model without the setting, and its class."""
    with engine(QWEN, None) as llm:
        assert type(model_of(llm)).__name__ == expected_class
        assert type(llm.llm_engine.model_executor.driver_worker.worker).__module__.startswith("vllm.")
        outputs = ask(llm, [message(*one) for one in picked(QWEN, 12)])
        if expected_class == "PrunedQwen3VL":  # nobody is unpruned without knowing
            with pytest.raises(ValueError, match="without the setting mipruner"):
                ask(llm, [message(*questions(QWEN)[0])], 16)
        return [[list(out.prompt_token_ids), list(out.outputs[0].token_ids)] for out in outputs]


def test_without_the_setting_nothing_changes():
    """The plug-in is installed and not asked for: the prompts and answers of a vLLM that loads no plug-in."""
    code = "import json, test_vllm as t; print(json.dumps(t.stock_outputs('Qwen3VLForConditionalGeneration')))"
    environment = os.environ | {"VLLM_PLUGINS": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.splitlines()[-1]) == stock_outputs("PrunedQwen3VL")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pruner": "visionzip"}, "visionzip.*cannot run in vLLM.*These can: .*divprune.*mi. These cannot: "),
        ({"pruner": "none", "keep": 0.25}, "none.*cannot run in vLLM.*the budget says"),
        ({"pruner": "cdpruner", "options": {"relevance": "clip"}}, "names its CLIP"),
        ({"pruner": "mi", "keep": "auto"}, "auto.*before the image is encoded"),
        ({"pruner": "mi", "keep": 1.5}, "keep=1.5"),
        ({"pruner": "mi", "options": {"lam": 3}}, "lam=3"),
        ({"pruner": "mi", "options": {"nothing": 3}}, "nothing"),
        ({"keeps": 3}, "unknown: keeps"),
        (64, "mipruner=64"),
    ],
)
def test_a_wrong_setting_ends_before_the_model_is_loaded(setting, message):
    with pytest.raises(ValueError, match=message), engine(LLAVA, setting):
        pass


@pytest.mark.timeout(900)
@SHARES
def test_the_questions_of_the_qwen_demo_are_answered_as_by_pipeline(qwen, share):
    agrees_on_the_demo(qwen, QWEN, share)


METHODS = [
    ("similarity", {}),
    ("random", {"seed": 1}),
    ("divprune", {}),
    ("trimtokenator", {}),
    ("cdpruner", {}),
    ("cover", {"lam": 0.5}),
    ("mi", {"lam": 0.5, "support": "vocabulary"}),
    ("mi", {"lam": 0.8, "prior": "center"}),
    ("mi", {"lam": 0.5, "aggregation": "global", "normalization": "minmax"}),
]


@contextmanager
def pruned_by(llm, setting):
    """The engine as if started with another setting: in both places that read it, without anything kept before."""
    found, model = settings.read(SimpleNamespace(mipruner=setting)), model_of(llm)
    settings.check_runs(found.pruner, model.config.model_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "mipruner", found)
        patch.setitem(vars(llm.llm_engine.renderer.mm_processor), "settings", found)
        vars(model).pop("signals", None)
        empty_caches(llm)
        yield
    vars(model).pop("signals", None)
    empty_caches(llm)


def empty_caches(llm):
    """They go by question and budget, and a server has one pruner."""
    llm.reset_mm_cache()
    assert llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()


@pytest.mark.parametrize(("pruner", "options"), METHODS)
def test_other_methods_answer_as_in_pipeline(qwen, pruner, options):
    asked = picked(QWEN, 24)
    with pruned_by(qwen, {"pruner": pruner, "options": options, "keep": 1 / 9}):
        outputs, names = [], []
        for one in asked:
            outputs += ask(qwen, [message(*one)])
            names.append(next(reversed(model_of(qwen).vision_rows._held)).hex())  # of the image, for random draws
    assert tokens(outputs) == expected(QWEN, asked, 1 / 9, pruner, names, **options)


def test_a_request_may_name_its_sample_by_which_random_draws(qwen):
    """As in `Pipeline`, where the images of a prompt have the sample's name and a number."""
    asked = [*picked(QWEN, 24), (questions(QWEN)[0][0], questions(QWEN)[0][1], questions(QWEN)[-1][1])]
    names, found = [f"demo/{k}" for k in range(len(asked))], []
    with pruned_by(qwen, {"pruner": "random", "options": {"seed": 1}, "keep": 1 / 9}):
        for one, name in [*zip(asked, names, strict=True), (asked[0], names[1])]:
            named = {"mm_processor_kwargs": {"sample": name}, "use_tqdm": False}
            found += tokens(qwen.chat([message(*one)], SamplingParams(max_tokens=4, temperature=0), **named))
        with pytest.raises(ValueError, match="sample=3 is not the name of a sample"):
            qwen.chat([message(*asked[0])], mm_processor_kwargs={"sample": 3}, use_tqdm=False)
    right = expected(QWEN, [*asked, asked[0]], 1 / 9, "random", [*names, names[1]], seed=1)
    assert found == right
    assert right[:-1] != expected(QWEN, asked, 1 / 9, "random", [""] * len(asked), seed=1)


def test_every_method_is_tested_above_or_refused_before_the_model_is_loaded():
    """The message names all that run and all that do not."""
    run = {name for name, _ in METHODS}
    for name in PRUNERS.keys() - run:
        with pytest.raises(InputError, match=f"pruner='{name}' cannot run in vLLM with a qwen3_vl") as refused:
            settings.check_runs(PRUNERS[name](), "qwen3_vl")
        can, cannot = str(refused.value).split("These can: ")[1].split(". These cannot: ")
        assert set(can.split(", ")) == run
        assert {word for part in re.sub(r"\([^)]*\)", "", cannot).split(";") for word in re.findall(r"\w+", part)} == (
            PRUNERS.keys() - run
        )


def test_a_video_is_refused_and_the_engine_lives_on(qwen):
    """Qwen3-VL reads videos; not one of them goes through unpruned or wrongly pruned."""
    one = questions(QWEN)[0]
    frames = np.zeros((4, 56, 56, 3), dtype=np.uint8)
    clip = (frames, {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4, "duration": 2.0})
    text = "<|vision_start|><|video_pad|><|vision_end|>What happens ?"
    with pytest.raises(ValueError, match="prunes no videos of a qwen3_vl: send the frames as images"):
        qwen.generate({"prompt": text, "multi_modal_data": {"video": clip}}, use_tqdm=False)
    assert tokens(ask(qwen, [message(*one)], 1 / 4)) == expected(QWEN, [one], 1 / 4, lam=0.5)


def test_answers_stay_under_preemption(qwen):
    asked = picked(QWEN, 48)
    calm = ask(qwen, [message(*one) for one in asked], 1 / 4, n=24, ignore_eos=True)
    with engine(QWEN, num_gpu_blocks_override=12, block_size=32, max_model_len=256) as llm:
        outputs = ask(llm, [message(*one) for one in asked], 1 / 4, n=24, ignore_eos=True)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0
    assert tokens(outputs) == tokens(calm)


# -------------------------------------------------------------------------------------------------------------- server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    setting = {"pruner": "mi", "options": {"lam": 0.5}}
    options = ("--max-model-len", "1024", "--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
        with serve(LLAVA, setting, tmp_path_factory.mktemp("server") / "log", *options) as server:
            yield server


def config_of(tmp_path, *overrides):
    words = [f"results={tmp_path}", "dataset.benchmark.n_scenes=8", "n_masks=0", "device=cpu", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return build.resolve(compose("config", words))


@pytest.mark.parametrize("keep", [1.0, 16])
def test_the_record_of_the_server_is_that_of_the_pipeline_to_the_answer(served, tmp_path, keep):
    pruner = ["pruner=none"] if keep == 1.0 else [f"keep={keep}"]
    remote = config_of(tmp_path, *pruner, "engine=server", f"engine.base_url={served.url}")
    found, expected = run_cell(remote), run_cell(config_of(tmp_path, *pruner))
    assert found["metrics"] == expected["metrics"] and found["standard_errors"] == expected["standard_errors"]
    rows = [{row["id"]: row["prediction"] for row in Cell(c).rows()} for c in (remote, config_of(tmp_path, *pruner))]
    assert rows[0] == rows[1] and len(rows[0]) == found["n_samples"] > 100
    n_image = 576 if keep == 1.0 else keep
    assert n_image < found["server"]["prompt_tokens"] < n_image + 40
    assert found["server"]["model"] == "served" and found["server"]["version"]


def test_a_server_with_another_pruner_is_not_taken_for_the_one_asked_for(served, tmp_path):
    wrong = config_of(tmp_path, "pruner=similarity", "engine=server", f"engine.base_url={served.url}")
    with pytest.raises(BenchmarkError, match="this server prunes with MIPruner"):
        run_cell(wrong)


def test_a_soak_loses_nothing_and_mixes_nothing_up(served):
    found = soak(served, scenes(4, 4, seed=0), lambda keep: {"keep": keep}, 200, concurrency=16)
    assert found.wrong == [] and found.asked == 200 and found.refused > 10
