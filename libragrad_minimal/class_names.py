"""A class by what people call it: exact synonyms first, and nothing is guessed where a word names two classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

LISTED = 12  # classes in an error message


def find_class(wanted: str, names: Sequence[str] | None, count: int, model: str) -> int:
    """The number of a class.

    Args:
        wanted: its number, one of its synonyms, or words of one.
        names: of the classes, each with its synonyms separated by commas; None where the model has none.
        count: how many classes there are.
        model: its name, for messages.
    Raises:
        ValueError: no class is called so (with the closest names), or several are (with their numbers).
    """
    if re.fullmatch(r"-?\d+", wanted.strip()):
        if not 0 <= int(wanted) < count:
            raise ValueError(f"{model} has classes 0..{count - 1}, not {wanted}")
        return int(wanted)
    if not names:
        raise ValueError(f"{model} comes without class names: give the class as a number, 0..{count - 1}")
    synonyms = [[words(part) for part in name.split(",")] for name in names]
    asked = words(wanted)
    exact = [number for number, parts in enumerate(synonyms) if asked in parts]
    inside = [number for number, parts in enumerate(synonyms) if any(f" {asked} " in f" {part} " for part in parts)]
    found = exact or (inside if asked else [])
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(f"{number} {names[number]}" for number in found[:LISTED])
        more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise ValueError(f"{wanted!r} names {len(found)} classes of {model}: {listed}{more}. Give the number of one")
    if len(names) < 20:
        raise ValueError(f"{model} knows no class {wanted!r}: it knows {', '.join(names)}")
    close = similar(asked, synonyms)
    advice = f"did you mean {', '.join(close)}?" if close else f"it has {count}, such as {names[0]}"
    raise ValueError(f"{model} knows no class {wanted!r}: {advice}")


def similar(asked: str, synonyms: Sequence[Sequence[str]]) -> list[str]:
    """What a misspelled name could be: names with their numbers, and words that one name has or several share."""
    parts = {part: f"{part} ({number})" for number, parts in enumerate(synonyms) for part in parts}
    known = {word: word for part in parts for word in part.split()} | parts
    return [known[name] for name in get_close_matches(asked, known, n=4)]


def words(name: str) -> str:
    """In small letters, whatever stands between the words."""
    return " ".join(re.findall(r"[^\W_]+", name.lower()))
