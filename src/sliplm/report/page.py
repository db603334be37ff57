"""One HTML file that needs nothing else: text, tables and pictures, readable on screen and on paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sliplm.durable import replace
from sliplm.report import need
from sliplm.report.figures import Picture
from sliplm.shares.tensorfile import write_error


@dataclass(frozen=True)
class Table:
    """A table of texts; columns after the first `left` ones are numbers, and set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, then pictures, then tables; `code` is a command or a file's text."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    code: str = ""


def write_page(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section]) -> None:
    """Write a page: `lead` are the paragraphs under the title.  All texts are plain: markup is escaped.

    Raises:
        ReportError: jinja2 is not installed.
        ShareError: the file cannot be written.
    """
    need("jinja2")
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    page = environment.from_string(_TEMPLATE).render(title=title, lead=lead, sections=sections)
    try:
        replace(path, page.encode(), lasting=False)
    except OSError as error:
        raise write_error(path, len(page), error) from error


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --ground: #fff; --tint: #f5f5f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --soft: #999; --line: #3c3c3c; --ground: #181818; --tint: #222; } }
body { color: var(--ink); background: var(--ground); font: 16px/1.5 system-ui, sans-serif;
  max-width: 56rem; margin: 2.5rem auto 4rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.lead p { font-size: 1.05rem; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; border-radius: 4px; }
figure { margin: 1.2rem 0; }
figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 4px; box-sizing: border-box; padding: .5rem; }
figcaption, caption { color: var(--soft); font-size: .88rem; text-align: left; margin: .4rem 0;
  max-width: 46rem; }
.scroll { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 600; border-bottom-width: 2px; }
.number { text-align: right; white-space: nowrap; }
@media print { body { font-size: 11pt; margin: 0; max-width: none; } figure, tr, pre { break-inside: avoid; }
  h2 { break-after: avoid; } }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<div class="lead">
{% for paragraph in lead %}
<p>{{ paragraph }}</p>
{% endfor %}
</div>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.text %}
<p>{{ paragraph }}</p>
{% endfor %}
{% if section.code %}
<pre>{{ section.code }}</pre>
{% endif %}
{% for picture in section.pictures %}
<figure>
<img src="data:image/png;base64,{{ picture.png | base64 }}" alt="{{ picture.caption }}">
<figcaption>{{ picture.caption }}</figcaption>
</figure>
{% endfor %}
{% for table in section.tables %}
<div class="scroll">
<table>
{% if table.caption %}
<caption>{{ table.caption }}</caption>
{% endif %}
<thead><tr>
{% for column in table.columns %}
<th{% if loop.index > table.left %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
<td{% if loop.index > table.left %} class="number"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""
