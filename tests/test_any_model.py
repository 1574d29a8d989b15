"""`mipruner.prune` around every image-text-to-text model type of the installed transformers, tiny and random.

Everything kept is the untouched `generate`, bit for bit; pruned is a short sequence that is built here by hand and run
through the model without hooks and without a cache. `make test` runs one type of each trait, `make test-models` all.
"""

import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import dispatch_model

import mipruner
from any_by_hand import STEPS, TYPES, ByHand, generate, inputs_of, kept_of, made
from any_decoder import INSIDE, decoders
from any_long import found
from any_page import PAGE, block, row
from any_recipes import OVERRIDES
from any_tiny import CLASSES, build
from any_tokens import check_tokens
from mipruner.arguments import Cut
from mipruner.errors import InputError
from mipruner.layer_form import Form, Seen, halves
from mipruner.models import FAMILIES
from mipruner.models.generic import TESTED, GenericAdapter, language_model_of, owner_of, refusal
from mipruner.prompt import Visual

TRAITS = ["gemma3", "gemma3n", "llama4", "granite4_vision", "molmo2", "idefics3", "glm4v", "lfm2_vl:conv", "exaone4_5"]
EVERY = os.environ.get("MODELS") == "all"
VARIANTS = ["gemma4:causal", "mistral3:sliding", "paligemma:2", "lfm2_vl:conv", "step3p7:sliding"]
LARGER = {"mistral_large4": "mistral_large4:wide", "glm5_next": "glm5_next:wide"}
"""Types whose default form drops keys by itself, so that no cacheless reference exists; the variant keeps them all."""

NOT_BUILT: dict[str, str] = {}
"""Types that are not known to work, and why. An entry that has become possible fails the test."""

IS_OLDEST = transformers.__version__.startswith("5.17.")
OLDEST = {
    "test_prunes_or_refuses": {
        "fuyu": "its pixels have another name",
        "inkling_mm_model": "needs scipy, which is not among what the library needs",
        **dict.fromkeys(("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"), "refused: no owner with a language model"),
        "step3p7:sliding": "no rotary embedding for each kind of layer",
        "vision-encoder-decoder": "no default config",
    },
    "test_bfloat16_and_beams": {
        "exaone4_5": "its beams fail with two images",
        **dict.fromkeys(("granite4_vision", "lfm2_vl:conv"), "beams of two images get the wrong one"),
    },
}
"""What transformers 5.17 itself cannot do, by test and type."""


def params():
    for kind in [*(kind for kind in CLASSES if kind not in FAMILIES), *VARIANTS]:
        marks = [] if kind in TRAITS else [pytest.mark.skipif(not EVERY, reason="make test-models runs all types")]
        if kind in NOT_BUILT:
            marks.append(pytest.mark.xfail(strict=True, reason=NOT_BUILT[kind]))
        yield pytest.param(kind, marks=marks)


@pytest.fixture(autouse=True)
def known(request):
    """Skip a type that the installed transformers does not have, or cannot do itself."""
    kind = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else None
    if kind and kind.split(":")[0] not in CLASSES:
        pytest.skip(f"not in transformers {transformers.__version__}")
    if IS_OLDEST and (reason := OLDEST.get(request.node.originalname, {}).get(kind)):
        pytest.skip(f"transformers 5.17: {reason}")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", params())
def test_prunes_or_refuses(kind):
    kind = LARGER.get(kind, kind)
    model = made(kind)
    if not hasattr(model, "generate") or refusal(model):
        assert kind not in TESTED
        with pytest.raises(InputError, match="cannot be pruned"):
            mipruner.prune(model, "mi", 0.5)
        return
    assert kind.split(":")[0] in TESTED, "add the type to TESTED, or to NOT_BUILT with a reason"
    inputs, px = inputs_of(kind, model)
    call = {**inputs, **px}
    _, stock, _ = generate(model, call)
    with mipruner.prune(model, "random", 1.0, positions="keep"):
        assert torch.equal(generate(model, call)[1], stock)
    with mipruner.prune(model, "mi", 0.5, positions="keep") as pruning:
        tokens, logits, _cache = generate(model, call)
    keep = kept_of(model, inputs, pruning)
    assert int((~keep).sum()) > 0
    assert not torch.allclose(logits, stock, atol=1e-3)
    by_hand_tokens, by_hand = ByHand(kind, model, inputs, px, keep)()
    assert torch.equal(tokens, by_hand_tokens)
    torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=0)
    assert torch.equal(generate(model, call)[1], stock)


def test_tested_types_are_those_of_transformers():
    """No type is said to be tested that this test does not run."""
    assert not TESTED & set(FAMILIES)
    if IS_OLDEST:
        absent = ", ".join(f"`{kind}`" for kind in sorted(TESTED - set(CLASSES)))
        assert f" {len(TESTED - set(CLASSES))} types of the table do not exist: {absent}." in " ".join(
            PAGE.read_text().split()
        )
    elif EVERY:
        assert set(CLASSES) >= TESTED


def why_refused(kind):
    """The reason as the page says it, or None for a type that is pruned."""
    model = made(LARGER.get(kind, kind))
    return refusal(model) if hasattr(model, "generate") else "it has no generate"


def found_row(kind):
    """The type's line of the page, measured."""
    larger = LARGER.get(kind, kind)
    model = made(larger)
    check_tokens(kind, model)
    return row(kind, found(larger, model))


@pytest.mark.skipif(not EVERY, reason="make test-models runs all types")
@pytest.mark.parametrize("kind", sorted(TESTED & set(CLASSES)))
def test_the_long_form_finds_what_the_page_says(kind):
    """Methods, beams, a padded batch, a second turn, keep=auto and bfloat16, with two images."""
    assert found_row(kind) in block(), "make models-page writes the page anew"


def test_the_page_lists_every_type():
    lines = block().splitlines()
    named = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert len(TESTED) == sum(line.count("|") == 8 for line in named.values())
    assert f"; {len(TESTED)} types:" in lines[1]
    assert named.keys() >= TESTED | set(NOT_BUILT)
    inside = [kind for kind in TESTED if not re.search("no:|`fastv`|`sparsevlm`|`dart`", named[kind].split("|")[4])]
    for page, what in [("README.md", "other"), ("docs/anywhere.md", r"\[further")]:
        text = " ".join((Path(__file__).parents[1] / page).read_text().split())
        said = re.search(rf" (\d+) {what} .*FastV, SparseVLM and DART on (\d+) of them", text)
        assert [*map(int, said.groups())] == [len(TESTED), len(inside)], page
    if EVERY:
        assert named.keys() >= set(CLASSES) - set(FAMILIES)


def test_methods_that_read_the_encoder_are_refused():
    model = build("gemma3", OVERRIDES)
    for method in ("attention", "visionzip", "autoprune"):
        with pytest.raises(InputError, match="only image rows and text are known"):
            mipruner.prune(model, method, 0.5)


@pytest.mark.parametrize("kind", ["idefics3", "glm4v", "cosmos3_omni", "minicpmv4_6"])
def test_methods_inside_the_language_model(kind):
    """Plain layers, rotation by pairs, deepstack rows, linear attention."""
    model = made(kind)
    refused = {}
    if IS_OLDEST and kind == "minicpmv4_6":  # whose rotary embedding takes three positions a token only
        refused = {"sparsevlm": "its position embeddings are not those of rotary_emb"}
    works = [name for name in INSIDE if name not in refused]
    assert decoders(kind, model, *inputs_of(kind, model)) == (works, refused)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("gemma3", "fastv", "some of its layers have a cache of type DynamicSlidingWindowLayer"),
        ("lfm2_vl", "fastv", "Lfm2Model has no norm"),
        ("kimi_k25", "fastv", "DeepseekV3Attention. has no k_proj"),
        ("minimax_m3_vl", "fastv", "selects keys by itself"),
        ("paligemma", "fastv", "is not causal"),
        ("molmo2", "fastv", "the attention mask of layer 0 is not the causal one"),
        ("granite4_vision", "fastv", "reads vision_mask for each token between its layers"),
        ("hunyuan_vl", "fastv", "the attention of layer 1 does not follow from its queries and keys"),
        ("step3p7", "sparsevlm", "position embeddings are not those of rotary_emb"),
    ],
)
def test_layers_of_another_form_are_refused(kind, method, message):
    model = made(kind)
    inputs, px = inputs_of(kind, model)
    with (
        pytest.raises(InputError, match=f"{kind}: .*{message}.*docs/models.md"),
        mipruner.prune(model, method, 0.3),
    ):
        generate(model, {**inputs, **px})
    generate(model, {**inputs, **px})


class Int8(torch.nn.Linear):
    """A quantized layer, whose weights cannot be read as numbers."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)


def changed(model, how):
    """The same model in bfloat16, with large logits of attention, dispatched by accelerate, or quantized."""
    for layer in language_model_of(owner_of(model)).layers:
        for x in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            if how == "large logits":
                x.weight *= 8
            if how == "quantized":
                x.__class__, x.weight = Int8, torch.nn.Parameter((x.weight * 100).to(torch.int8), requires_grad=False)
    if how == "dispatched":
        return dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return model if how == "quantized" else model.to(torch.bfloat16)


@pytest.mark.parametrize("how", ["bfloat16", "large logits", "dispatched", "quantized"])
def test_a_rotary_embedding_of_another_form_is_refused(how, monkeypatch):
    model = made("glm4v")
    inputs, px = inputs_of("glm4v", model)
    model = changed(model, how)
    call = inputs | {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in px.items()}
    with mipruner.prune(model, "fastv", 0.5) as pruning:
        generate(model, call)
    assert pruning.per_layer == [[14, 14, 7, 7]]
    monkeypatch.setattr("mipruner.layer_form.pairs", halves)
    with mipruner.prune(model, "fastv", 0.5), pytest.raises(InputError, match="does not follow from its queries"):
        generate(model, call)


@pytest.mark.parametrize(("length", "grid"), [(16, (4, 4)), (4, (4, 4)), (8, None)])
def test_a_square_number_of_rows_in_tiles_is_no_grid(length, grid):
    """One run of placeholders, a separator behind each line (Mistral), or behind each of two tiles (Idefics 3)."""
    adapter = GenericAdapter(made("gemma3"))
    ends = torch.arange(0, 16 // length).repeat_interleave(length)
    assert adapter.placed(Visual(torch.zeros(16, 2), grid=(4, 4)), 5 + torch.arange(16) + ends).grid == grid


def test_what_stands_between_two_layers_is_refused():
    model = made("idefics3")
    language_model = language_model_of(owner_of(model))
    hidden, valid = torch.randn(1, 5, 64), torch.ones(1, 5, dtype=torch.bool)
    call = {"attention_mask": None, "position_embeddings": (hidden, hidden)}
    seen = Seen(output=hidden.clone())
    form = Form("idefics3", language_model)
    form.check_call(1, (hidden,), call, valid, seen)
    for args, more, message in [
        ((hidden + 1,), {}, "the input of layer 1 is not the output of layer 0"),
        ((hidden, hidden), {}, "layer 1 reads positional argument 1 for each token"),
        ((hidden[0],), {}, "takes no tensor"),
        ((hidden,), {"per_layer": [torch.ones(5)]}, "reads per_layer for each token"),
        ((hidden,), {"position_embeddings": hidden}, "takes no position_embeddings"),
    ]:
        with pytest.raises(InputError, match=message):
            form.check_call(1, args, call | more, valid, seen)


@pytest.mark.parametrize("kind", ["glm4v", "idefics3"])
def test_a_padded_batch_inside_the_language_model_is_each_prompt_alone(kind):
    model = made(kind)
    inputs, px = inputs_of(kind, model)
    alone = {k: v[:, :-4] for k, v in inputs.items()}
    both = {k: torch.cat([v, torch.nn.functional.pad(alone[k], (4, 0))]) for k, v in inputs.items()}
    with mipruner.prune(model, "fastv", 0.5):
        together = generate(model, both | {k: torch.cat([v, v]) for k, v in px.items()})[1]
        apart = [generate(model, {**one, **px})[1] for one in (inputs, alone)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=0)


def test_a_type_that_nobody_tested_gets_one_warning(monkeypatch):
    model = build("gemma3", OVERRIDES)
    monkeypatch.setattr("mipruner.models.generic.TESTED", frozenset())
    with (
        pytest.warns(UserWarning, match="'gemma3' is not among the model types that were tested"),
        mipruner.prune(model, "random", 0.5),
    ):
        pass


def test_a_call_around_the_models_own_forward_is_refused():
    model = made("gemma3")
    inputs, _ = inputs_of("gemma3", model)
    language_model = language_model_of(owner_of(model))
    with mipruner.prune(model, "random", 0.5), pytest.raises(InputError, match="around the model's own forward"):
        language_model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))


def test_rows_that_do_not_stand_in_the_prompt_are_refused(monkeypatch):
    model = made("gemma3")
    inputs, px = inputs_of("gemma3", model)
    monkeypatch.setattr("mipruner.models.generic.ROWS", {"gemma3": lambda owner, out: out.pooler_output + 1})
    with (
        mipruner.prune(model, "random", 0.5),
        pytest.raises(InputError, match=r"gemma3: .*were not encoded by this call.*docs/models.md"),
    ):
        generate(model, {**inputs, **px})


def test_masks_that_cannot_be_made_anew_are_refused(monkeypatch):
    model = made("gemma3")
    inputs, px = inputs_of("gemma3", model)
    monkeypatch.setattr("mipruner.arguments._same", lambda a, b: False)
    with mipruner.prune(model, "random", 0.5), pytest.raises(InputError, match="in a way that is not known"):
        generate(model, {**inputs, **px})


def test_an_argument_as_long_as_the_prompt_is_known_or_refused():
    visual = torch.tensor([[False, True, True, False, True]])
    cut = Cut(torch.tensor([[-1, 0, 2, 3]]), visual)
    assert cut("x", torch.arange(1, 6)[None]).tolist() == [[0, 1, 3, 4]]
    assert cut("x", [torch.arange(3)])[0].tolist() == [1]
    assert cut("x", torch.zeros(7, 2)).shape == (7, 2)
    with pytest.raises(InputError, match=r"this model: .*argument x \[2, 5\].*docs/models.md"):
        cut("x", torch.zeros(2, 5))


@pytest.mark.parametrize("kind", ["gemma3", "idefics3", "exaone4_5"])
def test_a_second_turn_goes_on_with_the_short_cache(kind):
    model = made(kind)
    inputs, px = inputs_of(kind, model)
    with mipruner.prune(model, "mi", 0.5, positions="keep") as pruning:
        first = model.generate(
            **inputs, **px, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, pad_token_id=0
        )
        keep = kept_of(model, inputs, pruning)
        ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
        n_new = ids.shape[1] - inputs["input_ids"].shape[1]
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        turn |= {k: torch.cat([inputs[k], inputs[k].new_zeros(1, n_new)], 1) for k in TYPES if k in inputs}
        tokens, logits, _ = generate(model, turn | {"past_key_values": first.past_key_values})
    keep = torch.cat([keep, torch.ones(n_new, dtype=torch.bool)])
    by_hand_tokens, by_hand = ByHand(kind, model, turn, px, keep)()
    assert torch.equal(tokens, by_hand_tokens)
    torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3", "glm4v", "idefics3"])
def test_a_padded_batch_is_each_prompt_alone(kind):
    model = made(kind)
    inputs, px = inputs_of(kind, model)
    alone = {k: v[:, :-4] for k, v in inputs.items()}
    both = {k: torch.cat([v, torch.nn.functional.pad(alone[k], (4, 0))]) for k, v in inputs.items()}
    with mipruner.prune(model, "mi", 0.5):
        together = generate(model, both | {k: torch.cat([v, v]) for k, v in px.items()})[1]
        apart = [generate(model, {**one, **px})[1] for one in (inputs, alone)]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["gemma3", "granite4_vision", "molmo2", "idefics3", "lfm2_vl:conv", "exaone4_5"])
def test_bfloat16_and_beams(kind):
    """Everything kept is the untouched model."""
    model = made(kind)
    inputs, px = inputs_of(kind, model)
    call, options = {**inputs, **px}, dict(max_new_tokens=STEPS, num_beams=2, do_sample=False, pad_token_id=0)
    stock = model.generate(**call, **options)
    with mipruner.prune(model, "random", 1.0):
        assert torch.equal(model.generate(**call, **options), stock)
    model = model.to(torch.bfloat16)
    call |= {k: v.to(torch.bfloat16) for k, v in px.items() if v.is_floating_point()}
    stock = generate(model, call)[1]
    with mipruner.prune(model, "random", 1.0):
        assert torch.equal(generate(model, call)[1], stock)
    with mipruner.prune(model, "mi", 0.5):
        assert generate(model, call)[1].isfinite().all()


def test_beams_that_mix_up_images_are_refused():
    """transformers itself gives the beams of two images to the wrong prompts in GLM-4V (in 5.17 in most types)."""
    kind = "lfm2_vl:conv" if IS_OLDEST else "glm4v"
    model = made(kind)
    inputs, px = inputs_of(kind, model)
    with mipruner.prune(model, "mi", 0.5), pytest.raises(InputError, match="were not encoded by this call"):
        model.generate(**inputs, **px, max_new_tokens=2, num_beams=2, do_sample=False, pad_token_id=0)
