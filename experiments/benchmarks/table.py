"""Tables of questions with a picture in each row: found on the hub or on disk, checked, pictures decoded on demand.

Only the parquet files of the wanted split are fetched (TextVQA: 0.9 of 8.1 GB). `datasets` maps them into memory.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, RepositoryNotFoundError
from PIL import Image

from experiments.benchmarks.base import Benchmark, BenchmarkError, Sample, SampleError

HUB_TIMEOUT_S = 5


def _matching(names: Iterable[str], config: str | None, split: str, where: str) -> list[str]:
    """The parquet files of a split: its word stands in the file's name, and the config, if any, in the path.

    Raises BenchmarkError if there is none, or if of files named ..-00000-of-00003 some are missing.
    """
    found = sorted(name for name in names if name.endswith(".parquet"))
    names = [name for name in found if config in name] if config and any(config in name for name in found) else found
    names = [name for name in names if re.search(rf"(?<![a-z]){split}(?![a-z])", name.rsplit("/", 1)[-1])]
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
    if not (files := [Path(name) for name in sorted(glob(path))]):
        raise BenchmarkError(f"{path} does not exist; give a parquet file, a pattern, or a copy of the hub repository")
    return files


def _fetched(repository: str) -> Path | None:
    """The newest copy of a repository in the hub's cache on this machine."""
    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    copies = (r.revisions for r in repositories if (r.repo_type, r.repo_id) == ("dataset", repository))
    newest = max((revision for group in copies for revision in group), key=lambda r: r.last_modified, default=None)
    return newest and newest.snapshot_path


def _hub_files(hub: Sequence[str], config: str | None, split: str) -> list[Path]:
    """Fetch the split from the first repository that has it; without a network, take what an earlier run fetched.

    The hub's client retries a dead connection for half a minute; asking once, with a short timeout, whether the
    repository is there gives the answer at once.
    """
    problems: list[str] = []
    for repository in hub:
        try:
            info = HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
            names = _matching((file.rfilename for file in info.siblings or ()), config, split, repository)
            folder = snapshot_download(repository, repo_type="dataset", revision=info.sha, allow_patterns=names)
            return [Path(folder) / name for name in names]
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
) -> Dataset:
    """Rows with these columns and, undecoded, the picture's.

    ``hub`` and ``path`` are as in `TableBenchmark`; ``image`` is None for a table without pictures.

    Raises
    ------
    BenchmarkError
        No network and no copy, no such split, a file that is no parquet file, a column that is not there.
    """
    files = _local_files(path, config, split) if path else _hub_files(hub, config, split)
    columns = [*columns, *([image] if image else [])]
    try:
        table = load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except Exception as error:
        reason = error.__cause__ or error
        raise BenchmarkError(f"{files[0]} cannot be read: {' '.join(str(reason).split())[:200]}") from error
    if missing := [column for column in columns if column not in table.column_names]:
        has = ", ".join(table.column_names)
        raise BenchmarkError(f"{files[0]} lacks the column {', '.join(missing)}; it has {has}")
    table = table.select_columns(columns)
    try:
        return table.cast_column(image, ImageFeature(decode=False)) if image else table
    except Exception as error:
        raise BenchmarkError(f"the column {image} of {files[0]} holds no pictures") from error


class Pictures:
    """The pictures of a table by id, each decoded when asked for, the last few kept.

    Differs from `datasets` in that a picture is not turned by its EXIF orientation: LLaVA's scripts do not either.
    """

    def __init__(self, table: Dataset, row_of: dict[str, int], column: str = "image", cache_size: int = 16):
        self.table, self.row_of, self.column = table, row_of, column
        self.load = lru_cache(cache_size)(self._load)

    def _load(self, image_id: str) -> Image.Image:
        """The RGB picture. Raises SampleError if there is none or it is broken."""
        if image_id not in self.row_of:
            raise SampleError(f"no picture {image_id} in the table")
        content = self.table[self.row_of[image_id]][self.column] or {}
        if not content.get("bytes"):
            raise SampleError(f"the picture {image_id} is empty")
        try:
            with Image.open(io.BytesIO(content["bytes"])) as picture:
                return picture.convert("RGB")
        except Exception as error:
            raise SampleError(f"the picture {image_id} cannot be decoded: {error}") from error


def first_rows(ids: Iterable[str]) -> dict[str, int]:
    """The first row of each id."""
    rows: dict[str, int] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, row)
    return rows


def by_picture(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with those of one picture side by side, otherwise in their order."""
    order = first_rows(sample.image_id for sample in samples)
    return sorted(samples, key=lambda sample: order[sample.image_id])


class TableBenchmark(Benchmark):
    """A benchmark that is one table with a picture in each row.

    Attributes
    ----------
    hub : sequence of str
        Dataset repositories, tried in this order.
    path : str, optional
        Instead: a parquet file, a pattern of them, or a folder laid out like the repository.
    image_column : str
        The column that tells which rows share a picture. If it is the picture's own, its content tells.
    """

    config: str | None = None
    split: str = "test"
    columns: Sequence[str]
    image_column: str = "image"

    def __init__(self, hub: Sequence[str], path: str | None = None):
        self.hub, self.path = hub, path

    @cached_property
    def table(self) -> Dataset:
        columns = {self.image_column: None, **dict.fromkeys(self.columns)}.keys() - {"image"}
        return load_table(self.hub, self.path, config=self.config, split=self.split, columns=sorted(columns))

    @cached_property
    def image_ids(self) -> list[str]:
        """Of each row."""
        ids = self.table[self.image_column]
        if self.image_column != "image":
            return list(ids)
        return [hashlib.sha256((content or {}).get("bytes") or b"").hexdigest()[:16] for content in ids]

    @cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.table, first_rows(self.image_ids))

    def images(self, image_id: str) -> list[Image.Image]:
        return [self.pictures.load(image_id)]

    def rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Each row without its picture, and the picture's id."""
        return zip(self.table.remove_columns("image").to_list(), self.image_ids, strict=True)
