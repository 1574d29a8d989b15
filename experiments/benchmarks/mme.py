"""MME: perception 2,114 questions, cognition 260, two on each image. https://arxiv.org/abs/2306.13394"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from experiments.benchmarks.base import Example, Sample
from experiments.benchmarks.prompts import with_format
from experiments.benchmarks.rows import Row, Text, YesNo, read_each
from experiments.benchmarks.table import ShortAnswers, group_by_image
from experiments.metrics import (
    MME_COGNITION,
    MME_PERCEPTION,
    Cognition,
    MMERow,
    Perception,
    mme_answer,
    mme_correct,
    mme_scores,
)

YES_OR_NO = " Please answer yes or no."


class MMERowOfFile(Row):
    question_id: Text
    question: Text
    answer: YesNo
    category: Literal[Perception, Cognition]


class MME(ShortAnswers):
    """Yes or no, scored by category as accuracy + accuracy+ (share of images with both questions right).

    ``prompt``: "short_answer" replaces "Please answer yes or no." by LLaVA's sentence, "plain" keeps it. The perception
    score is a sum over ten categories. A run without all of them has the accuracy as its headline.
    """

    row = MMERowOfFile
    image_column = "question_id"

    examples = (
        Example(
            {
                "question_id": "existence/1.png",
                "question": "Is there a square in this image? Please answer yes or no.",
                "answer": "Yes",
                "category": "existence",
            },
            right="Yes",
            wrong="No",
        ),
        Example(
            {
                "question_id": "existence/1.png",
                "question": "Is there a cat in this image? Please answer yes or no.",
                "answer": "No",
                "category": "existence",
            },
            right="No",
            wrong="Yes",
        ),
    )

    def __init__(self, *args: Any, cognition: bool = False, **options: Any):
        super().__init__(*args, **options)
        self.categories = MME_PERCEPTION + MME_COGNITION if cognition else MME_PERCEPTION

    def samples(self) -> list[Sample]:
        rows = [(number, (row, image_id)) for number, row, image_id in self.rows if row.category in self.categories]
        n_questions = Counter(row.question_id for _, (row, _) in rows)
        before: Counter[str] = Counter()

        def read(_: int, found: tuple[MMERowOfFile, str]) -> Sample:
            row, image_id = found
            if (n := n_questions[row.question_id]) != 2:
                raise ValueError(f"MME has two questions an image; {row.question_id} has {n}")
            question = row.question.replace(YES_OR_NO, "").rstrip()
            before[row.question_id] += 1
            return Sample(
                id=f"{row.question_id}#{before[row.question_id] - 1}",
                text=row.question if self.prompt == "plain" else with_format(question, self.prompt),
                question=question,
                answer=row.answer,
                image_id=image_id,
                task=row.category,
                meta={"pair": row.question_id},
            )

        samples, odd = read_each(rows, read, self.where, self.on_bad_row)
        self.skipped = [*self.skipped, *odd]
        return group_by_image([sample for _, sample in samples])

    def correct(self, sample: Sample, prediction: str) -> float:
        return mme_correct(prediction, sample.answer, self.scoring)

    def is_readable(self, sample: Sample, prediction: str) -> bool:
        return mme_answer(prediction, self.scoring) != "other"

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        answered = zip(samples, predictions, strict=True)
        return mme_scores(
            [MMERow(s.task, s.meta["pair"], s.answer, prediction) for s, prediction in answered], self.scoring
        )
