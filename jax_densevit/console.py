"""What the commands share: exit codes, a progress bar, and options given as flags."""

import ast
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jax_densevit.errors import UserError


def run_command(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main(argv)` and leaves the process with its exit code.

    A :class:`UserError` is printed as its one sentence (exit code 1), Ctrl-C leaves with 130, and a closed pipe
    (`| head`) is no error. Anything else is a defect and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that knows only ASCII shows "?" for a name it cannot write; it does not end the program.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    Console.on_broken_pipe = _raise_again
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # imports are over: see the package's __init__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _raise_again(console: Console) -> None:
    """In place of rich's own way with a closed pipe, which is to leave with 1."""
    raise  # it is called while the error is handled


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function `(done, total)` that moves a progress bar with ETA; shown only on a terminal, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def split_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Flags that the command itself does not know, as options by name: `--mode slide --flip --data.root=/x`.

    Values are Python literals (`--scales 0.5,1.0`), else strings; a flag without a value is True.

    Raises:
      UserError: an argument that belongs to no flag.
    """
    options, i = {}, 0
    while i < len(arguments):
        flag, i = arguments[i], i + 1
        if not flag.startswith("--") or len(flag) == 2:
            raise UserError(f"The argument {flag!r} belongs to no option; options start with --.")
        name, equals, value = flag[2:].partition("=")
        if not equals and i < len(arguments) and not arguments[i].startswith("--"):
            value, equals, i = arguments[i], "=", i + 1
        options[name] = _literal(value) if equals else True
    return options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text
