"""Self-contained HTML pages: text, tables, pictures and charts in one file that needs no other.

Every function returns HTML; all text that goes in is escaped. Pictures are RGB uint8 (H, W, 3) or grey (H, W).
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable, Sequence
from html import escape as _html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.images import show, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.uint8]

MAX_ROWS = 4096
"""Height of a picture at most: browsers show, and JPEG holds, no picture of a hundred thousand rows."""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1180px; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05em; margin-bottom: .3em }
table { border-collapse: collapse; margin: .8em 0; font-size: .92em }
th, td { padding: .18em .7em; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top }
th { background: #f4f4f4 } td.number { text-align: right; font-variant-numeric: tabular-nums }
figure { margin: .4em 0; display: inline-block; vertical-align: top } figcaption { font-size: .85em; color: #555 }
img { max-width: 100% } .row { display: flex; gap: 8px; flex-wrap: wrap } .wrong { color: #a40000 }
.legend { font-size: .85em } .legend span { white-space: nowrap; margin-right: 1em }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .35em; vertical-align: -.12em }
pre { background: #f6f6f6; padding: .8em; overflow-x: auto; font-size: .85em }
"""


def escape(text: str, quote: bool = False) -> str:
    """Text as HTML. Bytes that are no text, in names of files, and control characters are shown as in messages, since a
    page cannot hold them."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else show(c) for c in text)
    return _html(shown, quote=quote)


def page(title: str, *parts: str) -> str:
    """A whole document."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def section(title: str, *parts: str, level: int = 2) -> str:
    """A heading and what belongs to it."""
    return "\n".join([f"<h{level}>{escape(title)}</h{level}>", *parts])


def paragraph(text: str, wrong: bool = False) -> str:
    """Text; `wrong` shows it in red."""
    return f"<p{' class=wrong' if wrong else ''}>{escape(text)}</p>"


def listing(items: Sequence[str]) -> str:
    """A list with bullets."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def folded(title: str, text: str) -> str:
    """Text as it is, hidden until its title is clicked."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table, without a head that has no words; cells that are numbers, percentages or '-' are set to the right."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)] if any(head) else []
    lines += ["".join(_cell(cell) for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(pixels: Array, caption: str = "", photo: bool = False, max_width: int = 640) -> str:
    """A picture, at most `max_width` pixels wide and `MAX_ROWS` high; a photo as JPEG (smaller), all else as PNG
    (exact)."""
    image = Image.fromarray(pixels)
    width, height = image.size
    if width > max_width:
        width, height = max_width, max(1, round(height * max_width / width))
    if height > MAX_ROWS:
        width, height = max(1, round(width * MAX_ROWS / height)), MAX_ROWS
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BOX if photo else Image.Resampling.NEAREST)
    data = io.BytesIO()
    if photo:
        image.save(data, "jpeg", quality=88)
    else:
        image.save(data, "png", optimize=True)
    return _figure(data.getvalue(), "jpeg" if photo else "png", caption)


def row(*figures: str) -> str:
    """Pictures beside each other."""
    return f"<div class=row>{''.join(figures)}</div>"


def legend(classes: Sequence[str], colors: Array) -> str:
    """What the colours (classes, 3) of label pictures stand for."""
    shown = (
        f'<span><i style="background: rgb({red}, {green}, {blue})"></i>{escape(name)}</span>'
        for name, (red, green, blue) in zip(classes, colors.tolist(), strict=True)
    )
    return f"<p class=legend>{' '.join(shown)}</p>"


def chart(draw: Callable[[Figure], Any], size: tuple[float, float], caption: str = "") -> str:
    """What `draw` puts on a matplotlib figure of `size` inches."""
    from engine.plots import figure

    def save(path: Path) -> None:
        with figure(path, size) as drawn:
            draw(drawn)

    return saved(save, caption)


def saved(save: Callable[[Path], Any], caption: str = "") -> str:
    """The PNG that `save` writes to the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "chart.png")
        save(path)
        return _figure(path.read_bytes(), "png", caption)


def write(path: Path | str, document: str) -> None:
    """Write a page, whole or not at all. Raises UserError naming the path."""
    write_bytes(path, document.encode())


def percent(value: float | None) -> str:
    """A share as percent with two digits, '-' for None and nan."""
    return "-" if value is None or value != value else f"{100 * value:.2f}"


def counted(number: int, what: str, several: str = "") -> str:
    """Such as '1 image' or '2 images'; `several` is the plural of a word that takes more than an s."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"


def _cell(value: object) -> str:
    text = str(value)
    plain = text.rstrip("%").replace(",", "").strip()
    number = text == "-" or plain.removeprefix("-").replace(".", "", 1).isdigit()
    return f"<td{' class=number' if number else ''}>{escape(text)}</td>"


def _figure(data: bytes, kind: str, caption: str) -> str:
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(caption, quote=True)}">{words}</figure>'
