"""Short stories with a question, its answer, and the words of the story the answer rests on.

Nine kinds of question, all generated, so the evidence is known by construction:

    Anna has a red ball. [Ben] has a [blue] [kite]. Anna drinks tea. What colour is Ben's kite? -> " blue"

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
DRINKS = "tea milk water juice coffee wine cocoa soup".split()
SURNAMES = "Baker Miller Cook Fisher Hunter Mason Potter Smith".split()
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


Story = tuple[list[str], list[Query]]  # the facts in order, each ending in a space or newline, and what can be asked


def colour_of(rng: random.Random, size: int) -> Story:
    return _adjective(rng, size, dict(zip(COLOURS, COLOURS, strict=True)), "What colour is {}'s {}?")


def opposite(rng: random.Random, size: int) -> Story:
    facts, queries = _adjective(rng, size, OPPOSITES, "What is the opposite of {}'s {}?")
    return facts, [*queries, _by_heart(rng, OPPOSITES, "The opposite of [{}] is")]


def _adjective(rng: random.Random, size: int, table: dict[str, str], ask: str) -> Story:
    """Find the word in front of a thing, then its partner in a table."""
    owners, things, words = rng.sample(NAMES, size), rng.sample(THINGS, size), rng.sample(list(table), size)
    facts, queries = [], []
    for number, (owner, thing, word) in enumerate(zip(owners, things, words, strict=True)):
        facts.append(f"{owner} has a {word} {thing}. ")
        wrong = words[number - 1] if size > 1 else rng.choice([other for other in table if other != word])
        evidence = {number: f"[{owner}] has a [{word}] [{thing}]. "}
        queries.append(Query(ask.format(owner, thing), f" {table[word]}", f" {table[wrong]}", evidence))
    return facts, queries


def _by_heart(rng: random.Random, table: dict[str, str], ask: str) -> Query:
    """A question that no story answers."""
    word, other = rng.sample(list(table), 2)
    return Query(ask.format(word), f" {table[word]}", f" {table[other]}", {})


def capital(rng: random.Random, size: int) -> Story:
    people, countries = rng.sample(NAMES, size), rng.sample(list(CAPITALS), size)
    facts = [f"{person} comes from {country}. " for person, country in zip(people, countries, strict=True)]
    return facts, [_by_heart(rng, CAPITALS, "The capital of [{}] is") for _ in range(2)]


def surname(rng: random.Random, size: int) -> Story:
    people, names = rng.sample(NAMES, size), rng.sample(SURNAMES, size)
    facts, queries = [], []
    for number, (person, name) in enumerate(zip(people, names, strict=True)):
        facts.append(f"We met {person} {name}. ")
        wrong = names[number - 1] if size > 1 else rng.choice([other for other in SURNAMES if other != name])
        evidence = {number: f"We met [{person}] [{name}]. "}
        queries.append(Query(f"Then we saw {person}", f" {name}", f" {wrong}", evidence))
    return facts, queries


def drink(rng: random.Random, size: int) -> Story:
    return _latest(rng, size, NAMES, DRINKS, "{} drinks {}. ", "And {}?")


def code(rng: random.Random, size: int) -> Story:
    return _latest(rng, size, THINGS, "0 1 2 3 4 5 6 7 8 9".split(), "{} = {}\n", "# {}:")


def _latest(rng: random.Random, size: int, keys: list[str], values: list[str], fact: str, ask: str) -> Story:
    """What was said last about somebody or something; with two facts or more, one of them may be spoken of twice."""
    known = rng.sample(keys, max(1, size - rng.randint(0, 1)))
    order = known + rng.choices(known, k=size - len(known))
    rng.shuffle(order)
    said = rng.sample(values, size)
    facts = [fact.format(key, value) for key, value in zip(order, said, strict=True)]
    queries = []
    for key in known:
        last = max(number for number, other in enumerate(order) if other == key)
        wrong = rng.choice([value for value in (said if size > 1 else values) if value != said[last]])
        evidence = {last: fact.format(f"[{key}]", f"[{said[last]}]")}
        queries.append(Query(ask.format(key), f" {said[last]}", f" {wrong}", evidence))
    return facts, queries


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
    "surname": surname,
    "drink": drink,
    "counting": counting,
    "ordering": ordering,
    "copying": copying,
    "code": code,
}
UNRELATED = {  # which kinds of sentence can be slipped into a story without touching its answers
    "colour": ("drink", "surname", "capital"),
    "opposite": ("drink", "surname", "capital"),
    "capital": ("colour", "drink", "surname"),
    "surname": ("colour", "drink", "capital"),
    "drink": ("colour", "surname", "capital"),
    "counting": ("colour", "drink", "capital"),
    "ordering": ("colour", "drink", "capital"),
    "copying": ("colour", "drink", "capital"),
    "code": (),  # a program holds nothing but assignments
}


def make_questions(rng: random.Random, kind: str, size: int, unrelated: int = 0, count: int = 1) -> list[Question]:
    """`count` questions (or as many as there are) about one story of `size` facts and `unrelated` other sentences."""
    facts, queries = KINDS[kind](rng, size)
    order: list[int | str] = list(range(len(facts)))  # numbers stand for facts, text for unrelated sentences
    for _ in range(unrelated if UNRELATED[kind] else 0):
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
