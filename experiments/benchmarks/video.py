"""TGIF-QA, MSVD-QA and MSRVTT-QA as in Video-LLaVA: open answers, graded yes or no and 0 to 5 by a judge.

https://arxiv.org/abs/2311.10122; the judge is Video-ChatGPT's, https://arxiv.org/abs/2306.05424.
"""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import av
import numpy as np
from PIL import Image
from pydantic import AliasChoices, Field, create_model

from experiments.benchmarks.base import Benchmark, BenchmarkError, Example, Sample, SampleError
from experiments.benchmarks.rows import Row, Text, Unique, check_on_bad_row, check_rows, read_each, read_rows
from experiments.benchmarks.table import group_by_image
from experiments.judge import OFFLINE, Judge, grades, prompt_hash
from experiments.metrics import mean_percent, textvqa_normalize

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")

ROLE = """\
You are a fair examiner of answers to questions about videos. Look at whether the predicted answer means the same as \
the correct one; synonyms and paraphrases are welcome."""
PROMPT = """\
Question: {question}
Correct Answer: {answer}
Predicted Answer: {prediction}

Reply with a Python dictionary and nothing else: under 'pred' the string 'yes' if the prediction is correct and 'no' \
if it is not, under 'score' a whole number from 0 to 5 for how well it matches, 5 being the best. \
For example: {{'pred': 'yes', 'score': 4}}"""


class Grade(NamedTuple):
    """Reply of a judge: right or wrong (None if neither), and a score from 0 to 5."""

    right: bool | None
    score: int


def read_grade(reply: str) -> Grade:
    """Read the first {...} of a reply. Raises ValueError if it has no verdict and score from 0 to 5.

    As in Video-LLaVA's script, a verdict that contains "yes" is yes; otherwise one that contains "no" is no. So "not
    sure" is no, and "maybe" is neither. A score of 4.8 is 4. A score that is not a number, such as "4.8" in quotes,
    invalidates the reply.
    """
    found = re.search(r"\{.*?\}", reply, re.DOTALL)
    try:
        grade = ast.literal_eval(found[0] if found else "")
        verdict, score = str(grade["pred"]).lower(), grade["score"]
    except (TypeError, KeyError, SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("no dictionary with pred and score") from None
    try:
        score = int(score)
    except (TypeError, ValueError, OverflowError):
        return Grade(None, 0)
    if not 0 <= score <= 5:
        raise ValueError(f"{score} is not between 0 and 5")
    return Grade(True if "yes" in verdict else False if "no" in verdict else None, score)


def grade_request(sample: Sample, prediction: str, temperature: float | None) -> dict[str, Any]:
    """Request to the judge."""
    user = PROMPT.format(question=sample.question, answer=sample.answer, prediction=prediction)
    messages = [{"role": "system", "content": ROLE}, {"role": "user", "content": user}]
    return {"messages": messages} | ({} if temperature is None else {"temperature": temperature})


def offline_grade(answer: str, prediction: str) -> Grade:
    """Right and 5 if the prediction contains the answer as whole words; else wrong and 5 x the F1 of their words."""
    gold, said = textvqa_normalize(answer), textvqa_normalize(prediction)
    if f" {gold} " in f" {said} ":
        return Grade(True, 5)
    gold_words, said_words = gold.split(), said.split()
    common = sum(min(gold_words.count(word), said_words.count(word)) for word in set(gold_words))
    return Grade(False, round(5 * 2 * common / max(1, len(gold_words) + len(said_words))))


def decoded(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """Decodable frames of a video. A damaged packet loses only its own frames."""
    for packet in container.demux(video=0):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def frames(path: Path, n_frames: int) -> list[Image.Image]:
    """``n_frames`` upright RGB frames at linspace(0, n - 1) of the n decodable frames.

    Raises
    ------
    SampleError
        If no frame can be decoded.
    """
    try:
        with av.open(str(path)) as container:
            n = sum(1 for _ in decoded(container)) if container.streams.video else 0
        if not n:
            raise SampleError(f"the video {path.name} has no frames")
        wanted = np.linspace(0, n - 1, n_frames, dtype=int).tolist()
        taken: dict[int, Image.Image] = {}
        with av.open(str(path)) as container:
            for i, frame in enumerate(decoded(container)):
                if i in wanted:
                    taken[i] = frame.to_image().convert("RGB").rotate(frame.rotation, expand=True)
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise SampleError(f"the video {path.name} cannot be decoded: {error}") from error
    return [taken[i] for i in wanted]


VIDEO_COLUMNS = ("video_name", "video_id", "video")


class AnswerRow(Row):
    question_id: Text
    answer: Text


class QuestionRow(Row):
    question: Text
    video: Annotated[Text, Field(validation_alias=AliasChoices(*VIDEO_COLUMNS))]


QuestionWithId = create_model("QuestionWithId", __base__=QuestionRow, question_id=(Text, ...))
QuestionWithAnswer = create_model(
    "QuestionWithAnswer", __base__=QuestionRow, answer=(Text, ...), question_id=(Text | None, None)
)


class VideoQA(Benchmark):
    """Accuracy in percent and mean score, 0 to 5.

    Differs from Video-LLaVA's script in three ways: frames are not flipped at random, answers are paired by question_id
    instead of by position, and the judge's prompt has the same parts in another wording. As there, a question whose
    verdict is neither yes nor no does not count in the accuracy. After five unreadable replies the verdict is no with
    score 0. Without a judge, words are matched: ``offline_accuracy`` and ``offline_score`` cannot be compared with
    other scores.

    Parameters
    ----------
    path : str
        Folder of the dataset.
    questions, answers : str
        Files in it (``.json``, ``.jsonl`` or ``.parquet``). Rows of questions have video_name (or video_id, or video),
        question and question_id. Rows of answers have answer and question_id. ``answers`` is None if the questions
        include the answers; then no question_id is needed.
    videos : str
        Folder of the videos in it. File names are those of the questions, with or without a usual suffix.
    n_frames : int
        Number of evenly spaced frames, including the first and the last.
    first : int, optional
        Use only this many questions, in the order of the file.
    on_bad_row : "stop" or "skip"
        What to do with an invalid row.
    temperature : float, optional
        Temperature of the judge. Video-ChatGPT sends none, which means 1; lmms-eval sends 0.
    """

    is_video = True
    examples = (
        Example(
            {"question_id": "v0_0", "video_name": "v0", "question": "what is a man doing?", "answer": "run"},
            right="He is on the run.",
            wrong="He sleeps.",
        ),
        Example(
            {"question_id": "v0_1", "video_name": "v0", "question": "what color is the car?", "answer": "red"},
            right="red",
            wrong="blue",
        ),
        Example(
            {"question_id": "v1_0", "video_name": "v1", "question": "who sings in the video?", "answer": "girl"},
            right="A girl sings.",
            wrong="nobody",
        ),
    )

    @classmethod
    def write_examples(cls, folder: Path) -> dict[str, Any]:
        rows = [example.row for example in cls.examples]
        for name in {row["video_name"] for row in rows}:
            first, *rest = (Image.new("RGB", (64, 48), (20 * k, 90, 160)) for k in range(10))
            first.save(folder / f"{name}.gif", save_all=True, append_images=rest)
        for file, columns in (
            ("test_q", ("question_id", "video_name", "question")),
            ("test_a", ("question_id", "answer")),
        ):
            part = [{column: row[column] for column in columns} for row in rows]
            (folder / f"{file}.json").write_text(json.dumps(part), encoding="utf-8")
        return {"path": str(folder), "videos": "."}

    def __init__(
        self,
        path: str | None,
        videos: str,
        questions: str = "test_q.json",
        answers: str | None = "test_a.json",
        n_frames: int = 8,
        first: int | None = 1000,
        judge: Judge | None = None,
        temperature: float | None = None,
        on_bad_row: str = "stop",
    ):
        self.on_bad_row = check_on_bad_row(on_bad_row)
        self.path, self.videos, self.questions, self.answers = path or "", videos, questions, answers
        self.n_frames, self.first, self.judge, self.temperature = n_frames, first, judge, temperature
        self.prefix = "" if judge else "offline_"
        self._frames = lru_cache(2)(lambda name: frames(self._file(name), n_frames))

    def samples(self) -> list[Sample]:
        if not self.path:
            raise BenchmarkError("the videos are on no hub in one form; set dataset.path to their folder, see docs")
        answer_of, bad_answers = self._answers()
        file, ids = Path(self.path) / self.questions, Unique()
        schema = QuestionWithAnswer if self.answers is None else QuestionWithId
        rows, bad = check_rows(read_rows(file)[: self.first], schema, str(file), self.on_bad_row)

        def read(number: int, row: Any) -> Sample:
            name = str(number) if row.question_id is None else row.question_id
            if self.answers is not None and name not in answer_of:
                raise ValueError(f"{self.answers} has no answer to question {name}")
            ids.check(name, number)
            answer = answer_of[name] if self.answers is not None else row.answer
            return Sample(id=name, text=row.question, question=row.question, answer=answer, image_id=row.video)

        found, unanswered = read_each(rows, read, str(file), self.on_bad_row)
        self.skipped = [*bad_answers, *bad, *unanswered]
        return group_by_image([sample for _, sample in found])

    def _answers(self) -> tuple[dict[str, str], list[str]]:
        """Answer to each question, and error messages of the skipped rows. A second, different answer is a bad row."""
        if self.answers is None:
            return {}, []
        file = Path(self.path) / self.answers
        answers: dict[str, str] = {}
        rows, bad = check_rows(read_rows(file), AnswerRow, str(file), self.on_bad_row)

        def read(number: int, row: AnswerRow) -> None:
            if answers.setdefault(row.question_id, row.answer) != row.answer:
                raise ValueError(f"it is a second answer to question {row.question_id}")

        return answers, bad + read_each(rows, read, str(file), self.on_bad_row)[1]

    def _find(self, name: str) -> Path | None:
        """File of a video: with this name, or with one of the suffixes in any case."""
        video = Path(self.path) / self.videos / name
        if video.is_file():
            return video
        if not video.parent.is_dir():
            return None
        files = sorted(f for f in video.parent.iterdir() if f.stem == video.name and f.suffix.lower() in SUFFIXES)
        return files[0] if files else None

    def _file(self, name: str) -> Path:
        if (file := self._find(name)) is None:
            raise SampleError(f"no video {name} in {Path(self.path) / self.videos}")
        return file

    def fingerprint(self, image_id: str) -> str:
        """Name and size of the file. Videos are too large for a digest of their content."""
        file = self._find(image_id)
        return f"{file.name} {file.stat().st_size}" if file else ""

    def images(self, image_id: str) -> list[Image.Image]:
        return self._frames(image_id)

    def _grades(self, samples: Sequence[Sample], predictions: Sequence[str | None]) -> list[Grade]:
        def request(sample: Sample, prediction: str, attempt: int) -> dict[str, Any]:
            return grade_request(sample, prediction, self.temperature)

        found = grades(self.judge, samples, predictions, request, read_grade, offline_grade)
        return [grade or Grade(False, 0) for grade in found]

    def correct(self, sample: Sample, prediction: str) -> float:
        return self.score([sample], [prediction])[0]

    def score(self, samples: Sequence[Sample], predictions: Sequence[str | None]) -> list[float]:
        return [float(bool(grade.right)) for grade in self._grades(samples, predictions)]

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        return {f"{self.prefix}accuracy": list(scores)}

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        found = self._grades(samples, predictions)
        decided = [grade.right for grade in found if grade.right is not None]
        return {
            f"{self.prefix}accuracy": mean_percent(decided),
            f"{self.prefix}score": fmean(grade.score for grade in found),
        }

    def provenance(self) -> dict[str, Any]:
        return self.judge.provenance(prompt_hash(ROLE, PROMPT)) if self.judge else OFFLINE
