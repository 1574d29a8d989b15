"""POPE on COCO, the later version: 3,000 random, popular and adversarial questions each, on 500 images.

https://arxiv.org/abs/2305.10355
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiments.benchmarks.base import Example, Sample
from experiments.benchmarks.prompts import with_format
from experiments.benchmarks.rows import Row, Text, YesNo
from experiments.benchmarks.table import ShortAnswers
from experiments.metrics import POPE_CATEGORIES, POPECategory, POPERow, mme_answer, pope_correct, pope_scores


class POPERowOfFile(Row):
    question_id: str
    question: Text
    answer: YesNo
    image_source: str | None
    category: POPECategory


class POPE(ShortAnswers):
    """Object presence, yes or no: accuracy, F1 and yes-rate of each category, and the mean of the three.

    ``prompt``: "short_answer" is LLaVA's prompt, "plain" is the question only. The paper's full-token row seems to use
    the latter (yes-rate .56; LLaVA's prompt gives about .42). LLaVA's own files are an earlier version with 2,910
    random questions.
    """

    row = POPERowOfFile
    image_column = "image_source"
    examples = (
        Example(
            {
                "question_id": "1",
                "question": "Is there a snowboard in the image?",
                "answer": "yes",
                "image_source": "COCO_1",
                "category": "random",
            },
            right="Yes",
            wrong="No",
        ),
        Example(
            {
                "question_id": "1",
                "question": "Is there a car in the image?",
                "answer": "no",
                "image_source": "COCO_2",
                "category": "popular",
            },
            right="No, there is not.",
            wrong="yes",
        ),
        Example(
            {
                "question_id": "1",
                "question": "Is there a bench in the image?",
                "answer": "no",
                "image_source": "COCO_3",
                "category": "adversarial",
            },
            right="no",
            wrong="Yes, there is.",
        ),
    )

    def name(self, number: int, row: POPERowOfFile) -> str:
        return f"{row.category}/{row.question_id}"

    def sample(self, row: POPERowOfFile, **ids: Any) -> Sample:
        text = with_format(row.question, self.prompt)
        return Sample(text=text, question=row.question, answer=row.answer, task=row.category, **ids)

    def correct(self, sample: Sample, prediction: str) -> float:
        return pope_correct(prediction, sample.answer, self.scoring)

    def is_readable(self, sample: Sample, prediction: str) -> bool:
        """Whether the answer begins with yes or no, as in MME. LLaVA's rule for POPE counts everything else as yes."""
        return mme_answer(prediction, "lmms_eval") != "other"

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = list(zip(samples, scores, strict=True))
        return {f"{c}_accuracy": [score for sample, score in scored if sample.task == c] for c in POPE_CATEGORIES}

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        answered = zip(samples, predictions, strict=True)
        return pope_scores([POPERow(s.task, s.answer, prediction) for s, prediction in answered], self.scoring)

    def standard_errors(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, float]:
        """Standard errors of the categories, and of their mean if all categories have one.

        The three categories share their positive questions, so their scores are not independent. The contributions of a
        question are summed over the categories first.
        """
        errors = super().standard_errors(samples, scores)
        groups = {name: group for name, group in self.groups(samples, scores).items() if group}
        if len(errors) < len(groups):
            return errors
        means = {name: fmean(group) for name, group in groups.items()}
        weights = {name: 100 / len(groups) / math.sqrt(len(g) * (len(g) - 1)) for name, g in groups.items()}
        added: dict[tuple[str, str], float] = defaultdict(float)
        for sample, score in zip(samples, scores, strict=True):
            name = f"{sample.task}_accuracy"
            added[sample.image_id, sample.question] += weights[name] * (score - means[name])
        return {"accuracy": math.hypot(*added.values())} | errors
