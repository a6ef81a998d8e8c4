"""Classes by name: synonyms first, nothing guessed where a word names two."""

import pytest

from libragrad_minimal.class_names import find_class


@pytest.fixture(scope="module")
def imagenet() -> list[str]:
    info = pytest.importorskip("timm.data").ImageNetInfo()
    return [info.index_to_description(number) for number in range(1000)]


@pytest.mark.parametrize(
    ("typed", "number"),
    [
        *(("tabby", 281), ("Tabby Cat", 281), ("ESPRESSO", 967), ("giant panda", 388), ("red panda", 387)),
        *(("Cardigan Welsh corgi", 264), ("ring-tailed lemur", 383), ("ring tailed lemur", 383), ("tank suit", 639)),
        *(("mouth harp", 593), ("Siamese", 284), ("corgi pembroke", None), ("999", 999), ("0", 0)),
        *(("lemur", 383), ("egyptian_cat", 285), (" 7 ", 7)),
    ],
)
def test_the_class_that_is_meant(typed, number, imagenet):
    if number is None:
        with pytest.raises(ValueError, match="knows no class"):
            find_class(typed, imagenet, 1000, "vit")
    else:
        assert find_class(typed, imagenet, 1000, "vit") == number


@pytest.mark.parametrize(
    ("typed", "numbers"),
    [
        *(("panda", (387, 388)), ("crane", (134, 517)), ("harp", (593, 594)), ("cardigan", (264, 474))),
        *(("maillot", (638, 639)), ("missile", (657, 744)), ("cat", (281, 282, 283, 284, 285, 383, 387))),
    ],
)
def test_words_that_name_several_are_listed_and_refused(typed, numbers, imagenet):
    with pytest.raises(ValueError, match=f"names {len(numbers)} classes of vit") as error:
        find_class(typed, imagenet, 1000, "vit")
    assert all(f"{number} {imagenet[number]}" in str(error.value) for number in numbers)


def test_a_word_in_very_many_classes_is_not_listed_whole(imagenet):
    with pytest.raises(ValueError, match=r"names \d\d classes .*; and \d+ more"):
        find_class("terrier", imagenet, 1000, "vit")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("tabbby", "tabby (281)"), ("expresso", "espresso (967)"), ("golden retreiver", "(207)")]
    + [("retreiver", "retriever,"), ("labradr", "labrador"), ("terier", "terrier,")],
)
def test_typos_get_suggestions(typed, meant, imagenet):
    with pytest.raises(ValueError, match="did you mean") as error:
        find_class(typed, imagenet, 1000, "vit")
    assert meant in str(error.value)


@pytest.mark.parametrize(
    ("typed", "names", "message"),
    [
        ("1000", ["a"] * 1000, "0..999, not 1000"),
        ("-1", ["a"] * 1000, "0..999, not -1"),
        ("1.5", ["a"] * 1000, "knows no class '1.5'"),
        ("²", ["a"] * 1000, "knows no class"),
        ("", ["a, b"] * 30, "knows no class ''"),
        ("cat", None, "without class names: give the class as a number, 0..1000"),
        ("dog", ["cat", "star"], "it knows cat, star"),
    ],
)
def test_what_is_no_class(typed, names, message):
    with pytest.raises(ValueError, match=message):
        find_class(typed, names, len(names) if names else 1001, "vit")
