"""Pages hold everything themselves and show what they were given."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import UserError
from seg import html


def embedded(document: str) -> list[np.ndarray]:
    """The pictures of a page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', document)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]


def test_text_is_escaped_everywhere() -> None:
    bad = "<script>alert('x')</script>&"
    grey = np.zeros((4, 4), np.uint8)
    parts = [html.paragraph(bad), html.listing([bad]), html.table([bad], [[bad]]), html.folded(bad, bad)]
    document = html.page(bad, html.section(bad, *parts), html.picture(grey, bad + '"'))
    assert "<script" not in document and document.count("&lt;script&gt;") >= 9 and '&quot;"' in document


def test_nothing_is_loaded_from_elsewhere() -> None:
    document = html.page("x", html.picture(np.zeros((4, 4, 3), np.uint8)), html.chart(lambda figure: None, (1, 1)))
    assert re.findall(r'(?:src|href)="(?!data:)', document) == [] and "url(" not in document


def test_pictures_are_exact_as_png_and_close_as_photo() -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    exact, photo, small = embedded(
        html.row(html.picture(pixels), html.picture(pixels, photo=True), html.picture(pixels, max_width=48))
    )
    assert np.array_equal(exact, pixels) and small.shape == (32, 48, 3)
    assert set(map(tuple, small.reshape(-1, 3))) <= set(map(tuple, pixels.reshape(-1, 3)))
    assert photo.shape == pixels.shape and np.abs(photo.astype(int) - pixels).mean() < 12


def test_charts_hold_what_was_drawn() -> None:
    def draw(figure: Any) -> None:
        figure.add_subplot().plot([0, 1], [0, 1], color="red", linewidth=5)

    (chart,) = embedded(html.chart(draw, (2, 1)))
    assert chart.shape[:2] == (120, 240)
    assert ((chart[..., 0] > 200) & (chart[..., 1] < 50)).sum() > 100


def test_numbers_stand_at_the_right() -> None:
    table = html.table(["a", "b"], [["road", 0.5], ["-", "1,234"], ["12.3%", "3 m"]])
    assert table.count("<td class=number>") == 4 and "<td>road</td>" in table and "<td>3 m</td>" in table
    assert (html.percent(0.12345), html.percent(None), html.percent(float("nan"))) == ("12.35", "-", "-")


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x.html: cannot be written"):
        html.write(tmp_path / "file" / "x.html", html.page("x"))
