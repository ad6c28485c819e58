"""What every command shares: the program itself, and how it ends when something is wrong."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from depthscope.errors import DepthscopeError

app = typer.Typer(
    name="depthscope",
    help="Show how much every layer of a language model contributes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
BAD_INPUT = 2


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"depthscope {version('depthscope')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Show how much every layer of a language model contributes. Layers count from 0."""


def say(line: str) -> None:
    """Print one line as it is, without reading it as markup."""
    Console().print(Text(line))


@contextmanager
def errors_for_people(after_interrupt: str = "Nothing was written.") -> Iterator[None]:
    """One message instead of a traceback: exit code 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except DepthscopeError as error:
        Console(stderr=True).print(Text("Error: ", style="bold red") + Text(str(error)), soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "Interrupted."
        Console(stderr=True).print(Text(f"{said} {after_interrupt}"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
