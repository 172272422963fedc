"""Pages of HTML that need nothing but themselves: text, tables, embedded figures, one style.

Everything that comes from outside is escaped here; no script, no network, readable on a phone and
on paper.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

PIXELS = 1.6  # of a figure for one of the page, where it has room: letters like the page's own

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1100px;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.3rem 0 0.6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; border-bottom: 1px solid #ddd; }
a { color: #0072B2; }
p { margin: 0.4rem 0; max-width: 48rem; }
.data { color: #555; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #eee;
  vertical-align: top; white-space: nowrap; }
td.text, th.text { text-align: left; white-space: normal; }
thead th { color: #555; font-weight: 600; border-bottom: 1px solid #bbb; }
figure { margin: 1.2rem 0 1.8rem; }
figcaption { color: #444; margin-bottom: 0.4rem; max-width: 48rem; }
img { max-width: 100%; height: auto; display: block; border: 1px solid #eee;
  box-sizing: border-box; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; line-height: 1.4; }
@media screen and (max-width: 700px) { img { width: 860px; max-width: none; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
</style>
</head>
<body>
<p class="data">$data</p>
<h1>$heading</h1>
$body
</body>
</html>
""")


class Html(str):
    """Text that is HTML already: `table` does not escape it."""


def page(heading: str, data: str, parts: Iterable[str]) -> str:
    """A whole page. data: what the numbers are of, its first line, and in the window's title."""
    text = {"title": f"{heading} – {data}", "data": data, "heading": heading}
    if data.startswith("DEMO"):
        text["title"] = f"DEMO – {heading}"
    return _PAGE.substitute({k: escape(v) for k, v in text.items()}, body="\n".join(parts))


def section(heading: str, *parts: str) -> str:
    """A heading and what is under it; empty where there is nothing."""
    parts = tuple(part for part in parts if part)
    return "\n".join((f"<h2>{escape(heading)}</h2>", *parts)) if parts else ""


def paragraph(text: str) -> str:
    """A paragraph; empty where there is no text."""
    return f"<p>{escape(text)}</p>" if text else ""


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def link(path: str, text: str) -> Html:
    """An anchor to a file beside or below the page; `path` is relative to it."""
    return Html(f'<a href="{quote(path)}">{escape(text)}</a>')


def table(header: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """Rows of cells, numbers to the right; empty without rows.

    text: the columns that hold words, to the left. A cell that `link` made stays an anchor.
    """
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        opened = [f'<{tag} class="text">' if i in text else f"<{tag}>" for i in range(len(cells))]
        inner = [cell if isinstance(cell, Html) else escape(cell) for cell in cells]
        parts = (f"{o}{c}</{tag}>" for o, c in zip(opened, inner, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    head, body = line(header, "th"), "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def figure(path: Path, caption: str) -> str:
    """A PNG, embedded, under its caption. Raises OSError where it cannot be read."""
    png = path.read_bytes()
    width = int.from_bytes(png[16:20], "big")  # of the header chunk
    data, caption = base64.b64encode(png).decode("ascii"), escape(caption)
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="scroll"><img alt="{caption}" '
        f'width="{round(width / PIXELS)}" src="data:image/png;base64,{data}"></div></figure>'
    )
