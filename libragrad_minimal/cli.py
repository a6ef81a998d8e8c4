"""The entry to the command line: it finds the command that is asked for, and turns every fault into one line.

Nothing here needs torch, so that `libragrad --help` answers at once; commands.py is imported for a command.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from io import TextIOWrapper

import click

from .progress import complain, telling

COMMANDS = {
    "image": "Which parts of a photograph speak for a class.",
    "clip": "Which parts of a photograph a sentence speaks of.",
    "text": "Which words of a text a language model's next word comes from.",
    "relevance": "Which words make a passage answer a question.",
    "demo": "Everything above on the small models shipped here, offline, on one page.",
    "audit": "Which operations a model has, and how each is treated; status 1 if one is unsupported.",
    "sweep": "Does it work on every model of a library? One row a model; goes on where it was.",
    "benchmark": "Does it tell the truth? Every method on a data set, in one table; goes on where it was.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as typed; default: those of this process.
    Returns:
        The exit status: 0, 1 if an audit or a sweep found faults, 2 for bad input, 130 if stopped.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if isinstance(sys.stdout, TextIOWrapper):  # else a letter that a pipe's encoding lacks, on Windows, ends it all
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.disable(logging.ERROR)  # libraries log what they raise, too
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from")  # fonts.py says it, with a cure
            warnings.showwarning = lambda message, *_: complain(f"warning: {message}")  # one line, without its place
            return libragrad.main(arguments, prog_name="libragrad", standalone_mode=False) or 0
    except (click.Abort, KeyboardInterrupt):
        click.echo("libragrad: stopped", err=True)
        return 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        of = f" {context.info_name}" if context and context.parent else ""
        complain(f"error: {error.format_message()} (libragrad{of} --help shows an example)")
    except ModuleNotFoundError as error:  # what only some models need is imported where it is used
        complain(
            f"error: the command line needs {error.name}, which is not installed: "
            "pip install 'libragrad_minimal[notebooks]'"
        )
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:  # UnsupportedOperation, too
        complain(f"error: {error}")
    finally:
        logging.disable(logging.NOTSET)
    return 2


class Commands(click.Group):
    """Those of COMMANDS, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        if name not in COMMANDS:
            close = get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"No such command {name!r}." + "".join(f" Did you mean {known!r}?" for known in close))
        with telling("loading PyTorch"):
            from .commands import commands

        return commands[name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="libragrad_minimal")
def libragrad() -> None:
    """Balanced attributions (LibraGrad) of photographs, of pictures and sentences, and of texts.

    COMMAND --help shows each command's options, and an example.

    \b
    To begin with:
      libragrad demo
      libragrad image photo.jpg --class tabby --class espresso
    """
