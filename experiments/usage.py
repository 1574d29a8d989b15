"""Text of ``python run.py task=NAME --help``, from the files of conf. Imports neither torch nor Hydra."""

import ast
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

CONF = Path(__file__).parents[1] / "conf"
KEY = re.compile(r"(?:  - (?:override )?/?)?(\w+):(?: +([^#\s].*?))? *(?: # *(.*))?")
WIDTH = 116


def tasks() -> dict[str, str]:
    """Name and summary (second line of its file) of each task."""
    files = sorted((CONF / "task").glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[1].lstrip("# ") for file in files}


def keys(file: Path) -> Iterator[tuple[str, str, str]]:
    """Key, default value and comment of each top-level key of `file` and of its defaults."""
    text = file.read_text(encoding="utf-8")
    values, section = yaml.safe_load(text), ""
    for found in filter(None, map(KEY.fullmatch, text.splitlines())):
        name, value, says = found.groups("")
        section = section if found[0][0] == " " else name
        if name in ("defaults", "task", "hydra") or section not in (name, "defaults"):
            continue
        inner = {"": value} if value else values[name] if isinstance(values[name], dict) else {"": values[name]}
        for key, one in inner.items():
            yield f"{name}.{key}".rstrip("."), _shown(one), says
        if found[0].startswith("  - /"):
            yield from keys(CONF / name / f"{value}.yaml")


def _shown(value: Any) -> str:
    """A default value as it can be typed; for a list of mappings only its kind."""
    if isinstance(value, list):
        return "[...]" if isinstance(value[0], dict) else f"[{','.join(map(str, value))}]"
    return str(value).replace(", ", ",")


def _rows(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and two columns. The right column is wrapped, and starts on a new line after a long left entry."""
    lines = [title]
    for left, right in rows:
        first, *others = [""] * (len(left) > 24) + wrap(right, WIDTH - 28, break_on_hyphens=False) or [""]
        lines += [f"  {left:24}  {first}".rstrip(), *(" " * 28 + other for other in others)]
    return "\n".join(lines)


def task_of(words: Sequence[str]) -> str:
    """Task of a command line, from ``task=`` or from the file of ``experiment=``."""
    given = dict(word.split("=", 1) for word in words if "=" in word)
    file = CONF / "experiment" / f"{given.get('experiment')}.yaml"
    of_experiment = re.search(r"override /task: (\w+)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return given.get("task") or (of_experiment[1] if of_experiment else "evaluate")


def usage(words: Sequence[str], program: str) -> str:
    """Help of the task in the command line `words`; without a task, `program` and lists of tasks and names.

    Raises KeyError if there is no such task.
    """
    task = task_of(words)
    if task not in tasks():
        near = get_close_matches(task, tasks())
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(tasks())}"
        raise KeyError(f"no task {task!r}: {hint}")
    file = CONF / "task" / f"{task}.yaml"
    module = find_spec(yaml.safe_load(file.read_text(encoding="utf-8"))["task"])
    assert module and module.origin
    own = {key: (value, says) for key, value, says in keys(file)}
    shared = {key: (value, says) for key, value, says in keys(CONF / "config.yaml") if key not in own}
    parts = [program if task == "evaluate" else ast.get_docstring(ast.parse(Path(module.origin).read_bytes())) or ""]
    if task == "evaluate":
        parts.append(_rows("Tasks; python run.py task=NAME --help tells more of each:", list(tasks().items())))
    for title, rows in ((f"Keys of task={task}", own), ("Keys of all tasks, of which each uses some", shared)):
        if rows:
            parts.append(_rows(f"{title}:", [(f"{key}={value}", says) for key, (value, says) in rows.items()]))
    if task == "evaluate":
        folders = sorted(one for one in CONF.iterdir() if one.is_dir() and one.name not in ("hydra", "task"))
        names = [(f"{one.name}=", ", ".join(sorted(file.stem for file in one.glob("*.yaml")))) for one in folders]
        parts.append(_rows("Names in conf:", names))
    else:
        parts.append("Names of models, datasets and methods: python run.py --help")
    return "\n\n".join(part.strip() for part in parts)
