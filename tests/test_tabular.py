"""One table in four formats: the same cells, each escaped and styled as its format wants it."""

import re

import pytest

from experiments.tabular import NEWLINE, Span, Table

TABLE = Table(
    ["method", ["acc", Span("a", "sup")], "note"],
    [
        "keep 64 & more",
        ["A_b | c", [Span("57.1", "bold"), Span(" ± 0.4", "small"), NEWLINE, Span("56.9", "underline small")], "<x>"],
        ["B", "–", ""],
    ],
)


def test_markdown():
    assert TABLE.markdown().splitlines() == [
        "| method | acc<sup>a</sup> | note |",
        "| --- | ---: | ---: |",
        "| *keep 64 & more* |  |  |",
        r"| A_b \| c | **57.1** ± 0.4<br><u>56.9</u> | <x> |",
        "| B | – |  |",
    ]


def test_latex_gives_a_cell_of_two_lines_two_rows():
    lines = TABLE.latex().splitlines()
    assert r"\multicolumn{3}{l}{\textit{keep 64 \& more}} \\" in lines
    assert r"A\_b | c & \textbf{57.1}{\scriptsize  $\pm$ 0.4} & $<$x$>$ \\" in lines
    assert r" & {\scriptsize \underline{56.9}} &  \\" in lines and r"B & -- &  \\" in lines


def test_html_shows_what_is_written_and_runs_nothing():
    page = TABLE.html()
    assert "&lt;x&gt;" in page and "<x>" not in page
    assert "<td><b>57.1</b><small> ± 0.4</small><br><small><u>56.9</u></small></td>" in page
    assert page.count("<tr") == page.count("</tr>") == 4


def test_terminal_is_aligned_and_without_marks():
    lines = Table(["name", "ms"], [["long name", "1.00"], [Span("x", "bold"), "22.00"]]).terminal().splitlines()
    assert lines == ["name       ms", "long name  1.00", "x          22.00"]


@pytest.mark.parametrize("write", [Table.markdown, Table.html, Table.latex, Table.terminal])
def test_an_empty_text_leaves_no_empty_mark(write):
    text = write(Table(["a"], [[[Span("", "bold"), Span("", "sup"), "1"]]]))
    assert not re.search(r"\*\*\*\*|<b></b>|<sup></sup>|\{\}", text.replace(r"\begin{tabular}{l}", ""))
