"""TextVQA, validation: 5,000 questions, each with ten answers and OCR tokens. https://arxiv.org/abs/1904.08920"""

from collections.abc import Sequence

from experiments.benchmarks.base import BenchmarkError, Sample
from experiments.benchmarks.prompts import SHORT_ANSWER
from experiments.benchmarks.table import TableBenchmark, by_picture
from experiments.metrics import textvqa_accuracy


class TextVQA(TableBenchmark):
    """VQA accuracy of short answers; LLaVA and lmms-eval score alike.

    ``ocr`` shows the data set's OCR tokens to the model in a line of their own, as LLaVA does and lmms-eval by default
    does not; without them LLaVA-1.5-7B loses about twelve points.
    """

    split = "validation"
    columns = ("image_id", "question_id", "question", "answers", "ocr_tokens")
    image_column = "image_id"

    def __init__(self, hub: Sequence[str], path: str | None = None, ocr: bool = True):
        super().__init__(hub, path)
        self.ocr = ocr

    def samples(self) -> list[Sample]:
        samples = []
        for row, image_id in self.rows():
            if len(row["answers"]) != 10:
                raise BenchmarkError(
                    f"TextVQA question {row['question_id']} has {len(row['answers'])} answers, not ten"
                )
            question = row["question"].capitalize()  # as in LLaVA's file, which lowers all other letters
            ocr = [f"Reference OCR token: {', '.join(row['ocr_tokens'])}"] if self.ocr else []
            samples.append(
                Sample(
                    id=str(row["question_id"]),
                    text="\n".join([question, *ocr, SHORT_ANSWER]),
                    question=question,
                    content="\n".join([question, *ocr]),
                    answer=row["answers"],
                    image_id=image_id,
                )
            )
        return by_picture(samples)

    def correct(self, sample: Sample, prediction: str) -> float:
        return textvqa_accuracy(prediction, sample.answer)
