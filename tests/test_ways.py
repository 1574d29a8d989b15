"""Ways of calling a model inside `mipruner.prune`: what the explicit route gives, or a refusal in one sentence."""

import copy
import io
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import mipruner
from mipruner import PRUNERS
from mipruner.decoding import Decoding, decode, prefill
from mipruner.errors import InputError
from mipruner.models import Prompt
from mipruner.pipeline import Pipeline
from mipruner.prompt import collate
from mipruner.pruners import make
from mipruner.shortening import shorten
from test_attach import N, chat, explicit, generated, indices, make_image, registered
from tiny import prompts_of, reference, tiny, tokenizer

FAMILIES = ["llava", "qwen3_vl"]
METHODS = ["mi", "vispruner", "fastv", "sparsevlm"]
CELL = pytest.mark.parametrize(("family", "name"), [(family, name) for family in FAMILIES for name in METHODS])
KEEP = 0.2


@contextmanager
def pruned(adapter, model, name, keep=KEEP):
    with torch.inference_mode(), mipruner.prune(model, name, keep, tokenizer=adapter.tokenizer) as pruning:
        yield pruning


def model_and_prompt(family, name, n=1):
    """A model of its own, a prompt, and the tokens of the explicit route."""
    adapter, prompts = tiny(family), prompts_of(family)[:n]
    answers = explicit(adapter, PRUNERS[name](), prompts, KEEP)
    return adapter, copy.deepcopy(adapter.model), reference(family, prompts), [answer.tokens for answer in answers]


# Compiled models.


def whole(model):
    model.compile(backend="eager")


def forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def language_model(model):
    model.model.language_model.compile(backend="eager")


def layers(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")


def vision(model):
    (model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower).compile(backend="eager")


@pytest.mark.parametrize(
    ("compiled", "family", "name"),  # every pair of them in `make ways`
    [
        (whole, "llava", "mi"),
        (forward, "qwen3_vl", "fastv"),
        (language_model, "llava", "vispruner"),
        (layers, "qwen3_vl", "fastv"),
        (vision, "llava", "mi"),
    ],
)
def test_a_compiled_model_called_before(compiled, family, name):
    """The graph made before knows nothing of pruning; it is used again afterwards."""
    adapter, model, inputs, expected = model_and_prompt(family, name)
    compiled(model)
    torch._dynamo.reset()
    with torch.inference_mode():
        full = generated(model, inputs)
    with pruned(adapter, model, name):
        assert generated(model, inputs) == expected
    with torch.inference_mode():
        assert generated(model, inputs) == full
    with pruned(adapter, model, name):
        assert generated(model, inputs) == expected


@pytest.mark.parametrize("name", ["mi", "fastv"])
def test_wrappers_are_taken_off(name):
    adapter, model, inputs, expected = model_and_prompt("llava", name)
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        compiled(**inputs)

    class Wrapped(nn.Module):  # as DistributedDataParallel
        def __init__(self):
            super().__init__()
            self.module = model

    for wrapper in (compiled, Wrapped()):
        with pruned(adapter, wrapper, name):
            assert int(compiled(**inputs).logits[0, -1].argmax()) == expected[0][0]
            assert generated(model, inputs) == expected
    with pytest.raises(InputError, match="use DistributedDataParallel"):
        mipruner.prune(nn.DataParallel(model), name)


# Caches and modes of generate.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["mi", "vispruner"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_static_cache_holds_the_short_prompt(family, name, n):
    adapter, model, inputs, expected = model_and_prompt(family, name, n)
    with pruned(adapter, model, name):
        assert generated(model, inputs, cache_implementation="static") == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_has_no_room_for_layers_of_their_own_length(family):
    adapter, model, inputs, _ = model_and_prompt(family, "fastv")
    with pruned(adapter, model, "fastv"), pytest.raises(InputError, match="use a DynamicCache"):
        generated(model, inputs, cache_implementation="static")


@CELL
def test_a_copy_of_the_cache_goes_on(family, name):
    adapter, model, inputs, expected = model_and_prompt(family, name)
    with pruned(adapter, model, name):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        caches = copy.deepcopy(out.past_key_values), out.past_key_values
        for cache in caches:
            more = model.generate(out.sequences, past_key_values=cache, max_new_tokens=N - 2, do_sample=False)
            assert more[0, inputs["input_ids"].shape[1] :].tolist() == expected[0]


@CELL
def test_a_cache_that_outlives_its_context_is_refused(family, name):
    adapter, model, inputs, _ = model_and_prompt(family, name)
    with pruned(adapter, model, name):
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with torch.inference_mode(), pytest.raises(InputError, match="its context has ended"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2)


@CELL
def test_prompts_in_turn_then_the_first_chat_goes_on(family, name):
    """Text alone, on the cache of the first turn, after another prompt."""
    adapter, model, _, _ = model_and_prompt(family, name)
    rest = tokenizer()("<|im_end|>\n<|im_start|>user\nAnd then ?<|im_end|>\n<|im_start|>assistant\n").input_ids
    options, found = dict(do_sample=False, return_dict_in_generate=True, eos_token_id=None), []
    with pruned(adapter, model, name):
        for between in (False, True):
            told = model.generate(**chat(["What is it ?"], family), max_new_tokens=3, **options)
            if between:
                model.generate(**reference(family, prompts_of(family)[1:2]), max_new_tokens=3)
            ids = torch.cat([told.sequences, torch.tensor([rest])], 1)
            out = model.generate(ids, past_key_values=told.past_key_values, max_new_tokens=N, **options)
            found.append(out.sequences[0, ids.shape[1] :].tolist())
    assert found[0] == found[1] and len(found[0]) == N


# Prompts.


@CELL
def test_a_prompt_without_an_image_in_the_batch(family, name):
    """Each row as it would be alone."""
    adapter, model, inputs, expected = model_and_prompt(family, name)
    text = tokenizer()("<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n").input_ids
    n = inputs["input_ids"].shape[1]
    alone = {"input_ids": torch.tensor([text]), "attention_mask": torch.ones(1, len(text), dtype=torch.long)}
    with torch.inference_mode():
        plain = generated(model, alone)
    both = dict(inputs)
    both["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[0] * (n - len(text)) + text])])
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    both["attention_mask"][1, : n - len(text)] = 0
    if "mm_token_type_ids" in both:
        both["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, n).to(torch.int)])
    with pruned(adapter, model, name) as pruning:
        assert generated(model, both) == expected + plain
        assert str(pruning.last[1]) == "no image, nothing pruned"
        assert generated(model, alone) == plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["random", "vispruner", "fastv", "divprune"])
def test_an_image_without_a_question(family, name):
    adapter = tiny(family)
    inputs = reference(family, [Prompt("?", [make_image(0, 84, 84)])])
    inputs["input_ids"], at = inputs["input_ids"].clone(), (inputs["input_ids"] == tokenizer()("?").input_ids[0])
    keep = ~at[0]
    inputs = {k: v[:, keep] if v.shape[:2] == at.shape else v for k, v in inputs.items()}
    with pruned(adapter, adapter.model, name) as pruning:
        generated(adapter.model, inputs)
        (kept,) = pruning.last
        assert kept.n_kept[0] < kept.n_visual[0] and kept.question == ""
    with pruned(adapter, adapter.model, "mi"), pytest.raises(InputError, match="the question is empty"):
        generated(adapter.model, inputs)


# Threads and lifetimes.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("one", "other"), [("mi", "fastv"), ("vispruner", "sparsevlm")])
def test_two_threads_open_two_contexts_on_one_model(family, one, other):
    adapter, model, inputs, expected = model_and_prompt(family, one)
    wanted = {one: expected, other: [explicit(adapter, PRUNERS[other](), prompts_of(family)[:1], 0.4)[0].tokens]}
    both, found = threading.Barrier(2, timeout=60), {}

    def serve(name, keep):
        with pruned(adapter, model, name, keep):
            both.wait()
            found[name] = [generated(model, inputs) for _ in range(3)]
            both.wait()

    threads = [threading.Thread(target=serve, args=args) for args in ((one, KEEP), (other, 0.4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [tokens] * 3 for name, tokens in wanted.items()}


def test_a_thread_between_two_contexts_is_refused():
    adapter, model, inputs, _ = model_and_prompt("llava", "mi")
    opened, done = threading.Barrier(3, timeout=60), threading.Event()

    def hold():
        with pruned(adapter, model, "mi"):
            opened.wait()
            done.wait(60)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    opened.wait()
    try:
        with (
            torch.inference_mode(),
            pytest.raises(InputError, match="contexts are open on this model in other threads"),
        ):
            generated(model, inputs)
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("name", ["vispruner", "fastv"])
def test_pipelines_in_two_threads_on_one_adapter(name):
    adapter, prompts = tiny("llava"), prompts_of("llava")
    expected = [explicit(adapter, PRUNERS[name](), [prompt], KEEP)[0] for prompt in prompts]
    found = {}

    def run(k):
        found[k] = [explicit(adapter, PRUNERS[name](), [prompts[k % 3]], KEEP)[0] for _ in range(3)]

    threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, answers in found.items():
        assert all(answer.tokens == expected[k % 3].tokens for answer in answers)
        assert all(indices([a.selections]) == indices([expected[k % 3].selections]) for a in answers)
    assert len(found) == 6


@CELL
def test_attached_detached_and_used_again(family, name):
    adapter, model, inputs, expected = model_and_prompt(family, name)
    before = registered(model)
    with torch.inference_mode():
        full = generated(model, inputs)
        pruning = mipruner.attach(model, name, KEEP, tokenizer=adapter.tokenizer)
        assert generated(model, inputs) == expected
        with pytest.raises(InputError, match="is open already"):
            pruning.__enter__()
        with pytest.raises(InputError, match="being pruned already"):
            mipruner.attach(model, name)
        pruning.detach()
        assert generated(model, inputs) == full and registered(model) == before
        with pruning:
            assert generated(model, inputs) == expected
        n = pruning.last[0].n_visual[0]
        assert f"of {n} image tokens" in str(pruning) and prompts_of(family)[0].text in str(pruning)


def test_a_copy_of_a_model_that_is_being_pruned_is_plain():
    adapter, model, inputs, _ = model_and_prompt("qwen3_vl", "fastv")
    with torch.inference_mode():
        full = generated(model, inputs)
    with pruned(adapter, model, "fastv") as pruning:
        saved = io.BytesIO()
        torch.save(model.model.language_model.state_dict(), saved)
        clone = copy.deepcopy(model)
        assert generated(clone, inputs) == full
        with pytest.raises(InputError, match="belongs to one model"):
            copy.deepcopy(pruning)
    assert generated(clone, inputs) == full


def test_prune_alone_says_that_it_does_nothing():
    adapter = tiny("llava")
    with pytest.warns(UserWarning, match="alone prunes nothing"):
        mipruner.prune(adapter.model, "mi", tokenizer=adapter.tokenizer)
    with pytest.raises(InputError, match="keep=0 is not a budget"):
        mipruner.prune(adapter.model, "mi", 0)


# Two methods.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inside", ["fastv", "sparsevlm"])
def test_one_method_at_the_door_and_one_inside(family, inside):
    """Around a model and in the pipeline, equal to the second on a prompt that the first made, by hand."""
    adapter, prompts = tiny(family), prompts_of(family)[:1]
    with torch.inference_mode():
        pipeline = Pipeline(adapter, PRUNERS["mi"](), 0.6)
        seen = pipeline.see([image for prompt in prompts for image in prompt.images])
        (sample,) = [adapter.read(p, [seen[id(i)] for i in p.images]) for p in prompts]
        batch = collate([adapter.shorten(sample, pipeline.select(sample))])
        n_keep = mipruner.budget(0.3, sample.n_visual)
        with shorten(adapter.language_model, PRUNERS[inside](), batch.is_visual, [n_keep]):
            expected = decode(adapter, batch, prefill(adapter, batch), Decoding(max_new_tokens=N))
        inputs = reference(family, prompts)
        methods = ["mi", inside]
        with mipruner.prune(adapter.model, methods, [0.6, 0.3], tokenizer=adapter.tokenizer) as pruning:
            assert generated(adapter.model, inputs) == expected
        assert sum(pruning.last[0].n_kept) <= n_keep and str(pruning).startswith(f"mi then {inside}, keep=[0.6, 0.3]")
    if inside == "fastv":
        both = make("mi_fastv", keep_before=0.6, before={"name": "mi"}, inside={"name": "fastv", "layer": 2})
        (answer,) = Pipeline(adapter, both, 0.3, Decoding(max_new_tokens=N))(prompts)
        assert [answer.tokens] == expected and indices([answer.selections]) == indices(pruning.selections)
        assert answer.visual_tokens_per_layer[1:3] == [mipruner.budget(0.6, sample.n_visual), n_keep]
        (answer,), (alone,) = (explicit(adapter, pruner, prompts, 0.8) for pruner in (both, PRUNERS["mi"]()))
        assert answer.tokens == alone.tokens and indices([answer.selections]) == indices([alone.selections])
        assert set(answer.visual_tokens_per_layer) == {answer.n_keep}, "nothing is left for the second to drop"
    with pytest.raises(InputError, match="2 methods need a budget each"):
        mipruner.prune(adapter.model, methods, 0.3)
    with pytest.raises(InputError, match="one method takes one"):
        mipruner.prune(adapter.model, "mi", [0.6, 0.3])
    with pytest.raises(InputError, match="3 methods: give one, or one before the language model and one inside it"):
        mipruner.prune(adapter.model, [*methods, "dart"], [0.6, 0.3, 0.2])
    with pytest.raises(InputError, match="use budget_match=nominal"):
        mipruner.prune(adapter.model, ["mi", make("fastv", budget_match="layer_mean")], [0.6, 0.3])
    with pytest.raises(InputError, match="one before the language model and one inside it"):
        mipruner.prune(adapter.model, ["fastv", "mi"], [0.6, 0.3])


# Training.


@CELL
def test_the_loss_is_that_of_the_short_sequence(family, name):
    """Against the logits of the short prompt, and checkpointing against none."""
    adapter = tiny(family)
    model, gradients = copy.deepcopy(adapter.model).train().requires_grad_(), []
    inputs = {key: value.clone() for key, value in reference(family, prompts_of(family)[:2]).items()}
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100
    with mipruner.prune(model, name, KEEP, tokenizer=adapter.tokenizer):
        logits = model(**inputs).logits
        assert logits.shape[1] < labels.shape[1]
        expected = nn.functional.cross_entropy(logits[:, -9:-1].flatten(0, 1).float(), labels[:, -8:].flatten())
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            loss = model(**inputs, labels=labels).loss
            torch.testing.assert_close(loss, expected)
            loss.backward()
            found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients.append(torch.cat(found))
        last = model(**inputs, logits_to_keep=torch.tensor([labels.shape[1] - 1])).logits
        torch.testing.assert_close(last[:, 0], logits[:, -1])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert len(found) > 20 and gradients[0].abs().sum() > 0


@pytest.mark.parametrize("name", ["mi", "fastv"])
def test_ten_steps_of_lora(name):
    peft = pytest.importorskip("peft")
    adapter = tiny("llava")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    model = peft.get_peft_model(copy.deepcopy(adapter.model), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    inputs = {key: value.clone() for key, value in reference("llava", prompts_of("llava")[:2]).items()}
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100
    losses = []
    with mipruner.prune(model, name, KEEP, tokenizer=adapter.tokenizer):
        for _ in range(10):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
