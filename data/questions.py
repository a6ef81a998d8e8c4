"""Short stories with a question, its answer, and the words of the story the answer rests on.

Eight kinds of question, all generated, so the evidence is known by construction:

    Anna has a red ball. [Ben] has a [blue] [kite]. Anna is in the park. The colour of Ben's kite is -> " blue"

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
PLACES = "kitchen garden park school shop museum forest station".split()
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
    owners, things, colours = (rng.sample(words, size) for words in (NAMES, THINGS, COLOURS))
    facts, queries = [], []
    for number, (owner, thing, colour) in enumerate(zip(owners, things, colours, strict=True)):
        facts.append(f"{owner} has a {colour} {thing}. ")
        wrong = colours[number - 1] if size > 1 else rng.choice([c for c in COLOURS if c != colour])
        evidence = {number: f"[{owner}] has a [{colour}] [{thing}]. "}
        queries.append(Query(f"The colour of {owner}'s {thing} is", f" {colour}", f" {wrong}", evidence))
    return facts, queries


def place_of(rng: random.Random, size: int) -> Story:
    people = rng.sample(NAMES, max(1, size - 1))
    walkers = people + rng.choices(people, k=size - len(people))  # with two facts or more, somebody may move twice
    rng.shuffle(walkers)
    places = rng.sample(PLACES, size)
    facts = [f"{walker} went to the {place}. " for walker, place in zip(walkers, places, strict=True)]
    queries = []
    for person in people:
        last = max(number for number, walker in enumerate(walkers) if walker == person)
        wrong = rng.choice([place for place in (places if size > 1 else PLACES) if place != places[last]])
        evidence = {last: f"[{person}] went to the [{places[last]}]. "}
        queries.append(Query(f"Now {person} is in the", f" {places[last]}", f" {wrong}", evidence))
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


def opposite(rng: random.Random, size: int) -> Story:
    return _looked_up(rng, size, OPPOSITES, "{} says {}. ", "The opposite of {}'s word is", "The opposite of [{}] is")


def capital(rng: random.Random, size: int) -> Story:
    return _looked_up(
        rng, size, CAPITALS, "{} comes from {}. ", "The capital of {}'s country is", "The capital of [{}] is"
    )


def _looked_up(rng: random.Random, size: int, table: dict, fact: str, indirect: str, direct: str) -> Story:
    """Find a person's word in the story, then its partner in a table the model must have learned by heart."""
    people, words = rng.sample(NAMES, size), rng.sample(sorted(table), size)
    facts, queries = [], []
    for number, (person, word) in enumerate(zip(people, words, strict=True)):
        facts.append(fact.format(person, word))
        wrong = words[number - 1] if size > 1 else rng.choice([other for other in sorted(table) if other != word])
        evidence = {number: fact.format(f"[{person}]", f"[{word}]")}
        queries.append(Query(indirect.format(person), f" {table[word]}", f" {table[wrong]}", evidence))
    free = rng.choice([word for word in sorted(table) if word not in words])
    queries.append(Query(direct.format(free), f" {table[free]}", f" {table[words[0]]}", {}))
    return facts, queries


def code(rng: random.Random, size: int) -> Story:
    variables = rng.sample(THINGS, max(1, size - 1))
    assigned = variables + rng.choices(variables, k=size - len(variables))
    rng.shuffle(assigned)
    values = rng.sample(range(10), size)
    facts = [f"{variable} = {value}\n" for variable, value in zip(assigned, values, strict=True)]
    queries = []
    for variable in variables:
        last = max(number for number, other in enumerate(assigned) if other == variable)
        wrong = rng.choice([value for value in (values if size > 1 else range(10)) if value != values[last]])
        evidence = {last: f"[{variable}] = [{values[last]}]\n"}
        queries.append(Query(f"print({variable}) #", f" {values[last]}", f" {wrong}", evidence))
    return facts, queries


KINDS: dict[str, Callable[[random.Random, int], Story]] = {
    "colour": colour_of,
    "place": place_of,
    "counting": counting,
    "ordering": ordering,
    "copying": copying,
    "opposite": opposite,
    "capital": capital,
    "code": code,
}
UNRELATED = {  # which kinds of sentence can be slipped into a story without touching its answers
    "colour": ("place", "opposite", "capital"),
    "place": ("colour", "opposite", "capital"),
    "counting": ("colour", "place", "capital"),
    "ordering": ("colour", "place", "capital"),
    "copying": ("colour", "place", "capital"),
    "opposite": ("colour", "place", "capital"),
    "capital": ("colour", "place", "opposite"),
    "code": ("code",),  # a program holds nothing but assignments
}


def make_questions(rng: random.Random, kind: str, size: int, unrelated: int = 0, count: int = 1) -> list[Question]:
    """`count` questions (or as many as there are) about one story of `size` facts and `unrelated` other sentences."""
    facts, queries = KINDS[kind](rng, size)
    order: list[int | str] = list(range(len(facts)))  # numbers stand for facts, text for unrelated sentences
    for _ in range(0 if kind == "code" else unrelated):
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
