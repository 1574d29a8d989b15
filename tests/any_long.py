"""What the long form of `tests/test_any_model.py` finds of one type, in words for the table of docs/models.md.

A comparison that fails raises; what transformers itself cannot do, or what is refused, is put into words.
"""

import zlib

import torch

import mipruner
from any_by_hand import STEPS, TYPES, ByHand, generate, inputs_of, kept_of, rows_of, seen_by
from any_decoder import decoders
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models.generic import owner_of
from mipruner.pruners import PRUNERS, make
from mipruner.pruners.base import Pruner
from mipruner.selection import Auto

OPTIONS = [
    {"lam": 0.2, "aggregation": "global"},
    {"normalization": "minmax", "tau": 0.5},
    {"support": "vocabulary"},
    {"prior": "center"},
]
"""Of mi, beside its defaults."""

KNOWN = {"vocabulary", "grid", "words", "question"}
METHODS = [
    *(name for name, cls in PRUNERS.items() if issubclass(cls, Pruner) and set(make(name).needs) <= KNOWN),
    *(" ".join(["mi", *(f"{k}={v}" for k, v in options.items())]) for options in OPTIONS),
]
"""Of which the table says how many work."""

NEVER = "not in transformers"
"""For what the untouched model cannot do."""


def features_of(kind, model, inputs, px):
    """What a method should see of each image: rows, question and grid, read from the model by hand."""
    ids = inputs["input_ids"][0]
    images = rows_of(kind.split(":")[0], owner_of(model), seen_by(owner_of(model), px))
    named = [v for k, v in model.config.to_dict().items() if "token" in k and isinstance(v, int)]
    text = ids[-9:][~torch.isin(ids[-9:], torch.tensor(named))]
    sample = f"{zlib.crc32(ids.numpy().tobytes()):08x}"
    for k, rows in enumerate(images):
        grid = None
        if "image_grid_thw" in px and len(px["image_grid_thw"]) == len(images):
            t, h, w = px["image_grid_thw"][k].tolist()
            merge = round((t * h * w / len(rows)) ** 0.5)
            grid = (h // merge, w // merge) if h * w == merge**2 * len(rows) else None
        elif "image_grid_thw" not in px and round(len(rows) ** 0.5) ** 2 == len(rows):
            grid = (round(len(rows) ** 0.5),) * 2
        yield Features(
            visual=rows,
            text=model.get_input_embeddings()(text),
            grid=grid,
            question=torch.ones(len(text), dtype=torch.bool),
            vocabulary=model.get_input_embeddings().weight,
            sample=sample if len(images) == 1 else f"{sample}/{k}",
        )


def methods(kind, model, inputs, px):
    """Methods that choose what they choose of features read by hand."""
    features = list(features_of(kind, model, inputs, px))
    names = [(name, {}) for name, cls in PRUNERS.items() if issubclass(cls, Pruner)] + [("mi", o) for o in OPTIONS]
    works = []
    for name, options in names:
        pruner = make(name, **options)
        keep = 1.0 if name == "none" else 0.5
        try:
            with mipruner.prune(model, pruner, keep, positions="keep") as pruning:
                model(**inputs, **px, use_cache=False)
        except InputError as error:
            is_known = "only image rows and text are known" in str(error)
            assert is_known or ("grid" in pruner.needs and any(one.grid is None for one in features)), (name, error)
            continue
        for one, chosen in zip(features, pruning.selections[0], strict=True):
            expected = pruner(one, len(chosen.indices)).indices
            assert torch.equal(chosen.indices, expected), (name, options)
        works.append(" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
    return works


def beams(model, call):
    options = dict(max_new_tokens=STEPS, num_beams=2, do_sample=False, pad_token_id=0)
    try:
        stock = model.generate(**call, **options)
    except Exception:
        return NEVER
    try:
        with mipruner.prune(model, "random", 1.0, positions="keep"):
            assert torch.equal(model.generate(**call, **options), stock)
        with mipruner.prune(model, "mi", 0.5, positions="keep"):
            assert model.generate(**call, **options).shape[1] > 0
    except InputError as error:
        assert "were not encoded by this call" in str(error)
        return "refused: transformers mixes the images up"
    return "yes"


def padded(kind, model, inputs, px):
    alone = {k: v[:, :-4] for k, v in inputs.items()}
    both = {k: torch.cat([v, torch.nn.functional.pad(alone[k], (4, 0))]) for k, v in inputs.items()}
    along = {"pixel_values": -1} if kind.startswith("minicpm") else {}
    both |= {k: torch.cat([v, v], along.get(k, 0)) for k, v in px.items()}
    try:
        stock = generate(model, both)[1]
    except Exception:
        return NEVER
    apart = torch.cat([generate(model, {**one, **px})[1] for one in (inputs, alone)])
    differs = float((stock[:, 0] - apart[:, 0]).abs().max())
    with mipruner.prune(model, "random", 1.0, positions="keep"):
        assert torch.equal(generate(model, both)[1], stock)
    with mipruner.prune(model, "mi", 0.5, positions="keep"):
        together = generate(model, both)[1][:, 0]
        apart = torch.cat([generate(model, {**one, **px})[1] for one in (inputs, alone)])[:, 0]
    if differs < 1e-4:
        torch.testing.assert_close(together, apart, atol=2e-4, rtol=0)
        return "yes"
    return f"transformers itself differs by {differs:.0e}"


def second_turn(kind, model, inputs, px):
    try:
        with mipruner.prune(model, "mi", 0.5, positions="keep") as pruning:
            first = model.generate(
                **inputs,
                **px,
                max_new_tokens=3,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=0,
                suppress_tokens=[model.config.image_token_id],  # a random model may say it
            )
            keep = kept_of(model, inputs, pruning)
            ids = torch.cat([first.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
            n_new = ids.shape[1] - inputs["input_ids"].shape[1]
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            new = torch.full((1, n_new), int(kind.startswith("paligemma")))  # there 0 is what sees both ways
            turn |= {k: torch.cat([inputs[k], new], 1) for k in TYPES if k in inputs}
            tokens, logits, _ = generate(model, turn | {"past_key_values": first.past_key_values})
    except InputError as error:
        return f"refused: {error}"
    keep = torch.cat([keep, torch.ones(n_new, dtype=torch.bool)])
    by_hand_tokens, by_hand = ByHand(kind, model, turn, px, keep)()
    assert torch.equal(tokens, by_hand_tokens)
    torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=0)
    return "yes"


def auto(kind, model, inputs, px):
    with mipruner.prune(model, "mi", Auto(0.3, 0.5), positions="keep") as pruning:
        tokens, logits, _ = generate(model, inputs | px)
    mi = make("mi")
    for one, chosen in zip(features_of(kind, model, inputs, px), pruning.selections[0], strict=True):
        assert len(chosen.indices) <= round(0.5 * len(one.visual)) + 1
        assert len(chosen.indices) <= Auto(0.3, 0.5).enough(mi.s_cross(one))
    by_hand_tokens, by_hand = ByHand(kind, model, inputs, px, kept_of(model, inputs, pruning))()
    assert torch.equal(tokens, by_hand_tokens)
    torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=0)
    return "yes"


def bfloat16(model, call):
    """Leaves the model in bfloat16."""
    model.to(torch.bfloat16)
    call = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in call.items()}
    try:
        stock = generate(model, call)[1]
    except Exception:
        return NEVER
    with mipruner.prune(model, "random", 1.0, positions="keep"):
        assert torch.equal(generate(model, call)[1], stock)
    with mipruner.prune(model, "mi", 0.5, positions="keep"):
        assert generate(model, call)[1].isfinite().all()
    return "yes"


def found(kind, model):
    """One word or sentence for each of the columns of the table."""
    inputs, px = inputs_of(kind, model)
    return {
        "methods": methods(kind, model, inputs, px),
        "inside": decoders(kind, model, inputs, px),
        "beams": beams(model, inputs | px),
        "padded batch": padded(kind, model, inputs, px),
        "second turn": second_turn(kind, model, inputs, px),
        "keep=auto": auto(kind, model, inputs, px),
        "bfloat16": bfloat16(model, inputs | px),
    }
