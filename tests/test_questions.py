"""The generated questions and the stored prompts: answers read off by other means, nothing held out is trained on."""

import json
import random
import re
from pathlib import Path

import pytest
import questions  # lies in data/, beside the script that trains on it

from libragrad_minimal.models import DATA


def test_prompts_are_many_and_distinct():
    groups = json.loads((DATA / "prompts.json").read_text())
    assert len(groups["llama"]) == 10 and sum(map(len, groups["llama"].values())) >= 60
    assert set(groups["demo llama"]) == set(questions.KINDS)
    for model in ("llama", "demo llama"):
        prompts = [prompt for group in groups[model].values() for prompt in group]
        assert len({prompt["prompt"] for prompt in prompts}) == len(prompts)
        assert all(prompt["expected"] != prompt["contrast"] for prompt in prompts)


def solve(question) -> str:
    """The answer read off the text by other means than the generator's."""
    text, ask = question.prompt, question.ask
    if question.kind in ("opposite", "capital"):
        table = questions.OPPOSITES if question.kind == "opposite" else questions.CAPITALS
        return table[re.search(r"of (\w+) is", ask).group(1)]
    if question.kind == "colour":
        owner, thing = re.search(r"(\w+)'s (\w+)\?", ask).groups()
        return re.search(rf"{owner} has a (\w+) {thing}\.", text).group(1)
    if question.kind == "counting":
        animal = re.search(r"number of (\w+)s is", ask).group(1)
        return questions.NUMBERS[len(re.findall(rf"a {animal}\b", text)) - 1]
    if question.kind == "copying":
        said, again = re.search(r"Say: ([^.]*)\.", text).group(1).split(), ask.split()[1:]
        return said[len(again)]
    assert question.kind == "ordering"
    row = re.findall(r"the (\w+)", re.search(r"First comes ([^.]*)\.", text).group(1))
    if "last" in ask:
        return row[-1]
    step = 1 if "after" in ask else -1
    return row[row.index(re.search(r"(?:after|before) the (\w+)", ask).group(1)) + step]


@pytest.mark.parametrize("kind", list(questions.KINDS))
def test_answers_and_evidence_are_right(kind):
    rng = random.Random(3)
    for _ in range(300):
        for question in questions.make_questions(rng, kind, rng.randint(1, 4), rng.randint(0, 2), count=3):
            assert question.answer == f" {solve(question)}"
            assert question.distractor != question.answer
            words = [question.prompt[start:end] for start, end in question.evidence]
            assert words and all(re.fullmatch(r"\w+", word) for word in words)


def test_held_out_questions_are_never_trained_on():
    train_llama = pytest.importorskip("train_llama")
    kept = tuple(question.prompt + question.answer for question in questions.held_out_questions(300))
    rng = random.Random(0)
    for _ in range(6000):
        (story, _), *rest = train_llama.training_text(rng)
        story = story.removeprefix(train_llama.BOS)
        for (ask, _), (answer, _) in zip(rest[::3], rest[1::3], strict=False):  # question, answer, full stop
            assert not f"{story}{ask}{answer}".startswith(kept)
    shipped = json.loads(Path(DATA / "evidence_questions.json").read_text())
    assert len(shipped) >= 200 and all(questions.held_out(as_question(entry)) for entry in shipped)


def as_question(entry: dict) -> questions.Question:
    return questions.Question(**{name: value for name, value in entry.items() if name != "prompt"})
