"""Texts in scripts that matplotlib's font lacks: drawn with another font, or told in one line, and no warnings."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engine import glyphs

HAND, FOOT = "\u210a", "\u2312"  # matplotlib brings STIX, which has them; DejaVu Sans has not
NOWHERE = "\U000105a9"  # assigned to no character


@pytest.fixture(autouse=True)
def _anew() -> None:
    glyphs._families.cache_clear()


def drawn(*words: str) -> Figure:
    figure = Figure(figsize=(2, 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title("\n".join(words))
    axes.set_yticks(range(len(words)), words)
    return figure


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_characters_that_another_font_has(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    figure = drawn("road", f"{HAND}{FOOT}")
    glyphs.save(figure, io.BytesIO(), format=kind)
    (title,) = [axes.title for axes in figure.axes]
    assert title.get_fontfamily()[0] == "sans-serif" and len(title.get_fontfamily()) > 1
    assert [label.get_fontfamily() for label in figure.axes[0].get_yticklabels()] == [title.get_fontfamily()] * 2
    assert capsys.readouterr().err == ""


def test_a_fallback_draws_the_character_and_not_a_box() -> None:
    def pixels(text: str) -> bytes:
        figure = Figure(figsize=(1, 1))
        canvas = FigureCanvasAgg(figure)
        figure.text(0.3, 0.3, text, fontsize=30)
        glyphs.save(figure, io.BytesIO(), dpi=100)
        return bytes(canvas.buffer_rgba())

    assert len({pixels(HAND), pixels(FOOT), pixels(NOWHERE), pixels("")}) == 4


@pytest.mark.filterwarnings("error")
def test_characters_that_no_font_has_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        glyphs.save(drawn(f"a{NOWHERE}\u200d\x1b"), io.BytesIO())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"note: no installed font has {NOWHERE}, which pictures show as boxes")
    assert said[0].endswith("fontlist-*.json")


def test_usual_texts_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    figure = drawn("Straße", "дорога")
    glyphs.save(figure, io.BytesIO())
    assert figure.axes[0].title.get_fontfamily() == ["sans-serif"] and capsys.readouterr().err == ""


def test_a_font_that_is_gone_or_damaged_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.ttf").write_bytes(b"no font")
    for name in ("x.ttf", "gone.ttf"):
        assert glyphs._characters(str(tmp_path / name)) == frozenset()


def test_other_warnings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: warnings.warn("something else", UserWarning, stacklevel=1))
    with pytest.warns(UserWarning, match="something else"):
        glyphs.save(drawn(NOWHERE), io.BytesIO())
