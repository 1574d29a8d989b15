"""MME: perception 2,114 questions, cognition 260, two on each picture. https://arxiv.org/abs/2306.13394"""

from collections import Counter
from collections.abc import Sequence

from experiments.benchmarks.base import BenchmarkError, Sample
from experiments.benchmarks.prompts import check_prompt, with_format
from experiments.benchmarks.table import TableBenchmark, by_picture
from experiments.metrics import MME_COGNITION, MME_PERCEPTION, MMERow, check_scoring, mme_correct, mme_scores

YES_OR_NO = " Please answer yes or no."


class MME(TableBenchmark):
    """Yes or no, scored by category as accuracy + accuracy+, where a picture counts if both its questions are right.

    ``prompt``: "short_answer" puts LLaVA's sentence in the place of "Please answer yes or no.", "plain" keeps it.
    A run over part of the categories has no perception score, which is a sum over all ten; its headline is the plain
    accuracy.
    """

    columns = ("question_id", "question", "answer", "category")
    image_column = "question_id"

    def __init__(
        self,
        hub: Sequence[str],
        path: str | None = None,
        cognition: bool = False,
        prompt: str = "short_answer",
        scoring: str = "llava",
    ):
        super().__init__(hub, path)
        self.categories = MME_PERCEPTION + MME_COGNITION if cognition else MME_PERCEPTION
        self.prompt, self.scoring = check_prompt(prompt), check_scoring(scoring)

    def samples(self) -> list[Sample]:
        of_picture: Counter[str] = Counter()
        samples = []
        for row, image_id in self.rows():
            if row["category"] not in self.categories:
                continue
            question = row["question"].replace(YES_OR_NO, "").rstrip()
            samples.append(
                Sample(
                    id=f"{image_id}#{of_picture[image_id]}",
                    text=row["question"] if self.prompt == "plain" else with_format(question, self.prompt),
                    question=question,
                    answer=row["answer"],
                    image_id=image_id,
                    task=row["category"],
                )
            )
            of_picture[image_id] += 1
        if odd := [name for name, count in of_picture.items() if count != 2]:
            raise BenchmarkError(f"MME has two questions a picture; {odd[0]} has {of_picture[odd[0]]}")
        return by_picture(samples)

    def correct(self, sample: Sample, prediction: str) -> float:
        return mme_correct(prediction, sample.answer, self.scoring)

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        answered = zip(samples, predictions, strict=True)
        return mme_scores(
            [MMERow(s.task, s.image_id, s.answer, prediction) for s, prediction in answered], self.scoring
        )
