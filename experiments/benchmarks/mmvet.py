"""MM-Vet: 218 open questions, each graded 0.0 to 1.0 by a judge. https://arxiv.org/abs/2308.02490"""

import math
import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from experiments.benchmarks.base import Example, Sample
from experiments.benchmarks.rows import Row, Text
from experiments.benchmarks.table import TableBenchmark
from experiments.judge import OFFLINE, Judge, grades, prompt_hash
from experiments.metrics import bootstrap, textvqa_normalize

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
PAPER_ITEMS = 33
"""Resampling this many of the 218 items gives the spread of the paper's MM-Vet scores."""

PROMPT = """\
You grade a predicted answer against the ground truth. Give one number from 0.0 (all wrong) over 0.1, 0.2, ... to 1.0 \
(all right) for how correct the prediction is. Where the ground truth has <AND>, an answer is all right only if it has \
each of the parts; where it has <OR>, any one of the alternatives is enough. Fill in the last cell of this table.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers solve the equation? | -4 <AND> 7 | x = 2 | 0.0
Which numbers solve the equation? | -4 <AND> 7 | x = 7 | 0.5
Which numbers solve the equation? | -4 <AND> 7 | x = -4 | 0.5
Which numbers solve the equation? | -4 <AND> 7 | x = 7 or x = 4 | 0.5
Which numbers solve the equation? | -4 <AND> 7 | x is either 7 or -4 | 1.0
Why do people laugh at this meme? | A tiny kitten sees a lion in the mirror. It pokes fun at those who take themselves \
to be far mightier than they are. | It shows a kitten and a lion. Kittens are funny because they are small. | 0.4
Why do people laugh at this meme? | A tiny kitten sees a lion in the mirror. It pokes fun at those who take themselves \
to be far mightier than they are. | The kitten believes that it is a lion when it looks into the mirror; the joke is \
on people who think too highly of themselves. | 1.0
{question} | {answer} | {prediction} |"""
AGAIN = "\nAnswer with the number alone, such as 0.3."


def grade_request(sample: Sample, prediction: str, attempt: int) -> dict[str, Any]:
    """Request to the judge, with temperature 0 and three tokens.

    Each retry raises the temperature by 0.5 and asks more explicitly.
    """
    answer = sample.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = {"{question}": sample.question, "{answer}": answer, "{prediction}": prediction}
    prompt = re.sub("|".join(row), lambda match: row[match[0]], PROMPT)
    return {
        "messages": [{"role": "user", "content": prompt + (AGAIN if attempt else "")}],
        "temperature": 0.5 * attempt,
        "max_tokens": 3,
    }


def read_grade(reply: str) -> float:
    """The first word as a number in [0, 1]. Raises ValueError, also for "nan", which the official code accepts."""
    grade = float((reply.split() or [""])[0])
    if math.isnan(grade) or not 0 <= grade <= 1:
        raise ValueError(f"{grade} is no grade")
    return grade


def offline_grade(answer: str, prediction: str) -> float:
    """Share of the <AND> parts that are in the prediction as whole words; maximum over the <OR> alternatives."""
    said = f" {textvqa_normalize(prediction)} "

    def contained(part: str) -> bool:
        return f" {textvqa_normalize(part)} " in said

    return max(fmean(contained(part) for part in option.split("<AND>")) for option in answer.split("<OR>"))


class MMVetRow(Row):
    question_id: str
    question: Text
    answer: Text
    capability: Text


class MMVet(TableBenchmark):
    """Mean grade of the judge in percent, over all questions, by capability and by set of capabilities.

    Differs from MM-Vet's script in the wording of the judge's prompt, which has the same parts, and in the spread,
    which is a bootstrap over items. Without a judge, words are matched: ``offline_score`` and similar metrics cannot be
    compared with other scores.
    """

    row = MMVetRow
    examples = (
        Example(
            {"question_id": "v1_0", "question": "What is x?", "answer": "-1 <AND> -5", "capability": "ocr,math"},
            right="x is -1 or -5",
            wrong="x is 3",
        ),
        Example(
            {"question_id": "v1_1", "question": "Where is this?", "answer": "Rome <OR> Roma", "capability": "rec"},
            right="In Rome.",
            wrong="In Paris.",
        ),
        Example(
            {"question_id": "v1_2", "question": "What is beside the cup?", "answer": "spoon", "capability": "rec,spat"},
            right="A spoon",
            wrong="A dog",
        ),
    )

    def __init__(self, *args: Any, judge: Judge | None = None, **options: Any):
        super().__init__(*args, **options)
        self.judge = judge
        self.headline = "score" if judge else "offline_score"

    def sample(self, row: MMVetRow, **ids: Any) -> Sample:
        found = {capability.strip() for capability in row.capability.split(",")}
        task = ",".join(sorted(found, key=(*CAPABILITIES, *sorted(found)).index))
        return Sample(text=row.question, question=row.question, answer=row.answer, task=task, **ids)

    def correct(self, sample: Sample, prediction: str) -> float:
        return self.score([sample], [prediction])[0]

    def score(self, samples: Sequence[Sample], predictions: Sequence[str | None]) -> list[float]:
        found = grades(self.judge, samples, predictions, grade_request, read_grade, offline_grade)
        return [grade or 0.0 for grade in found]

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        scored = [(sample.task, score) for sample, score in zip(samples, scores, strict=True)]
        by_capability = {c: [score for task, score in scored if c in task.split(",")] for c in CAPABILITIES}
        by_set = {task: [score for other, score in scored if other == task] for task in sorted({t for t, _ in scored})}
        return (
            {self.headline: list(scores)}
            | {f"{self.headline}_{capability}": group for capability, group in by_capability.items()}
            | {f"{self.headline}_only_{capabilities}": group for capabilities, group in by_set.items()}
        )

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        means = super().metrics(samples, predictions, scores)
        if len(scores) < 2:
            return means
        percent = [100 * score for score in scores]
        spread = bootstrap(percent)
        return means | {
            f"{self.headline}_bootstrap_sd": spread.sd,
            f"{self.headline}_bootstrap_low": spread.low,
            f"{self.headline}_bootstrap_high": spread.high,
            f"{self.headline}_bootstrap_sd_{PAPER_ITEMS}_items": bootstrap(percent, n_items=PAPER_ITEMS).sd,
        }

    def provenance(self) -> dict[str, Any]:
        return self.judge.provenance(prompt_hash(PROMPT, AGAIN)) if self.judge else OFFLINE
