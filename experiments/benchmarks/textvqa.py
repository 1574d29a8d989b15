"""TextVQA, validation: 5,000 questions, each with ten answers and OCR tokens. https://arxiv.org/abs/1904.08920"""

from typing import Annotated, Any

from pydantic import Field

from experiments.benchmarks.base import Example, Sample
from experiments.benchmarks.prompts import SHORT_ANSWER
from experiments.benchmarks.rows import Row, Text
from experiments.benchmarks.table import TableBenchmark
from experiments.metrics import textvqa_accuracy


class TextVQARow(Row):
    image_id: str | None
    question_id: str
    question: Text
    answers: Annotated[list[str], Field(min_length=10, max_length=10)]
    ocr_tokens: list[str]


class TextVQA(TableBenchmark):
    """VQA accuracy of short answers. LLaVA and lmms-eval have the same rule.

    ``ocr`` adds a line with the dataset's OCR tokens to the question, as in LLaVA, but not by default in lmms-eval.
    Without it LLaVA-1.5-7B loses about twelve points.
    """

    split = "validation"
    row = TextVQARow
    image_column = "image_id"

    examples = (
        Example(
            {
                "image_id": "a",
                "question_id": "34602",
                "question": "what is the brand?",
                "answers": ["acme"] * 9 + ["acme corp"],
                "ocr_tokens": ["ACME", "12"],
            },
            right="Acme.",
            wrong="12",
        ),
        Example(
            {
                "image_id": "b",
                "question_id": "34603",
                "question": "what is the time?",
                "answers": ["ten past ten"] * 10,
                "ocr_tokens": [],
            },
            right="ten past ten",
            wrong="noon",
        ),
    )

    def __init__(self, *args: Any, ocr: bool = True, **options: Any):
        super().__init__(*args, **options)
        self.ocr = ocr

    def sample(self, row: TextVQARow, **ids: Any) -> Sample:
        question = row.question.capitalize()  # as in LLaVA's file, where all other letters are lower case
        content = f"{question}\nReference OCR token: {', '.join(row.ocr_tokens)}" if self.ocr else question
        text = f"{content}\n{SHORT_ANSWER}"
        return Sample(text=text, question=question, content=content, answer=row.answers, **ids)

    def correct(self, sample: Sample, prediction: str) -> float:
        return textvqa_accuracy(prediction, sample.answer)
