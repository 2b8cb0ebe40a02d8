"""The page of a race: one file of HTML that needs nothing else, for a desk or a phone."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from lightning_optim.race import svg
from lightning_optim.race.comparison import Comparison
from lightning_optim.race.curves import charts
from lightning_optim.race.lines import in_yaml

STYLE = """
:root { --paper: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #d8dee4; --panel: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e6e9ec; --soft: #9aa4ae; --rule: #333b44; --panel: #1d2228; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; }
.soft { color: var(--soft); }
ul { padding-left: 1.2rem; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; }
.legend svg { width: 1.6rem; height: .7rem; vertical-align: middle; margin-right: .35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.charts svg { display: block; width: 100%; height: auto; background: var(--panel); border-radius: 6px; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; }
svg .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg .axis { fill: none; stroke: var(--soft); }
svg .grid { fill: none; stroke: var(--rule); stroke-width: .7; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.band { fill: var(--c); opacity: .16; stroke: none; }
.dot { fill: var(--c); }
.dashed { stroke-dasharray: 5 3; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--rule); }
th { font-size: .85rem; color: var(--soft); font-weight: 600; }
pre { background: var(--panel); padding: .7rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(6rem, 14rem) 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (max-width: 44rem) {
  body { padding: .8rem; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
  svg text { font-size: 15px; }
  svg .title { font-size: 17px; }
  .wide thead { position: absolute; left: -10000px; }
  .wide tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--rule); }
  .wide td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; text-align: right; }
  .wide td::before { content: attr(data-label); color: var(--soft); text-align: left; }
  .wide td:first-child { font-weight: 600; }
  .wide td:first-child::before { content: none; }
}
"""
# Okabe and Ito's colours, which the colour-blind tell apart; black is a grey that is seen on dark paper too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98", "#b8a900")


def page(comparison: Comparison) -> str:
    """The page as HTML.

    Args:
        comparison: What the race has found.
    """
    names = [one.name for one in comparison.standings]
    title = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    subject = comparison.about.get("what", "")
    colours = "\n".join(f".c{i} {{ --c: {colour}; }}" for i, colour in enumerate(COLOURS))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}{colours}</style></head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">{escape(subject)}</p>' if subject else "",
            *_list(comparison.findings()),
            *_table(comparison),
            "<h2>Curves</h2>",
            *_legend(names),
            '<div class="charts">',
            *map(svg.draw, charts(comparison)),
            "</div>",
            '<p class="soft">Lines are means over seeds, bands reach from the lowest seed to the highest.</p>',
            "<h2>How to read this</h2>",
            *(f"<p>{escape(text)}</p>" for text in comparison.method()),
            "<h2>Settings</h2>",
            *_settings(comparison),
            *_runs(comparison),
            "</body></html>",
            "",
        ]
    )


def _list(texts: list[str]) -> Iterator[str]:
    yield "<ul>"
    yield from (f"<li>{escape(text)}</li>" for text in texts)
    yield "</ul>"


def _table(comparison: Comparison) -> Iterator[str]:
    head = comparison.head()
    yield '<table class="wide"><thead><tr>'
    yield from (f"<th>{escape(title)}</th>" for title in head)
    yield "</tr></thead><tbody>"
    for row in comparison.rows():
        cells = (f'<td data-label="{escape(title)}">{escape(cell)}</td>' for title, cell in zip(head, row, strict=True))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table>"


def _legend(names: list[str]) -> Iterator[str]:
    yield '<ul class="legend">'
    for i, name in enumerate(names):
        style = f"line c{i % 8}{' dashed' if i % 16 >= 8 else ''}"
        line = f'<svg viewBox="0 0 32 10" aria-hidden="true"><path class="{style}" d="M0 5H32"/></svg>'
        yield f"<li>{line}{escape(name)}</li>"
    yield "</ul>"


def _settings(comparison: Comparison) -> Iterator[str]:
    about = {key: value for key, value in comparison.about.items() if key not in ("what", "command")}
    yield "<dl>"
    for key, value in about.items():
        yield f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
    for one in comparison.standings:
        yield f"<dt>{escape(one.name)}</dt><dd>{escape(in_yaml(one.candidate.spec))}</dd>"
    yield "</dl>"
    if command := comparison.about.get("command"):
        yield f"<p>Again, or to continue:</p><pre>{escape(command)}</pre>"


def _runs(comparison: Comparison) -> Iterator[str]:
    order = {one.name: i for i, one in enumerate(comparison.standings)}
    name = comparison.metric.name
    yield f"<details><summary>All {len(comparison.runs)} runs</summary>"
    head = ("candidate", "lr", "seed", name, "steps", "seconds", "end")
    yield '<table class="wide"><thead><tr>' + "".join(f"<th>{escape(title)}</th>" for title in head)
    yield "</tr></thead><tbody>"
    for (who, lr, seed), run in sorted(comparison.runs.items(), key=lambda item: (order[item[0][0]], *item[0][1:])):
        value = f"{run.metrics[name]:.5g}" if name in run.metrics else "–"
        end = f"{run.status}{': ' + run.reason if run.reason else ''}"
        cells = (who, f"{lr:g}", str(seed), value, str(run.steps), f"{run.seconds:.1f}", end)
        labelled = zip(head, cells, strict=True)
        yield "<tr>" + "".join(f'<td data-label="{escape(t)}">{escape(cell)}</td>' for t, cell in labelled) + "</tr>"
    yield "</tbody></table></details>"
