"""Building blocks of a self-contained HTML page: no network access, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape as escape_markup

from fastbyol.config.console import printable

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f9; color: #1d2430; font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { margin: 0 0 2px; font-size: 27px; }
h2 { margin: 0 0 10px; font-size: 19px; }
h3 { margin: 16px 0 6px; font-size: 15px; }
section { margin: 18px 0; padding: 18px 22px; background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; overflow-x: auto; }
p { margin: 6px 0 12px; max-width: 86ch; }
.lead, .note { color: #5a6575; }
.note { font-size: 13px; }
.verdict { font-size: 17px; font-weight: 600; }
.alarm { color: #a3261b; font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 14px 0; }
.card { padding: 12px 16px; background: #f6f8fb; border: 1px solid #e1e5ea; border-radius: 8px; }
.card b { display: block; font-size: 27px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: #5a6575; font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #edf0f3; }
th { color: #5a6575; font-weight: 600; font-size: 13px; }
td.number, th.number { text-align: right; }
.grid td, .grid th { padding: 2px 5px; border: 0; text-align: center; vertical-align: middle; font-size: 11px; color: #5a6575; }
.grid img { display: block; width: 76px; height: 76px; image-rendering: pixelated; border: 3px solid transparent; border-radius: 3px; }
.grid img.hit { border-color: #2e8b57; } .grid img.miss { border-color: #d0574b; }
.grid td.gap, .grid th.gap { padding-left: 20px; }
.columns { display: flex; flex-wrap: wrap; gap: 8px 40px; align-items: flex-start; }
.columns td, .columns th { padding: 2px 10px 2px 0; font-size: 13px; }
img.figure { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.scroll td, .scroll th { padding: 4px 8px; }
.scroll th { vertical-align: bottom; }
.scroll td.number { white-space: nowrap; }
.scroll th:first-child, .scroll td:first-child { position: sticky; left: 0; z-index: 1; padding-left: 0; background: #fff; }
.scroll th:first-child, .scroll td:first-child { min-width: 104px; max-width: 38vw; overflow-wrap: break-word; }
.scroll .small { display: inline-block; min-width: 180px; }
.plot { max-width: 640px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 14px; }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 12px; font-size: 13px; overflow-wrap: anywhere; }
.key svg, td svg, th svg { vertical-align: middle; margin-right: 6px; }
.same { color: #97a1ae; }
.small { color: #5a6575; font-size: 13px; }
@media (max-width: 600px) { main { padding: 14px 8px 40px; } section { padding: 12px 12px; } h1 { font-size: 23px; } }
pre { margin: 6px 0; padding: 10px 14px; background: #f6f8fb; border: 1px solid #e1e5ea; border-radius: 6px; overflow-x: auto; }
"""


def escape(text: str) -> str:
    """Escapes plain text for HTML; markup, control characters and non-UTF-8 bytes are shown as characters."""
    return escape_markup(printable(text))


def breakable(text: str) -> str:
    """Escapes plain text, as of a path or an option's name, so that it may break behind '_', '/' and '.'."""
    return re.sub(r"([_/]|\.(?=\D))", r"\1<wbr>", escape(text))


def page(title: str, *, lead: str, sections: Iterable[str]) -> str:
    """Returns the whole document. `title` and `lead` are plain text, `sections` HTML."""
    # An empty icon: browsers ask the server of a page without one for /favicon.ico.
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n' + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def section(name: str, *, title: str, parts: Iterable[str]) -> str:
    """Returns a titled box with the anchor `name`; `parts` are HTML."""
    return f'<section id="{escape(name)}">\n<h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"


def paragraph(text: str, *, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def numbered(texts: Iterable[str]) -> str:
    """Returns a numbered list of plain texts."""
    return f"<ol>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ol>"


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """Returns boxes for headline figures, each (value, what it is)."""
    boxes = (f'<div class="card"><b>{escape(value)}</b><span>{escape(meaning)}</span></div>' for value, meaning in figures)
    return f'<div class="cards">{"".join(boxes)}</div>'


def table(header: Sequence[str], *, rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """Returns a table of plain text; the columns in `numbers` are right-aligned. An empty header is omitted."""
    return html_table([escape(h) for h in header], rows=([escape(v) for v in row] for row in rows), numbers=numbers)


def html_table(header: Sequence[str], *, rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    """Returns a table like `table`, of cells that are HTML."""
    kinds = dict.fromkeys(numbers, "number")
    head = f"<thead>{_row('th', header, kinds)}</thead>" if header else ""
    body = "".join(_row("td", row, kinds) for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def wide(content: str) -> str:
    """Returns a wide table in a box that scrolls sideways by itself; its first column stays in sight."""
    return f'<div class="scroll">{content}</div>'


def _row(tag: str, values: Sequence[str], kinds: dict[int, str]) -> str:
    cells = (f'<{tag} class="{kinds[i]}">{v}</{tag}>' if i in kinds else f"<{tag}>{v}</{tag}>" for i, v in enumerate(values))
    return f"<tr>{''.join(cells)}</tr>"


def image(png: bytes, *, alt: str, kind: str = "") -> str:
    """Returns an <img> element with the PNG embedded."""
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img class="{kind}" alt="{escape(alt)}" title="{escape(alt)}" src="data:image/png;base64,{encoded}">'


def image_grid(header: Sequence[str], *, rows: Iterable[Sequence[str]], gaps: frozenset[int] = frozenset()) -> str:
    """Returns rows of HTML cells (an `image`, a caption) under plain-text headers; the columns in `gaps` get some space on the left."""
    kinds = dict.fromkeys(gaps, "gap")
    head, body = _row("th", [escape(h) for h in header], kinds), "".join(_row("td", row, kinds) for row in rows)
    return f'<table class="grid">{f"<thead>{head}</thead>" if header else ""}<tbody>{body}</tbody></table>'


def command(text: str) -> str:
    lines = "\n".join(map(escape, text.split("\n")))
    return f"<pre>{lines}</pre>"
