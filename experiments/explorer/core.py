"""Explorer without a server: loaded models, and the results of a request as plain data."""

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from PIL import Image

from experiments import build
from experiments.benchmarks.demo import Demo
from experiments.explorer.panels import data_url
from experiments.explorer.views import Cell, Seen, read, see, show, show_cell, show_question
from experiments.results import ROOT
from mipruner.errors import InputError
from mipruner.models import Adapter
from mipruner.pruners import PRUNERS, ImagePruner, make
from mipruner.selection import budget

N_HELD = 8
"""Number of images whose features are cached."""
N_SCENES = 12


class Cancelled(Exception):
    """Raised if the client no longer waits for the answer."""


# ------------------------------------------------------------------------------------------------------ hyperparameters


def describe_fields(name: str, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Hyperparameters of a pruner that a form can show, with the values of conf/pruner."""
    hints, described = get_type_hints(PRUNERS[name]), []
    for one in fields(PRUNERS[name]):
        value = defaults[one.name]
        if isinstance(value, list | tuple | dict) or one.name == "prior_table":
            continue
        hint = hints[one.name]
        choices = list(get_args(hint)) if get_origin(hint) is Literal else []
        choices = [choice for choice in choices if choice != "estimated"]  # it wants a table
        described.append({"name": one.name, "value": value, "choices": choices})
    return described


def read_value(text: str) -> Any:
    """Parse a value typed into a form, as YAML."""
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
    """Parse a budget as text: 1 is one token and 1.0 is all tokens. JSON numbers do not distinguish them."""
    keep = read_value(text)
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise InputError(f"{text[:40]!r} is not a budget: give a whole number of tokens or a fraction such as 0.25")
    budget(keep, sys.maxsize)
    return keep


# ------------------------------------------------------------------------------------------------------------- explorer

REAL = "python run.py task=explorer model=llava15_7b"
"""Command for photographs that the demo shows."""
OWN = ("model", "pruner", "keep", "experiment", "ablation", "image", "question", "task", "models", "port")
"""Groups and keys that the page sets or does not use."""


class Explorer:
    """Loaded models for any number of threads, with one forward pass at a time.

    Parameters
    ----------
    overrides : sequence of str
        Overrides as for run.py: model=llava15_7b dataset=.. decoding.max_new_tokens=..
    models : sequence of str, optional
        Names in conf/model to choose from. By default the model of ``overrides``, or both demo models.
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
        self.pruners = [name for name, cls in PRUNERS.items() if not issubclass(cls, ImagePruner)]  # those keep tokens
        self.defaults = cache(self._defaults)
        self._lock = threading.Lock()  # torch uses all cores for a pass, and hooks are on the model during it
        self._adapters: dict[str, tuple[Adapter, str]] = {}
        self._seen: OrderedDict[tuple[str, str], Seen] = OrderedDict()

    def compose(self, model: str, pruner: str) -> dict[str, Any]:
        """Resolved config of a model and a pruner. Raises `InputError` for an unknown name."""
        try:
            is_ready = GlobalHydra.instance().is_initialized()  # by run.py
            with nullcontext() if is_ready else initialize_config_dir(str(ROOT / "conf"), version_base=None):
                return build.resolve(compose("config", [*self.words, f"model={model}", f"pruner={pruner}"]))
        except HydraException as error:
            raise InputError(str(error).strip().splitlines()[0]) from error

    def _defaults(self, model: str, pruner: str) -> dict[str, Any]:
        """Hyperparameters in conf/pruner, or of the class for a method without a file there."""
        own = {one.name: one.default for one in fields(PRUNERS[pruner])}
        if not (ROOT / "conf/pruner" / f"{pruner}.yaml").is_file():
            return own
        chosen = self.compose(model, pruner)["pruner"]
        return own | {name: value for name, value in chosen.items() if name in own}

    def adapter(self, model: str) -> tuple[Adapter, str]:
        """The model (loaded at first use) and its path."""
        if model not in self._adapters:
            config = self.compose(model, "mi")
            self._adapters[model] = build.model(config), config["model"]["path"]
        return self._adapters[model]

    def describe(self) -> dict[str, Any]:
        """Models, pruners and scenes that can be chosen."""
        pruners = {
            name: {"title": PRUNERS[name].title, "fields": describe_fields(name, self.defaults(self.models[0], name))}
            for name in self.pruners
            if name != "none"
        }
        scenes = min(N_SCENES, self.demo.n_scenes)
        return {"models": self.models, "pruners": pruners, "n_scenes": scenes, "command": REAL}

    def scene_image(self, index: int) -> Image.Image:
        """Image of a demo scene. Raises `InputError` for an invalid number."""
        if not 0 <= index < min(N_SCENES, self.demo.n_scenes):
            raise InputError(f"there is no scene {index}")
        return self.demo.images(str(index))[0]

    def scene(self, index: int) -> dict[str, Any]:
        """Image of a demo scene with its questions."""
        image = self.scene_image(index)
        questions = [
            {"text": sample.text, "answer": sample.answer}
            for sample in self.demo.samples()
            if sample.image_id == str(index)
        ]
        return {"src": data_url(image), "questions": questions}

    def cell(self, pruner: str, keep: int | float, options: dict[str, Any], model: str | None = None) -> Cell:
        """A panel of a pruner, options and budget. ``model`` is by default the first.

        Raises
        ------
        InputError
            If there is no such pruner or hyperparameter, or a value is invalid.
        """
        if pruner not in self.pruners:
            raise InputError(f"there is no pruner {str(pruner)[:40]!r}")
        defaults = self.defaults(model if model in self.models else self.models[0], pruner)
        if unknown := [key for key in options if key not in defaults]:
            raise InputError(f"{pruner} has no hyperparameter {unknown[0][:40]!r}")
        changed = {key: value for key, value in options.items() if value != defaults[key]}
        return Cell(pruner, make(pruner, **defaults | changed), keep, changed)

    def see(self, model: str, image: Image.Image, key: str) -> Seen:
        """Encode each image once per model. ``key`` names the image. The last `N_HELD` results are cached."""
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
        """All data of the page, see `show`. Each question is also answered with all tokens.

        Parameters
        ----------
        key : str
            Name of the image, the key of the cache.
        scene : int, optional
            Number of the demo scene, for known answers.
        tell : callable
            Called with (done, all) before each panel. An exception in it stops the work.

        Raises
        ------
        InputError
            If there is no such model, a question is empty, or a budget is invalid. An error of a single method is shown
            in its panel instead.
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
            encoded = read(adapter, seen, question)
            runs = []
            for cell in (self.cell("none", 1.0, {}), *cells):
                tell(done, n)
                with self._lock:
                    runs.append(show_cell(adapter, (model, path), seen, encoded, question, cell, self.decoding))
                done += 1
            shown.append(self.judge(scene, show_question(question, encoded, runs)))
        return show(adapter, model, seen, shown)

    def judge(self, scene: int | None, shown: dict[str, Any]) -> dict[str, Any]:
        """Mark answers as right or wrong if the question belongs to the scene."""
        for sample in self.demo.samples() if scene is not None else ():
            if sample.image_id == str(scene) and sample.text == shown["question"]:
                shown["expected"] = sample.answer
                for run in shown["runs"]:
                    run["right"] = None if "error" in run else self.demo.correct(sample, run["answer"]) >= 0.5
                break
        return shown
