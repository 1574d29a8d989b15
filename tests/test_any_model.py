"""`mipruner.prune` around every image-text-to-text model type of the installed transformers, tiny and random.

Everything kept is the untouched `generate`, bit for bit; pruned is a short sequence that is built here by hand and run
through the model without hooks and without a cache. `make test` runs one type of each trait, `make test-models` all.
"""

import inspect
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

import mipruner
from any_recipes import OVERRIDES, pixels
from any_tiny import CLASSES, build
from mipruner.arguments import Cut
from mipruner.errors import InputError
from mipruner.models import FAMILIES
from mipruner.models.generic import TESTED, language_model_of, owner_of, refusal

STEPS = 3
TRAITS = ["gemma3", "gemma3n", "llama4", "granite4_vision", "molmo2", "idefics3", "glm4v", "lfm2_vl:conv", "exaone4_5"]
EVERY = os.environ.get("MODELS") == "all"
VARIANTS = ["gemma4:causal", "mistral3:sliding", "paligemma:2", "lfm2_vl:conv", "step3p7:sliding"]
BIDIRECTIONAL = {"gemma3", "paligemma", "gemma4", "shieldgemma2", "gemma4_unified", "molmo2"}
TYPES = ("token_type_ids", "mm_token_type_ids")
LARGER = {"mistral_large4": "mistral_large4:wide", "glm5_next": "glm5_next:wide"}
"""Types whose default form drops keys by itself, so that no cacheless reference exists; the variant keeps them all."""

NOT_BUILT = {
    "deepseek_ocr2": "its tiny form has no recipe: the shrunk vision encoder does not run",
    "diffusion_gemma": "its tiny form has no recipe: the default config does not build",
    "dots3_note": "its tiny form has no recipe: the shrunk config is refused by its own check",
    "gemma4_unified": "its tiny form has no recipe: no vision encoder in the default config",
    "inkling2": "its tiny form has no recipe: the pixel layout is not known",
    "inkling_mm_model": "its tiny form has no recipe: sizes in the config have other names",
    "muse_spark": "its tiny form has no recipe: sizes in the config have other names",
    "pp_formulanet": "its tiny form has no recipe: no input embeddings",
    "qwen4_exp": "its tiny form has no recipe: per-layer embeddings of n-grams",
    "unlimited_ocr": "its tiny form has no recipe: the shrunk vision encoder does not run",
}
"""Types that are not known to work, and why. An entry that has become possible fails the test."""


def params():
    for kind in [*(kind for kind in CLASSES if kind not in FAMILIES), *VARIANTS]:
        marks = [] if kind in TRAITS else [pytest.mark.skipif(not EVERY, reason="make test-models runs all types")]
        if kind in NOT_BUILT:
            marks.append(pytest.mark.xfail(strict=True, reason=NOT_BUILT[kind]))
        yield pytest.param(kind, marks=marks)


def rows_of(kind, owner, out):
    """Image rows [n, d], by the conventions of transformers and the three exceptions."""
    rows = getattr(out, "pooler_output", None)
    if kind == "llama4":
        rows = owner.multi_modal_projector(out.last_hidden_state)
    elif kind == "granite4_vision":
        rows = out.deepstack_features[0][1]
    elif rows is None:
        rows = out.last_hidden_state
    if isinstance(rows, torch.Tensor) and rows.ndim == 2:
        rows = [rows]
    return [image.reshape(-1, image.shape[-1]) for image in rows]


def seen_by(owner, px):
    names = inspect.signature(owner.get_image_features).parameters
    return owner.get_image_features(**{k: v for k, v in px.items() if k in names}, return_dict=True)


def inputs_of(kind, model):
    """A prompt with two images, and what belongs to them."""
    owner = owner_of(model)
    px = pixels(kind, model, owner)
    ids, types, draw = [], [], torch.Generator().manual_seed(5)
    for rows in rows_of(kind.split(":")[0], owner, seen_by(owner, px)):
        ids += [*torch.randint(10, 90, (3,), generator=draw).tolist(), *[model.config.image_token_id] * len(rows)]
        types += [0] * 3 + [1] * len(rows)
    ids += torch.randint(10, 90, (9,), generator=draw).tolist()
    types += [0] * 9
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    known = {*inspect.signature(model.forward).parameters, *inspect.signature(owner.forward).parameters}
    for name in TYPES:
        if name in known:
            inputs[name] = torch.tensor([types]) * (not kind.startswith("paligemma"))
    return inputs, px


def generate(model, inputs):
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), out.past_key_values


def recorded(model, language_model, inputs):
    """Arguments of the language model in one untouched forward pass."""
    seen = {}

    def note(module, args, kwargs):
        if not seen:
            seen.update(dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs)

    handle = language_model.register_forward_pre_hook(note, with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    return seen


class ByHand:
    """Greedy decoding of a short sequence, each step anew without a cache."""

    def __init__(self, kind, model, inputs, px, keep):
        self.kind, self.model, self.keep = kind.split(":")[0], model, keep
        self.owner = owner_of(model)
        self.language_model = language_model_of(self.owner)
        self.visual = inputs["input_ids"] == model.config.image_token_id
        self.embed = model.get_input_embeddings()
        seen = recorded(model, self.language_model, {**inputs, **px})
        position_ids = seen.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(len(keep))[None]
        self.short, self.position_ids = self.embeds(inputs, px)[:, keep], position_ids[..., keep]
        self.types = {k: inputs[k][:, keep] for k in TYPES if k in inputs and self.kind in BIDIRECTIONAL}
        if seen.get("per_layer_inputs") is not None:
            self.types["per_layer_inputs"] = seen["per_layer_inputs"][:, keep]
        self.direct = self.arguments(seen)

    def embeds(self, inputs, px):
        rows = torch.cat(rows_of(self.kind, self.owner, seen_by(self.owner, px)))
        embeds = self.embed(inputs["input_ids"]).clone()
        if self.kind == "molmo2":
            embeds[self.visual] += rows
        else:
            embeds[self.visual] = 0 * rows if self.kind == "granite4_vision" else rows.to(embeds)
        return embeds

    def arguments(self, seen):
        """What only the language model takes, of the tokens that are left."""
        kept, direct = self.keep[self.visual[0]], {}
        if seen.get("visual_pos_masks") is not None:
            direct["visual_pos_masks"] = self.visual[:, self.keep]
            direct["deepstack_visual_embeds"] = [x[kept] for x in seen["deepstack_visual_embeds"]]
        if seen.get("moe_mm_token_type_ids") is not None:
            direct["moe_mm_token_type_ids"] = seen["moe_mm_token_type_ids"][:, self.keep]
        if seen.get("vision_mask") is not None:
            direct["vision_mask"] = seen["vision_mask"][:, self.keep]
            features = seen["deepstack_features"]
            if isinstance(features, dict):
                direct["deepstack_features"] = {k: v[kept] for k, v in features.items()}
            else:
                direct["deepstack_features"] = [(k, v[kept]) for k, v in features]
        return direct

    def logits(self):
        n = self.short.shape[1]
        mask = torch.ones(1, n, dtype=torch.long)
        inputs = dict(inputs_embeds=self.short, position_ids=self.position_ids, attention_mask=mask, use_cache=False)
        if not self.direct:
            return self.model(**inputs, **self.types).logits[:, -1]
        out = self.language_model(**inputs, **self.direct)
        scale = getattr(self.model.config.get_text_config(), "logits_scaling", 1)
        return self.model.get_output_embeddings()(out.last_hidden_state)[:, -1] / scale

    def append(self, token):
        new = self.embed(token)[:, None]
        self.short = torch.cat([self.short, new], 1)
        self.position_ids = torch.cat([self.position_ids, self.position_ids[..., -1:] + 1], -1)
        for name, x in self.types.items():
            if name == "per_layer_inputs":
                make = self.language_model.get_per_layer_inputs
                both = "inputs_embeds" in inspect.signature(make).parameters
                last = make(token[:, None], *([new] if both else []))
            else:
                last = torch.full((1, 1), int(self.kind == "paligemma"))
            self.types[name] = torch.cat([x, last], 1)
        for name in ("visual_pos_masks", "moe_mm_token_type_ids", "vision_mask"):
            if name in self.direct:
                x = self.direct[name]
                self.direct[name] = torch.cat([x, x.new_zeros(1, 1, *x.shape[2:])], 1)

    def __call__(self):
        tokens, logits = [], []
        for _ in range(STEPS):
            logits.append(self.logits())
            tokens.append(logits[-1].argmax(-1))
            self.append(tokens[-1])
        return torch.stack(tokens, 1), torch.stack(logits, 1)


def kept_of(model, inputs, pruning):
    ids = inputs["input_ids"][0]
    keep, start = ids != model.config.image_token_id, 0
    places = (~keep).nonzero()[:, 0]
    for selection, visual in zip(pruning.selections[0], pruning.encoded[0].visuals, strict=True):
        keep[places[start + selection.indices]] = True
        start += visual.n_visual
    return keep


def made(kind):
    """A tiny model that answers without an end."""
    model = build(kind, OVERRIDES)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None
    return model


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
    if EVERY:
        assert set(CLASSES) >= TESTED


def test_the_page_lists_every_type():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text().split("## Any other model")[1]
    tested, rest = page.split("The test builds")
    assert f"{len(TESTED)} types" in tested
    assert set(re.findall(r"`([\w.-]+)`", tested.split("on transformers")[1])) == TESTED
    if EVERY:
        others = set(CLASSES) - TESTED - set(FAMILIES)
        assert others <= set(re.findall(r"`([\w.-]+)`", rest))


def test_methods_that_look_inside_are_refused():
    model = build("gemma3", OVERRIDES)
    for method in ("attention", "visionzip", "fastv"):
        with pytest.raises(InputError, match="only image rows and text are known"):
            mipruner.prune(model, method, 0.5)


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
    with mipruner.prune(model, "random", 0.5), pytest.raises(InputError, match="were not encoded by this call"):
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
    with pytest.raises(InputError, match=r"argument x \[2, 5\]"):
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
    """transformers itself gives the beams of two images to the wrong prompts in GLM-4V."""
    model = made("glm4v")
    inputs, px = inputs_of("glm4v", model)
    with mipruner.prune(model, "mi", 0.5), pytest.raises(InputError, match="were not encoded by this call"):
        model.generate(**inputs, **px, max_new_tokens=2, num_beams=2, do_sample=False, pad_token_id=0)
