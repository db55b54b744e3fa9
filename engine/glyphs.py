"""Names in scripts that matplotlib's own font lacks, drawn with what else is installed."""

from __future__ import annotations

import functools
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry


def save(figure: Figure, to: str | Path | IO[bytes], **options: Any) -> None:
    """`figure.savefig(to, **options)`, its texts with further installed fonts where the first one lacks characters.

    Those that no font has are drawn as boxes; stderr says so in a line, once for the same characters.
    """
    from matplotlib.text import Text

    texts: list[Any] = figure.findobj(Text)
    characters = frozenset("".join(text.get_text() for text in texts))
    # no font has those that control a terminal or a text, nor half of a pair
    if families := _families(
        frozenset(one for one in characters if unicodedata.category(one) not in ("Cc", "Cf", "Cs"))
    ):
        for text in texts:
            text.set_fontfamily([*text.get_fontfamily(), *families])
    with warnings.catch_warnings():
        lacks = "Glyph .* missing from|Matplotlib currently does not support"
        warnings.filterwarnings("ignore", message=lacks, category=UserWarning)
        figure.savefig(to, **options)


@functools.cache
def _families(needed: frozenset[str]) -> tuple[str, ...]:
    """The installed fonts that have what of these characters the first one lacks."""
    from matplotlib import get_cachedir
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    missing = needed - _characters(findfont(FontProperties()))
    if not missing:
        return ()
    regular = {font.name: font.fname for font in fontManager.ttflist if _is_regular(font)}
    found = []
    for name in sorted(regular, key=lambda name: (not name.startswith("Noto Sans"), name)):
        if missing and missing & (there := _characters(regular[name])):
            found.append(name)
            missing -= there
    if missing:
        print(
            f"note: no installed font has {' '.join(sorted(missing)[:10])}{' ...' if len(missing) > 10 else ''}, "
            "which pictures show as boxes; install one, such as Noto Sans CJK, and remove matplotlib's list of fonts, "
            f"{get_cachedir()}/fontlist-*.json",
            file=sys.stderr,
        )
    return tuple(found)


def _is_regular(font: FontEntry) -> bool:
    """Whether matplotlib takes it without a word about its weight, and it has letters: Last Resort has boxes alone."""
    upright = font.style == "normal" and font.stretch == "normal" and font.weight in (400, "normal", "regular")
    return upright and not font.name.startswith("Last Resort")


def _characters(path: str) -> frozenset[str]:
    """Those that a font has; none where its file is not there any more, or no font."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(map(chr, get_font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()
