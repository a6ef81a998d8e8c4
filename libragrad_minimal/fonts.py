"""A font for every character: matplotlib's own has no Chinese, Japanese, Korean and much else; a system font may."""

from __future__ import annotations

import warnings
from functools import cache
from unicodedata import category

from matplotlib.font_manager import findSystemFonts, fontManager, get_font

OWN, OWN_MONO = "DejaVu Sans", "DejaVu Sans Mono"  # shipped with matplotlib
FIRST = ("CJK", "Noto", "Droid", "Hei", "Gothic", "Song", "Ming", "Unicode")  # families that have many scripts
UNDRAWABLE = ("emoji", "last resort", "blank")  # coloured glyphs, which matplotlib can't draw, or none at all


def families_for(text: str, own: str = OWN) -> list[str]:
    """The families that draw a text together, `own` first, as `fontfamily=` takes them.

    Warns of characters that no font of this machine has: they are drawn as boxes.
    """
    families = [own]
    missing = {character for character in text if needs_glyph(character)} - characters(file_of(own))
    for family, file in system_fonts() if missing else ():
        if found := missing & characters(file):
            families.append(family)
            missing -= found
        if not missing:
            break
    if missing:
        listed = "".join(sorted(missing)[:10])
        warnings.warn(
            f"no font on this machine has {listed}: drawn as boxes; install one that has, on Debian fonts-noto-cjk "
            "for Chinese, Japanese and Korean, or write HTML, which a browser draws",
            stacklevel=3,
        )
    return families


def needs_glyph(character: str) -> bool:
    return not character.isspace() and category(character) not in ("Cc", "Cf")


def file_of(family: str) -> str:
    return fontManager.findfont(family)


@cache
def characters(file: str) -> frozenset[str]:
    """What a font file can draw; none for one that can't be read."""
    try:
        return frozenset(map(chr, get_font(file).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def system_fonts() -> list[tuple[str, str]]:
    """(family, file), likely ones first. matplotlib remembers its list of them: those installed since are added."""
    known = {entry.fname for entry in fontManager.ttflist}
    for file in findSystemFonts():
        if file not in known:
            try:
                fontManager.addfont(file)
            except (OSError, RuntimeError, ValueError):
                continue
    regular = [e for e in fontManager.ttflist if e.style == "normal" and e.weight in (400, "normal", "regular")]
    usable = {e.name: e.fname for e in regular if not any(word in e.name.lower() for word in UNDRAWABLE)}
    return sorted(usable.items(), key=lambda entry: (not any(word in entry[0] for word in FIRST), entry[0]))
