"""A strict reader of HTML: what a browser would put right in silence is a fault here."""

from __future__ import annotations

import base64
import binascii
import io
import re
from html.entities import html5
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

VOID = {"meta", "img", "br", "hr", "link", "input", "col"}
ATTRIBUTES = {
    "html": {"lang"},
    "meta": {"charset", "name", "content"},
    "img": {"src", "alt", "width", "height"},
    "a": {"href"},
}
"""Those that an element may have, beside those of any."""
ANYWHERE = {"class", "id", "title", "style"}
FLOW = {"h1", "h2", "h3", "h4", "h5", "p", "ul", "table", "div", "figure", "details", "pre"}
PHRASING = {"img", "a", "b", "i", "em", "strong", "span", "code", "br"}
CHILDREN = {
    "": {"html"},
    "html": {"head", "body"},
    "head": {"meta", "title", "style"},
    "body": FLOW | PHRASING,
    "div": FLOW | PHRASING,
    "figure": FLOW | PHRASING | {"figcaption"},
    "details": FLOW | PHRASING | {"summary"},
    "ul": {"li"},
    "table": {"tr", "thead", "tbody"},
    "thead": {"tr"},
    "tbody": {"tr"},
    "tr": {"th", "td"},
    **dict.fromkeys(("li", "td"), FLOW | PHRASING),
    **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "p", "pre", "th", "figcaption", "summary", "a"), PHRASING),
    **dict.fromkeys(("b", "i", "em", "strong", "span", "code"), PHRASING),
}
"""Elements that may be within an element; those that are not named hold text alone."""
NO_TEXT = {"", "html", "head", "table", "thead", "tbody", "tr", "ul"}
"""Where only white space stands between the elements."""


class Reader(HTMLParser):
    """Collects `faults`; the pieces of text come undecoded, so that what is not escaped is seen."""

    def __init__(self, folder: Path) -> None:
        super().__init__(convert_charrefs=False)
        self.folder, self.faults = folder, list[str]()
        self.open, self.seen, self.ids = list[str](), list[str](), list[str]()
        self.titles, self.headings, self.cells = list[str](), list[int](), list[list[int]]()

    def fault(self, text: str) -> None:
        self.faults.append(f"line {self.getpos()[0]}: {text[:200]}")

    @property
    def parent(self) -> str:
        return self.open[-1] if self.open else ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in CHILDREN.get(self.parent, set()):
            self.fault(f"<{tag}> within <{self.parent}>")
        self.attributes(tag, attrs)
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            level = int(tag[1])
            if level > (self.headings[-1] if self.headings else 0) + 1:
                self.fault(f"<{tag}> after a heading of level {self.headings[-1:]}")
            self.headings.append(level)
        if tag == "table":
            self.cells.append([])
        if tag == "tr":
            self.cells[-1].append(0)
        if tag in ("td", "th"):
            self.cells[-1][-1] += 1

    def attributes(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source, found = self.get_starttag_text() or "", dict(attrs)
        names = [name for name, _ in attrs]
        for name in names:
            if name not in ATTRIBUTES.get(tag, set()) | ANYWHERE or names.count(name) > 1:
                self.fault(f"attribute {name!r} in {source}")
        if re.search(r"=\s*[^\s\"'>]*[\"'<`=][^\s>]*", re.sub(r"=\s*(\"[^\"]*\"|'[^']*')", "", source)):
            self.fault(f"a value without quotes in {source}")
        if tag == "img":
            if found.get("alt") is None:
                self.fault("picture without alt")
            self.resource(found.get("src") or "", picture=True)
        if "href" in found:
            self.resource(found["href"] or "")
        if found.get("id"):
            self.ids.append(found["id"] or "")

    def resource(self, address: str, picture: bool = False) -> None:
        """A place that must be within the page, or a file beside it."""
        inlined = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", address)
        if inlined and picture:
            try:
                with Image.open(io.BytesIO(base64.b64decode(inlined[2], validate=True))) as image:
                    image.load()
                    if image.format != inlined[1].upper():
                        self.fault(f"{image.format} called {inlined[1]}")
            except (OSError, binascii.Error) as error:
                self.fault(f"picture that cannot be read: {error}")
        elif re.match(r"[a-z]+:|//|/", address) or not (self.folder / unquote(address)).is_file():
            self.fault(f"{address[:80]!r} is neither in the page nor a file beside it")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fault(f"<{tag}/>")

    def handle_endtag(self, tag: str) -> None:
        if self.parent != tag:
            self.fault(f"</{tag}> within <{self.parent}>")
        if tag in self.open:
            while self.open.pop() != tag:
                pass
        if tag == "table" and self.cells and len(set(self.cells.pop())) != 1:
            self.fault("a table whose rows have different numbers of cells")

    def handle_data(self, data: str) -> None:
        if self.parent == "style":
            if re.search(r"url\(|@import|<", data):
                self.fault("a style that loads something")
            return
        if self.parent == "title":
            self.titles.append(data)
        if data.strip() and self.parent in NO_TEXT:
            self.fault(f"text within <{self.parent}>: {data!r}")
        if re.search("[<&]", data):
            self.fault(f"not escaped: {data!r}")

    def handle_entityref(self, name: str) -> None:
        if f"{name};" not in html5:
            self.fault(f"unknown entity &{name}")
        self.handle_data("x")

    def handle_charref(self, name: str) -> None:
        self.handle_data("x")

    def handle_comment(self, data: str) -> None:
        self.fault(f"comment {data!r}")

    def unknown_decl(self, data: str) -> None:
        self.fault(f"declaration {data!r}")

    def handle_pi(self, data: str) -> None:
        self.fault(f"instruction {data!r}")


def faults(document: str, folder: Path = Path("/nowhere")) -> list[str]:
    """What is wrong with a page that lies in `folder`."""
    reader = Reader(folder)
    reader.feed(document)
    reader.close()
    found = reader.faults
    if not document.startswith("<!DOCTYPE html>\n"):
        found.append("no <!DOCTYPE html> at the beginning")
    if reader.open:
        found.append(f"not closed: {reader.open}")
    if reader.seen[:2] != ["html", "head"] or not re.search(r'<html lang="[a-z]{2}">', document):
        found.append("no language")
    if '<meta charset="utf-8">' not in document[:1024]:
        found.append("no charset within the first 1024 bytes")
    if reader.seen.count("title") != 1 or not "".join(reader.titles).strip():
        found.append("not one title")
    if reader.seen.count("h1") != 1:
        found.append("not one <h1>")
    if len(set(reader.ids)) < len(reader.ids):
        found.append("an id that occurs twice")
    if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", document):
        found.append("characters that a page cannot hold")
    return found
