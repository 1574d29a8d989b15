"""Prompts of types without an adapter, and the short prompt cut by hand: no hooks, no cache, each step anew."""

import inspect

import torch

from any_recipes import OVERRIDES, pixels
from any_tiny import build
from mipruner.models.generic import language_model_of, owner_of

STEPS = 3
BIDIRECTIONAL = {"gemma3", "paligemma", "gemma4", "shieldgemma2", "gemma4_unified", "molmo2"}
TYPES = ("token_type_ids", "mm_token_type_ids")


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
    if kind == "hunyuan_vl" and len(rows) == 1:  # transformers 5.17
        rows = rows[0].split([12, 11])
    if kind == "inkling_mm_model":  # its processor gives one image or several alike
        rows = [rows[:8, 0], rows[8:, 0]]
    return [image.reshape(-1, image.shape[-1]) for image in rows]


def seen_by(owner, px):
    names = inspect.signature(owner.get_image_features).parameters
    given = {k: v for k, v in px.items() if k in names}
    if "vision_feature_select_strategy" in names:  # Llama 4 needs it in transformers 5.17
        given["vision_feature_select_strategy"] = getattr(owner.config, "vision_feature_select_strategy", None)
    return owner.get_image_features(**given, return_dict=True)


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
        if name in known and not kind.startswith("inkling"):  # whose generate refuses them
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
        self.direct = self.arguments(seen)
        if seen.get("per_layer_inputs") is not None:  # only the language model takes them in transformers 5.17
            takes = "per_layer_inputs" in inspect.signature(model.forward).parameters
            (self.types if takes else self.direct)["per_layer_inputs"] = seen["per_layer_inputs"][:, keep]

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
        for name in ("moe_mm_token_type_ids", "ple_input_ids"):
            if seen.get(name) is not None:
                direct[name] = seen[name][:, self.keep]
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
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(out.last_hidden_state)[:, -1] / getattr(config, "logits_scaling", 1)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()

    def append(self, token):
        new = self.embed(token)[:, None]
        self.short = torch.cat([self.short, new], 1)
        self.position_ids = torch.cat([self.position_ids, self.position_ids[..., -1:] + 1], -1)
        for given in (self.types, self.direct):
            if "per_layer_inputs" in given:
                make = self.language_model.get_per_layer_inputs
                both = "inputs_embeds" in inspect.signature(make).parameters
                last = make(token[:, None], *([new] if both else []))
                given["per_layer_inputs"] = torch.cat([given["per_layer_inputs"], last], 1)
        for name in {*self.types} & {*TYPES}:
            last = torch.full((1, 1), int(self.kind == "paligemma"))
            self.types[name] = torch.cat([self.types[name], last], 1)
        for name in ("visual_pos_masks", "moe_mm_token_type_ids", "vision_mask"):
            if name in self.direct:
                x = self.direct[name]
                self.direct[name] = torch.cat([x, x.new_zeros(1, 1, *x.shape[2:])], 1)
        if "ple_input_ids" in self.direct:
            self.direct["ple_input_ids"] = torch.cat([self.direct["ple_input_ids"], token[:, None]], 1)

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
