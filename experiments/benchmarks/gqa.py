"""GQA, balanced test-dev: 12,578 questions on 398 images. https://arxiv.org/abs/1902.09506"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.benchmarks.base import Example, Sample
from experiments.benchmarks.prompts import with_format
from experiments.benchmarks.rows import Row, Text, check_rows
from experiments.benchmarks.table import ShortAnswers, load_table, write_table
from experiments.metrics import gqa_correct


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


class GQA(ShortAnswers):
    """Short answers by exact match, over all, binary and open questions (whose structural type is "query")."""

    config, split = "testdev_balanced_images", "testdev"
    questions = "testdev_balanced_instructions"
    """Config of the second table; the first table has the images."""
    row, image_column = GQAImage, "id"
    examples = (
        Example(
            {
                "id": "20000000",
                "imageId": "n1",
                "question": "Is the square red?",
                "answer": "yes",
                "isBalanced": True,
                "types": {"structural": "verify"},
            },
            right="Yes.",
            wrong="no",
        ),
        Example(
            {
                "id": "20000001",
                "imageId": "n2",
                "question": "What color is the chair?",
                "answer": "blue",
                "isBalanced": True,
                "types": {"structural": "query"},
            },
            right="blue",
            wrong="The chair is red.",
        ),
        Example(
            {
                "id": "20000002",
                "imageId": "n3",
                "question": "Is it indoors or outdoors?",
                "answer": "outdoors",
                "isBalanced": True,
                "types": {"structural": "choose"},
            },
            right="Outdoors",
            wrong="indoors",
        ),
    )

    @classmethod
    def write_examples(cls, folder: Path) -> dict[str, Any]:
        rows = [example.row for example in cls.examples]
        write_table(folder / f"{cls.config}-{cls.split}.parquet", [{"id": row["imageId"]} for row in rows])
        write_table(folder / f"{cls.questions}-{cls.split}.parquet", rows, image=None)
        return {"path": str(folder)}

    @cached_property
    def rows(self) -> list[tuple[int, GQAQuestion, str]]:
        """The balanced questions."""
        columns = list(GQAQuestion.model_fields)
        table, files = load_table(
            self.hub, self.path, config=self.questions, split=self.split, columns=columns, image=None
        )
        good, self.skipped = check_rows(table.to_list(), GQAQuestion, str(files[0]), self.on_bad_row)
        return [(number, question, question.imageId) for number, question in good if question.isBalanced]

    def name(self, number: int, row: GQAQuestion) -> str:
        return row.id

    def sample(self, row: GQAQuestion, **ids: Any) -> Sample:
        task = "open" if row.types.structural == "query" else "binary"
        text = with_format(row.question, self.prompt)
        return Sample(text=text, question=row.question, answer=row.answer, task=task, **ids)

    def correct(self, sample: Sample, prediction: str) -> float:
        return gqa_correct(prediction, sample.answer, self.scoring)

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = list(zip(samples, scores, strict=True))
        tasks = {task: [score for sample, score in scored if sample.task == task] for task in ("binary", "open")}
        return {"accuracy": list(scores)} | tasks
