"""What strangers may have written where settings are expected."""

import copy
import random

HOSTILE = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 10**30, 0.5, -1.5, 1e300, float("nan"), float("inf"), "", "8",
    "x" * 1000, "owner/kernel", "../../etc/passwd", "\x1b[31m\n\u202e", [], [1, 2], ["a"], {}, {"a": 1}, [[[[]]]],
    10**400,
]  # fmt: skip


NAMES = [
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    "trust_remote_code",
    "norm_layer",
    "dtype",
    "embed_dim",
]


def spoiled(value, rng: random.Random):
    """A copy in which something, at any depth, is missing, more, or another."""
    if rng.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return rng.choice(HOSTILE)
    changed = copy.copy(value)
    key = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    what = rng.random()
    if what < 0.15:
        del changed[key]
    elif what < 0.3 and isinstance(changed, dict):
        changed[rng.choice(NAMES)] = rng.choice(HOSTILE)
    elif what < 0.4 and isinstance(changed, list):
        changed.insert(key, rng.choice(HOSTILE))
    else:
        changed[key] = spoiled(changed[key], rng)
    return changed
