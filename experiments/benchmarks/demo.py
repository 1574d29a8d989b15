"""Demo benchmark: rendered scenes with questions in the wording and scoring rules of five benchmarks.

It needs no download and no GPU. Its results are no evidence for photographs.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.benchmarks.base import Benchmark, BenchmarkError, Example, Sample
from experiments.demo.questions import TASKS, Question, make_questions
from experiments.demo.scenes import DENSITIES, FULL_CANVAS, Scene, make_scene, render, scene_generators
from experiments.metrics import (
    POPERow,
    gqa_correct,
    mme_correct,
    pope_correct,
    pope_scores,
    scienceqa_correct,
    textvqa_accuracy,
)

SCORES = {
    "pope": pope_correct,
    "gqa": gqa_correct,
    "scienceqa": lambda prediction, answer: scienceqa_correct(prediction, answer, n_choices=3),
    "textvqa": lambda prediction, answer: textvqa_accuracy(prediction, [answer] * 10),
    "mme": mme_correct,
}


class Demo(Benchmark):
    """Questions about ``n_scenes`` scenes: accuracy over all, accuracy of each task, and POPE's F1 and yes-rate.

    MME's accuracy+ is not computed: it needs two questions of a category per image, and here there is one.

    Parameters
    ----------
    density : str
        ``crowded`` (10 to 14 objects are tried) or ``sparse`` (2 to 8 objects, and counting questions).
    n_scenes : int
        Number of scenes. Scene i does not depend on it.
    seed : int
        Seed of the scenes and the questions.
    tasks : sequence of str, optional
        Some of pope, gqa, scienceqa, textvqa, mme; by default all. The questions of a task do not depend on it.
    canvases : sequence of (width, height)
        Sizes in px; scene i has canvas i modulo their number.
    n_objects, sizes : sequence of int, optional
        Override the density: minimum and maximum number of objects, possible lengths of an object's longer side in px.

    Raises
    ------
    BenchmarkError
        For an unknown density or task.
    """

    examples = tuple(
        Example({"question": question}, right, wrong)
        for question, right, wrong in (
            ("Is there a moon in the image ?", "yes", "no"),
            ("Is there a note in the image ?", "no", "yes"),
            ("Is there a bolt in the image ?", "yes", "no"),
            ("Is there a cloud in the image ?", "no", "yes"),
            ("Is there a snowman in the image ?", "yes", "no"),
            ("Is there a cloud in the image ?", "no", "yes"),
            ("What color is the snowman ?", "blue", "red"),
            ("What color is the snowflake ?", "purple", "red"),
            ("What color is the sword ?", "black", "red"),
            ("What color is the envelope ?", "red", "blue"),
            ("Which object is in the image ? A . bishop B . anchor C . knight", "A", "B"),
            ("Which object is in the image ? A . snowman B . diamond C . balance", "A", "snowman"),
            ("What number is written on the sign ?", "3 7", "7 3"),
            ("Is there a gear in the image ?", "yes", "no"),
            ("Is the umbrella to the right of the sword ?", "yes", "no"),
            ("Is the bishop purple ?", "no", "yes"),
        )
    )

    def __init__(
        self,
        density: str = "crowded",
        n_scenes: int = 40,
        seed: int = 0,
        tasks: Sequence[str] | None = None,
        canvases: Sequence[tuple[int, int]] = (FULL_CANVAS,),
        n_objects: tuple[int, int] | None = None,
        sizes: Sequence[int] | None = None,
    ):
        for name, known in ((density, tuple(DENSITIES)), *((task, TASKS) for task in tasks or ())):
            if name not in known:
                raise BenchmarkError(f"the demo has no {name!r}, only {', '.join(known)}")
        self.density, self.n_scenes, self.seed = density, n_scenes, seed
        self.tasks = TASKS if tasks is None else tasks
        self.canvases, self.n_objects, self.sizes = canvases, n_objects, sizes

    @classmethod
    def write_examples(cls, folder: Path) -> dict[str, Any]:
        return {"n_scenes": 1}

    def scene(self, index: int) -> Scene:
        rng, _ = scene_generators(self.seed, index)
        return make_scene(rng, self.density, self.canvases[index % len(self.canvases)], self.n_objects, self.sizes)

    @cached_property
    def _samples(self) -> list[Sample]:
        samples = []
        for index in range(self.n_scenes):
            _, rng = scene_generators(self.seed, index)
            for number, question in enumerate(self.make_questions(self.scene(index), rng)):
                if question.task in self.tasks:
                    sample = Sample(
                        id=f"{index}/{number}",
                        text=question.text,
                        question=question.text,
                        answer=question.answer,
                        image_id=str(index),
                        task=question.task,
                        meta={"category": question.category},
                    )
                    samples.append(sample)
        return samples

    def make_questions(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        return make_questions(scene, rng)

    def samples(self) -> list[Sample]:
        return self._samples

    def images(self, image_id: str) -> list[Image.Image]:
        return [render(self.scene(int(image_id)))]

    def correct(self, sample: Sample, prediction: str) -> float:
        return SCORES[sample.task](prediction, sample.answer)

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = list(zip(samples, scores, strict=True))
        by_task = {task: [score for sample, score in scored if sample.task == task] for task in TASKS}
        return {"accuracy": list(scores)} | by_task

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        answered = [
            POPERow(sample.meta["category"], sample.answer, prediction)
            for sample, prediction in zip(samples, predictions, strict=True)
            if sample.task == "pope"
        ]
        pope = pope_scores(answered)
        derived = {f"pope_{name}": pope[name] for name in ("f1", "yes_rate") if name in pope}
        return super().metrics(samples, predictions, scores) | derived
