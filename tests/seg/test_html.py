"""Pages hold everything themselves, show what they were given, and are sound HTML whatever that is."""

from __future__ import annotations

import base64
import html as html_module
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from engine import checkpoint
from engine.errors import UserError
from seg import card_page, errors_page, html, inspect_data, inspect_page
from seg.config import SegConfig
from seg.labels import table
from seg.models import build
from tests.seg import layouts
from tests.seg.strict_html import faults


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


@pytest.mark.parametrize("photo", [False, True])
def test_pictures_of_very_thin_images(photo: bool) -> None:
    """JPEG takes 65,500 rows at most."""
    sizes = {(70000, 2): (4096, 1), (70000, 700): (4096, 41), (2, 70000): (1, 640), (4096, 640): (4096, 640)}
    for size, shown in sizes.items():
        pixels = np.full((*size, 3), 77, np.uint8)
        (found,) = embedded(html.picture(pixels, photo=photo))
        assert found.shape == (*shown, 3) and (found == 77).all()


def test_a_legend_names_every_colour() -> None:
    found = html.legend(["road", "<a>"], np.array([[1, 2, 3], [255, 0, 9]], np.uint8))
    pairs = re.findall(r"rgb\((\d+), (\d+), (\d+)\)\"></i>([^ ]*?)</span>", found)
    assert pairs == [("1", "2", "3", "road"), ("255", "0", "9", "&lt;a&gt;")]
    assert not faults(html.page("x", found))


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


# ---------------------------------------------------------------- strictness

GOOD = html.page("x", html.section("y", html.paragraph("z"), html.table(["a", "b"], [["c", 1]]), html.listing(["d"])))


@pytest.mark.parametrize(
    "change",
    [
        ("<!DOCTYPE html>\n", ""),
        (' lang="en"', ""),
        ('<meta charset="utf-8">', ""),
        ("<title>x</title>", "<title></title>"),
        ("</p>", ""),
        ("</p>", "</p></p>"),
        ("<p>z</p>", "<p>z<div></div></p>"),
        ("<p>z</p>", "<b>z</p></b>"),
        ("<p>z</p>", "<p>z & y < x</p>"),
        ("<p>z</p>", "<p>z &nosuchthing;</p>"),
        ("<p>z</p>", "<script>z</script>"),
        ("<p>z</p>", "<p class=a'b>z</p>"),
        ("<p>z</p>", '<p class="a" class="b">z</p>'),
        ("<p>z</p>", '<p onclick="z">z</p>'),
        ("<p>z</p>", "<p>z\x01</p>"),
        ("<p>z</p>", "<p>z\udcff</p>"),
        ("<p>z</p>", "<!-- z -->"),
        ("<p>z</p>", "<h4>z</h4>"),
        ("<p>z</p>", "<h1>z</h1>"),
        ("<p>z</p>", '<img src="data:image/png;base64,AAAA" alt="">'),
        ("<p>z</p>", '<img src="there.png" alt="">'),
        ("<p>z</p>", '<img src="here.png">'),
        ("<p>z</p>", '<a href="https://example.org">z</a>'),
        ("<p>z</p>", '<p id="a">z</p><p id="a">z</p>'),
        ("<td>c</td>", ""),
        ("<tr>", "z<tr>"),
        ("</body>", ""),
    ],
)
def test_the_strict_reader_finds_each_fault(tmp_path: Path, change: tuple[str, str]) -> None:
    (tmp_path / "here.png").touch()
    assert faults(GOOD, tmp_path) == [] and change[0] in GOOD
    assert faults(GOOD.replace(*change), tmp_path) != []


def test_files_beside_a_page_are_found(tmp_path: Path) -> None:
    (tmp_path / "a b.png").touch()
    assert faults(GOOD.replace("<p>z</p>", '<img src="a%20b.png" alt="">'), tmp_path) == []


BAD = "<b>&\"'</style></title><script>$x^{2$]]>"


def test_every_piece_of_a_page_is_sound_whatever_is_written_in_it() -> None:
    for bad in (BAD, "&amp;&#0;&lt", "\x00\x1b[31m\x85\ud800\udcff", "a\nb\tc", "<!-- ", "\u202e\u2028", ""):
        pieces = [
            html.section(bad, html.paragraph(bad, wrong=True), html.listing([bad, bad]), html.folded(bad, bad)),
            html.section(bad, html.table([bad, bad], [[bad, bad]]), html.table(["", ""], [[bad, 3]]), level=3),
            html.row(
                html.picture(np.zeros((4, 4), np.uint8), bad), html.picture(np.zeros((4, 4, 3), np.uint8), bad, True)
            ),
        ]
        assert faults(html.page(f"x{bad}", *pieces)) == []


NAMES = ('<b>&"', "a $x^{2$ b", "']]><!-- é")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> SegConfig:
    """A data set whose folder, classes and files are called as to break a page."""
    root = tmp_path_factory.mktemp("pages") / "<i>&amp;\"' data"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in (b'<b>&"', b"a & b", b"\xff$x^{2$"):
            image, mask = layouts.scene(rng, [0, 1, 2, 255], (48, 64))
            stem = os.fsdecode(split.encode() + b" " + name)
            layouts.put(root / "images" / split / "<u>city" / f"{stem}.png", image)
            layouts.put(root / "masks" / split / "<u>city" / f"{stem}.png", mask)
    entries = [{"id": i, "name": name, "color": [90 * i, 9, 9], "train_id": i} for i, name in enumerate(NAMES)]
    entries.append({"id": 255, "name": "<void>", "color": [0, 0, 0], "ignore": True})
    (root / "labels.yaml").write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf-8")
    return SegConfig.model_validate(
        {
            "length": "1 epochs",
            "batch_size": 1,
            "data": {"name": "folder", "root": root, "crop": (32, 32)},
            "model": {"name": "lraspp_mobilenet_v3_large", "output_stride": 16},
            "runtime": {"workers": 0, "device": "cpu", "threads": 1},
        }
    )


@pytest.fixture(scope="module")
def hostile_checkpoint(hostile: SegConfig) -> Path:
    torch.manual_seed(0)
    known = table(hostile.data)
    state: dict[str, Any] = dict.fromkeys(checkpoint.KEYS)
    state |= {"format": checkpoint.FORMAT, "task": "seg", "config": hostile.model_dump(mode="json"), "step": 7}
    state |= {"meta": {"classes": list(known.classes), "labels": known.to_plain()}}
    state["model"] = build(hostile.model, known.num_classes, pretrained=False).state_dict()
    path = hostile.data.root.parent / "<run>&" / "best.pt"
    path.parent.mkdir()
    checkpoint.save(path, state)
    return path


def texts(document: str) -> str:
    """What a page shows."""
    return html_module.unescape(re.sub("<[^>]*>", "", document.partition("</head>")[2]))


def test_the_page_of_a_data_set_is_sound(hostile: SegConfig, tmp_path: Path) -> None:
    first = next((hostile.data.root / "images/train").rglob("*&*.png"))
    copy = first.with_name("<copy>.png")
    copy.write_bytes(first.read_bytes())
    try:
        found = inspect_data.inspect(hostile.data)
    finally:
        copy.unlink()
    html.write(tmp_path / "report.html", inspect_page.document(found))
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert faults(document, tmp_path) == []
    assert all(name in texts(document) for name in NAMES)
    assert "image without label" in document and "<copy>.png" in texts(document) and r"\udcff$x^{2$" in texts(document)
    assert inspect_page.text(found).encode()


def test_the_card_is_sound(hostile_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "<out>"
    text = card_page.write_card(hostile_checkpoint, out=out, corruptions=True, corruption_images=1)
    document = (out / "card.html").read_text(encoding="utf-8")
    assert faults(document, out) == [] and all(name in texts(document) for name in NAMES)
    assert "<run>&/best.pt" in texts(document) and r"val \udcff$x^{2$" in texts(document) and text.encode()


def test_the_page_of_errors_is_sound(hostile_checkpoint: Path, tmp_path: Path) -> None:
    errors_page.write_errors(hostile_checkpoint, tmp_path / "errors.html")
    document = (tmp_path / "errors.html").read_text(encoding="utf-8")
    assert faults(document, tmp_path) == [] and " taken for " in texts(document)
    assert "<run>&/best.pt" in texts(document) and r"val \udcff$x^{2$" in texts(document)
