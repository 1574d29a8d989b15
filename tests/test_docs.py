"""Links, anchors, file names and commands in the pages of this repository exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from experiments import conf
from experiments.settings import check_keys
from mipruner.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
PAGES = [page for page in TRACKED if not page.startswith("docs/results/")]

LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
FILE = re.compile(
    r"(?<![\w./-])((?:analysis|conf|docs|examples|experiments|mipruner|notebooks|plugins|tests)/[\w./-]+\.\w+)"
)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, flags=re.M)
    }


def broken(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = [name for name in FILE.findall(text) if "NAME" not in name and not (ROOT / name).exists()]
    for link in (a or b for a, b in LINK.findall(text)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_file_names_exist(page):
    assert not broken(ROOT / page)


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[1](#a-title) [2](#none) [3](none.md) `tests/none.py` `tests/test_docs.py`")
    assert broken(page) == ["tests/none.py", "#none", "none.md"]


COMMAND = re.compile(r"python run\.py((?: [^`\n#]*)?)")


def commands(page: Path) -> list[list[str]]:
    """The words of every run.py command of a page, up to a comment; those with a placeholder are left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [re.split(r" {3,}", line)[0] for line in COMMAND.findall(text)]
    return [shlex.split(line) for line in lines if not re.search(r"\.\.\.|NAME|CELL|--config-dir", line)]


def unknown(words: list[str]) -> list[str]:
    """The names in a command that no file of conf has. Raises `InputError` for an unknown key."""
    check_keys(words)
    groups = {path.name for path in conf.CONF.iterdir() if path.is_dir()}
    named = [word.split("=", 1) for word in words if word.partition("=")[0] in groups]
    return [f"{group}={name}" for group, names in named for name in names.split(",") if name not in conf.names(group)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page):
    assert not [found for words in commands(ROOT / page) for found in unknown(words)]


def test_unknown_names_in_commands_are_found():
    assert unknown(["-m", "pruner=mi,nothing", "pruner.lam=1", "task=evaluation"]) == [
        "pruner=nothing",
        "task=evaluation",
    ]
    with pytest.raises(InputError, match="picture"):
        unknown(["picture=[1,1]"])
