"""Strangers' words within our messages and pages."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from html import escape
from unicodedata import category

TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of reading
UNWRITABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, ends of lines and paragraphs


def shown(text: object) -> str:
    """A text with its control characters written out, [U+202E]: some turn what follows around, so that it lies; some
    rule a terminal."""
    return "".join(code_point(c) if c in TURNING or category(c) in UNWRITABLE else c for c in str(text))


def code_point(character: str) -> str:
    return f"[U+{ord(character):04X}]"


def check_text(text: str, what: str) -> None:
    """Raises ValueError if there are halves of characters in it, which Python makes of bytes that are no text."""
    if any(category(character) == "Cs" for character in text):
        raise ValueError(f"{what} isn't UTF-8: it holds bytes that are no text")


def in_html(text: object) -> str:
    """A text as it stands in HTML, between tags or as an attribute."""
    return escape(shown(text))


def similar_ones(name: str, known: Sequence[str], cutoff: float = 0.6) -> str:
    """What a name that isn't known could have been, as a part of a sentence."""
    return f"similar ones are {', '.join(get_close_matches(name, known, cutoff=cutoff)) or 'none'}"


def one_line(text: object, longest: int = 300) -> str:
    """On one line, not too long, and without what moves a terminal's cursor or turns the direction of reading."""
    words = " ".join(str(text).split())
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words[:longest])
    return shown + "..." * (len(words) > longest)
