"""Short stories with a question, its answer, and the words of the story the answer rests on.

Six kinds of question, all generated, so the evidence is known by construction:

    Anna has a red ball. [Ben] has a [blue] [kite]. Carl comes from Peru. What colour is Ben's kite? -> " blue"

Words in square brackets are the evidence: the words that state the fact asked for. Every story also
holds distractors: other facts of the same kind, and sentences that have nothing to do with the question.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

NAMES = "Anna Ben Carl Dora Emma Hugo Kate Leo Mary Paul".split()
COLOURS = "red blue green yellow black white pink brown".split()
THINGS = "ball kite book cup hat lamp box ring".split()
ANIMALS = "cat dog cow pig hen fox bear goat".split()
WORDS = "tree moon fish rain star leaf stone rose".split()
NUMBERS = "one two three four five six seven eight nine ten".split()
_COUNTRIES = "France-Paris Italy-Rome Spain-Madrid Germany-Berlin Japan-Tokyo Egypt-Cairo Greece-Athens Peru-Lima"
CAPITALS = dict(pair.split("-") for pair in _COUNTRIES.split())
_ADJECTIVES = "hot-cold big-small wet-dry fast-slow old-new full-empty happy-sad clean-dirty"
_PAIRS = [pair.split("-") for pair in _ADJECTIVES.split()]
OPPOSITES = dict(_PAIRS) | {second: first for first, second in _PAIRS}


@dataclass(frozen=True)
class Question:
    """A prompt whose next token is known, and why."""

    kind: str
    story: str
    ask: str
    answer: str  # the next token, with its leading space
    distractor: str  # a wrong answer of the same sort, from the story where it offers one
    evidence: tuple[tuple[int, int], ...]  # character spans (start, end) of the evidence words in `prompt`

    @property
    def prompt(self) -> str:
        return self.story + self.ask


@dataclass(frozen=True)
class Query:
    """One question about a story; `evidence` gives the facts it rests on, by number, with the evidence in brackets."""

    ask: str
    answer: str
    distractor: str
    evidence: dict[int, str]


Story = tuple[list[str], list[Query]]  # the facts in order, each ending in a space, and what can be asked


def colour_of(rng: random.Random, size: int) -> Story:
    return _owned(rng, size, COLOURS)


def _owned(rng: random.Random, size: int, adjectives: list[str]) -> Story:
    """Who owns what, and the question of what colour it is."""
    owners, things, words = rng.sample(NAMES, size), rng.sample(THINGS, size), rng.sample(adjectives, size)
    facts, queries = [], []
    for number, (owner, thing, word) in enumerate(zip(owners, things, words, strict=True)):
        article = "an" if word[0] in "aeiou" else "a"
        facts.append(f"{owner} has {article} {word} {thing}. ")
        wrong = words[number - 1] if size > 1 else rng.choice([other for other in adjectives if other != word])
        evidence = {number: f"[{owner}] has {article} [{word}] [{thing}]. "}
        queries.append(Query(f"What colour is {owner}'s {thing}?", f" {word}", f" {wrong}", evidence))
    return facts, queries


def opposite(rng: random.Random, size: int) -> Story:
    facts, _ = _owned(rng, size, list(OPPOSITES))  # adjectives that distract
    return facts, [_by_heart(rng, OPPOSITES, "The opposite of [{}] is") for _ in range(2)]


def _by_heart(rng: random.Random, table: dict[str, str], ask: str) -> Query:
    """A question that no story answers."""
    word, other = rng.sample(list(table), 2)
    return Query(ask.format(word), f" {table[word]}", f" {table[other]}", {})


def capital(rng: random.Random, size: int) -> Story:
    people, countries = rng.sample(NAMES, size), rng.sample(list(CAPITALS), size)
    facts = [f"{person} comes from {country}. " for person, country in zip(people, countries, strict=True)]
    return facts, [_by_heart(rng, CAPITALS, "The capital of [{}] is") for _ in range(2)]


def counting(rng: random.Random, size: int) -> Story:
    kinds = rng.sample(ANIMALS, min(3, size + 1))
    seen = kinds + rng.choices(kinds, k=size - 1)
    rng.shuffle(seen)
    person = rng.choice(NAMES)

    def sentence(marked: str | None) -> str:
        words = [f"a [{animal}]" if animal == marked else f"a {animal}" for animal in seen]
        return f"{person} sees {', '.join(words[:-1])} and {words[-1]}. "

    queries = []
    for animal in kinds:
        count = seen.count(animal)
        wrong = rng.choice([other for other in (count - 1, count + 1) if other > 0])
        queries.append(
            Query(
                f"The number of {animal}s is", f" {NUMBERS[count - 1]}", f" {NUMBERS[wrong - 1]}", {0: sentence(animal)}
            )
        )
    return [sentence(None)], queries


def ordering(rng: random.Random, size: int) -> Story:
    animals = rng.sample(ANIMALS, size + 1)

    def sentence(*marked: str) -> str:
        words = [f"the [{animal}]" if animal in marked else f"the {animal}" for animal in animals]
        return f"First comes {', then '.join(words)}. "

    here = rng.randrange(len(animals) - 1)
    back = rng.randrange(1, len(animals))
    queries = [
        Query("The last is the", f" {animals[-1]}", f" {animals[0]}", {0: sentence(animals[-1])}),
        Query(f"Right after the {animals[here]} comes the", f" {animals[here + 1]}", f" {animals[max(here - 1, 0)]}",
              {0: sentence(animals[here], animals[here + 1])}),
        Query(f"Right before the {animals[back]} comes the", f" {animals[back - 1]}",
              f" {animals[min(back + 1, len(animals) - 1)]}", {0: sentence(animals[back], animals[back - 1])}),
    ]  # fmt: skip
    return [sentence()], queries


def copying(rng: random.Random, size: int) -> Story:
    words = rng.sample(WORDS, size + 2)
    here = rng.randrange(1, len(words))
    marked = " ".join(f"[{word}]" if number in (here - 1, here) else word for number, word in enumerate(words))
    query = Query(f"Again: {' '.join(words[:here])}", f" {words[here]}", f" {words[here - 2]}", {0: f"Say: {marked}. "})
    return [f"Say: {' '.join(words)}. "], [query]


KINDS: dict[str, Callable[[random.Random, int], Story]] = {
    "colour": colour_of,
    "opposite": opposite,
    "capital": capital,
    "counting": counting,
    "ordering": ordering,
    "copying": copying,
}
UNRELATED = {  # which kinds of sentence can be slipped into a story without touching its answers
    "colour": ("capital",),
    "opposite": ("capital",),
    "capital": ("colour",),
    "counting": ("colour", "capital"),
    "ordering": ("colour", "capital"),
    "copying": ("colour", "capital"),
}


def make_questions(rng: random.Random, kind: str, size: int, unrelated: int = 0, count: int = 1) -> list[Question]:
    """`count` questions (or as many as there are) about one story of `size` facts and `unrelated` other sentences."""
    facts, queries = KINDS[kind](rng, size)
    order: list[int | str] = list(range(len(facts)))  # numbers stand for facts, text for unrelated sentences
    for _ in range(unrelated):
        other = KINDS[rng.choice(UNRELATED[kind])](rng, 1)[0][0]
        order.insert(rng.randint(0, len(order)), other)
    questions = []
    for query in rng.sample(queries, min(count, len(queries))):
        story = (item if isinstance(item, str) else query.evidence.get(item, facts[item]) for item in order)
        story, in_story = _read_brackets("".join(story))
        ask, in_ask = _read_brackets(query.ask)
        evidence = (*in_story, *((start + len(story), end + len(story)) for start, end in in_ask))
        questions.append(Question(kind, story, ask, query.answer, query.distractor, evidence))
    return questions


def held_out(question: Question) -> bool:
    """Whether a question is kept for testing: one prompt in twenty, chosen by its text, is never trained on."""
    return zlib.crc32(question.prompt.encode()) % 20 == 0


def held_out_questions(count: int, seed: int = 0) -> list[Question]:
    """`count` different held-out questions, the kinds in turn; stories of 2 or 3 facts, at most one unrelated."""
    rng = random.Random(seed)
    kinds, found = list(KINDS), {}
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        (question,) = make_questions(rng, kind, size=rng.randint(2, 3), unrelated=rng.randint(0, 1))
        if held_out(question):
            found[question.prompt] = question
    return list(found.values())


def _read_brackets(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Take the brackets out of `marked` and say where they were."""
    text, spans = "", []
    for part in re.split(r"(\[[^\]]*\])", marked):
        if part.startswith("["):
            part = part[1:-1]
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, tuple(spans)
