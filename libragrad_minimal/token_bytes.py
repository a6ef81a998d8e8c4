"""Characters whose bytes lie in several tokens: tokenizers cut those they seldom met, of Chinese or an emoji."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

# Byte-level tokenizers (GPT-2's, Llama 3's) write a byte as a character that can be seen: one that has a shape as
# itself, the others as U+0100 and on.
SHAPED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
UNSHAPED = [byte for byte in range(256) if byte not in SHAPED]
BYTES = {chr(byte): byte for byte in SHAPED} | {chr(256 + place): byte for place, byte in enumerate(UNSHAPED)}


def bytes_of(token: str) -> bytes | None:
    """The bytes that a token of a vocabulary stands for, "<0xE7>" or "ç"; None if it isn't written in bytes."""
    if written := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's way
        return bytes.fromhex(written[1])
    return bytes(BYTES[letter] for letter in token) if BYTES.keys() >= set(token) else None


def whole_characters(pieces: Sequence[bytes]) -> list[str]:
    """Each character whole, in the text of the piece that it begins in: b"\\xe7\\xba", b"\\xa2" are "红", "".

    Bytes that are no character's are written out, <E7>.
    """
    starts = [0, *accumulate(map(len, pieces))][:-1]
    texts = [""] * len(pieces)
    for start, character in characters(b"".join(pieces)):
        texts[bisect_right(starts, start) - 1] += character
    return texts


def characters(content: bytes) -> Iterator[tuple[int, str]]:
    """(where it begins, the character)."""
    start = 0
    for character in content.decode("utf-8", "surrogateescape"):
        lone = "\udc80" <= character <= "\udcff"  # how that way of decoding marks a byte that is no character's
        yield start, f"<{content[start]:02X}>" if lone else character
        start += 1 if lone else len(character.encode())
