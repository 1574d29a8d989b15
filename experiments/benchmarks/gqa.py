"""GQA, balanced test-dev: 12,578 questions on 398 pictures. https://arxiv.org/abs/1902.09506"""

from collections.abc import Sequence
from functools import cached_property

from experiments.benchmarks.base import Sample
from experiments.benchmarks.prompts import check_prompt, with_format
from experiments.benchmarks.table import TableBenchmark, by_picture, load_table
from experiments.metrics import check_scoring, gqa_correct


class GQA(TableBenchmark):
    """Short answers by exact match, over all, binary and open questions (whose structural type is "query")."""

    config, split = "testdev_balanced_images", "testdev"
    columns, image_column = ("id",), "id"

    def __init__(
        self, hub: Sequence[str], path: str | None = None, prompt: str = "short_answer", scoring: str = "llava"
    ):
        super().__init__(hub, path)
        self.prompt, self.scoring = check_prompt(prompt), check_scoring(scoring)

    @cached_property
    def questions(self):
        return load_table(
            self.hub,
            self.path,
            config="testdev_balanced_instructions",
            split="testdev",
            columns=("id", "imageId", "question", "answer", "isBalanced", "types"),
            image=None,
        )

    def samples(self) -> list[Sample]:
        return by_picture(
            [
                Sample(
                    id=row["id"],
                    text=with_format(row["question"], self.prompt),
                    question=row["question"],
                    answer=row["answer"],
                    image_id=row["imageId"],
                    task="open" if row["types"]["structural"] == "query" else "binary",
                )
                for row in self.questions.to_list()
                if row["isBalanced"]
            ]
        )

    def correct(self, sample: Sample, prediction: str) -> float:
        return gqa_correct(prediction, sample.answer, self.scoring)

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = list(zip(samples, scores, strict=True))
        tasks = {task: [score for sample, score in scored if sample.task == task] for task in ("binary", "open")}
        return {"accuracy": list(scores)} | tasks
