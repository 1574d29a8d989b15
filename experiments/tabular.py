"""Writes one table as Markdown, LaTeX, HTML or plain text."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest


@dataclass(frozen=True)
class Span:
    """A part of a cell with one or more styles: bold, underline, italic, small, sup, newline."""

    text: str
    style: str = ""


NEWLINE = Span("", "newline")
Cell = str | Span | Sequence[str | Span]

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
LATEX |= {"–": "--", "<": r"$<$", ">": r"$>$"} | {char: f"\\{char}" for char in "&%$#_{}"}


@dataclass(frozen=True)
class Format:
    """How one output format escapes text and marks styles."""

    escape: Callable[[str], str]
    styles: Mapping[str, str]

    def __call__(self, cell: Cell) -> str:
        spans = [cell] if isinstance(cell, str | Span) else cell
        return "".join(map(self._span, spans))

    def _span(self, span: str | Span) -> str:
        if isinstance(span, str):
            return self.escape(span)
        text = self.escape(span.text)
        for style in span.style.split():
            text = self.styles[style].format(text) if text or style == "newline" else ""
        return text


TAGS = {"underline": "<u>{}</u>", "sup": "<sup>{}</sup>", "newline": "<br>"}
MARKDOWN = Format(
    lambda text: " ".join(text.replace("|", "\\|").splitlines()),
    TAGS | {"bold": "**{}**", "italic": "*{}*", "small": "{}", "code": "`{}`"},
)
HTML = Format(
    lambda text: html.escape(text, quote=False),
    TAGS | {"bold": "<b>{}</b>", "italic": "<i>{}</i>", "small": "<small>{}</small>", "code": "<code>{}</code>"},
)
TEX = Format(
    lambda text: "".join(LATEX.get(char, char) for char in text),
    {
        "bold": r"\textbf{{{}}}",
        "underline": r"\underline{{{}}}",
        "italic": r"\textit{{{}}}",
        "small": r"{{\scriptsize {}}}",
        "sup": r"\textsuperscript{{{}}}",
        "code": r"\texttt{{{}}}",
    },
)
TERMINAL = Format(str, dict.fromkeys((*MARKDOWN.styles, "code"), "{}") | {"newline": " "})


@dataclass(frozen=True)
class Table:
    """A table: a head, and rows of cells. A row that is a single `Span` or text is a heading of the rows below it.

    Attributes
    ----------
    n_text : int
        Number of text columns, left-aligned. The other columns are numbers, right-aligned.
    """

    head: Sequence[Cell]
    rows: Sequence[str | Sequence[Cell]]
    n_text: int = 1

    def markdown(self) -> str:
        rule = ["---"] * self.n_text + ["---:"] * (len(self.head) - self.n_text)
        empty = [""] * (len(self.head) - 1)
        lines = [list(map(MARKDOWN, self.head)), rule]
        for row in self.rows:
            lines.append([MARKDOWN(Span(row, "italic")), *empty] if isinstance(row, str) else list(map(MARKDOWN, row)))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        heads = "".join(f"<th>{HTML(cell)}</th>" for cell in self.head)
        lines = [f"<table><thead><tr>{heads}</tr></thead>"]
        for row in self.rows:
            if isinstance(row, str):
                lines.append(f"<tr class=group><th colspan={len(self.head)}>{HTML(row)}</th></tr>")
            else:
                cells = "".join(f"<td>{HTML(cell)}</td>" for cell in row[1:])
                lines.append(f"<tr><th>{HTML(row[0])}</th>{cells}</tr>")
        return "\n".join([*lines, "</table>"])

    def latex(self) -> str:
        """A ``tabular``, which needs booktabs. A cell with two lines becomes two rows."""
        columns = "l" * self.n_text + "r" * (len(self.head) - self.n_text)
        lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", " & ".join(map(TEX, self.head)) + r" \\"]
        if not any(isinstance(row, str) for row in self.rows):
            lines.append(r"\midrule")
        for row in self.rows:
            if isinstance(row, str):
                heading = TEX(Span(row, "italic"))
                lines += [r"\midrule", rf"\multicolumn{{{len(self.head)}}}{{l}}{{{heading}}} \\"]
            else:
                parts = zip_longest(*map(_lines, row), fillvalue="")
                lines += [" & ".join(map(TEX, part)) + r" \\" for part in parts]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])

    def terminal(self) -> str:
        """Plain text with aligned columns."""
        rows = [self.head, *([row] if isinstance(row, str) else row for row in self.rows)]
        texts = [[TERMINAL(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip_longest(*texts, fillvalue="")]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in texts)


def _lines(cell: Cell) -> list[Cell]:
    spans = [cell] if isinstance(cell, str | Span) else cell
    return [list(part) for is_end, part in groupby(spans, lambda span: span == NEWLINE) if not is_end]
