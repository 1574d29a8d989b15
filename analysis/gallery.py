"""Style and script of pages with panels. A panel is drawn when it becomes visible; lists can be filtered."""

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
