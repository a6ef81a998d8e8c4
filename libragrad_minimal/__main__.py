"""`libragrad`, or `python -m libragrad_minimal`: the command line, if what it needs is installed."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run one command; returns the exit status, as `cli.main` does."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where whoever started this has Ctrl-C ignored
        signal.signal(signal.SIGINT, stop)
    try:
        from . import cli

        return cli.main()
    except ModuleNotFoundError as error:
        print(
            f"libragrad: error: the command line needs {error.name}, which is not installed: "
            "pip install 'libragrad_minimal[notebooks]'",
            file=sys.stderr,
        )
        return 2
    finally:
        signal.signal(signal.SIGINT, before)


def stop(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does: KeyboardInterrupt as always, but the end at once while something is being imported.

    There the exception is lost or reworded: callbacks of the import system print and drop it, and modules written in C
    make an ImportError of it.
    """
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"libragrad: stopped\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
