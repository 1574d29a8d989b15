"""Benchmarks that are tables with an image in each row, from the hub or from disk.

Rows are checked at once, images are decoded on demand. Only the parquet files of one split are downloaded (TextVQA: 0.9
of 8.1 GB). `datasets` maps them into memory.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from glob import escape, glob
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, RepositoryNotFoundError
from PIL import Image

from experiments.benchmarks.base import Benchmark, BenchmarkError, Sample, SampleError
from experiments.benchmarks.prompts import check_prompt
from experiments.benchmarks.rows import Row, check_on_bad_row, check_rows
from experiments.images import open_image
from experiments.metrics import check_scoring

HUB_TIMEOUT_S = 5


def _matching(names: Iterable[str], config: str | None, split: str, where: str) -> list[str]:
    """Parquet files of a split. The split is in the name of the file or is its folder; the config is in the path.

    Hidden files (macOS) are ignored. Raises BenchmarkError if there is no file, or if one of several parts
    (..-00000-of-00003) is missing.
    """
    found = sorted(name for name in names if name.endswith(".parquet") and not re.search(r"(^|/)\.", name))
    names = [name for name in found if config in name] if config and any(config in name for name in found) else found
    of_split = re.compile(rf"(?<![a-z]){split}(?![a-z])[^/]*$|(^|/){split}/[^/]*$")
    names = [name for name in names if of_split.search(name)]
    wanted = f"config {config}, split {split}" if config else f"split {split}"
    if not names:
        raise BenchmarkError(f"{where} has no parquet file of {wanted}; it has {', '.join(found[:8]) or 'none'}")
    parts = [int(number) for name in names for number in re.findall(r"-of-0*(\d+)", name)[:1]]
    if parts and max(parts) != len(names):
        raise BenchmarkError(f"{where} has {len(names)} of the {max(parts)} parquet files of {wanted}")
    return names


def _in_folder(folder: Path, config: str | None, split: str) -> list[Path]:
    names = (str(file.relative_to(folder)) for file in folder.rglob("*.parquet"))
    return [folder / name for name in _matching(names, config, split, str(folder))]


def _local_files(path: str, config: str | None, split: str) -> list[Path]:
    if Path(path).is_dir():
        return _in_folder(Path(path), config, split)
    if Path(path).is_file():
        return [Path(path)]
    if not (files := [Path(name) for name in sorted(glob(path))]):
        raise BenchmarkError(f"{path} does not exist; give a parquet file, a pattern, or a copy of the hub repository")
    return files


def _fetched(repository: str) -> Path | None:
    """Newest copy of a repository in the local cache of the hub."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    copies = (r.revisions for r in repositories if (r.repo_type, r.repo_id) == ("dataset", repository))
    newest = max((revision for group in copies for revision in group), key=lambda r: r.last_modified, default=None)
    return newest.snapshot_path if newest else None


def _hub_files(hub: Sequence[str], config: str | None, split: str) -> list[Path]:
    """Download the split from the first repository that has it; without a network, use an earlier download.

    First the hub is asked once, with a short timeout, whether the repository exists, because its client retries a dead
    connection for half a minute.
    """
    problems: list[str] = []
    for repository in hub:
        try:
            info = HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
            names = _matching((file.rfilename for file in info.siblings or ()), config, split, repository)
            fetched = snapshot_download(repository, repo_type="dataset", revision=info.sha, allow_patterns=names)
            return [Path(fetched) / name for name in names]
        except RepositoryNotFoundError:
            problems.append(f"{repository} is not there, or not for you")
        except BenchmarkError as error:
            problems.append(str(error))
        except Exception as error:
            problems.append(f"the hub cannot be reached ({' '.join(str(error).split())[:120]})")
            break
    for folder in filter(None, map(_fetched, hub)):
        try:
            return _in_folder(folder, config, split)
        except BenchmarkError as error:
            problems.append(str(error))
    raise BenchmarkError(f"{'; '.join(problems)}. Copy the data here and set dataset.path to its folder or files")


def load_table(
    hub: Sequence[str],
    path: str | None,
    *,
    split: str,
    columns: Sequence[str],
    config: str | None = None,
    image: str | None = "image",
) -> tuple[Dataset, list[Path]]:
    """Rows with these columns and the undecoded image column, and their files.

    See `TableBenchmark` for ``hub`` and ``path``. ``image`` is None for a table without images.

    Raises
    ------
    BenchmarkError
        If there is no network and no copy, no such split, an invalid parquet file, or a missing column.
    """
    files = _local_files(path, config, split) if path else _hub_files(hub, config, split)
    columns = [*columns, *([image] if image else [])]
    try:
        table = load_dataset("parquet", data_files=[escape(str(file)) for file in files], split="train")
    except Exception as error:
        reason = error.__cause__ or error
        raise BenchmarkError(f"{files[0]} cannot be read: {' '.join(str(reason).split())[:200]}") from error
    if missing := [column for column in columns if column not in table.column_names]:
        has = ", ".join(table.column_names)
        raise BenchmarkError(f"{files[0]} lacks the column {', '.join(missing)}; it has {has}")
    table = table.select_columns(columns)
    try:
        return (table.cast_column(image, ImageFeature(decode=False)) if image else table), files
    except Exception as error:
        raise BenchmarkError(f"the column {image} of {files[0]} holds no images") from error


def find_source(content: dict[str, Any] | None, folders: Sequence[Path]) -> bytes | Path | None:
    """The content of an image, or its file in one of these folders; None if there is neither."""
    content = content or {}
    if content.get("bytes"):
        return content["bytes"]
    files = (folder / content["path"] for folder in folders if content.get("path"))
    return next((file for file in files if file.is_file()), None)


def content_digest(source: bytes | Path | None) -> str:
    """Digest, sixteen hex digits, of a file's content; of empty content if the file is missing."""
    content = source.read_bytes() if isinstance(source, Path) else source or b""
    return hashlib.sha256(content).hexdigest()[:16]


class StoredImages:
    """Images of a table by id, decoded on demand. The last few are cached.

    An image is in the table, or in a file that the table names, as written by the hub's tools.
    """

    def __init__(
        self,
        table: Dataset,
        row_of: dict[str, int],
        cache_size: int = 16,
        folders: Sequence[Path] = (),
    ):
        self.table, self.row_of, self.folders = table, row_of, folders
        self.load = lru_cache(cache_size)(self._load)

    def _load(self, image_id: str) -> Image.Image:
        """The RGB image. Raises SampleError if there is none or it is broken."""
        if image_id not in self.row_of:
            raise SampleError(f"no image {image_id} in the table")
        content = self.table[self.row_of[image_id]]["image"] or {}
        source = find_source(content, self.folders)
        if source is None and content.get("path"):
            raise SampleError(f"the image {image_id} is not there: {content['path']} beside the table")
        if source is None:
            raise SampleError(f"the image {image_id} is empty")
        try:
            return open_image(source, f"the image {image_id}")
        except ValueError as error:
            raise SampleError(str(error)) from error


def first_rows(ids: Iterable[str]) -> dict[str, int]:
    """First row of each id."""
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, row)
    return rows


def group_by_image(samples: Sequence[Sample]) -> list[Sample]:
    """Samples sorted so that those of one image are neighbours, otherwise in their order."""
    order = first_rows(sample.image_id for sample in samples)
    return sorted(samples, key=lambda sample: order[sample.image_id])


def numbered(names: Iterable[str]) -> list[str]:
    """Names with #2, #3, ... after repeated ones."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def by_content(names: Iterable[str | None], digests: Iterable[str]) -> list[str]:
    """Id of each image: its name, with #2, #3 for other images of that name; its digest if it has no name."""
    known: dict[str, list[str]] = {}
    ids = []
    for name, digest in zip(names, digests, strict=True):
        contents = known.setdefault(name or digest, [])
        if digest not in contents:
            contents.append(digest)
        place = contents.index(digest)
        ids.append((name or digest) + (f"#{place + 1}" if place else ""))
    return ids


def write_table(file: Path, rows: Sequence[dict[str, Any]], image: str | None = "image") -> None:
    """Write a parquet file of rows, each with its own small image in the column ``image``."""
    rows = list(rows)
    for number, row in enumerate(rows):
        if image is None:
            break
        content = io.BytesIO()
        Image.new("RGB", (32, 32), (60 * number % 256, 90, 160)).save(content, "PNG")
        rows[number] = {image: {"bytes": content.getvalue(), "path": None}} | row
    pq.write_table(pa.Table.from_pylist(rows), file)


class TableBenchmark(Benchmark):
    """A benchmark that is one table with an image in each row.

    Attributes
    ----------
    hub : sequence of str
        Dataset repositories, tried in this order.
    path : str, optional
        Instead of ``hub``: a parquet file, a glob pattern, or a folder laid out like the repository.
    on_bad_row : "stop" or "skip"
        What to do with a row that does not fit ``row``.
    row : type of Row
        Columns without the image.
    image_column : str, optional
        Column with the name of the image. Rows share an image if name and content are equal.

    A subclass defines `sample`, and `name` if the id of a row is not its question_id.
    """

    config: str | None = None
    split: str = "test"
    row: type[Row]
    image_column: str | None = None

    def __init__(self, hub: Sequence[str], path: str | None = None, on_bad_row: str = "stop"):
        self.hub, self.path, self.on_bad_row = hub, path, check_on_bad_row(on_bad_row)

    @classmethod
    def write_examples(cls, folder: Path) -> dict[str, Any]:
        write_table(folder / f"{cls.split}.parquet", [example.row for example in cls.examples])
        return {"path": str(folder)}

    @cached_property
    def _read(self) -> tuple[Dataset, list[Path]]:
        columns = sorted(self.row.model_fields)
        return load_table(self.hub, self.path, config=self.config, split=self.split, columns=columns)

    @property
    def table(self) -> Dataset:
        return self._read[0]

    @cached_property
    def folders(self) -> list[Path]:
        """Folders with the image files that the table names."""
        root = [Path(self.path)] if self.path and Path(self.path).is_dir() else []
        return root + list(dict.fromkeys(file.parent for file in self._read[1]))

    @cached_property
    def _digests(self) -> list[str]:
        return [content_digest(find_source(content, self.folders)) for content in self.table["image"]]

    @cached_property
    def image_ids(self) -> list[str]:
        """Image id of each row."""
        column = self.image_column and self.table[self.image_column]
        names = [None if name is None else str(name) for name in column or [None] * len(self._digests)]
        return by_content(names, self._digests)

    @cached_property
    def stored(self) -> StoredImages:
        return StoredImages(self.table, first_rows(self.image_ids), folders=self.folders)

    def fingerprint(self, image_id: str) -> str:
        row = self.stored.row_of.get(image_id)
        return "" if row is None else self._digests[row]

    def images(self, image_id: str) -> list[Image.Image]:
        return [self.stored.load(image_id)]

    @property
    def where(self) -> str:
        """Path or repository of the table."""
        return str(self.path or self.hub[0])

    @cached_property
    def rows(self) -> list[tuple[int, Any, str]]:
        """Number, columns and image id of each valid row."""
        rows = self.table.remove_columns("image").to_list()
        good, self.skipped = check_rows(rows, self.row, self.where, self.on_bad_row)
        return [(number, row, self.image_ids[number]) for number, row in good]

    def samples(self) -> list[Sample]:
        names = numbered(self.name(number, row) for number, row, _ in self.rows)
        rows = zip(names, self.rows, strict=True)
        return group_by_image([self.sample(row, id=name, image_id=image_id) for name, (_, row, image_id) in rows])

    def name(self, number: int, row: Any) -> str:
        """Name of a row. Repeated names are numbered."""
        return row.question_id

    def sample(self, row: Any, **ids: str) -> Sample:
        """The sample of a row, given the ids of the sample and of its image."""
        raise NotImplementedError


class ShortAnswers(TableBenchmark):
    """A table of questions with short answers.

    Attributes
    ----------
    prompt : "short_answer" or "plain"
        Whether LLaVA's sentence follows the question.
    scoring : "llava" or "lmms_eval"
        Rule that reads the answer.
    """

    def __init__(self, *args: Any, prompt: str = "short_answer", scoring: str = "llava", **options: Any):
        super().__init__(*args, **options)
        self.prompt, self.scoring = check_prompt(prompt), check_scoring(scoring)
