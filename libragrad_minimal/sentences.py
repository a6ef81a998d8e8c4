"""Strangers' words within our messages."""

from __future__ import annotations


def one_line(text: object, longest: int = 300) -> str:
    """On one line, not too long, and without what moves a terminal's cursor or turns the direction of reading."""
    words = " ".join(str(text).split())
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words[:longest])
    return shown + "..." * (len(words) > longest)
