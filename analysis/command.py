"""Command line parser of all scripts of analysis."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from io import TextIOWrapper
from pathlib import Path


def arguments(doc: str | None, out: str | None = None, reads_results: bool = False) -> ArgumentParser:
    """Create a parser whose help is the docstring of the script, with ``--results`` and ``--out`` if the script has
    them.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if reads_results:
        parser.add_argument(
            "--results", type=Path, default=Path("results"), help="folder of the records (default: results)"
        )
    if out is not None:
        parser.add_argument("--out", type=Path, default=Path(out), help=f"where to write (default: {out})")
    return parser
