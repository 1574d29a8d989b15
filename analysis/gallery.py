"""HTML pages with panels of `panels.js`. A panel is drawn when it becomes visible; lists can be filtered."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from analysis import compare, masks
from experiments.explorer import panels

IMAGE_WIDTH = 448
"""Largest width of images in a page, in pixels; larger images are resized."""

STYLE = """
:root { --ink: #1c1e21; --paper: #fff; --soft: #f3f4f6; --line: #d9dce1; --dim: #666c75 }
:root { --good: #0072b2; --bad: #c04f00 }
* { box-sizing: border-box }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
header, main { max-width: 1200px; margin: 0 auto; padding: 0 16px }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); z-index: 1 }
nav div { max-width: 1200px; margin: 0 auto; padding: 8px 16px; display: flex; gap: 20px }
a { color: var(--good) }
h2 { margin-top: 40px }
h3 { margin: 0; overflow-wrap: anywhere }
.small { font-size: 13px; color: var(--dim); overflow-wrap: anywhere }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 8px 0 }
th, td { padding: 3px 10px; text-align: right; white-space: nowrap; vertical-align: top }
tr th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); font-weight: 500 }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600 }
tr.group th { border-top: 1px solid var(--line); font-style: italic }
td small { color: var(--dim) }
.notes { list-style: none; padding: 0 }
details { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; margin: 10px 0 }
summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; font-size: 12px; background: var(--soft); padding: 10px }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 24px }
figure { margin: 0 }
.plots img { width: 100%; background: #fff }
figcaption { font-size: 13px; overflow-wrap: anywhere }
.filters { display: flex; flex-wrap: wrap; gap: 12px; margin: 12px 0 }
select { font: inherit; max-width: 100%; padding: 4px }
.case { min-height: 300px; border-top: 1px solid var(--line); padding: 18px 0 }
.changed-answer { color: var(--bad); font-weight: 600 }
.side td, .side th { text-align: left; white-space: normal; max-width: 420px; overflow-wrap: anywhere }
.panels .top { display: none }
.panels .cells { grid-template-columns: 132px minmax(0, 1fr); max-width: none }
.panels .others { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)) }
@media (max-width: 600px) { .panels .cells { grid-template-columns: minmax(0, 1fr) } }
"""

SCRIPT = """
const cases = [...document.querySelectorAll('.case')];
const gallery = JSON.parse(document.getElementById('cases').textContent);
const seen = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    const view = gallery.views[cases.indexOf(target)];
    panels(target.querySelector('.panels'), { ...view, src: gallery.images[view.src] });
  }
}, { rootMargin: '600px' });
cases.forEach(item => seen.observe(item));
const filters = [...document.querySelectorAll('.filters select')];
for (const select of filters) {
  const values = new Set(cases.map(item => item.dataset[select.name]));
  for (const value of values) select.add(new Option(value, value));
  select.onchange = () => {
    for (const item of cases) item.hidden = filters.some(f => f.value && f.value !== item.dataset[f.name]);
  };
}
"""


def show_run(method: str, keep: str, row: dict[str, Any]) -> dict[str, Any]:
    """A panel: the line of samples.jsonl of one method and budget."""
    run = {"pruner": method, "label": compare.METHODS.get(method, method), "keep": keep, "order": None}
    if "error" in row:
        return run | {"error": row["error"]}
    right = None if row["correct"] is None else masks.is_right(row)
    return run | {"answer": row["prediction"], "right": right, "kept": row["kept"][0], "n_visual": row["n_visual"]}


def show(src: str, image: Image.Image, runs: Sequence[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    """Data of `panels.js` for one sample and its runs (method, budget, line of samples.jsonl)."""
    *_, first = runs[0]
    answered = next((row for *_, row in runs if "error" not in row), None)
    grid, box = (answered[key][0] for key in ("grids", "boxes")) if answered else (None, None)
    expected = None if first["answer"] is None else masks.answer_text(first["answer"])
    question = {"question": first["question"], "expected": expected, "words": [], "pmi": None}
    questions = [question | {"runs": [show_run(*run) for run in runs]}]
    return {"src": src, "size": image.size, "grid": grid, "box": box, "vocabulary": None, "questions": questions}


def data(images: Mapping[str, Image.Image], views: Sequence[dict[str, Any]]) -> str:
    """Images by their ``src`` and views as JSON."""
    return panels.embedded({"images": {k: panels.data_url(x, IMAGE_WIDTH) for k, x in images.items()}, "views": views})


def page(title: str, head: str, main: str, cases: str, style: str = "") -> str:
    """HTML of a page. ``head`` and ``main`` are HTML, ``cases`` is the result of `data`, one view per ``.case``."""
    return f"""<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta http-equiv=Content-Security-Policy content="{panels.POLICY}">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{panels.style()}{STYLE}{style}</style>
{head}
<main>
{main}
</main>
<script type=application/json id=cases>{cases}</script>
<script>{panels.script()}{SCRIPT}</script>
</html>
"""
