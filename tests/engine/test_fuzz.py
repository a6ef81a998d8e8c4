"""Random graphs of up to sixty operations are complete, or refused; nearly all are complete. See fuzz.py."""

import random
from collections import Counter

import pytest
from fuzz import GOOD, POOL, TEMPLATES, Program, outcome, random_steps, shrunk
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

NOT_TO_BE_BALANCED = [template for template, often in POOL.items() if often == 1]
BALANCED = [template for template in TEMPLATES if template not in NOT_TO_BE_BALANCED]
STEPS = st.tuples(st.sampled_from(BALANCED), st.integers(0, 999))


def test_any_graph_is_complete_or_refused():
    counts = Counter()

    # Derandomised: a commit passes or it doesn't; new programs are for the nights of fuzz.py, which also shrinks.
    @settings(
        max_examples=300,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.integers(0, 10**9).map(lambda seed: random_steps(random.Random(seed)))
        | st.lists(STEPS, min_size=1, max_size=60)
    )
    def check(steps):
        kind, text = outcome(Program(steps))
        counts[kind] += 1
        assert kind in GOOD, f"{kind}: {text}\n{shrunk(steps)}"

    check()
    assert counts["complete"] > counts.total() / 2 and counts["refused"] < 0.3 * counts.total(), counts


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_operation_alone(template):
    """What the random graphs are made of is complete by itself: a pool that is refused tests nothing."""
    expected = "refused" if template in NOT_TO_BE_BALANCED else "complete"
    for number in range(3):
        program = Program([(template, number)])
        kind, text = outcome(program)
        assert kind == expected, f"{kind}: {text}\n{program}"
