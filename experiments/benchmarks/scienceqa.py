"""ScienceQA-IMG, test: the 2,017 of 4,241 questions with a picture. https://arxiv.org/abs/2209.09513"""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from experiments.benchmarks.base import Sample
from experiments.benchmarks.prompts import OPTION_LETTER
from experiments.benchmarks.rows import Row, Text
from experiments.benchmarks.table import TableBenchmark, by_picture
from experiments.metrics import check_scoring, scienceqa_correct, scienceqa_letter

LETTERS = "ABCDE"


class ScienceQARow(Row):
    """LLaVA's rule reads the letters A to E: the data set has no sixth choice."""

    question: Text
    choices: Annotated[list[Text], Field(min_length=2, max_length=len(LETTERS))]
    answer: Annotated[int, Field(ge=0)]
    hint: str | None
    subject: str | None

    @model_validator(mode="after")
    def check_answer(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is none of the {len(self.choices)} choices, counted from 0")
        return self


class ScienceQA(TableBenchmark):
    """Multiple choice answered by a letter; an answer without one is wrong, never a random guess."""

    config = "ScienceQA-IMG"
    row = ScienceQARow

    def __init__(self, hub: Sequence[str], path: str | None = None, scoring: str = "llava", on_bad_row: str = "stop"):
        super().__init__(hub, path, on_bad_row)
        self.scoring = check_scoring(scoring)

    def samples(self) -> list[Sample]:
        samples = []
        for number, row, image_id in self.rows:
            context = [f"Context: {row.hint}"] if row.hint else []
            choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=False)]
            question = "\n".join([*context, row.question, *choices])
            samples.append(
                Sample(
                    id=str(number),
                    text=f"{question}\n{OPTION_LETTER}",
                    question=question,
                    answer=LETTERS[row.answer],
                    image_id=image_id,
                    task=row.subject or "",
                    meta={"n_choices": len(row.choices)},
                )
            )
        return by_picture(samples)

    def correct(self, sample: Sample, prediction: str) -> float:
        return scienceqa_correct(prediction, sample.answer, sample.meta["n_choices"], self.scoring)

    def is_readable(self, sample: Sample, prediction: str) -> bool:
        return scienceqa_letter(prediction) is not None or len(prediction.strip(". ")) == 1
