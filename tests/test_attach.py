"""`mipruner.prune` around code that knows nothing of it: against the explicit route, and prompts built by hand."""

import threading
import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers import pipeline as transformers_pipeline

import mipruner
from experiments.results import ROOT
from families import LLAVA_TEMPLATE
from mipruner import PRUNERS, fused
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.inputs import reader_of
from mipruner.intercept import Stepped
from mipruner.models import Prompt, load
from mipruner.pipeline import Pipeline
from mipruner.prompt import collate
from mipruner.pruners import MIPruner
from mipruner.question import Reader, between_special
from tiny import MODULES, make_image, processor_of, prompts_of, reference, tiny, tokenizer

N = 5
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
DEMO = ROOT / "experiments" / "demo"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def explicit(adapter, pruner, prompts, keep=0.4, n=N):
    return Pipeline(adapter, pruner, keep, Decoding(max_new_tokens=n))(prompts)


def generated(model, inputs, n=N, **options):
    """New tokens of each prompt, without the end of text and what follows it."""
    out = model.generate(**inputs, max_new_tokens=n, **{"do_sample": False, **options})
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2)] if 2 in row else row for row in rows]


def indices(selections):
    return [[selection.indices.tolist() for selection in chosen] for chosen in selections]


def registered(model) -> Counter:
    """Everything that hangs on the modules of a model."""
    hooks = Counter()
    for module in model.modules():
        for name, value in vars(module).items():
            if "hooks" in name and isinstance(value, dict):
                hooks[name] += len(value)
        hooks[f"class {type(module).__mro__[:2]}"] += isinstance(module, Stepped)
        hooks["methods"] += sum(callable(value) for name, value in vars(module).items() if name.startswith("get_"))
    return hooks


CELLS = [(family, "mi") for family in MODULES] + [
    (family, name)
    for family in ("llava", "video_llava", "qwen3_vl")
    for name in ("mi_attention", "visionzip", "mmtok", "fastv", "sparsevlm")
]


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_generate_gives_what_the_explicit_route_gives(family, name):
    """Three prompts of different length: padding, several images, videos."""
    adapter, pruner = tiny(family), PRUNERS[name]()
    prompts = prompts_of(family)[:2] if family == "internvl" else prompts_of(family)  # its frames count as images
    answers = explicit(adapter, pruner, prompts)
    inputs, before = reference(family, prompts), registered(adapter.model)
    with mipruner.prune(adapter.model, pruner, 0.4, tokenizer=adapter.tokenizer) as pruning:
        tokens = generated(adapter.model, inputs)
    assert tokens == [answer.tokens for answer in answers]
    assert indices(pruning.selections) == indices(answer.selections for answer in answers)
    assert registered(adapter.model) == before
    if name == "mi":
        assert tokens != generated(adapter.model, inputs), "pruning changed nothing: this tests nothing"


def test_the_vocabulary_is_summed_over_once_an_image(monkeypatch):
    """A further question about an image finds the sum of the first one, another image does not."""
    calls = []
    plain = fused.log_partition
    monkeypatch.setattr(fused, "log_partition", lambda *args, **kwargs: (calls.append(args), plain(*args, **kwargs))[1])
    adapter, pruner = tiny("llava"), MIPruner(0.5, support="vocabulary")
    one, *_ = prompts_of("llava")
    prompts = [one, replace(one, text="Is there a red car ?"), replace(one, images=[make_image(7, 84, 84)])]
    expected = [explicit(adapter, pruner, [prompt])[0] for prompt in prompts]
    assert len(calls) == 3
    calls.clear()
    with mipruner.prune(adapter.model, pruner, 0.4, tokenizer=adapter.tokenizer) as pruning:
        for prompt, answer in zip(prompts, expected, strict=True):
            assert generated(adapter.model, reference("llava", [prompt])) == [answer.tokens]
            assert indices(pruning.selections) == indices([answer.selections])
    assert len(calls) == 2


def test_a_random_choice_is_one_for_each_prompt_in_any_batch():
    adapter, prompts = tiny("llava"), [prompts_of("llava")[k] for k in (0, 2)]
    with mipruner.prune(adapter.model, "random", 0.4, tokenizer=adapter.tokenizer) as pruning:
        kept = []
        for batch in (prompts, prompts[:1], prompts[1:]):
            generated(adapter.model, reference("llava", batch), 1)
            kept += indices(pruning.selections)
    assert kept[0] == kept[2] != kept[1] == kept[3]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("name", ["mi", "none"])
def test_keeping_everything_is_the_untouched_model(family, name):
    adapter, inputs = tiny(family), reference(family, prompts_of(family))
    options = dict(max_new_tokens=N, output_logits=True, return_dict_in_generate=True, do_sample=False)
    expected = adapter.model.generate(**inputs, **options)
    with mipruner.prune(adapter.model, name, 1.0, tokenizer=adapter.tokenizer):
        found = adapter.model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("options", [{"positions": "keep"}, {"attn": "eager"}, {"dtype": torch.bfloat16}])
def test_positions_implementations_and_precisions(options):
    adapter, prompts = tiny("llava", **options), prompts_of("llava")
    inputs = reference("llava", prompts, options.get("dtype", torch.float32))
    with mipruner.prune(
        adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer, positions=options.get("positions"), lam=0.8
    ):
        tokens = generated(adapter.model, inputs)
    assert tokens == [answer.tokens for answer in explicit(adapter, MIPruner(lam=0.8), prompts)]


def short_prompts(pruning):
    """The pruned prompts as ``generate`` takes them without this library."""
    adapter = pruning.adapter
    pairs = zip(pruning.encoded, pruning.selections, strict=True)
    batch = collate([adapter.shorten(*pair) for pair in pairs])
    mask = torch.ones(batch.embeds.shape[:2]) if batch.attention_mask is None else batch.attention_mask
    return {"inputs_embeds": batch.embeds, "position_ids": batch.position_ids, "attention_mask": mask.long()}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "several"],
)
@pytest.mark.parametrize("name", ["mi", "visionzip"])
def test_ways_of_drawing_are_those_of_the_short_prompt(options, name):
    prompts = prompts_of("llava")[:: 2 if OLD else 1]  # where an old transformers mixes up the images of copies
    adapter, inputs = tiny("llava"), reference("llava", prompts)
    options = {"max_new_tokens": N, "min_new_tokens": N, **options}
    torch.manual_seed(0)
    with mipruner.prune(adapter.model, name, 0.4, tokenizer=adapter.tokenizer) as pruning:
        found = adapter.model.generate(**inputs, **options)[:, -N:]
        adapter.model.generate(**inputs, max_new_tokens=1)  # the prompts once each, for what follows
    torch.manual_seed(0)
    assert found.tolist() == adapter.model.generate(**short_prompts(pruning), **options).tolist()


def test_streaming_and_threads():
    """Each of two threads streams the answer that it would have alone."""
    adapter, prompts = tiny("llava"), prompts_of("llava")
    singles = [reference("llava", [prompt]) for prompt in prompts[:2]]
    expected = [
        answer.tokens for prompt in prompts[:2] for answer in explicit(adapter, PRUNERS["visionzip"](), [prompt])
    ]

    class Stream:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens = self.tokens[self.n_prompt :]

    streams = [Stream() for _ in range(6)]

    def run(stream, inputs):
        stream.n_prompt = inputs["input_ids"].shape[1]
        adapter.model.generate(**inputs, max_new_tokens=N, do_sample=False, streamer=stream)

    with mipruner.prune(adapter.model, "visionzip", 0.4, tokenizer=adapter.tokenizer):
        pairs = zip(streams, singles * 3, strict=True)
        threads = [threading.Thread(target=run, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [stream.tokens[: len(tokens)] for stream, tokens in zip(streams, expected * 3, strict=True)] == expected * 3


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("with_cache", [True, False])
def test_forward_passes_by_hand(family, with_cache):
    """Neither positions nor a cache of the caller's own, and a mask that counts the full prompt."""
    adapter, prompts = tiny(family), prompts_of(family)[1:2]
    expected = explicit(adapter, MIPruner(), prompts)[0].tokens
    inputs = reference(family, prompts)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    found = []
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer):
        out = adapter.model(**inputs, use_cache=with_cache)
        for _ in expected:
            found.append(int(out.logits[0, -1].argmax()))
            token = torch.tensor([found[-1:]])
            for name in rest.keys() & {"attention_mask", "mm_token_type_ids"}:
                more = torch.full_like(token, int(name == "attention_mask")).to(rest[name])
                rest[name] = torch.cat([rest[name], more], 1)
            if with_cache:
                mask = {"attention_mask": rest["attention_mask"]}
                out = adapter.model(input_ids=token, past_key_values=out.past_key_values, **mask)
            else:
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
                out = adapter.model(input_ids=inputs["input_ids"], use_cache=False, **rest)
    assert found == expected


@pytest.mark.parametrize("name", ["mi", "fastv", "sparsevlm", "autoprune"])
def test_a_forward_pass_that_records_gradients(name):
    """The plain ``model(**inputs)`` of a script, without ``no_grad`` around it."""
    adapter, inputs = tiny("llava"), reference("llava", prompts_of("llava"))
    with mipruner.prune(adapter.model, name, 0.4, tokenizer=adapter.tokenizer):
        expected = adapter.model(**inputs).logits
    with torch.inference_mode(False), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("error")
        model = deepcopy(adapter.model).requires_grad_()
        with mipruner.prune(model, name, 0.4, tokenizer=adapter.tokenizer):
            found = model(**{key: value.clone() for key, value in inputs.items()}).logits
    assert found.requires_grad and torch.equal(found, expected)


def test_generate_without_a_cache():
    adapter, prompts = tiny("llava"), prompts_of("llava")
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer):
        found = generated(adapter.model, reference("llava", prompts), use_cache=False)
    assert found == [answer.tokens for answer in explicit(adapter, MIPruner(), prompts)]


# Conversations.


def chat(said, family="llava"):
    """Ids and images of a conversation about one image; what is said alternates between user and assistant."""
    inputs = reference(family, [Prompt(said[0], [make_image(0, 84, 84)])])
    words = tokenizer()
    rest = ""
    for k, text in enumerate(said[1:]):
        rest += f"{text}<|im_end|>\n" + ("<|im_start|>user\n" if k % 2 == 0 else "<|im_start|>assistant\n")
    more = torch.tensor([words(rest).input_ids], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 7).int()
    return inputs


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_the_latest_question_of_a_chat_scores(family):
    adapter, words = tiny(family), tokenizer()
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer) as pruning:
        adapter.model.generate(**chat(["What is it ?", "A cup .", "Which color ?"], family), max_new_tokens=1)
        (sample,) = pruning.encoded
        assert words.decode(sample.ids[sample.is_text]) == "Which color ?"
        chosen = indices(pruning.selections)
        adapter.model.generate(**chat(["Which color ?"], family), max_new_tokens=1)
        assert chosen == indices(pruning.selections)
        adapter.model.generate(**chat(["What is it ?"], family), max_new_tokens=1)
        assert chosen != indices(pruning.selections)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("positions", ["repack", "keep"])
def test_a_chat_goes_on_with_its_cache(family, positions):
    """Equal to a forward pass over the pruned first turn and the rest, built by hand and without a cache."""
    if family == "qwen3_vl" and positions == "repack":
        pytest.skip("M-RoPE is never repacked")
    adapter = tiny(family)
    first, options = chat(["What is it ?"], family), dict(do_sample=False, return_dict_in_generate=True)
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer, positions=positions) as pruning:
        told = adapter.model.generate(**first, max_new_tokens=3, min_new_tokens=3, **options)
        rest = tokenizer()("<|im_end|>\n<|im_start|>user\nAnd then ?<|im_end|>\n<|im_start|>assistant\n").input_ids
        ids = torch.cat([told.sequences, torch.tensor([rest])], 1)
        second = first | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in second:
            second["mm_token_type_ids"] = (ids == 7).int()
        found = adapter.model.generate(**second, past_key_values=told.past_key_values, max_new_tokens=N, **options)

    (sample,), ((selection,),) = pruning.encoded, pruning.selections
    assert tokenizer().decode(sample.ids[sample.is_text]) == "What is it ?", "the second turn pruned nothing anew"
    short = pruning.adapter.shorten(sample, [selection])
    expected, said = [], ids[0, len(sample.ids) :].tolist()
    for _ in range(N):
        text = torch.tensor(said + expected)
        embeds = torch.cat([short.embeds, adapter.model.get_input_embeddings()(text)])[None]
        ahead = short.position_ids[:, -1:] + 1 + torch.arange(len(text))
        position_ids = torch.cat([short.position_ids, ahead], 1)[:, None]
        visual = torch.cat([short.is_visual, torch.zeros(len(text), dtype=torch.bool)])[None]
        deepstack = {"visual_pos_masks": visual, "deepstack_visual_embeds": list(short.deepstack)}
        out = adapter.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids[0] if len(position_ids) == 1 else position_ids,
            attention_mask=torch.ones(embeds.shape[:2]),
            use_cache=False,
            **(deepstack if short.deepstack else {}),
        )
        expected.append(int(adapter.model.lm_head(out.last_hidden_state[0, -1]).argmax()))
    assert found.sequences[0, ids.shape[1] :].tolist() == expected[: found.sequences.shape[1] - ids.shape[1]]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_cached_beginning_is_left_alone(family):
    """A system prompt whose cache the caller keeps, and the same prompt without it."""
    if OLD and family == "qwen3_vl":
        pytest.skip("places an image behind a cached beginning wrongly, pruned or not")
    adapter = tiny(family)
    inputs = chat(["What is it ?", "A cup .", "Which color ?"], family)
    cache, n = DynamicCache(config=adapter.model.config.text_config), 3
    adapter.model.model.language_model(
        inputs_embeds=adapter.model.get_input_embeddings()(inputs["input_ids"][:, :n]), past_key_values=cache
    )
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer) as pruning:
        expected = generated(adapter.model, inputs)
        chosen = indices(pruning.selections)
        found = generated(adapter.model, inputs, past_key_values=cache)
        assert indices(pruning.selections) == chosen
    assert found == expected


def test_methods_inside_the_decoder_start_anew_with_every_prompt():
    adapter, prompts = tiny("llava"), prompts_of("llava")
    pruner, words = PRUNERS["fastv"](), tokenizer()
    text = dict(words(["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"], return_tensors="pt"))
    text = {name: text[name] for name in ("input_ids", "attention_mask")}
    plain, expected = generated(adapter.model, text), [explicit(adapter, pruner, [p])[0].tokens for p in prompts[:2]]
    with mipruner.prune(adapter.model, pruner, 0.4, tokenizer=adapter.tokenizer):
        for prompt, tokens in zip(prompts, expected, strict=False):
            assert generated(adapter.model, reference("llava", [prompt])) == [tokens]
            assert generated(adapter.model, text) == plain


DECODER_METHODS = ["fastv", "dart", "sparsevlm", "autoprune"]


@pytest.mark.parametrize("name", ["mi", *DECODER_METHODS])
def test_threads_inside_one_context(name):
    """Six at a time, each with the answer that it would have alone."""
    adapter, pruner, prompts = tiny("llava"), PRUNERS[name](), prompts_of("llava")
    expected = [explicit(adapter, pruner, [prompt])[0].tokens for prompt in prompts] * 2
    found = [None] * 6

    def run(k):
        found[k] = generated(adapter.model, reference("llava", [prompts[k % 3]]))[0]

    with mipruner.prune(adapter.model, pruner, 0.4, tokenizer=adapter.tokenizer):
        threads = [threading.Thread(target=run, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected


@pytest.mark.parametrize("name", ["mi", *DECODER_METHODS])
def test_a_chat_goes_on_after_another_prompt(name):
    """What became of a prompt lies on its cache: an answer in between changes nothing."""
    adapter, options = tiny("llava"), dict(do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    rest = tokenizer()("<|im_end|>\n<|im_start|>user\nAnd then ?<|im_end|>\n<|im_start|>assistant\n").input_ids
    found = []
    for between in (False, True):
        with mipruner.prune(adapter.model, name, 0.4, tokenizer=adapter.tokenizer):
            told = adapter.model.generate(**chat(["What is it ?"]), max_new_tokens=3, **options)
            if between:
                adapter.model.generate(**reference("llava", prompts_of("llava")[1:2]), max_new_tokens=3)
            ids = torch.cat([told.sequences, torch.tensor([rest])], 1)
            more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            out = adapter.model.generate(**more, past_key_values=told.past_key_values, max_new_tokens=N, **options)
        found.append(out.sequences[0, ids.shape[1] :].tolist())
    assert found[0] == found[1] and len(found[0]) == N


# What is T.


def ids_of(text):
    ids = torch.tensor(tokenizer()(text).input_ids)
    return ids, ids == 3


USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEMPLATES = {"chatml": LLAVA_TEMPLATE, "vicuna": VICUNA, "demo": (DEMO / "llava/chat_template.jinja").read_text()}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("chatml", f"<s>{USER}<image><image>\nWhat is it?{END}", "What is it?"),
        ("chatml", f"{USER}What\nis it? <image>{END}", "What\nis it? "),
        ("chatml", f"{USER}<image>\nA?{END}B<|im_end|>\n{USER}The user asks: C?{END}D", "The user asks: C?"),
        ("chatml", f"{USER}<image>\nWas ist 这个？{END}", "Was ist 这个？"),
        ("chatml", f"{USER}<image>\n这个是什么？{END}", "这个是什么？"),
        ("chatml", f"{USER}Frame1: <image>\nFrame2: <image>\nWho?{END}", "Who?"),
        ("vicuna", "USER: <image>\nWhat is it? ASSISTANT:", "What is it?"),
        ("vicuna", "A chat. USER: <image>\nA? ASSISTANT: B</s>USER: Is C? ASSISTANT:", "Is C?"),
        ("vicuna", "<image>\nno role words", "no role words"),
        ("demo", "<image> USER: What color is it ? ASSISTANT:", "What color is it ?"),
        ("demo", "<image> USER: A ? ASSISTANT: B </s> USER: C ? ASSISTANT:", "C ?"),
    ],
)
def test_the_users_text_is_found_by_the_template(name, text, expected):
    ids, is_visual = ids_of(text)
    is_text = Reader(tokenizer(), TEMPLATES[name], ("<image>",)).latest(ids, is_visual)
    assert tokenizer().decode(ids[is_text]).strip() == expected.strip()
    assert not tokenizer().decode(ids[is_text])[:1].isspace()


def test_of_several_chat_templates_the_default_one_is_read():
    words, adapter = deepcopy(tokenizer()), tiny("llava")
    words.chat_template = {"default": LLAVA_TEMPLATE, "tools": "{{ 1 }}"}
    assert reader_of(words, adapter).template == LLAVA_TEMPLATE


def test_a_given_text_is_found_where_it_stands_last():
    ids, is_visual = ids_of(f"{USER}<image>\nred or blue ? Answer: red{END}")
    reader = Reader(tokenizer(), None)
    where = reader.occurrence(ids, is_visual, "red").nonzero()[:, 0].tolist()
    assert tokenizer().decode(ids[where]) == "red" and where[0] > len(ids) - 20
    with pytest.raises(InputError, match="'green' is not in the prompt"):
        reader.occurrence(ids, is_visual, "green")
    with pytest.raises(InputError, match="is not in the prompt"):
        reader.occurrence(ids, is_visual, " ")


def test_without_a_tokenizer_the_text_up_to_the_next_end_counts():
    ids, is_visual = ids_of(f"{USER}<image>\n<|vision_end|>What?{END}")
    is_text = between_special(ids, is_visual, ends={10}, special={6, 10})
    assert tokenizer().decode(ids[is_text]) == "\nWhat?"
    ids, is_visual = ids_of("USER: <image>\nWhat? ASSISTANT:")
    assert tokenizer().decode(ids[between_special(ids, is_visual, {2}, {2})]) == "\nWhat? ASSISTANT:"


def test_a_model_alone_is_enough_and_says_what_it_took_for_the_question():
    adapter, prompts = tiny("llava"), prompts_of("llava")[:1]
    with pytest.warns(UserWarning, match="role words included"), mipruner.prune(adapter.model, "mi", 0.4) as pruning:
        generated(adapter.model, reference("llava", prompts))
    (sample,) = pruning.encoded
    assert tokenizer().decode(sample.ids[sample.is_text]) == f"\n{prompts[0].text}{END}"


def test_text_names_a_part_of_each_prompt():
    adapter, prompts = tiny("llava"), prompts_of("llava")
    parts = ["color", "the first or the second", "What happens"]
    marked = [Prompt(p.text, p.images, query=part) for p, part in zip(prompts, parts, strict=True)]
    inputs = reference("llava", prompts)
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer, text=parts) as pruning:
        found = generated(adapter.model, inputs)
        with pytest.raises(InputError, match="3 texts were given, and there are 1 prompts"):
            adapter.model.generate(**reference("llava", prompts[:1]), max_new_tokens=1)
    answers = explicit(adapter, MIPruner(), marked)
    assert found == [answer.tokens for answer in answers]
    assert indices(pruning.selections) == indices(answer.selections for answer in answers)


# Refusals.


def test_nothing_is_left_behind_whatever_is_raised(record_property):
    adapter, inputs = tiny("qwen3_vl"), reference("qwen3_vl", prompts_of("qwen3_vl"))
    before, expected = registered(adapter.model), generated(adapter.model, inputs)

    class Broken(MIPruner):
        def select(self, features, n_keep):
            raise ZeroDivisionError

    for pruner in (Broken(), PRUNERS["fastv"](layer=99)):
        with (
            pytest.raises((ZeroDivisionError, InputError)),
            mipruner.prune(adapter.model, pruner, 0.4, tokenizer=adapter.tokenizer),
        ):
            adapter.model.generate(**inputs, max_new_tokens=2)
        assert registered(adapter.model) == before
    with pytest.raises(KeyboardInterrupt), mipruner.prune(adapter.model, tokenizer=adapter.tokenizer):
        raise KeyboardInterrupt
    assert registered(adapter.model) == before
    assert generated(adapter.model, inputs) == expected
    accident = "an exception or Ctrl-C inside `mipruner.prune`"
    record_property("survives", (accident, "no hook is left; the model answers as before"))


def test_one_context_at_a_time():
    adapter = tiny("llava")
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer):
        with (
            pytest.raises(InputError, match="is being pruned already"),
            mipruner.prune(adapter.model, tokenizer=adapter.tokenizer),
        ):
            pass
        with mipruner.prune(tiny("qwen3_vl").model, "mi", 0.4, tokenizer=adapter.tokenizer):  # another model
            pass
        found = generated(adapter.model, reference("llava", prompts_of("llava")))
    assert found == [answer.tokens for answer in explicit(adapter, MIPruner(), prompts_of("llava"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruner": "mmi"}, "unknown pruner 'mmi': "),
        ({"pruner": "mi", "lamda": 1}, "mi: .*unexpected keyword argument 'lamda'"),
        ({"pruner": MIPruner(), "lam": 1}, "lam: hyperparameters belong to the pruner"),
        ({"pruner": MIPruner}, "MIPruner'> is no pruner: give one of none, .* or an instance"),
        ({"pruner": "mi", "lam": 2}, "lam=2 is not in"),
        ({"keep": 0}, "keep=0 is not a budget"),
        ({"keep": 1.5}, "keep=1.5 is neither"),
        ({"positions": "moved"}, "unknown positions 'moved'"),
        ({"text": "What?"}, "give tokenizer, too"),
    ],
)
def test_what_does_not_fit_is_refused_on_entering(arguments, message):
    model = tiny("llava").model
    before = registered(model)
    with pytest.raises(InputError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mipruner.prune(model, **arguments):
            pass
    assert registered(model) == before
    llm = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(InputError, match="'llama' has no adapter"), mipruner.prune(llm):
        pass
    for wrong in (tiny("llava"), model.model, "experiments/demo/llava"):
        with pytest.raises(InputError, match="give the transformers model that has generate"), mipruner.prune(wrong):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_chunk_size": 8}, "prefill_chunk_size cuts a prompt before its question is known"),
        ({"assistant_model": tiny("llava").model}, "assistant_model reads guesses together with the prompt"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens reads guesses together with the prompt"),
    ],
)
def test_what_cannot_be_served_is_refused(options, message):
    adapter = tiny("llava")
    inputs = reference("llava", [Prompt("is it is it is it is it ?", [make_image(0, 84, 84)])])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, **options}
    with (
        pytest.raises(InputError, match=message),
        mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer),
    ):
        adapter.model.generate(**inputs, **options)


def test_images_and_prompts_must_come_together():
    adapter, inputs = tiny("llava"), reference("llava", prompts_of("llava")[:1])
    elsewhere = {"image": adapter.model.model.get_image_features(inputs["pixel_values"])}
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with mipruner.prune(adapter.model, "mi", 0.4, tokenizer=adapter.tokenizer):
        with pytest.raises(InputError, match="images encoded for them in this context 0"):
            adapter.model(**ids, mm_encoder_outputs=elsewhere)
        generated(adapter.model, reference("llava", [Prompt("What?", [make_image(5, 84, 84)])]))
        with pytest.raises(InputError, match="were not encoded by this call"):
            adapter.model(**ids, mm_encoder_outputs=elsewhere)
        with pytest.raises(InputError, match="has inputs_embeds only"):
            adapter.model.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=1)
    with (
        pytest.raises(InputError, match="keep=40 asks for more tokens than the 16"),
        mipruner.prune(adapter.model, "mi", 40, tokenizer=adapter.tokenizer),
    ):
        adapter.model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("name", ["mi", "fastv"])
def test_a_cache_counts_the_full_prompt_and_crops_what_came_after_it(family, name):
    """As assisted decoding does when a guess was wrong."""
    adapter, inputs = tiny(family), reference(family, prompts_of(family)[:1])
    options = dict(do_sample=False, min_new_tokens=4, return_dict_in_generate=True)
    with mipruner.prune(adapter.model, name, 0.4, tokenizer=adapter.tokenizer):
        out = adapter.model.generate(**inputs, max_new_tokens=4, **options)
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        assert cache.layers[-1].keys.shape[2] < out.sequences.shape[1] - 1, "nothing was pruned: this tests nothing"
        cache.crop(-2)
        again = adapter.model.generate(out.sequences[:, :-2], past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert again.tolist() == out.sequences.tolist()
        with pytest.raises(InputError, match="a shortened prompt cannot be cropped"):
            cache.crop(-5)


# The real thing.


def scene():
    path = ROOT / "tests/data/scene.png"
    return Image.open(path) if path.exists() else make_image(1, 336, 336)


def test_transformers_pipeline_on_the_demo():
    folder = str(DEMO / "llava")
    adapter = load(folder, dtype="float32")
    question, image = "What color is the sun ?", scene()
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    pipe = transformers_pipeline("image-text-to-text", model=model, processor=processor)
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    with mipruner.prune(model, "mi", 16) as pruning:  # the tokenizer beside the weights is found
        found = pipe(text=messages, max_new_tokens=4, return_full_text=False, do_sample=False)
    (answer,) = explicit(adapter, MIPruner(), [Prompt(question, [image])], keep=16, n=4)
    assert found[0]["generated_text"].strip() == answer.text
    assert indices(pruning.selections) == indices([answer.selections])
    assert pruning.encoded[0].is_text.sum() == len(question.split())


def test_the_qwen_shaped_demo():
    adapter = load(DEMO / "qwen3vl")
    question, image = "Is there a sun in the image ?", make_image(2, 336, 252)
    pixels = adapter.preprocess(image)
    n = int(pixels["grid_thw"].prod()) // 4
    text = f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|> USER: {question} ASSISTANT:"
    inputs = dict(adapter.tokenizer(text, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    kinds = (inputs["input_ids"] == adapter.model.config.image_token_id).int()
    inputs |= {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["grid_thw"], "mm_token_type_ids": kinds}
    (answer,) = explicit(adapter, MIPruner(), [Prompt(question, [image])], keep=0.1, n=4)
    with mipruner.prune(adapter.model, "mi", 0.1) as pruning:
        found = generated(adapter.model, inputs, n=4)
    assert found == [answer.tokens]
    assert indices(pruning.selections) == indices([answer.selections])
    assert processor_of("qwen3_vl").size != adapter.image_processor.size
