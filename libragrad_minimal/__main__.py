"""`libragrad`, or `python -m libragrad_minimal`: the command line, if what it needs is installed."""

import sys


def main() -> int:
    """Run one command; returns the exit status, as `cli.main` does."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        print(
            f"libragrad: error: the command line needs {error.name}, which is not installed: "
            "pip install 'libragrad_minimal[notebooks]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("libragrad: stopped", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
