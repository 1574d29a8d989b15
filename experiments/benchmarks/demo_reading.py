"""The demo's images with questions that need several patches at once. See `experiments.demo.reading`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.base import BenchmarkError, Example, Sample
from experiments.benchmarks.demo import Demo
from experiments.demo.questions import Question
from experiments.demo.reading import FORMS
from experiments.demo.scenes import Scene


class DemoReading(Demo):
    """Questions of some forms about ``n_scenes`` scenes: accuracy over all, and accuracy of each form.

    Parameters
    ----------
    forms : sequence of str, optional
        Only these forms; all of `FORMS` by default. A form's questions do not depend on the others.
    **scenes
        Density, n_scenes, seed, canvases, n_objects and sizes of `Demo`.

    Raises
    ------
    BenchmarkError
        For a form that is not there.
    """

    examples = (
        Example({"question": "What number is written on the sign ?"}, "3 7", "7 3"),
        Example({"question": "What is the blue object ?"}, "snowman", "spade"),
        Example({"question": "What is the brown object ?"}, "spade", "snowman"),
    )

    def __init__(self, forms: Sequence[str] | None = None, **scenes: Any):
        super().__init__(**scenes)
        self.forms = list(FORMS) if forms is None else list(forms)
        for form in self.forms:
            if form not in FORMS:
                raise BenchmarkError(f"the demo has no form {form!r}, only {', '.join(FORMS)}")

    def make_questions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        generators = dict(zip(FORMS, rng.spawn(len(FORMS)), strict=True))
        return [question for form in self.forms for question in FORMS[form](scene, generators[form])]

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = list(zip(samples, scores, strict=True))
        by_form = {form: [score for sample, score in scored if sample.meta["category"] == form] for form in self.forms}
        return {"accuracy": list(scores)} | by_form
