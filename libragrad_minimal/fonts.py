"""A font for every character: matplotlib's own has no Chinese, Japanese, Korean and much else; a system font may."""

from __future__ import annotations

import warnings
from functools import cache
from unicodedata import category, east_asian_width

from matplotlib.font_manager import FontEntry, findSystemFonts, fontManager, get_font, weight_dict

OWN, OWN_MONO = "DejaVu Sans", "DejaVu Sans Mono"  # shipped with matplotlib
FIRST = ("CJK", "Noto", "Droid", "Hei", "Gothic", "Song", "Ming", "Unicode")  # families that have many scripts
LISTED = 40  # characters in a warning
REGULAR = weight_dict["regular"]
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
        listed = "".join(sorted(missing)[:LISTED]) + "..." * (len(missing) > LISTED)
        packages = " and ".join(sorted(set(map(package, missing))))
        warnings.warn(
            f"no font on this machine has {listed}: drawn as boxes; install one that has (on Debian {packages})",
            stacklevel=3,
        )
    return families


def package(character: str) -> str:
    """Debian's, with a font that has the character and that matplotlib can draw."""
    if category(character) == "So":
        return "fonts-symbola"  # its emoji are outlines; matplotlib draws no coloured ones
    return "fonts-noto-cjk" if east_asian_width(character) in "WF" else "fonts-noto-core"


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
    upright = (entry for entry in fontManager.ttflist if entry.style == "normal")
    usable = {
        entry.name: entry.fname
        for entry in sorted(upright, key=lambda entry: -abs(weight_of(entry) - REGULAR))
        if not any(word in entry.name.lower() for word in UNDRAWABLE)
    }  # of each family the weight nearest to regular; there are some that have no other than medium
    return sorted(usable.items(), key=lambda entry: (not any(word in entry[0] for word in FIRST), entry[0]))


def weight_of(entry: FontEntry) -> int:
    return weight_dict[entry.weight] if isinstance(entry.weight, str) else entry.weight
