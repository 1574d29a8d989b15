"""ScienceQA-IMG, test: the 2,017 of 4,241 questions with an image. https://arxiv.org/abs/2209.09513"""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from experiments.benchmarks.base import Example, Sample
from experiments.benchmarks.prompts import OPTION_LETTER
from experiments.benchmarks.rows import Row, Text
from experiments.benchmarks.table import TableBenchmark
from experiments.metrics import check_scoring, scienceqa_correct, scienceqa_letter

LETTERS = "ABCDE"


class ScienceQARow(Row):
    """Columns of a row. LLaVA's rule reads the letters A to E, because the dataset has at most five choices."""

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
    """Multiple choice answered by a letter. An answer without a letter is wrong, without a random guess."""

    config = "ScienceQA-IMG"
    row = ScienceQARow

    examples = (
        Example(
            {
                "question": "Which state of matter is the square?",
                "choices": ["solid", "liquid"],
                "answer": 0,
                "hint": "Figure: a made-up square.",
                "subject": "natural science",
            },
            right="A",
            wrong="B",
        ),
        Example(
            {
                "question": "Which of these is a gas?",
                "choices": ["ice", "water", "steam"],
                "answer": 2,
                "hint": None,
                "subject": "natural science",
            },
            right="The answer is C.",
            wrong="steam",
        ),
    )

    def __init__(self, *args: Any, scoring: str = "llava", **options: Any):
        super().__init__(*args, **options)
        self.scoring = check_scoring(scoring)

    def name(self, number: int, row: ScienceQARow) -> str:
        return str(number)

    def sample(self, row: ScienceQARow, **ids: str) -> Sample:
        context = [f"Context: {row.hint}"] if row.hint else []
        choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=False)]
        question = "\n".join([*context, row.question, *choices])
        text, meta = f"{question}\n{OPTION_LETTER}", {"n_choices": len(row.choices)}
        return Sample(
            text=text, question=question, answer=LETTERS[row.answer], task=row.subject or "", meta=meta, **ids
        )

    def correct(self, sample: Sample, prediction: str) -> float:
        return scienceqa_correct(prediction, sample.answer, sample.meta["n_choices"], self.scoring)

    def is_readable(self, sample: Sample, prediction: str) -> bool:
        return scienceqa_letter(prediction) is not None or len(prediction.strip(". ")) == 1
