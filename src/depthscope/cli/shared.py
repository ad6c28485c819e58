"""What all commands share: the program, which checks paths first, and how errors end it."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text

from depthscope.cli.paths import refuse_empty_paths, refuse_overwriting
from depthscope.console.terminal import terminal
from depthscope.errors import DepthscopeError
from depthscope.files.atomic import reason


class Program(typer.Typer):
    """Commands that refuse to begin if an output would overwrite a file that another argument names."""

    def command(  # type: ignore[override]
        self, name: str | None = None, **options: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a command; a path without a mark of its use raises a TypeError at once."""
        register = super().command(name, **options)

        def declare(function: Callable[..., Any]) -> Callable[..., Any]:
            refuse_empty_paths(function)

            @wraps(function)
            def checked(**arguments: Any) -> Any:
                with errors_for_people():
                    refuse_overwriting(function, arguments)
                return function(**arguments)

            register(checked)
            return function

        return declare


app = Program(
    name="depthscope",
    help="Show how much every layer of a language model contributes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130
BAD_INPUT = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _print_version(requested: bool) -> None:
    if requested:
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
    terminal().print(Text(line))


@contextmanager
def errors_for_people(after_interrupt: str = "Nothing was written.") -> Iterator[None]:
    """Print one message instead of a traceback; exit with code 2 for bad input, 130 for Ctrl-C."""
    try:
        yield
    except DepthscopeError as error:
        _exit_with_error(str(error))
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "Interrupted."
        terminal(stderr=True).print(Text(f"{message} {after_interrupt}"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None and error.errno not in (*NO_ROOM, errno.EIO):
            raise
        place = "the standard output" if error.filename is None else repr(os.fsdecode(error.filename))
        action = "write" if error.filename is None or error.errno in NO_ROOM else "read or write"
        cause = "it does not exist" if isinstance(error, FileNotFoundError) else reason(error)
        _exit_with_error(f"cannot {action} {place}: {cause}.")


def _exit_with_error(message: str) -> NoReturn:
    """Print an error and exit; output that cannot be written is discarded, since Python would try again at exit."""
    terminal(stderr=True).print(Text("Error: ", style="bold red") + Text(message), soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    raise typer.Exit(BAD_INPUT)
