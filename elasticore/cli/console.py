"""What all commands share: where they print, how they end on bad input, and options."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from elasticore.errors import ElasticoreError

__all__ = ["Backend", "Json", "app", "count", "err", "out", "plain_errors"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Elastic attention: each KV head chooses full or sparse attention per input.",
)
out, err = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead.")]
Backend = Annotated[
    str, typer.Option(help="What runs the attention; see `elasticore doctor`.", metavar="NAME")
]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input ends in one line and exit code 2, not in a traceback."""
    try:
        yield
    except (
        *(ElasticoreError, ValueError, TypeError, ArithmeticError),
        *(OSError, RuntimeError, ImportError),
    ) as error:
        if "--traceback" in sys.argv:
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        if not isinstance(error, (ValueError, OSError, ElasticoreError)):  # perhaps a bug
            err.print("[dim]elasticore --traceback COMMAND shows where it came from.[/]")
        raise typer.Exit(2) from error


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
