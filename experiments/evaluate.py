"""Evaluates a benchmark in batches. An interrupted evaluation resumes after the last finished batch.

Batches are formed before the run starts. So a resumed run has the same batches and the same record as an uninterrupted
run. While the model answers one batch, threads load and process the images of the next batch. Several processes share
the same batches, so the record does not depend on their number, which may change between starts.
"""

import random
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import Any

from PIL import Image
from tqdm import tqdm

from experiments import results
from experiments.benchmarks.base import Benchmark, BenchmarkError, Sample, SampleError, sample_digest
from experiments.ranks import Ranks
from experiments.results import Cell
from mipruner.errors import InputError, PromptError
from mipruner.models import Prompt, Video
from mipruner.pipeline import Answer, Pipeline
from mipruner.processed import ProcessorPipeline
from mipruner.prompt import Media

WINDOW = 256
"""Number of samples that are sorted by length together. It is small, so that samples of one image stay close."""

MAX_IMAGES = 128
"""Number of loaded images in the cache."""


def subset(samples: Sequence[Sample], limit: int | None, shard: str | None, seed: int) -> list[Sample]:
    """About ``limit`` samples of whole images drawn by ``seed``; of these the images of one shard, such as ``"0/4"``.

    Raises
    ------
    InputError
        If the shard is not of the form k/n, or no sample is left.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.image_id, []).append(sample)
    names = list(groups)
    if limit is not None:
        drawn, count = set(), 0
        for name in random.Random(seed).sample(names, len(names)):
            if count >= limit:
                break
            drawn.add(name)
            count += len(groups[name])
        names = [name for name in names if name in drawn]
    if shard is not None:
        try:
            part, parts = map(int, str(shard).split("/"))
            if not 0 <= part < parts:
                raise ValueError
            names = names[part:][::parts]
        except ValueError:
            raise InputError(f"shard={shard!r} is not a part such as 0/4") from None
    if not names:
        raise InputError("no samples are left: raise limit, or choose another shard")
    return [sample for name in names for sample in groups[name]]


def by_length(samples: Sequence[Sample]) -> list[Sample]:
    """Sort the samples of each `WINDOW` by question length, longest first, so that batches have little padding."""
    windows = (samples[start : start + WINDOW] for start in range(0, len(samples), WINDOW))
    return [sample for window in windows for sample in sorted(window, key=lambda sample: -len(sample.text))]


class ImageLoader:
    """Loads the images of a batch and runs the pipeline's image processor on them; caches the last `MAX_IMAGES`.

    The pipeline's vision cache needs an image to stay the same object.
    """

    def __init__(self, benchmark: Benchmark, pipeline: Pipeline | ProcessorPipeline, pool: ThreadPoolExecutor):
        self.benchmark, self.pipeline, self.pool = benchmark, pipeline, pool
        self._held: OrderedDict[str, list[Media]] = OrderedDict()

    def load(self, samples: Sequence[Sample]) -> tuple[dict[str, list[Media]], dict[str, str]]:
        """Images and error messages of the samples, by image_id."""
        images, errors = {}, {}
        names = dict.fromkeys(sample.image_id for sample in samples)
        new = {name: self.pool.submit(self._prepared, name) for name in names if name not in self._held}
        for image_id in names:
            if image_id in new:
                try:
                    self._held[image_id] = new[image_id].result()
                except SampleError as error:
                    errors[image_id] = str(error)
                    continue
            self._held.move_to_end(image_id)
            images[image_id] = self._held[image_id]
        while len(self._held) > MAX_IMAGES:
            self._held.popitem(last=False)
        return images, errors

    def _prepared(self, image_id: str) -> list[Media]:
        """Load and process one image or video. Raises SampleError if it cannot be read or the processor refuses it."""
        frames = self.benchmark.images(image_id)
        images: list[Media] = [Video(frames)] if self.benchmark.is_video else [*frames]
        self.pipeline.adapter.kinds(images)
        try:
            self.pipeline.prepare(images)
        except Exception as error:
            sizes = ", ".join(f"{width} x {height}" for width, height in (image.size for image in images))
            raise SampleError(f"the model's image processor refuses {image_id}, {sizes}: {error}") from error
        return images


def prompts_of(
    pipeline: Pipeline | ProcessorPipeline, samples: Sequence[Sample], images: dict[str, list[Media]], text_scope: str
) -> tuple[dict[str, Prompt], dict[str, str]]:
    """Prompts of the samples with an image, and error messages for invalid texts, by sample id."""
    prompts, errors = {}, {}
    for sample in samples:
        if sample.image_id not in images:
            continue
        prompt = Prompt(
            text=sample.text,
            images=images[sample.image_id],
            query=sample.question if text_scope == "question" else None,
            question=sample.content or sample.question,
            sample=sample.id,
        )
        try:
            pipeline.adapter.chat.check_text(prompt)
            prompts[sample.id] = prompt
        except PromptError as error:
            errors[sample.id] = str(error)
    return prompts, errors


def answer_prompts(
    pipeline: Pipeline | ProcessorPipeline, prompts: dict[str, Prompt]
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Answers and error messages by sample id. If a batch is refused for one prompt, each prompt is answered alone."""
    if not prompts:
        return {}, {}
    try:
        return dict(zip(prompts, pipeline(list(prompts.values())), strict=True)), {}
    except PromptError as error:
        if len(prompts) == 1:
            return {}, dict.fromkeys(prompts, str(error))
    alone = [answer_prompts(pipeline, {name: prompt}) for name, prompt in prompts.items()]
    return {k: v for answers, _ in alone for k, v in answers.items()}, {k: v for _, e in alone for k, v in e.items()}


def answer_batch(
    pipeline: Pipeline | ProcessorPipeline,
    samples: Sequence[Sample],
    images: dict[str, list[Media]],
    errors: dict[str, str],
    text_scope: str,
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl for one batch, without ``correct``."""
    prompts, text_errors = prompts_of(pipeline, samples, images, text_scope)
    before = dict(pipeline.watch.ms)
    answers, refused = answer_prompts(pipeline, prompts)
    latency_ms = {k: round((ms - before.get(k, 0)) / max(1, len(answers)), 3) for k, ms in pipeline.watch.ms.items()}
    rows = []
    for sample in samples:
        row = sample.row()
        if sample.id in answers:
            answer = answers[sample.id]
            row |= {
                "prediction": answer.text,
                "n_visual": sum(answer.n_visual),
                "grids": answer.grids,
                "boxes": answer.boxes,
                "kept": [selection.indices.tolist() for selection in answer.selections],
                "n_keep": answer.n_keep,
                "per_layer": answer.visual_tokens_per_layer,
                "latency_ms": latency_ms,
                "notes": answer.notes,
            }
        else:
            row["error"] = (text_errors | refused).get(sample.id) or errors[sample.image_id]
        shown = [image for image in images.get(sample.image_id, ()) if isinstance(image, Image.Image)]
        if notes := [image.info["note"] for image in shown if image.info.get("note")]:
            row["image_notes"] = notes
        rows.append(row)
    return rows


def answer_rest(
    cell: Cell, pipeline: Pipeline | ProcessorPipeline, benchmark: Benchmark, samples: Sequence[Sample], ranks: Ranks
) -> float | None:
    """Answer this process's share of the open samples. Returns the share of time spent waiting for images."""
    digests = {sample.id: sample_digest(benchmark, sample) for sample in samples}
    if ranks.rank == 0:
        cell.keep_answers(digests)
    ranks.wait()
    done = {row["id"] for row in cell.rows()}
    ranks.wait()
    batch_size = cell.config["batch_size"]
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    shared = ranks.share([batch for batch in batches if not done.issuperset(sample.id for sample in batch)])
    n_samples, quiet = sum(map(len, shared)), ranks.rank > 0 or None
    bar = tqdm(total=n_samples, unit="q", desc=_words(cell), disable=quiet, file=sys.stderr)
    start, waited = time.perf_counter(), 0.0
    with bar, ThreadPoolExecutor(cell.config["loader_threads"]) as pool, ThreadPoolExecutor(1) as ahead:
        loader = ImageLoader(benchmark, pipeline, pool)
        loading = ahead.submit(loader.load, shared[0] if shared else [])
        for batch, following in zip(shared, [*shared[1:], []], strict=False):
            asked = time.perf_counter()
            images, errors = loading.result()
            waited += time.perf_counter() - asked
            loading = ahead.submit(loader.load, following)
            new = answer_batch(pipeline, batch, images, errors, cell.config["text_scope"])
            cell.append([row | {"digest": digests[row["id"]]} for row in new], ranks.rank)
            bar.update(len(new))
    return round(waited / (time.perf_counter() - start), 4) if shared else None


def evaluate(
    cell: Cell,
    pipeline: Pipeline | ProcessorPipeline,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    begun: dict[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """Answer the open samples, score all and return the record; {} on other ranks than the first.

    The record is not written here. It is written last, because its presence means that the cell is finished.

    Raises
    ------
    BenchmarkError
        If every sample failed.
    """
    samples = by_length(samples)
    waited = answer_rest(cell, pipeline, benchmark, samples, ranks)
    peak_memory_gib = ranks.largest(results.peak_memory_gib(pipeline.adapter.device))
    if ranks.rank > 0:
        return {}
    device = (f"{ranks.n} x " if ranks.n > 1 else "") + results.device_name(pipeline.adapter.device)
    costs = {"device": device, "batch_size": cell.config["batch_size"], "peak_memory_gib": round(peak_memory_gib, 3)}
    costs["waited_for_images"] = waited
    return finish(cell, benchmark, samples, begun | costs)


def finish(cell: Cell, benchmark: Benchmark, samples: Sequence[Sample], run: dict[str, Any]) -> dict[str, Any]:
    """Score the answered samples and return the record, with the entries of ``run``."""
    answered = {row["id"]: row for row in cell.rows()}
    rows = [answered[sample.id] for sample in samples]
    if all("error" in row for row in rows):
        raise BenchmarkError(f"none of the {len(rows)} samples could be run; the first: {rows[0]['error']}")
    predictions = [row["prediction"] for row in rows]
    scores = benchmark.score(samples, predictions)
    for row, score in zip(rows, scores, strict=True):
        row["correct"] = score
    cell.keep_rows(rows)
    return {
        "schema": results.SCHEMA,
        "id": cell.id,
        "cell": cell.cell,
        "config": cell.config,
        "versions": results.versions(),
        "finished": results.now(),
        "n_samples": len(samples),
        "failed": [{"id": row["id"], "error": row["error"]} for row in rows if "error" in row],
        "skipped": list(benchmark.skipped),
        "unusable": unusable(benchmark, samples, predictions),
        "metrics": benchmark.metrics(samples, predictions, scores),
        "standard_errors": benchmark.standard_errors(samples, scores),
        "provenance": benchmark.provenance(),
        **_means([row for row in rows if "error" not in row]),
        **run,
    }


def unusable(benchmark: Benchmark, samples: Sequence[Sample], predictions: Sequence[str | None]) -> dict[str, int]:
    """Number of empty answers, and number of other answers without the requested form."""
    answered = [(s, p) for s, p in zip(samples, predictions, strict=True) if p is not None]
    said = [(sample, prediction) for sample, prediction in answered if prediction]
    unread = sum(not benchmark.is_readable(sample, prediction) for sample, prediction in said)
    return {"empty": len(answered) - len(said), "unreadable": unread}


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean tokens and latency of the answered samples; None if a server does not report them."""
    if not rows or rows[0]["per_layer"] is None:
        return {"tokens": None, "latency_ms": None, "notes": {}}
    per_layer = [fmean(counts) for counts in zip(*(row["per_layer"] for row in rows), strict=True)]
    stages = ("vision", "scoring", "prefill", "decode")
    latency_ms = {stage: round(fmean(row["latency_ms"].get(stage, 0.0) for row in rows), 3) for stage in stages}
    return {
        "tokens": {
            "visual": fmean(row["n_visual"] for row in rows),
            "kept": fmean(row["n_keep"] for row in rows),
            "per_layer": per_layer,
            "layer_mean": fmean(per_layer),
        },
        "latency_ms": latency_ms | {"total": round(sum(latency_ms.values()), 3)},
        "notes": dict(sorted({item for row in rows for item in row["notes"].items()})),
    }


def _words(cell: Cell) -> str:
    return " ".join(str(word) for word in (*list(cell.cell.values())[:3], f"keep={cell.cell['keep']}"))
