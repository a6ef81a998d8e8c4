"""What a person reads in a terminal: what is done, what takes longer than they wait without a word, what went wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from tqdm import tqdm

from .sentences import shown

PATIENCE = 2.0  # seconds


@contextmanager
def telling(what: str, has_bar: bool = False) -> Iterator[None]:
    """While the block runs: nothing for two seconds, then what it does; in a terminal, how long it has taken, too.

    Args:
        what: the block does, such as "loading vit_tiny".
        has_bar: the block shows a bar of its own in a terminal, so nothing more is said there.
    """
    what, done, begun = shown(what), Event(), time.monotonic()

    def speak() -> None:
        if (has_bar and sys.stderr.isatty()) or done.wait(PATIENCE):
            return
        if not sys.stderr.isatty():
            print(f"{what} ...", file=sys.stderr, flush=True)
            return
        while not done.wait(1.0):
            print(f"\r{what} ... {time.monotonic() - begun:.0f} s", end="", file=sys.stderr, flush=True)
        print("\r\033[K", end="", file=sys.stderr, flush=True)  # what comes next begins on a clean line

    teller = Thread(target=speak, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def tell(line: str) -> None:
    """On stdout; names of files and words of models in it can't rule the terminal."""
    tqdm.write(shown(line))


def complain(message: str) -> None:
    tqdm.write(f"libragrad: {shown(' '.join(message.split()))}", file=sys.stderr)
