"""Tokens that are parts of characters: bytes by the tokenizers library, characters by how UTF-8 is built."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from libragrad_minimal.token_bytes import bytes_of, whole_characters

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS.filter(bool))
def test_bytes_are_those_that_the_tokenizers_library_writes(text):
    ((token, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert bytes_of(token) == text.encode()


def test_every_byte_has_its_token():
    assert {bytes_of(f"<0x{byte:02X}>") for byte in range(256)} == {bytes([byte]) for byte in range(256)}
    assert bytes_of("\u2581kite") is None and bytes_of("\u7ea2") is None


@given(TEXTS, st.lists(st.integers(0, 60)))
def test_pieces_are_together_the_text_and_each_character_stands_where_it_begins(text, cuts):
    content = text.encode()
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    pieces = [content[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    texts = whole_characters(pieces)
    assert "".join(texts) == text
    for piece, shown in zip(pieces, texts, strict=True):
        assert len(shown) == sum(byte & 0xC0 != 0x80 for byte in piece), "every other byte begins a character"


@pytest.mark.parametrize(
    "pieces, texts",
    [
        ([b"a \xe7\xba", b"\xa2"], ["a \u7ea2", ""]),
        ([b"\xe7\xba"], ["<E7><BA>"]),
        ([b"\xba", b"\xa2b", b"\xf0\x9f"], ["<BA>", "<A2>b", "<F0><9F>"]),
        ([b"\xe7", b"\xe7\xba\xa2"], ["<E7>", "\u7ea2"]),
        ([], []),
    ],
)
def test_what_is_no_whole_character_is_written_out(pieces, texts):
    assert whole_characters(pieces) == texts
