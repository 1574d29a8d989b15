"""GQA, balanced test-dev: 12,578 questions on 398 pictures. https://arxiv.org/abs/1902.09506"""

from collections.abc import Sequence
from functools import cached_property

from experiments.benchmarks.base import Sample
from experiments.benchmarks.prompts import check_prompt, with_format
from experiments.benchmarks.rows import Row, Text, check_rows
from experiments.benchmarks.table import TableBenchmark, by_picture, load_table, numbered
from experiments.metrics import check_scoring, gqa_correct


class GQAImage(Row):
    id: Text


class GQATypes(Row):
    structural: str


class GQAQuestion(Row):
    id: Text
    imageId: Text
    question: Text
    answer: Text
    isBalanced: bool
    types: GQATypes


class GQA(TableBenchmark):
    """Short answers by exact match, over all, binary and open questions (whose structural type is "query")."""

    config, split = "testdev_balanced_images", "testdev"
    row, image_column = GQAImage, "id"

    def __init__(
        self,
        hub: Sequence[str],
        path: str | None = None,
        prompt: str = "short_answer",
        scoring: str = "llava",
        on_bad_row: str = "stop",
    ):
        super().__init__(hub, path, on_bad_row)
        self.prompt, self.scoring = check_prompt(prompt), check_scoring(scoring)

    @cached_property
    def questions(self) -> list[GQAQuestion]:
        """The balanced ones."""
        table, files = load_table(
            self.hub,
            self.path,
            config="testdev_balanced_instructions",
            split="testdev",
            columns=list(GQAQuestion.model_fields),
            image=None,
        )
        good, self.skipped = check_rows(table.to_list(), GQAQuestion, str(files[0]), self.on_bad_row)
        return [question for _, question in good if question.isBalanced]

    def samples(self) -> list[Sample]:
        ids = numbered(row.id for row in self.questions)
        return by_picture(
            [
                Sample(
                    id=name,
                    text=with_format(row.question, self.prompt),
                    question=row.question,
                    answer=row.answer,
                    image_id=row.imageId,
                    task="open" if row.types.structural == "query" else "binary",
                )
                for name, row in zip(ids, self.questions, strict=True)
            ]
        )

    def correct(self, sample: Sample, prediction: str) -> float:
        return gqa_correct(prediction, sample.answer, self.scoring)

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = list(zip(samples, scores, strict=True))
        tasks = {task: [score for sample, score in scored if sample.task == task] for task in ("binary", "open")}
        return {"accuracy": list(scores)} | tasks
