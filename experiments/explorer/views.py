"""Computes the data that `panels.js` draws: answer and kept tokens by question, method and budget.

The vision encoder runs once per image, with all signals that any pruner reads. Each panel is a `Pipeline` with its
results.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor

from experiments.explorer.panels import data_url
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models import Adapter, Prompt
from mipruner.pipeline import Answer, Pipeline
from mipruner.pmi import BLOCK, cross_pmi, log_partition
from mipruner.prompt import Encoded, Visual
from mipruner.pruners import PRUNERS, Method, Pruner

N_ORDER = 128
"""Number of picks whose order is shown."""
N_WORDS = 5
"""Number of vocabulary words that are shown for a patch."""
SIGNALS = frozenset(one.name for one in fields(Features) if one.default is not MISSING)
"""All optional fields that pruners may read."""


@dataclass(frozen=True)
class Cell:
    """A panel: one method and one budget.

    Attributes
    ----------
    pruner : str
        Name in conf/pruner.
    method : Pruner or DecoderPruner
    keep : int or float
    changed : dict
        Hyperparameters that differ from conf/pruner.
    """

    pruner: str
    method: Method
    keep: int | float
    changed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """An image after the vision encoder.

    Attributes
    ----------
    image : PIL image
    visual : Visual
        With all signals of `SIGNALS` that the model has.
    ms : float
    vocabulary : list of lists of (word, PMI), or None
        For each patch, the words of the vocabulary with the highest PMI.
    """

    image: Image.Image
    visual: Visual
    ms: float
    vocabulary: list[list[tuple[str, float]]] | None


# ---------------------------------------------------------------------------------------------- words of the vocabulary

_readable: "WeakKeyDictionary[Any, tuple[Tensor, list[str]]]" = WeakKeyDictionary()


def readable(adapter: Adapter) -> tuple[Tensor, list[str]]:
    """Ids and text of tokens that are words: two or more letters, no special tokens."""
    if adapter.model not in _readable:
        special, table = set(adapter.tokenizer.all_special_ids), adapter.model.get_input_embeddings().weight
        ids = [k for k in range(min(len(adapter.tokenizer), len(cast(Tensor, table))))]
        words = [word.strip() for word in adapter.tokenizer.batch_decode([[k] for k in ids])]
        kept = [k for k in ids if k not in special and len(words[k]) > 1 and words[k].isalpha()]
        _readable[adapter.model] = torch.tensor(kept), [words[k] for k in kept]
    return _readable[adapter.model]


def say_patches(adapter: Adapter, visual: Tensor, tau: float = 0.1) -> list[list[tuple[str, float]]]:
    """The `N_WORDS` vocabulary words w with the highest PMI(v_i; w), eq. 18, for each of visual [n_visual, d].

    p(w | v_i) is normalised over all readable words, see `readable`. At most `BLOCK` of them are in memory at a time.
    """
    ids, words = readable(adapter)
    table = cast(Tensor, adapter.model.get_input_embeddings().weight)[ids.to(visual.device)]
    partition = log_partition(visual, table, tau)
    best, index = visual.new_zeros(len(visual), 0, dtype=torch.float32), ids.new_zeros(len(visual), 0).to(visual.device)
    for start in range(0, len(table), BLOCK):
        pmi = cross_pmi(visual, table[start : start + BLOCK], tau, log_partition=partition)
        values, places = pmi.topk(min(4 * N_WORDS, pmi.shape[1]))
        best, index = torch.cat([best, values], -1), torch.cat([index, places + start], -1)
        best, kept = best.topk(min(4 * N_WORDS, best.shape[1]))
        index = index.gather(-1, kept)
    said = []
    for values, places in zip(best.tolist(), index.tolist(), strict=True):
        spelled: dict[str, float] = {}  # " snow" and "Snow" are one word
        for value, place in zip(values, places, strict=True):
            spelled.setdefault(words[place].lower(), round(value, 2))
        said.append(list(spelled.items())[:N_WORDS])
    return said


# ------------------------------------------------------------------------------------------------------- image and cell


@torch.inference_mode()
def see(adapter: Adapter, image: Image.Image) -> Seen:
    """Encode an image once, with all signals that a pruner may need."""
    start = time.perf_counter()
    (visual,) = adapter.encode([adapter.preprocess(image)], SIGNALS)
    ms = 1e3 * (time.perf_counter() - start)
    vocabulary = None if visual.grid is None else say_patches(adapter, visual.tokens)
    return Seen(image, visual, ms, vocabulary)


@torch.inference_mode()
def answer_cell(
    adapter: Adapter, seen: Seen, question: str, cell: Cell, decoding: Decoding
) -> tuple[Answer, dict[str, float]]:
    """Answer of the model with the tokens of this panel, and the ms of each stage after the vision encoder."""
    pipeline = Pipeline(adapter, cell.method, cell.keep, decoding)
    pipeline.cache.put(seen.image, seen.visual, SIGNALS)
    (told,) = pipeline([Prompt(question, [seen.image])])
    return told, dict(pipeline.watch.ms)


def order_of(adapter: Adapter, seen: Seen, question: str, cell: Cell) -> list[int] | None:
    """The first `N_ORDER` picks of the method; None if it has no order."""
    if not isinstance(cell.method, Pruner) or cell.pruner == "none":
        return None
    (features,) = adapter.read(Prompt(question, [seen.image]), [seen.visual], cell.method.signals).features()
    order = cell.method.order(features, min(N_ORDER, features.n_visual))
    return None if order is None else order.tolist()


def show_run(cell: Cell, told: Answer, ms: dict[str, float], n_prompt: int, order: list[int] | None) -> dict[str, Any]:
    """A panel as data. ``n_prompt`` is the number of tokens of the full prompt."""
    layers = told.visual_tokens_per_layer
    return {
        "pruner": cell.pruner,
        "label": PRUNERS[cell.pruner].title,
        "keep": str(cell.keep),
        "n_keep": told.n_keep,
        "n_visual": sum(told.n_visual),
        "answer": told.text,
        "right": None,
        "kept": told.selections[0].indices.tolist(),
        "order": order,
        "prompt_tokens": n_prompt - sum(told.n_visual) + layers[0],
        "layer_mean": sum(layers) / len(layers),
        "ms": sum(ms.values()),
    }


def show_question(question: str, encoded: Encoded, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A question with its words, PMI(v_i; t_j) [n_text][n_visual] at the paper's tau, and its panels."""
    (features,) = encoded.features()
    pmi = cross_pmi(features.visual, features.text).T
    return {
        "question": question,
        "expected": None,
        "words": [word.strip() for word in features.words or ()],
        "pmi": [[round(value, 2) for value in row] for row in pmi.tolist()],
        "runs": list(runs),
    }


def show(adapter: Adapter, model: str, seen: Seen, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All data for `panels.js`: an image, and the questions about it."""
    return {
        "model": model,
        "src": data_url(seen.image),
        "size": seen.image.size,
        "grid": seen.visual.grid,
        "box": adapter.box(seen.image.size),
        "vision_ms": seen.ms,
        "vocabulary": seen.vocabulary,
        "questions": list(questions),
    }


# ------------------------------------------------------------------------------------------------------------- commands


def command(model: str, question: str, cell: Cell, decoding: Decoding, image: str = "IMAGE") -> str:
    """Command line of the same call."""
    words = [f"image={image}", f"question={question}", f"model={model}", f"pruner={cell.pruner}"]
    words += [] if cell.pruner == "none" else [f"keep={cell.keep}"]
    words += [f"pruner.{key}={'null' if value is None else value}" for key, value in cell.changed.items()]
    words += [] if decoding.max_new_tokens == 128 else [f"decoding.max_new_tokens={decoding.max_new_tokens}"]
    return shlex.join(["python", "run.py", *words])


def python_lines(path: str, cell: Cell, decoding: Decoding) -> str:
    """Python lines of the same call on a loaded model."""
    method = cell.method
    values = {one.name: (getattr(method, one.name), one.default) for one in fields(method)}
    options = "".join(f", {name}={value!r}" for name, (value, default) in values.items() if value != default)
    return (
        f"model = AutoModelForImageTextToText.from_pretrained({path!r})\n"
        f"with mipruner.prune(model, {cell.pruner!r}, keep={cell.keep!r}{options}):\n"
        f'    ids = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), '
        f"max_new_tokens={decoding.max_new_tokens})"
    )


@torch.inference_mode()
def read(adapter: Adapter, seen: Seen, question: str) -> Encoded:
    """The full prompt. Raises `InputError` if the question is empty or invalid."""
    if not question.strip():
        raise InputError("the question is empty: type one")
    return adapter.read(Prompt(question, [seen.image]), [seen.visual], frozenset({"words"}))


@torch.inference_mode()
def show_cell(
    adapter: Adapter,
    model: tuple[str, str],
    seen: Seen,
    encoded: Encoded,
    question: str,
    cell: Cell,
    decoding: Decoding,
    image: str = "IMAGE",
) -> dict[str, Any]:
    """A panel with its commands. ``model`` is (name, path). An error of the method is shown in the panel."""
    same = {
        "command": command(model[0], question, cell, decoding, image),
        "python": python_lines(model[1], cell, decoding),
    }
    try:
        told, ms = answer_cell(adapter, seen, question, cell, decoding)
        order = order_of(adapter, seen, question, cell)
    except InputError as error:
        named = {"pruner": cell.pruner, "label": PRUNERS[cell.pruner].title, "keep": str(cell.keep)}
        return named | {"error": str(error), "order": None} | same
    return show_run(cell, told, ms, len(encoded.ids), order) | same
