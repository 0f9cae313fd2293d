"""What all commands share: where they print, how they end on bad input, and options."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from elasticore.errors import ElasticoreError

__all__ = ["Backend", "Json", "app", "count", "err", "out", "place", "plain_errors", "steps"]

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Elastic attention: each KV head chooses full or sparse attention per input.",
)
# Lines are as long as they are: what is cut up cannot be copied, nor read by programs.
out, err = (Console(stderr=is_err, soft_wrap=True, emoji=False) for is_err in (False, True))

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead.")]
Backend = Annotated[
    str, typer.Option(help="What runs the attention; see `elasticore doctor`.", metavar="NAME")
]


@contextmanager
def plain_errors(extra: str = "", kept: str = "") -> Iterator[None]:
    """Bad input ends in one line and exit code 2, an interruption in one and 130: no traceback.

    Parameters
    ----------
    extra
        The package's extra that the command needs.
    kept
        What an interrupted command leaves, and how to go on.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        err.print(f"[yellow]interrupted[/]{': ' * bool(kept)}{escape(kept)}")
        raise typer.Exit(130) from None
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        foreseen = isinstance(error, (ValueError, OSError, ElasticoreError))
        text = str(error) if str(error) and foreseen else f"{type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            foreseen, text = True, _missing(error, extra)
        err.print(f"[bold red]error:[/] {escape(text)}", highlight=False)
        if not foreseen:  # perhaps a bug
            err.print("[dim]elasticore --traceback COMMAND shows where it came from.[/]")
        raise typer.Exit(2) from error


def _missing(error: ImportError, extra: str) -> str:
    """What is not installed, and how to get it."""
    text, install = str(error), f"pip install 'elasticore[{extra}]'"
    if isinstance(error, ModuleNotFoundError) and error.name:
        text = f"{error.name.partition('.')[0]} is not installed"
    return text if not extra or "pip install 'elasticore[" in text else f"{text}; {install}."


def place(path: object) -> str:
    """A path as it is shown: every character of it."""
    return f"[bold]{escape(str(path))}[/]"


def steps(items: Sequence[T], text: str) -> Iterator[T]:
    """Go through ``items`` with a bar; where standard error is no terminal, a line a tenth."""
    if err.is_terminal:
        yield from track(items, text, console=err)
        return
    count = len(items)
    for number, item in enumerate(items):
        if number % max(1, -(-count // 10)) == 0:
            err.print(f"{escape(text)}: {number} of {count}", highlight=False)
        yield item
    err.print(f"{escape(text)}: {count} of {count}", highlight=False)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[bool, typer.Option(help="Show where an error came from.")] = False,
) -> None:
    """Run before every command."""
    if version:
        from elasticore import __version__

        out.print(__version__)
        raise typer.Exit


def count(text: str, option: str) -> int:
    """A count such as 1000, 8k (8,192) or 700m."""
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    units = {"": 1, "k": 1 << 10, "m": 1 << 20}
    if not digits.isdecimal() or unit not in units:
        raise ValueError(f"{option} must be a count such as 8192, 8k or 700m, got {text!r}.")
    return int(digits) * units[unit]
