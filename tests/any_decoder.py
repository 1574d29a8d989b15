"""Methods inside the language model on types without an adapter, against layers called one by one by hand."""

from dataclasses import fields, replace

import torch

import mipruner
from any_by_hand import TYPES, generate, kept_of, made
from mipruner.errors import InputError
from mipruner.models.generic import language_model_of, owner_of
from mipruner.pruners import PRUNERS, make
from mipruner.pruners.base import DecoderPruner

INSIDE = [
    name for name, cls in PRUNERS.items() if issubclass(cls, DecoderPruner) and "attention" not in make(name).needs
]
"""Methods inside the language model that read nothing of the vision encoder."""

PLACED = ("attention_mask", "position_embeddings", "position_ids", "past_key_values", "hidden_states")


def recorded_calls(model, call, layers):
    """Input and arguments of each of the decoder layers, and arguments of the language model, in one stock call."""
    language_model, seen, whole = language_model_of(owner_of(model)), {}, {}
    handles = [language_model.register_forward_pre_hook(lambda m, a, k: whole.update(k), with_kwargs=True)]
    for k in layers:
        note = lambda m, a, kw, k=k: seen.update({k: (a[0], kw)})  # noqa: E731
        handles.append(language_model.layers[k].register_forward_pre_hook(note, with_kwargs=True))
    model(**call, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen, whole


def recording(pruner, script):
    """The same method, which notes for each layer what it saw and what it chose."""
    if hasattr(pruner, "inside"):
        return replace(pruner, inside=recording(pruner.inside, script))

    class Recorded(type(pruner)):
        def reduce(self, view, n_keep):
            script[view.layer] = view, super().reduce(view, n_keep)
            return script[view.layer][1]

    return Recorded(**{field.name: getattr(pruner, field.name) for field in fields(pruner)})


def last_hidden(model, call, keep, script, renumbers):
    """Last hidden state of a prompt, of which ``keep`` enters; no cache, the layers called one by one."""
    language_model = language_model_of(owner_of(model))
    seen, whole = recorded_calls(model, call, [0])
    hidden, given = seen[0]
    hidden, (cos, sin) = hidden[0, keep], (x.expand(1, *x.shape[1:])[0, keep] for x in given["position_embeddings"])
    visual = call["input_ids"][0] == model.config.image_token_id
    deepstack = []
    for rows in whole.get("deepstack_visual_embeds") or []:
        full = torch.zeros(len(visual), rows.shape[-1])
        full[visual] = rows
        deepstack.append(full[keep])
    visual, others = visual[keep], {k: v for k, v in given.items() if k not in PLACED}
    for k, layer in enumerate(language_model.layers):
        if k in script:
            step, at = script[k][1], visual.nonzero()[:, 0]
            order = [int(i) for i in range(len(hidden)) if not visual[i] or i in at[step.indices]]
            centres = [] if step.merge is None else at[step.centres].tolist()
            behind = sum(i <= int(at[-1]) for i in order)
            places = torch.tensor([*order[:behind], *centres, *order[behind:]])
            new = {behind + m: step.merge[m] for m in range(len(centres))}

            def cut(x, at=at, places=places, new=new):
                out = x[places].clone()
                for row, weights in new.items():
                    out[row] = weights @ x[at]
                return out

            hidden, deepstack = cut(hidden), [cut(x) for x in deepstack]
            cos, sin, visual = cos[places], sin[places], visual[places]
            if renumbers:
                cos, sin = (x[0] for x in language_model.rotary_emb(hidden[None], torch.arange(len(hidden))[None]))
        n = len(hidden)
        causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None] if hasattr(layer, "self_attn") else None
        hidden = layer(hidden[None], attention_mask=causal, position_embeddings=(cos[None], sin[None]), **others)[0]
        if k < len(deepstack):
            hidden = hidden + deepstack[k]
    return language_model.norm(hidden)[-1]


def check_view(kind, model, call, script):
    """What the method saw at its first layer, against the layer's own eager attention weights and its cache."""
    (k, (view, chosen)), *_ = script.items()
    eager, weights = made(kind), []
    eager.set_attn_implementation("eager")
    attn = language_model_of(owner_of(eager)).layers[k - 1].self_attn
    handle = attn.register_forward_hook(lambda module, args, output: weights.append(output[1][0]))
    eager(**call, use_cache=False)
    handle.remove()
    n = len(view.visual)
    torch.testing.assert_close(view.attention(torch.arange(n)), weights[0], atol=1e-5, rtol=1e-4)
    keys = model(**call, use_cache=True).past_key_values
    if keys is not None:
        torch.testing.assert_close(view.keys, keys.layers[k - 1].keys[0].transpose(0, 1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(view.hidden, recorded_calls(model, call, [k])[0][k][0][0], atol=1e-5, rtol=1e-4)
    visual = call["input_ids"][0] == model.config.image_token_id
    return weights[0].mean(0)[-1, visual].topk(len(chosen.indices)).indices.sort().values


def run(kind, model, inputs, px, name):
    """Prune with method ``name``, and compare with layers called by hand at the first and at the last token."""
    options, script, states = {"keep_before": 0.6} if name == "mi_fastv" else {}, {}, []
    language_model, call = language_model_of(owner_of(model)), inputs | px
    handle = language_model.register_forward_hook(lambda m, a, out: states.append(out.last_hidden_state[0, -1]))
    try:
        with mipruner.prune(model, recording(make(name, **options), script), 0.4) as pruning:
            tokens = generate(model, call)[0][0]
    finally:
        handle.remove()
    n_visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if not script:  # all that enters is left
        assert n_visual <= 2
        return
    assert pruning.per_layer[0][-1] == next(reversed(script.values()))[1].n_rows <= n_visual
    assert name != "fastv" or pruning.per_layer[0][-1] < n_visual
    keep = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    if name == "mi_fastv":
        with mipruner.prune(model, "mi", 0.6, positions="keep") as run:
            model(**call, use_cache=False)
        keep = kept_of(model, inputs, run)
    else:
        by_weights = check_view(kind, model, call, script)
        if name == "fastv":
            assert torch.equal(next(iter(script.values()))[1].indices, by_weights)
    renumbers = make(name).renumbers and language_model_is_1d(model, call)
    said = tokens[:-1].tolist()
    for n in (0, len(said)):
        if model.config.image_token_id in said[:n]:
            continue
        longer = {"input_ids": torch.cat([inputs["input_ids"], tokens[None, :n]], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        longer |= {k: torch.cat([inputs[k], inputs[k].new_zeros(1, n)], 1) for k in TYPES if k in inputs}
        kept = torch.cat([keep, torch.ones(n, dtype=torch.bool)])
        expected = last_hidden(model, longer | px, kept, script, renumbers)
        torch.testing.assert_close(states[n], expected, atol=1e-4, rtol=1e-4)


def language_model_is_1d(model, call):
    position_ids = recorded_calls(model, call, [0])[1].get("position_ids")
    return position_ids is None or position_ids.ndim == 2


def decoders(kind, model, inputs, px):
    """Methods inside the language model that work; why the others are refused, by method."""
    works, refused = [], {}
    stock = generate(model, inputs | px)[1]
    for name in INSIDE:
        try:
            with mipruner.prune(model, name, 1.0):
                assert torch.equal(generate(model, inputs | px)[1], stock), name
            run(kind, model, inputs, px, name)
            works.append(name)
        except InputError as error:
            assert "docs/models.md" in str(error), error
            refused[name] = str(error).split("Llama's, and ")[-1].split(": use ")[0]
    return works, refused
