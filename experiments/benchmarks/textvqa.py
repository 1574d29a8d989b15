"""TextVQA, validation: 5,000 questions, each with ten answers and OCR tokens. https://arxiv.org/abs/1904.08920"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from experiments.benchmarks.base import Sample
from experiments.benchmarks.prompts import SHORT_ANSWER
from experiments.benchmarks.rows import Row, Text
from experiments.benchmarks.table import TableBenchmark, by_picture, numbered
from experiments.metrics import textvqa_accuracy


class TextVQARow(Row):
    image_id: str | None
    question_id: str
    question: Text
    answers: Annotated[list[str], Field(min_length=10, max_length=10)]
    ocr_tokens: list[str]


class TextVQA(TableBenchmark):
    """VQA accuracy of short answers; LLaVA and lmms-eval score alike.

    ``ocr`` shows the data set's OCR tokens to the model in a line of their own, as LLaVA does and lmms-eval by default
    does not; without them LLaVA-1.5-7B loses about twelve points.
    """

    split = "validation"
    row = TextVQARow
    image_column = "image_id"

    def __init__(self, hub: Sequence[str], path: str | None = None, ocr: bool = True, on_bad_row: str = "stop"):
        super().__init__(hub, path, on_bad_row)
        self.ocr = ocr

    def samples(self) -> list[Sample]:
        samples = []
        ids = numbered(row.question_id for _, row, _ in self.rows)
        for name, (_, row, image_id) in zip(ids, self.rows, strict=True):
            question = row.question.capitalize()  # as in LLaVA's file, which lowers all other letters
            ocr = [f"Reference OCR token: {', '.join(row.ocr_tokens)}"] if self.ocr else []
            samples.append(
                Sample(
                    id=name,
                    text="\n".join([question, *ocr, SHORT_ANSWER]),
                    question=question,
                    content="\n".join([question, *ocr]),
                    answer=row.answers,
                    image_id=image_id,
                )
            )
        return by_picture(samples)

    def correct(self, sample: Sample, prediction: str) -> float:
        return textvqa_accuracy(prediction, sample.answer)
