"""What the explorer shows, as plain data: one image, one or two questions, any pruners and budgets. No server here.

The vision encoder runs once an image, with every signal that some pruner reads; each cell is a `Pipeline` that is
handed what it made.
"""

import shlex
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from PIL import Image
from torch import Tensor

from experiments import build
from experiments.benchmarks.demo import Demo
from experiments.explorer.panels import data_url
from experiments.results import ROOT
from mipruner.decoding import Decoding
from mipruner.errors import InputError
from mipruner.features import Features
from mipruner.models import Adapter, Prompt
from mipruner.pipeline import Answer, Pipeline
from mipruner.pmi import BLOCK, cross_pmi, log_partition
from mipruner.prompt import Encoded, Visual
from mipruner.pruners import PRUNERS, DecoderPruner, Pruner
from mipruner.selection import budget

N_ORDER = 128
"""Picks whose order is shown."""
N_WORDS = 5
"""Words of the vocabulary that are shown for a patch."""
N_HELD = 8
"""Images whose features are held."""
N_SCENES = 12
SIGNALS = frozenset(one.name for one in fields(Features) if one.default is not MISSING)
"""Every field that some pruner may ask for."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Cell:
    """One panel: a method and a budget.

    Attributes
    ----------
    pruner : str
        Name in conf/pruner.
    method : Pruner or DecoderPruner
    keep : int or float
    changed : dict
        Hyperparameters that are not those of conf/pruner.
    """

    pruner: str
    method: Pruner | DecoderPruner
    keep: int | float
    changed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """One image after the vision encoder.

    Attributes
    ----------
    image : PIL image
    visual : Visual
        With every signal of `SIGNALS` that the model has.
    ms : float
    vocabulary : list of lists of (word, PMI), or None
        For each patch the words of the whole vocabulary with the largest PMI.
    """

    image: Image.Image
    visual: Visual
    ms: float
    vocabulary: list[list[tuple[str, float]]] | None


# ---------------------------------------------------------------------------------------------- words of the vocabulary

_readable: "WeakKeyDictionary[Any, tuple[Tensor, list[str]]]" = WeakKeyDictionary()


def readable(adapter: Adapter) -> tuple[Tensor, list[str]]:
    """Ids and spelling of the tokens that a person reads as words: two letters or more, no special ones."""
    if adapter.model not in _readable:
        special = set(adapter.tokenizer.all_special_ids)
        ids = [k for k in range(min(len(adapter.tokenizer), len(adapter.model.get_input_embeddings().weight)))]
        words = [word.strip() for word in adapter.tokenizer.batch_decode([[k] for k in ids])]
        kept = [k for k in ids if k not in special and len(words[k]) > 1 and words[k].isalpha()]
        _readable[adapter.model] = torch.tensor(kept), [words[k] for k in kept]
    return _readable[adapter.model]


def say_patches(adapter: Adapter, visual: Tensor, tau: float = 0.1) -> list[list[tuple[str, float]]]:
    """For each of visual [n_visual, d] the `N_WORDS` words w of the vocabulary with the largest PMI(v_i; w), eq. 18.

    p(w | v_i) is normalised over all readable words, see `readable`; no more than `BLOCK` of them exist at a time.
    """
    ids, words = readable(adapter)
    table = adapter.model.get_input_embeddings().weight[ids.to(visual.device)]
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
    """One vision pass with everything that any pruner may ask for."""
    start = time.perf_counter()
    (visual,) = adapter.encode([adapter.pixels(image)], SIGNALS)
    ms = 1e3 * (time.perf_counter() - start)
    vocabulary = None if visual.grid is None else say_patches(adapter, visual.tokens)
    return Seen(image, visual, ms, vocabulary)


@torch.inference_mode()
def answer_cell(
    adapter: Adapter, seen: Seen, question: str, cell: Cell, decoding: Decoding
) -> tuple[Answer, dict[str, float]]:
    """What the model says with the tokens of this cell, and the ms of each stage after the vision encoder."""
    pipeline = Pipeline(adapter, cell.method, cell.keep, decoding)
    pipeline.cache.put(seen.image, seen.visual, SIGNALS)
    (told,) = pipeline([Prompt(question, [seen.image])])
    return told, dict(pipeline.watch.ms)


def order_of(adapter: Adapter, seen: Seen, question: str, cell: Cell) -> list[int] | None:
    """The first `N_ORDER` tokens that the method picks, None where it has no order."""
    if not isinstance(cell.method, Pruner) or cell.pruner == "none":
        return None
    (features,) = adapter.read(Prompt(question, [seen.image]), [seen.visual], cell.method.signals).features()
    order = cell.method.order(features, min(N_ORDER, features.n_visual))
    return None if order is None else order.tolist()


def show_run(cell: Cell, told: Answer, ms: dict[str, float], n_prompt: int, order: list[int] | None) -> dict[str, Any]:
    """One panel as data; ``n_prompt`` tokens are in the full prompt."""
    layers = told.visual_tokens_per_layer
    return {
        "pruner": cell.pruner,
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
        "words": [word.strip() for word in features.words],
        "pmi": [[round(value, 2) for value in row] for row in pmi.tolist()],
        "runs": list(runs),
    }


def show(adapter: Adapter, model: str, seen: Seen, questions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that `panels.js` draws: an image and what was asked about it."""
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
    """The same on the command line."""
    words = [f"image={image}", f"question={question}", f"model={model}", f"pruner={cell.pruner}"]
    words += [] if cell.pruner == "none" else [f"keep={cell.keep}"]
    words += [f"pruner.{key}={'null' if value is None else value}" for key, value in cell.changed.items()]
    words += [] if decoding.max_new_tokens == 128 else [f"decoding.max_new_tokens={decoding.max_new_tokens}"]
    return shlex.join(["python", "run.py", *words])


def python_lines(path: str, cell: Cell, decoding: Decoding) -> str:
    """The same around a model of one's own."""
    method = cell.method
    values = {one.name: (getattr(method, one.name), one.default) for one in fields(method)}
    options = "".join(f", {name}={value!r}" for name, (value, default) in values.items() if value != default)
    return (
        f"model = AutoModelForImageTextToText.from_pretrained({path!r})\n"
        f"with mipruner.prune(model, {cell.pruner!r}, keep={cell.keep!r}{options}):\n"
        f'    ids = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), '
        f"max_new_tokens={decoding.max_new_tokens})"
    )


# ------------------------------------------------------------------------------------------------------ hyperparameters


def describe_fields(name: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """The hyperparameters of a pruner that a form can hold, with the values of conf/pruner."""
    hints, described = get_type_hints(PRUNERS[name]), []
    for one in fields(PRUNERS[name]):
        value = defaults.get(one.name, None if one.default is MISSING else one.default)
        if isinstance(value, list | tuple | dict) or one.name == "prior_table":
            continue
        hint = hints[one.name]
        choices = list(get_args(hint)) if get_origin(hint) is Literal else []
        choices = [choice for choice in choices if choice != "estimated"]  # it wants a table
        described.append({"name": one.name, "value": value, "choices": choices})
    return described


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a field's type; numbers without a point are also decimal ones."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(fits(one, value) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)


def read_value(text: str) -> Any:
    """What was typed into a form, as YAML would read it."""
    words = {"true": True, "false": False, "null": None, "none": None, "": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def read_keep(text: str) -> int | float:
    """A budget as it was typed: 1 is one token and 1.0 is everything, which JSON's numbers do not tell apart."""
    keep = read_value(text)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise InputError(f"{text[:40]!r} is not a budget: give a whole number of tokens or a fraction such as 0.25")
    budget(keep, sys.maxsize)
    return keep


# ------------------------------------------------------------------------------------------------------------- explorer

OWN = ("model", "pruner", "keep", "experiment", "ablation", "image", "question", "task")
"""Groups and keys that the page chooses, or that have no meaning on it."""


class Explorer:
    """Models held ready, one forward pass at a time, for any number of threads.

    Parameters
    ----------
    overrides : sequence of str
        The words of run.py: model=llava15_7b dataset=.. decoding.max_new_tokens=..
    models : sequence of str, optional
        Names of conf/model that may be chosen. By default the one of ``overrides``, or both of the demo.
    """

    def __init__(self, overrides: Sequence[str] = (), models: Sequence[str] = ()):
        named = [word.partition("=")[2] for word in overrides if word.startswith("model=")]
        self.models = list(models) or named or ["demo_llava", "demo_qwen3vl"]
        self.words = [word for word in overrides if word.partition("=")[0].split(".")[0].strip("+~") not in OWN]
        self.words += [word for word in overrides if word.startswith("model.")]
        if not any(word.startswith("decoding.max_new_tokens=") for word in self.words):
            self.words.append("decoding.max_new_tokens=64")
        self.config = self.compose(self.models[0], "mi")
        self.decoding = build.decoding(self.config)
        benchmark = build.benchmark(self.config)
        self.demo = benchmark if isinstance(benchmark, Demo) else Demo()
        self._defaults = {
            name: {
                k: v for k, v in self.compose(self.models[0], name)["pruner"].items() if k not in ("name", "_target_")
            }
            for name in PRUNERS
        }
        self._lock = threading.Lock()  # torch uses all cores for a pass, and hooks stand on the model while it lasts
        self._adapters: dict[str, tuple[Adapter, str]] = {}
        self._seen: OrderedDict[tuple[str, str], Seen] = OrderedDict()

    def compose(self, model: str, pruner: str) -> dict[str, Any]:
        """The resolved config of a model and a pruner. Raises `InputError` for a word that run.py does not know."""
        try:
            with initialize_config_dir(str(ROOT / "conf"), version_base=None):
                return build.resolve(compose("config", [*self.words, f"model={model}", f"pruner={pruner}"]))
        except HydraException as error:
            raise InputError(str(error).strip().splitlines()[0]) from error

    def adapter(self, model: str) -> tuple[Adapter, str]:
        """The model, loaded at its first use, and its path."""
        if model not in self._adapters:
            config = self.compose(model, "mi")
            self._adapters[model] = build.model(config), config["model"]["path"]
        return self._adapters[model]

    def describe(self) -> dict[str, Any]:
        """What the page offers."""
        pruners = {name: describe_fields(name, self._defaults[name]) for name in PRUNERS if name != "none"}
        scenes = min(N_SCENES, self.demo.n_scenes)
        return {"models": self.models, "pruners": pruners, "n_scenes": scenes, "command": self.command()}

    def command(self) -> str:
        return "python -m experiments.explorer model=llava15_7b"

    def scene_image(self, index: int) -> Image.Image:
        """An image of the demo. Raises `InputError` if there is none of this number."""
        if not 0 <= index < min(N_SCENES, self.demo.n_scenes):
            raise InputError(f"there is no scene {index}")
        return self.demo.images(str(index))[0]

    def scene(self, index: int) -> dict[str, Any]:
        """An image of the demo with its questions."""
        image = self.scene_image(index)
        questions = [
            {"text": sample.text, "answer": sample.answer}
            for sample in self.demo.samples()
            if sample.image_id == str(index)
        ]
        return {"src": data_url(image), "questions": questions}

    def cell(self, pruner: str, keep: int | float, options: dict[str, Any]) -> Cell:
        """Raises `InputError` if there is no such pruner or hyperparameter, or a value does not fit."""
        if pruner not in self._defaults:
            raise InputError(f"there is no pruner {str(pruner)[:40]!r}")
        defaults = self._defaults[pruner]
        if unknown := [key for key in options if key not in defaults]:
            raise InputError(f"{pruner} has no hyperparameter {unknown[0][:40]!r}")
        changed = {key: value for key, value in options.items() if value != defaults[key]}
        hints = get_type_hints(PRUNERS[pruner])
        for key, value in changed.items():
            if not fits(hints[key], value):
                raise InputError(f"{pruner}: {key}={str(value)[:40]} does not fit")
        return Cell(pruner, PRUNERS[pruner](**defaults | changed), keep, changed)

    def see(self, model: str, image: Image.Image, key: str) -> Seen:
        """One vision pass for each image and model; ``key`` names the image, and the last `N_HELD` are held."""
        if (model, key) not in self._seen:
            self._seen[model, key] = see(self.adapter(model)[0], image)
            while len(self._seen) > N_HELD:
                self._seen.popitem(last=False)
        self._seen.move_to_end((model, key))
        return self._seen[model, key]

    def ask(
        self,
        model: str,
        image: Image.Image,
        key: str,
        questions: Sequence[str],
        cells: Sequence[Cell],
        *,
        scene: int | None = None,
        tell: Callable[[int, int], None] = lambda done, n: None,
    ) -> dict[str, Any]:
        """Everything the page shows, see `show`; each question is also answered with all tokens.

        Parameters
        ----------
        key : str
            Name of the image: what was seen of it is held by it.
        scene : int, optional
            Number of the scene that the image is, so that known answers are known.
        tell : callable
            Called with (done, all) before each panel; what it raises ends the work.

        Raises
        ------
        InputError
            If there is no such model, a question is empty, or a budget does not fit. What one method cannot do with
            this budget is said in its panel instead.
        """
        if model not in self.models:
            raise InputError(f"there is no model {str(model)[:40]!r} here: choose {', '.join(self.models)}")
        done, n = 0, len(questions) * (1 + len(cells))
        tell(done, n)
        with self._lock:
            adapter, path = self.adapter(model)
            seen = self.see(model, image, key)
        for cell in cells:
            budget(cell.keep, seen.visual.n_visual)
        shown = []
        for question in questions:
            encoded = self.read(adapter, seen, question)
            runs = []
            for cell in (self.cell("none", 1.0, {}), *cells):
                tell(done, n)
                with self._lock:
                    runs.append(self.run((model, path), adapter, seen, encoded, question, cell))
                done += 1
            shown.append(self.judge(scene, show_question(question, encoded, runs)))
        return show(adapter, model, seen, shown)

    @torch.inference_mode()
    def read(self, adapter: Adapter, seen: Seen, question: str) -> Encoded:
        if not question.strip():
            raise InputError("the question is empty: type one")
        return adapter.read(Prompt(question, [seen.image]), [seen.visual], frozenset({"words"}))

    @torch.inference_mode()
    def run(
        self, model: tuple[str, str], adapter: Adapter, seen: Seen, encoded: Encoded, question: str, cell: Cell
    ) -> dict[str, Any]:
        """One panel with its commands; ``model`` is name and path."""
        same = {
            "command": command(model[0], question, cell, self.decoding),
            "python": python_lines(model[1], cell, self.decoding),
        }
        try:
            told, ms = answer_cell(adapter, seen, question, cell, self.decoding)
        except InputError as error:
            return {"pruner": cell.pruner, "keep": str(cell.keep), "error": str(error), "order": None} | same
        return show_run(cell, told, ms, len(encoded.ids), order_of(adapter, seen, question, cell)) | same

    def judge(self, scene: int | None, shown: dict[str, Any]) -> dict[str, Any]:
        """Right and wrong, where the question is one of the scene's own."""
        for sample in self.demo.samples() if scene is not None else ():
            if sample.image_id == str(scene) and sample.text == shown["question"]:
                shown["expected"] = sample.answer
                for run in shown["runs"]:
                    run["right"] = None if "error" in run else self.demo.correct(sample, run["answer"]) >= 0.5
                break
        return shown
