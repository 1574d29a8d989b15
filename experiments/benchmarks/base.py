"""Base class of benchmarks: samples, their images, and scores of predictions."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from experiments.metrics import mean_percent, standard_error


class SampleError(Exception):
    """One sample cannot be used (a broken image, a missing video). It is recorded as failed and the run continues."""


class BenchmarkError(Exception):
    """The benchmark cannot be read (no network, wrong columns, a missing split). The message says what to do."""


@dataclass(frozen=True)
class Sample:
    """One question. Images are loaded on demand by `Benchmark.images`.

    Attributes
    ----------
    id : str
        Unique within the benchmark and stable between runs.
    text : str
        The user's text as sent to the model, answer-format sentence included.
    question : str
        The part of ``text`` that is the question itself, its choices included; a substring of ``text``.
    answer : Any
        The reference in the form that the metric needs (a string, ten strings, a letter).
    image_id : str
        Samples with the same image_id share one image, which is encoded once.
    task : str
        Category within the benchmark (POPE's split, MME's category, the demo's task).
    content : str, optional
        ``text`` without its answer-format sentence, if it differs from ``question`` (TextVQA's OCR line). CDPruner and
        MMTok read it. A substring of ``text``.
    meta : dict
        Other values that the metric or the judge needs, as JSON.
    """

    id: str
    text: str
    question: str
    answer: Any
    image_id: str
    task: str = ""
    content: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Line of samples.jsonl without an answer."""
        named = {key: getattr(self, key) for key in ("id", "image_id", "task", "question", "answer")}
        return named | {"prediction": None, "correct": None}


class Example(NamedTuple):
    """A row of the data with a right and a wrong answer."""

    row: dict[str, Any]
    right: str
    wrong: str


class Benchmark(ABC):
    """A list of samples and their scoring rule.

    Samples with the same image are neighbours in ``samples``.
    """

    is_video: bool = False
    examples: Sequence[Example] = ()
    """Example rows of the data, in the order of `samples`. Every benchmark is tested with its examples."""
    skipped: Sequence[str] = ()
    """Error messages of the skipped rows, after `samples` was called."""

    @classmethod
    def write_examples(cls, folder: Path) -> dict[str, Any]:
        """Write the examples in the layout of the data on disk. Returns the options to read them."""
        raise NotImplementedError

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """All samples, in the order of the run. Raises `BenchmarkError`."""

    @abstractmethod
    def images(self, image_id: str) -> list[Image.Image]:
        """The RGB images (or the frames of the video) with this id. Raises `SampleError`."""

    def fingerprint(self, image_id: str) -> str | None:
        """Digest of the image or video with this id; None if code generates it. A missing file raises no error."""
        return None

    @abstractmethod
    def correct(self, sample: Sample, prediction: str) -> float:
        """Score of one prediction in [0, 1]."""

    def is_readable(self, sample: Sample, prediction: str) -> bool:
        """Whether the answer has the requested form (yes or no, a letter), right or wrong."""
        return True

    def score(self, samples: Sequence[Sample], predictions: Sequence[str | None]) -> list[float]:
        """Scores of all predictions in [0, 1]. A failed sample has the prediction None and the score 0.

        Called once, after all samples are answered. A judge is asked here, many questions in parallel.
        """
        return [0.0 if p is None else self.correct(s, p) for s, p in zip(samples, predictions, strict=True)]

    def groups(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, list[float]]:
        """Scores whose mean is a metric, by name of the metric, headline first. Without empty groups."""
        return {"accuracy": list(scores)}

    def metrics(
        self, samples: Sequence[Sample], predictions: Sequence[str | None], scores: Sequence[float]
    ) -> dict[str, float]:
        """Metrics by name; accuracies in percent. The first entry is the headline.

        ``scores`` is the result of `score`. A failed sample has the prediction None and counts in the denominator.
        """
        return {name: mean_percent(group) for name, group in self.groups(samples, scores).items() if group}

    def standard_errors(self, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, float]:
        """Standard errors, in the same units, of metrics that are a mean over at least two samples."""
        groups = self.groups(samples, scores)
        return {name: 100 * standard_error(group) for name, group in groups.items() if len(group) > 1}

    def provenance(self) -> dict[str, Any]:
        """Further facts for the record after scoring, such as the judge and its prompt."""
        return {}


def read_samples(benchmark: Benchmark) -> list[Sample]:
    """All samples, each with a unique id.

    Raises
    ------
    BenchmarkError
        If two samples have the same id, because the answer to one would count for both.
    """
    places: dict[str, int] = {}
    samples = list(benchmark.samples())
    for place, sample in enumerate(samples):
        if (first := places.setdefault(sample.id, place)) != place:
            one, other = (f"{samples[k].question!r} about {samples[k].image_id}" for k in (first, place))
            raise BenchmarkError(f"two questions have the id {sample.id}: {one} and {other}")
    return samples


def digest(benchmark: Benchmark, samples: Sequence[Sample]) -> str | None:
    """Digest, twelve hex digits, of all questions, answers and images. None if code generates the images."""
    contents = {sample.image_id: benchmark.fingerprint(sample.image_id) for sample in samples}
    if None in contents.values():
        return None
    return _hash(*([asdict(sample), contents[sample.image_id]] for sample in samples))


def sample_digest(benchmark: Benchmark, sample: Sample) -> str:
    """Digest, twelve hex digits, of one question with its answer and image."""
    return _hash(asdict(sample), benchmark.fingerprint(sample.image_id))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
