"""Reads a user's folder: a table of questions, and images. See docs/own_data.md."""

import json
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from PIL import Image
from pydantic import AliasChoices, BeforeValidator, Field

from experiments.benchmarks.base import Benchmark, BenchmarkError, Example, Sample, SampleError
from experiments.benchmarks.prompts import OPTION_LETTER, SHORT_ANSWER
from experiments.benchmarks.rows import Row, Text, Unique, check_on_bad_row, check_rows, read_each, read_rows
from experiments.benchmarks.table import content_digest, group_by_image
from experiments.images import open_image
from experiments.metrics import mme_answer, textvqa_normalize

TABLES = ("questions.jsonl", "questions.csv", "questions.json", "metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of the table, tried in this order. metadata.* is the layout of an ImageFolder on the hub."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SENTENCES = {"exact": SHORT_ANSWER, "vqa": SHORT_ANSWER, "yes_no": SHORT_ANSWER, "choice": OPTION_LETTER, "none": ""}
"""Sentence after the question for each scoring rule."""


def _as_list(value: Any) -> Any:
    """Parse a list in a CSV cell: JSON, or parts separated by bars. null and an empty cell are the empty list."""
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            raise ValueError('is no list: write ["red", "blue"] or red|blue') from None
    if isinstance(value, str):
        return [part.strip() for part in value.split("|")]
    return value


def _nothing(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


List = Annotated[list[Text], BeforeValidator(_as_list)]
Optional = Annotated[str | None, BeforeValidator(_nothing)]


class FolderRow(Row):
    question: Text
    image: Annotated[List, Field(min_length=1, validation_alias=AliasChoices("image", "images", "file_name"))]
    id: Annotated[Optional, Field(validation_alias=AliasChoices("id", "question_id"))] = None
    answer: Optional = None
    answers: List = Field(default_factory=list)
    choices: Annotated[List, Field(max_length=len(LETTERS), default_factory=list)]
    category: Optional = None

    @property
    def accepted(self) -> list[str]:
        """All right answers of the row."""
        return self.answers or ([] if self.answer is None else [self.answer])


def plain(text: str) -> str:
    """Lower case without a final full stop."""
    return text.strip().rstrip(".").lower()


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy for any number of answers: 1 if three of them match, or all of fewer than three.

    As in the official evaluator, with four or more answers it is the mean over leaving one answer out.
    """
    said = textvqa_normalize(prediction)
    agrees = [textvqa_normalize(answer) == said for answer in answers]
    if len(answers) < 4:
        return float(any(agrees))
    return fmean(min(1.0, (sum(agrees) - agree) / 3) for agree in agrees)


def letter(text: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names, by its letter ("b", "B.", "(B) blue") or its text; None if neither."""
    said = plain(text).lstrip("(")
    by_words = [LETTERS[k] for k, choice in enumerate(choices) if plain(choice) == plain(text)]
    if by_words:
        return by_words[0]
    first = said[:1].upper()
    is_letter = bool(first) and first in LETTERS[: len(choices)] and not said[1:2].isalnum()
    return first if is_letter and (len(said) == 1 or said[1] in ".):") else None


class Folder(Benchmark):
    """Own data: accuracy by one of four rules, over all questions and by category. Without answers nothing is scored.

    Parameters
    ----------
    path : str
        The folder. It has one of `TABLES`, with the columns question and image, and optionally id, answer, answers,
        choices and category. Image paths are relative to the table. Several images of a question are a list.
    scoring : str
        ``exact``: equality except for case and a final full stop. ``vqa``: VQA accuracy. ``choice``: the letter of the
        right choice, given in ``answer`` as letter or text. ``yes_no``: whether the answer begins with yes or no.
        ``none``: no scores. ``auto``: choice if there are choices, vqa if there are ``answers``, yes_no if every answer
        is yes or no, exact if there are other answers, else none.
    sentence : str, optional
        Sentence after each question; by default the one of the scoring rule.
    on_bad_row : "stop" or "skip"

    Raises
    ------
    BenchmarkError
        If the folder or its table is missing, a path is outside the folder, or a row lacks a value for the scoring.
    """

    examples = (
        Example({"question": "What is on the table?", "image": "a.png", "answer": "cup"}, right="Cup.", wrong="a cat"),
        Example({"question": "Is it red?", "image": "b.png", "answer": "yes"}, right="Yes", wrong="no"),
        Example({"question": "Which number?", "image": ["b.png", "c.png"], "answer": "7"}, right="7.", wrong="8"),
    )

    @classmethod
    def write_examples(cls, folder: Path) -> dict[str, Any]:
        for k, name in enumerate(("a.png", "b.png", "c.png")):
            Image.new("RGB", (64, 48), (60 * k, 90, 160)).save(folder / name)
        lines = (json.dumps(example.row) for example in cls.examples)
        (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return {"path": str(folder)}

    def __init__(self, path: str | None, scoring: str = "auto", sentence: str | None = None, on_bad_row: str = "stop"):
        if scoring not in ("auto", *SENTENCES):
            raise ValueError(f"scoring={scoring!r} is not one of auto, {', '.join(SENTENCES)}")
        self.path, self.asked, self.sentence = path or "", scoring, sentence
        self.on_bad_row = check_on_bad_row(on_bad_row)
        self._open = lru_cache(16)(open_image)

    @cached_property
    def table(self) -> Path:
        if not self.path:
            raise BenchmarkError("dataset=folder needs your folder: set dataset.path=mydata, see docs/own_data.md")
        if not Path(self.path).is_dir():
            raise BenchmarkError(f"there is no folder {self.path}: dataset.path is the folder of questions and images")
        folder = Path(self.path)
        found = [folder / name for name in TABLES if (folder / name).is_file()][:1]
        found = found or sorted(file for name in TABLES for file in folder.glob(f"*/{name}"))
        if not found:
            raise BenchmarkError(f"{self.path} has no questions: put {' or '.join(TABLES[:2])} into it")
        if len(found) > 1:
            raise BenchmarkError(
                f"{self.path} has {', '.join(map(str, found))}: set dataset.path to one of their folders"
            )
        return found[0]

    @cached_property
    def rows(self) -> list[tuple[int, FolderRow]]:
        rows, self.skipped = check_rows(read_rows(self.table), FolderRow, str(self.table), self.on_bad_row)
        return rows

    @cached_property
    def scoring(self) -> str:
        if self.asked != "auto":
            return self.asked
        rows = [row for _, row in self.rows]
        if not any(row.accepted for row in rows):
            return "none"
        if any(row.choices for row in rows):
            return "choice"
        if any(row.answers for row in rows):
            return "vqa"
        return "yes_no" if all(plain(row.answer or "") in ("yes", "no") for row in rows) else "exact"

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Files of each image_id."""
        return {" | ".join(row.image): row.image for _, row in self.rows}

    @cached_property
    def _samples(self) -> list[Sample]:
        ids = Unique()

        def read(number: int, row: FolderRow) -> Sample:
            sample = self._sample(number, row)
            ids.check(sample.id, number)
            return sample

        found, bad = read_each(self.rows, read, str(self.table), self.on_bad_row)
        self.skipped = [*self.skipped, *bad]
        return group_by_image([sample for _, sample in found])

    def samples(self) -> list[Sample]:
        return self._samples

    def _sample(self, number: int, row: FolderRow) -> Sample:
        """The sample of a row. Raises ValueError if the row does not fit the scoring."""
        choices = [f"{name}. {choice}" for name, choice in zip(LETTERS, row.choices, strict=False)]
        question = "\n".join([row.question, *choices])
        sentence = SENTENCES[self.scoring] if self.sentence is None else self.sentence
        return Sample(
            id=str(number) if row.id is None else row.id,
            text=f"{question}\n{sentence}" if sentence else question,
            question=question,
            answer=self._reference(row),
            image_id=" | ".join(row.image),
            task=row.category or "",
            meta={"choices": row.choices} if row.choices else {},
        )

    def _reference(self, row: FolderRow) -> Any:
        if self.scoring == "none":
            return None
        if not row.accepted:
            raise ValueError(f"it has no answer, which dataset.scoring={self.scoring} needs")
        if self.scoring in ("vqa", "exact"):
            return row.accepted
        if self.scoring == "yes_no":
            if (answer := plain(row.accepted[0])) not in ("yes", "no"):
                raise ValueError(f"the answer is {row.accepted[0]!r}, not yes or no")
            return answer
        if not row.choices:
            raise ValueError("it has no choices, which dataset.scoring=choice needs")
        if (right := letter(row.accepted[0], row.choices)) is None:
            raise ValueError(f"the answer {row.accepted[0]!r} is none of its choices")
        return right

    def _files(self, image_id: str) -> list[Path]:
        """Paths of the images. Raises SampleError for a path outside the folder or an invalid path."""
        names, root = self._names[image_id], Path(self.path).resolve()
        files = [self.table.parent / name.replace("\\", "/") for name in names]
        for name, file in zip(names, files, strict=True):
            try:
                target = file.resolve()
                file.is_file()
            except (OSError, ValueError) as error:  # name too long, folder not readable, null byte
                raise SampleError(f"there is no image {name[:60]!r}: {getattr(error, 'strerror', error)}") from error
            if not target.is_relative_to(root) or os.path.isabs(name):
                raise SampleError(f"the image {name} lies outside of {self.path}")
        return files

    def fingerprint(self, image_id: str) -> str:
        try:
            return " ".join(content_digest(file if file.is_file() else None) for file in self._files(image_id))
        except SampleError:
            return ""

    def images(self, image_id: str) -> list[Image.Image]:
        files = self._files(image_id)
        if missing := [file for file in files if not file.is_file()]:
            raise SampleError(f"there is no image {missing[0]}")
        try:
            return [self._open(file) for file in files]
        except ValueError as error:
            raise SampleError(str(error)) from error

    def correct(self, sample: Sample, prediction: str) -> float:
        if self.scoring == "vqa":
            return vqa_accuracy(prediction, sample.answer)
        if self.scoring == "exact":
            return float(plain(prediction) in map(plain, sample.answer))
        if self.scoring == "yes_no":
            return float(mme_answer(prediction, "lmms_eval") == sample.answer)
        return float(letter(prediction, sample.meta["choices"]) == sample.answer)

    def is_readable(self, sample: Sample, prediction: str) -> bool:
        if self.scoring == "yes_no":
            return mme_answer(prediction, "lmms_eval") != "other"
        return self.scoring != "choice" or letter(prediction, sample.meta["choices"]) is not None

    def score(self, samples: Sequence[Sample], predictions: Sequence[str | None]) -> list[Any]:
        if self.scoring == "none":
            return [None] * len(samples)
        return super().score(samples, predictions)

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        if self.scoring == "none":
            return {}
        categories = sorted({sample.task for sample in samples} - {""})
        scored = list(zip(samples, scores, strict=True))
        return {"accuracy": list(scores)} | {
            f"accuracy_{category}": [score for sample, score in scored if sample.task == category]
            for category in categories
        }

    def provenance(self) -> dict[str, Any]:
        return {"scoring": self.scoring}
