"""What a .gguf file says of itself, read within its own bounds.

Whoever reads a model from such a file trusts its counts: of settings, of an array's items, of a tensor's numbers. Here
each is held against the file's length first, since some libraries go on reading where a file has ended. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from .sentences import one_line

VERSIONS = (2, 3)
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # a value's type -> struct's
TEXT, ARRAY = 8, 9
LONGEST = 1 << 16  # of a name; and the most dimensions of a tensor is 4
ALIGNMENT = 32  # of tensors, where the file names no other


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape (rows first, as PyTorch counts), all of them known to lie within the file.

    Args:
        path: a .gguf file.
    Raises:
        ValueError: it is none, or is cut short or damaged: something in it would lie beyond its end.
        OSError: it can't be opened.
    """
    try:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a GGUF file")
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return _Reader(content).tensor_shapes()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as GGUF: {one_line(error)}") from error


class _Reader:
    def __init__(self, content: Any):
        self.content, self.place = content, 0

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        magic, (version,) = self.bytes(4), self.numbers("I")
        if magic != b"GGUF" or version not in VERSIONS:
            raise ValueError("it doesn't begin as a GGUF file of version 2 or 3 does")
        tensors, settings = self.numbers("QQ")
        known = dict(self.setting() for _ in self.counted(settings))
        alignment = known.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("its general.alignment is no number of bytes")
        found = [self.tensor() for _ in self.counted(tensors)]
        begin = -(-self.place // alignment) * alignment
        for name, shape, kind, offset in found:
            items, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if begin + offset + prod(shape) // items * size > len(self.content):
                raise ValueError(f"it ends before the numbers of {name!r} do: download it again")
        return {name: shape for name, shape, _, _ in found}

    def setting(self) -> tuple[str, Any]:
        name = self.text()
        (kind,) = self.numbers("I")
        return name, self.value(kind)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        (dimensions,) = self.numbers("I")
        shape = self.numbers("Q" * min(dimensions, LONGEST))
        kind, offset = self.numbers("IQ")
        return name, shape[::-1], kind, offset

    def value(self, kind: int) -> Any:
        """A number or a text; of an array nothing but that it is there."""
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind])[0]
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        kind, count = self.numbers("IQ")
        if kind in NUMBERS:
            self.bytes(count * struct.calcsize(f"<{NUMBERS[kind]}"))
            return None
        for _ in self.counted(count):
            self.text() if kind == TEXT else self.value(kind)
        return None

    def text(self) -> str:
        (length,) = self.numbers("Q")
        return self.bytes(length).decode("utf-8")

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))

    def counted(self, count: int) -> range:
        if count > len(self.content):  # each takes a byte at least
            raise ValueError("it names more parts than it has bytes: it is damaged")
        return range(count)

    def bytes(self, count: int) -> bytes:
        begin, self.place = self.place, self.place + count
        if self.place > len(self.content):
            raise ValueError("it ends in the middle of its header: download it again")
        return self.content[begin : self.place]
