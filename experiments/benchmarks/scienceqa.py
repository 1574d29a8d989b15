"""ScienceQA-IMG, test: the 2,017 of 4,241 questions with a picture. https://arxiv.org/abs/2209.09513"""

from collections.abc import Sequence

from experiments.benchmarks.base import Sample
from experiments.benchmarks.prompts import OPTION_LETTER
from experiments.benchmarks.table import TableBenchmark, by_picture
from experiments.metrics import check_scoring, scienceqa_correct

LETTERS = "ABCDE"


class ScienceQA(TableBenchmark):
    """Multiple choice answered by a letter; an answer without one is wrong, never a random guess."""

    config = "ScienceQA-IMG"
    columns = ("question", "choices", "answer", "hint", "subject")

    def __init__(self, hub: Sequence[str], path: str | None = None, scoring: str = "llava"):
        super().__init__(hub, path)
        self.scoring = check_scoring(scoring)

    def samples(self) -> list[Sample]:
        samples = []
        for i, (row, image_id) in enumerate(self.rows()):
            context = [f"Context: {row['hint']}"] if row["hint"] else []
            choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
            question = "\n".join([*context, row["question"], *choices])
            samples.append(
                Sample(
                    id=str(i),
                    text=f"{question}\n{OPTION_LETTER}",
                    question=question,
                    answer=LETTERS[row["answer"]],
                    image_id=image_id,
                    task=row["subject"],
                    meta={"n_choices": len(row["choices"])},
                )
            )
        return by_picture(samples)

    def correct(self, sample: Sample, prediction: str) -> float:
        return scienceqa_correct(prediction, sample.answer, sample.meta["n_choices"], self.scoring)
