"""The table of docs/anywhere.md: every way of calling by method and model, equal to something or refused.

A way is a function of a `Case` that returns what its cell says, or fails.
"""

import copy
import io
import os
import pickle
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    RepetitionPenaltyLogitsProcessor,
    TextIteratorStreamer,
)
from transformers import pipeline as transformers_pipeline

import mipruner
from mipruner import PRUNERS
from mipruner.decoding import Decoding
from mipruner.models import Prompt, Video
from mipruner.pipeline import Pipeline
from ways import FAMILIES, KEEP, METHODS, ON_DEMO, ROUTE, STOCK, Case, N, refused, then, without_question

WAYS = {}


def way(title):
    def add(function):
        WAYS[title] = function
        return function

    return add


def same(case, **options):
    with case.prune():
        assert case.generate(**options) == case.expected
    return ROUTE


def one(case):
    """The first prompt alone."""
    return case.prompts[:1]


# Modes of generate.


@way("greedy, a batch padded on the left")
def greedy(case):
    with case.prune() as pruning:
        assert case.generate() == case.expected
    assert all(sum(kept.n_kept) < sum(kept.n_visual) for kept in pruning.last)
    return ROUTE


@way("`return_dict_in_generate`, `output_logits`, `output_hidden_states`")
def outputs(case):
    inputs = case.inputs()
    options = dict(max_new_tokens=1, return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    with case.prune() as pruning:
        out = case.model.generate(**inputs, **options)
        n_short = max(len(e.ids) - sum(k.n_visual) for e, k in zip(pruning.encoded, pruning.last, strict=True))
    torch.testing.assert_close(out.logits[0].float(), case.logits(case.encoded())[:, -1], atol=2e-3, rtol=1e-3)
    states = out.hidden_states[0]
    assert n_short < states[-1].shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(case.model.lm_head(states[-1][:, -1]), out.logits[0])
    return f"logits {ROUTE}; hidden states are those of the short prompt"


@way("sampling by a seed")
def sampling(case):
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    torch.manual_seed(3)
    expected = case.answers(draw=lambda logits, said: torch.multinomial(logits.softmax(-1), 1))
    torch.manual_seed(3)
    with case.prune():
        assert case.generate(**options) == expected
    return ROUTE


@way("`num_return_sequences=2`, sampled")
def several(case):
    torch.manual_seed(3)
    draw = lambda logits, said: torch.multinomial(logits.softmax(-1), 1)  # noqa: E731
    expected = case.answers([case.prompts[0]] * 2, draw=draw)
    torch.manual_seed(3)
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=2)
    with case.prune():
        assert case.generate(one(case), **options) == expected
    return ROUTE


@way("beams")
def beams(case, width=2, n=3):
    encoded, hypotheses = case.encoded(one(case)), [([], 0.0)]
    for _ in range(n):
        found = []
        for said, score in hypotheses:
            sequence = [then(encoded[0], said, case.adapter)] if said and not case.inside else encoded
            if case.inside and said:  # what was kept must not depend on the answer
                log_p = logits_after(case, encoded, said).log_softmax(-1)
            else:
                log_p = case.logits(sequence)[0, -1].log_softmax(-1)
            log_p[case.adapter.tokenizer.eos_token_id] = -torch.inf
            best = log_p.topk(width)
            found += [([*said, int(k)], score + float(p)) for p, k in zip(*best, strict=True)]
        hypotheses = sorted(found, key=lambda pair: -pair[1])[:width]
    with case.prune():
        assert case.generate(one(case), num_beams=width, max_new_tokens=n, min_new_tokens=n) == [hypotheses[0][0]]
    return "equal to a search over the explicit route"


def logits_after(case, encoded, said):
    """Of the next token after some given ones, decoded one by one."""
    seen = []

    def draw(logits, tokens):
        seen.append(logits[0].clone())
        return logits.argmax(-1, keepdim=True)

    case.answers(encoded=encoded, draw=draw, said=torch.tensor([said]), n=1, ends=True)
    return seen[0]


@way("contrastive search (`penalty_alpha`)")
def contrastive(case):
    def search():
        with case.prune():
            case.generate(one(case), penalty_alpha=0.6, top_k=4)

    return f"of transformers no longer, {refused(search, Exception)}"


@way("`repetition_penalty`")
def penalty(case):
    inputs, process = case.inputs(), RepetitionPenaltyLogitsProcessor(1.5)
    expected = case.answers(
        draw=lambda logits, said: process(torch.cat([inputs["input_ids"], said], 1), logits).argmax(-1, keepdim=True)
    )
    with case.prune():
        assert case.generate(repetition_penalty=1.5) == expected
    return ROUTE


@way("`guidance_scale=1.5`")
def guidance(case):
    inputs, model = case.inputs(one(case)), copy.deepcopy(case.model)
    try:
        model.generate(**inputs, guidance_scale=1.5, max_new_tokens=N)
    except RuntimeError as error:
        return f"of transformers, pruned or not, {str(error).split('(')[0].strip()}"

    def draw(logits, said):
        ids = torch.cat([inputs["input_ids"][:, -1:], said], 1)
        plain = model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1].float().log_softmax(-1)
        guided = 1.5 * (logits.log_softmax(-1) - plain) + plain
        return guided.argmax(-1, keepdim=True)

    expected = case.answers(one(case), draw=draw)
    with case.prune():
        assert case.generate(one(case), guidance_scale=1.5) == expected
    return "equal to the explicit route and an unpruned pass without the prompt"


def refuses(title, **options):
    @way(title)
    def refuse(case):
        given = {name: case.model if value is ... else value for name, value in options.items()}

        def call():
            with case.prune():
                case.generate(one(case), **given)

        return refused(call)


refuses("`prefill_chunk_size`", prefill_chunk_size=8)
refuses("`assistant_model`", assistant_model=...)
refuses("`prompt_lookup_num_tokens`", prompt_lookup_num_tokens=3)
refuses("early exit (`assistant_early_exit`)", assistant_early_exit=1)


@way('`cache_implementation="static"`')
def static(case):
    def call():
        with case.prune():
            return case.generate(cache_implementation="static", disable_compile=True)

    if case.inside:
        return refused(call)
    assert call() == case.expected
    return ROUTE


@way("`use_cache=False`")
def no_cache(case):
    (encoded,), said = case.encoded(one(case)), []
    for _ in range(N):
        logits = case.logits([then(encoded, said, case.adapter) if said else encoded])[0, -1]
        logits[case.adapter.tokenizer.eos_token_id] = -torch.inf
        said.append(int(logits.argmax()))
    with case.prune():
        assert case.generate(one(case), use_cache=False) == [said]
    return f"{ROUTE}, pruned anew for each token"


@way("a streamer, read while its thread is at work")
def streamer(case):
    expected = case.adapter.tokenizer.decode(case.answers(one(case))[0])
    stream = TextIteratorStreamer(case.adapter.tokenizer, skip_prompt=True, timeout=60)

    @torch.inference_mode()
    def run():
        case.generate(one(case), streamer=stream)

    with case.prune():
        thread = threading.Thread(target=run)
        thread.start()
        told = "".join(stream)
        thread.join()
    assert told.split() == expected.split()
    return ROUTE


@way("a streamer's thread that outlives the block")
def outlives(case):
    second, over, errors = threading.Event(), threading.Event(), []

    class Stream:
        seen = 0

        def put(self, value):
            self.seen += 1
            if self.seen == 3:
                second.set()
                over.wait(60)

        def end(self):
            pass

    def run():
        with torch.inference_mode():
            errors.append(refused(lambda: case.generate(one(case), streamer=Stream())))

    with case.prune():
        thread = threading.Thread(target=run)
        thread.start()
        assert second.wait(60)
    over.set()
    thread.join()
    return errors[0]


# Implementations and precisions.


@way('`attn_implementation="eager"`')
def eager(case):
    case = case.own()
    case.model.set_attn_implementation("eager")
    expected = case.answers()
    with case.prune():
        assert case.generate() == expected
    return ROUTE


def precision(dtype):
    @way(f"weights in {str(dtype).removeprefix('torch.')}")
    def half(case):
        case = case.own()
        case.model.to(dtype)
        expected = case.answers()
        with case.prune():
            assert case.generate() == expected
        return f"{ROUTE} in that precision"


precision(torch.bfloat16)
precision(torch.float16)


@way("`torch.autocast`")
def autocast(case):
    with torch.autocast("cpu", torch.bfloat16):
        expected = case.answers(one(case))
        with case.prune():
            assert case.generate(one(case)) == expected
    return f"{ROUTE} under the same autocast"


@way("`keep=1.0`")
def everything(case):
    options = dict(max_new_tokens=N, output_logits=True, return_dict_in_generate=True, do_sample=False)
    inputs = case.inputs()
    stock = case.model.generate(**inputs, **options)
    with case.prune(keep=1.0):
        found = case.model.generate(**inputs, **options)
    assert torch.equal(found.sequences, stock.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, stock.logits, strict=True))
    return f"{STOCK}, bit for bit"


# Prompts.


@way("several images in a prompt")
def images(case):
    prompts = [Prompt(case.prompts[1].text, [case.prompts[0].images[0], case.prompts[1].images[0]])]
    with case.prune():
        assert case.generate(prompts) == case.answers(prompts)
    return ROUTE


@way("images of several sizes in a batch")
def sizes(case):
    assert case.prompts[0].images[0].size != case.prompts[1].images[0].size
    return same(case)


@way("a video")
def video(case):
    frames = [image.resize((84, 56)) for image in (case.prompts[0].images[0], case.prompts[1].images[0])] * 2
    prompts = [Prompt(case.prompts[0].text, [Video(frames)])]
    if case.family == "llava":
        return f"of this family no video, {refused(lambda: case.encoded(prompts))}"
    case = Case(case.family, case.name, on_demo=False)  # the demo's chat template has no place for a video
    with case.prune():
        assert case.generate(prompts) == case.answers(prompts)
    return f"{ROUTE} (random weights)"


@way("padding on the right, a forward pass")
def right(case):
    inputs = case.inputs()
    mask = inputs["attention_mask"]
    order = mask.argsort(dim=1, descending=True, stable=True)
    turned = {k: x.gather(1, order) if x.shape == mask.shape else x for k, x in inputs.items()}
    with case.prune():
        found = case.model(**turned).logits[:, -1].float()
    torch.testing.assert_close(found, case.logits(case.encoded())[:, -1], atol=2e-3, rtol=1e-3)
    return f"{ROUTE}; the last row of logits is each prompt's last"


@way("a prompt without an image in the batch")
def mixed(case):
    alone = text_only(case)
    plain = case.generate(inputs=alone)
    inputs, n = case.inputs(one(case)), case.inputs(one(case))["input_ids"].shape[1]
    short = nn.functional.pad(alone["input_ids"], (n - alone["input_ids"].shape[1], 0))
    both = inputs | {"input_ids": torch.cat([inputs["input_ids"], short])}
    padded = nn.functional.pad(alone["attention_mask"], (n - alone["attention_mask"].shape[1], 0))
    both["attention_mask"] = torch.cat([inputs["attention_mask"], padded])
    if "mm_token_type_ids" in both:
        both["mm_token_type_ids"] = torch.cat([both["mm_token_type_ids"], torch.zeros_like(short).int()])
    with case.prune() as pruning:
        assert case.generate(inputs=both) == case.answers(one(case)) + plain
        assert str(pruning.last[1]) == "no image, nothing pruned"
    return f"{ROUTE}, and to the unpruned model"


def text_only(case):
    words = case.adapter.tokenizer(case.prompts[0].text, return_tensors="pt")
    return {name: words[name] for name in ("input_ids", "attention_mask")}


@way("text alone")
def text(case):
    plain = case.generate(inputs=text_only(case))
    with case.prune():
        assert case.generate(inputs=text_only(case)) == plain
    return STOCK


@way("an image without a question")
def silent(case):
    (asked,) = case.encoded(one(case))
    rest = ~asked.is_text
    inputs = case.inputs(one(case))
    silent = {k: x[:, rest] if x.shape[:2] == (1, len(rest)) else x for k, x in inputs.items()}

    def call():
        with case.prune():
            return case.generate(inputs=silent)

    if PRUNERS[case.name]().reads_text:
        return refused(call)
    assert call() == case.answers(encoded=[without_question(asked)])
    return ROUTE


@way("`inputs_embeds` instead of ids")
def embeds(case):
    def call():
        with case.prune():
            case.model.generate(inputs_embeds=case.encoded(one(case))[0].embeds[None], max_new_tokens=1)

    return refused(call)


# Forward passes.


def by_hand(case, prompts):
    """A decode loop of the caller's, one token at a time."""
    inputs = case.inputs(prompts)
    out, mask = case.model(**inputs), inputs["attention_mask"]
    for _ in range(N):
        logits = out.logits[:, -1].clone()
        logits[:, case.adapter.tokenizer.eos_token_id] = -torch.inf
        token = logits.argmax(-1, keepdim=True)
        yield token[:, 0].tolist()
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        out = case.model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values)


@way("a decode loop by hand")
def loop(case):
    with case.prune():
        assert list(map(list, zip(*by_hand(case, case.prompts), strict=True))) == case.expected
    return ROUTE


@way("two decode loops in turn")
def loops(case):
    expected = [case.answers([prompt])[0] for prompt in case.prompts]
    with case.prune():
        pairs = zip(*(by_hand(case, [prompt]) for prompt in case.prompts), strict=True)
        assert [[token for (token,) in tokens] for tokens in zip(*pairs, strict=True)] == expected
    return ROUTE


@way("a prompt cut by hand within the question")
def chunks(case):
    inputs, (encoded,) = case.inputs(one(case)), case.encoded(one(case))
    n = int(encoded.is_text.nonzero()[2])
    first = {k: x[:, :n] if x.shape[:2] == inputs["input_ids"].shape else x for k, x in inputs.items()}

    def call():
        with case.prune():
            out = case.model(**first)
            mask = inputs["attention_mask"]
            rest = inputs["input_ids"][:, n:]
            return case.model(input_ids=rest, attention_mask=mask, past_key_values=out.past_key_values).logits[:, -1]

    if case.name != "vispruner":
        return refused(call)
    torch.testing.assert_close(call().float(), case.logits([encoded])[:, -1], atol=2e-3, rtol=1e-3)
    return f"{ROUTE}, as the question is not read"


@way("`logits_to_keep`, a number or places")
def logits_to_keep(case):
    inputs = case.inputs()
    expected = case.logits(case.encoded(), 2)
    with case.prune():
        n = inputs["input_ids"].shape[1]
        for keep in (2, torch.tensor([n - 2, n - 1])):
            found = case.model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-3)
    return ROUTE


def labelled(case, n_answer=5):
    """Inputs with an answer and labels on it, and the loss of the short prompts."""
    (encoded,), words = case.encoded(one(case)), case.adapter.tokenizer(case.prompts[1].text).input_ids[-n_answer:]
    inputs = case.inputs(one(case))
    answer = torch.tensor([words])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            more = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}.get(name, torch.zeros_like(answer))
            inputs[name] = torch.cat([inputs[name], more.to(inputs[name])], 1)
    rows = case.logits([then(encoded, words, case.adapter)], n_answer + 1)[0, :-1]
    return inputs | {"labels": labels}, cross_entropy(rows, answer[0])


@way("`labels`")
def labels(case):
    inputs, expected = labelled(case)
    with case.prune():
        torch.testing.assert_close(case.model(**inputs).loss, expected, atol=1e-3, rtol=1e-3)
    return "loss equal to that of the short prompt by hand"


# Training.


@contextmanager
def training(case):
    """A model of its own, and a labelled batch, outside of inference mode."""
    inputs, expected = labelled(case)
    with torch.inference_mode(False), torch.enable_grad():
        case = case.own()
        case.model.load_state_dict({k: x.clone() for k, x in case.model.state_dict().items()}, assign=True)
        case.model.requires_grad_().train()
        yield case, {k: x.clone() for k, x in inputs.items()}, expected


@way("gradients, with and without checkpointing")
def checkpointing(case):
    with training(case) as (case, inputs, expected), case.prune():
        gradients = []
        for on in (False, True):
            if on:
                case.model.gradient_checkpointing_enable()
            case.model.zero_grad()
            loss = case.model(**inputs).loss
            torch.testing.assert_close(loss.detach(), expected, atol=1e-3, rtol=1e-3)
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    assert gradients[0].abs().sum() > 0
    return "gradients equal to each other, loss to that of the short prompt by hand"


@way("ten steps of LoRA, the lines below")
def lora(case):
    page = (Path(__file__).parent.parent / "docs/anywhere.md").read_text()
    lines = page.split("<!-- begin training -->\n```python\n")[1].split("```")[0]
    lines = lines.replace('"mi", keep=0.25', f'"{case.name}", keep={KEEP}').replace("lr=1e-4", "lr=1e-2")
    peft, losses = pytest.importorskip("peft"), []
    with training(case) as (case, inputs, expected):

        class Batches:
            def __iter__(self):
                for _ in range(10):
                    yield inputs
                    losses.append(names["loss"].item())

        torch.manual_seed(0)
        names = {"peft": peft, "torch": torch, "mipruner": mipruner, "model": case.model}
        names |= {"processor": case.adapter.tokenizer, "batches": Batches()}
        exec(lines, names)
    torch.testing.assert_close(losses[0], float(expected), atol=1e-3, rtol=1e-3)
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    return "first loss equal to that of the short prompt by hand; it falls"


# Chats.


def turns(case, between=False, cache=lambda cache: cache):
    """A second turn of text on the cache of the first; what it should say, and what it says."""
    more = case.adapter.tokenizer(f" ASSISTANT: {case.prompts[1].text}", add_special_tokens=False).input_ids
    told = case.answers(one(case))
    said = torch.tensor([told[0] + more])
    expected = case.answers(one(case), said=said)
    options = dict(do_sample=False, return_dict_in_generate=True, min_new_tokens=N, max_new_tokens=N)
    with case.prune():
        out = case.model.generate(**case.inputs(one(case)), **options)
        if between:
            case.generate(case.prompts[1:])
        ids = torch.cat([out.sequences, torch.tensor([more])], 1)
        out = case.model.generate(ids, past_key_values=cache(out.past_key_values), **options)
    return expected, [out.sequences[0, ids.shape[1] :].tolist()]


@way("a chat, the whole conversation each time")
def conversation(case):
    prompts = [Prompt(case.prompts[1].text, one(case)[0].images)]
    with case.prune() as pruning:
        case.generate()
        assert case.generate(prompts) == case.answers(prompts)
        assert pruning.last[0].question.split() == case.prompts[1].text.split()
    return ROUTE


@way("a second turn on the cache of the first")
def second_turn(case):
    expected, found = turns(case)
    assert found == expected
    return ROUTE


@way("the same, after another prompt in between")
def interleaved(case):
    expected, found = turns(case, between=True)
    assert found == expected
    return ROUTE


@way("the same, on a copy of the cache")
def copied(case):
    expected, found = turns(case, cache=copy.deepcopy)
    assert found == expected
    return ROUTE


@way("the cache of a pruned turn outside of its context")
def outside(case):
    options = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    with case.prune():
        out = case.model.generate(**case.inputs(one(case)), **options)

    return refused(lambda: case.model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2))


# Threads.


def in_threads(calls):
    """What each call gives, all at once."""
    found, barrier = [None] * len(calls), threading.Barrier(len(calls), timeout=120)

    def run(k):
        with torch.inference_mode():
            barrier.wait()
            found[k] = calls[k]()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@way("four threads in one context")
def threads(case):
    expected = [case.answers([prompt]) for prompt in case.prompts]
    calls = [lambda k=k: case.generate([case.prompts[k]]) for k in (0, 1)]
    with case.prune():
        assert in_threads(calls * 2) == expected * 2
    return ROUTE


@way("a context in each of two threads, another budget each")
def contexts(case):
    both, done = threading.Barrier(2, timeout=120), threading.Barrier(2, timeout=120)

    def serve(keep):
        with case.prune(keep=keep):
            both.wait()
            answer = case.generate(one(case))
            done.wait()
            return answer

    plain = case.generate(one(case))
    assert in_threads([lambda: serve(KEEP), lambda: serve(1.0)]) == [case.answers(one(case)), plain]
    return f"{ROUTE}, each its own"


@way("a `Pipeline` in each of two threads on one adapter")
def pipelines(case):
    decoding = Decoding(max_new_tokens=N)

    def answer(prompt):
        return Pipeline(case.adapter, PRUNERS[case.name](), KEEP, decoding)([prompt])[0].tokens

    expected = [answer(prompt) for prompt in case.prompts]
    assert in_threads([lambda p=p: answer(p) for p in case.prompts] * 2) == expected * 2
    return "equal to one after the other"


# Models inside of something, and copies.


def compiled(title, compile):
    @way(f"{title} compiled, called before and inside")
    def call(case):
        case = case.own()
        torch._dynamo.reset()
        compile(case.model)
        plain = case.generate(one(case))
        expected = adapter_answers(case)
        with case.prune():
            assert case.generate(one(case)) == expected
        assert case.generate(one(case)) == plain
        return f"{ROUTE}; afterwards the old graph is used again"


def adapter_answers(case):
    return Case(case.family, case.name, case.on_demo).answers(one(case))


def compile_layers(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")


def compile_vision(model):
    (model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower).compile(backend="eager")


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


compiled("the model", lambda model: model.compile(backend="eager"))
compiled("`model.forward`", compile_forward)
compiled("the language model", lambda model: model.model.language_model.compile(backend="eager"))
compiled("its layers one by one", compile_layers)
compiled("the vision tower", compile_vision)


@way("`torch.compile(model)` given to `prune`")
def wrapped(case):
    case = case.own()
    with case.prune(torch.compile(case.model, backend="eager")):
        assert case.generate() == case.expected
    return ROUTE


@way("a `PeftModel`")
def peft_model(case):
    peft = pytest.importorskip("peft")
    case = case.own()
    model = peft.get_peft_model(case.model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with case.prune(model):
        assert case.generate(model=model) == case.expected
    return ROUTE


@way("`DistributedDataParallel`")
def ddp(case, folder=None):
    inputs, expected = labelled(case)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with training(case) as (own, inputs, expected):
            model = nn.parallel.DistributedDataParallel(own.model)
            with own.prune(model):
                loss = model(**inputs).loss
                loss.backward()
            torch.testing.assert_close(loss.detach(), expected, atol=1e-3, rtol=1e-3)
            with torch.no_grad(), own.prune(model):
                own.model.eval()
                assert own.generate(model=model.module) == case.expected
    finally:
        torch.distributed.destroy_process_group()
    return f"{ROUTE}; loss equal to that of the short prompt by hand"


@way("`DataParallel`")
def data_parallel(case):
    return refused(lambda: case.prune(nn.DataParallel(case.own().model)))


def accelerated(title, dispatch):
    @way(f"accelerate: {title}")
    def call(case):
        accelerate = pytest.importorskip("accelerate")
        own = case.own()
        dispatch(accelerate, own.model)
        with own.prune():
            assert own.generate() == case.expected
        return ROUTE


def disk(accelerate, model):
    folder = torch.hub.tempfile.mkdtemp()
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


accelerated(
    '`device_map={"": "cpu"}`',
    lambda accelerate, model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True, main_device="cpu"),
)
accelerated(
    "weights on the CPU, fetched for each call",
    lambda accelerate, model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
)
accelerated("weights on the disk", disk)


@way("`copy.deepcopy(model)` inside")
def copies(case):
    plain = case.generate()
    with case.prune():
        assert case.generate(model=copy.deepcopy(case.model)) == plain
    return f"{STOCK}: a copy is not pruned"


@way("`pickle` and `torch.save` of the model inside")
def pickles(case):
    plain, saved = case.generate(), io.BytesIO()
    case = case.fresh()  # transformers leaves hooks that no pickle takes where hidden states were asked for
    with case.prune():
        other = pickle.loads(pickle.dumps(case.model))
        torch.save(case.model, saved)
    assert case.generate(model=other) == plain
    assert case.generate(model=torch.load(io.BytesIO(saved.getvalue()), weights_only=False)) == plain
    return f"{STOCK}: what is saved is not pruned"


@way("`attach` and `detach`, then `with`")
def attached(case):
    plain = case.generate()
    pruning = mipruner.attach(case.model, case.name, KEEP, tokenizer=case.adapter.tokenizer)
    try:
        assert case.generate() == case.expected
    finally:
        pruning.detach()
    assert case.generate() == plain
    with pruning:
        assert case.generate() == case.expected
    return f"{ROUTE}, then to the unpruned model, then to the route"


@way("`prune(...)` without `with`")
def forgotten(case):
    with pytest.warns(UserWarning, match="alone prunes nothing") as caught:
        case.prune()
    return f"warns: {str(caught[0].message).split(': ')[0]}"


@way("a second `prune` in the same thread")
def twice(case):
    def call():
        with case.prune(), case.prune():
            pass

    return refused(call)


@way("two methods, one before the decoder and one inside it")
def two(case):
    names = ["vispruner", case.name] if case.inside else [case.name, "fastv"]
    pruner = mipruner.composed.Composed(before=PRUNERS[names[0]](), inside=PRUNERS[names[1]](), keep_before=0.5)
    expected = [a.tokens for a in Pipeline(case.adapter, pruner, KEEP, Decoding(max_new_tokens=N))(one(case))]
    with mipruner.prune(case.model, names, [0.5, KEEP], tokenizer=case.adapter.tokenizer):
        found = case.generate(one(case), min_new_tokens=0)
    end = case.adapter.tokenizer.eos_token_id
    assert [row[: row.index(end)] if end in row else row for row in found] == expected
    return f"{ROUTE}, {' then '.join(names)}"


@way('`pipeline("image-text-to-text")`')
def text_pipeline(case):
    demo = Case(case.family, case.name, on_demo=True)
    folder = Path(__file__).parent.parent / "experiments/demo" / case.family.replace("_", "")
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        return f"of transformers not without torchvision, refused: {' '.join(str(error).split())[:60]}..."
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    pipe = transformers_pipeline("image-text-to-text", model=model, processor=processor)
    (prompt,) = one(demo)
    content = [{"type": "image", "image": prompt.images[0]}, {"type": "text", "text": prompt.text}]
    with demo.prune(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipe(text=[{"role": "user", "content": content}], max_new_tokens=N, return_full_text=False)
    (expected,) = demo.answers([prompt], ends=True)
    words = demo.adapter.chat.decode(expected[: expected.index(2)] if 2 in expected else expected)
    assert found[0]["generated_text"].split() == words.split()
    return ROUTE


# Each way once in `make test`, every cell in `make ways`.

EVERY = [(family, name) for name in METHODS for family in FAMILIES]
FULL, DEMO = ON_DEMO in os.environ, os.environ.get(ON_DEMO) == "1"
SHORT = [title for title in WAYS if "compiled" not in title]  # tests/test_ways.py has these
CELLS = [
    (title, *cell)
    for k, title in enumerate(WAYS if FULL else SHORT)
    for cell in (EVERY if FULL else [EVERY[k % len(EVERY)]])
]


@pytest.mark.parametrize(("title", "family", "name"), CELLS)
def test_way(title, family, name, record_property):
    case = Case(family, name, DEMO)
    with torch.inference_mode():
        says = WAYS[title](case)
    record_property("cell", (title, family, name, says))


def test_the_ways_are_not_told_by_their_words_alone():
    """A way that is wrong fails: the expected answer is not the unpruned one, nor that of another method."""
    for family in FAMILIES:
        case = Case(family, "mi", on_demo=False)
        with torch.inference_mode():
            assert case.expected != case.generate()
