"""Commands of other programs: shown, run, retried, or only printed."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable

from jax_densevit.errors import UserError


class CommandFailed(UserError):
    """A command ended with an error; `said` is what it wrote to its standard error."""

    def __init__(self, command: tuple[str, ...], code: int, said: str):
        self.code, self.said = code, said
        last = [line.strip() for line in said.splitlines() if line.strip()][-1:] or ["it said nothing"]
        super().__init__(f"`{shlex.join(command[:4])} ...` ended with {code}: {last[0][:300]}")


class Shell:
    """Runs commands given as words, so that nothing is ever quoted twice or not at all.

    Args:
      dry_run: print every command, run none; :meth:`read` then answers with an empty text.
      sleep: waits between tries.
    """

    def __init__(self, dry_run: bool = False, sleep: Callable[[float], None] = time.sleep):
        self.dry_run, self.sleep = dry_run, sleep

    def run(self, *command: str, stdin: str | None = None, tries: int = 1, wait: float = 10.0) -> None:
        """Runs a command; what it prints goes to the screen. With `tries`, again after a failure, and later.

        Raises:
          CommandFailed: the last try failed, or there is no such program.
        """
        for left in reversed(range(tries)):
            try:
                self._call(command, stdin, capture=False)
                return
            except CommandFailed as error:
                if not left:
                    raise
                print(f"{error} Again in {wait:.0f} s.")
                self.sleep(wait)
                wait *= 2

    def read(self, *command: str) -> str:
        """Runs a command and gives what it wrote to standard output."""
        return self._call(command, None, capture=True)

    def _call(self, command: tuple[str, ...], stdin: str | None, capture: bool) -> str:
        if self.dry_run:
            print(f"+ {shlex.join(command)}" + (f" <<'END'\n{stdin}END" if stdin else ""), flush=True)
            return ""
        try:
            done = subprocess.run(
                command,
                input=stdin,
                stdin=None if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE if capture else None,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError as error:
            raise CommandFailed(command, 127, f"{command[0]} is not installed, or not in PATH") from error
        if done.returncode:
            raise CommandFailed(command, done.returncode, done.stderr)
        if not capture:
            print(done.stderr, end="", file=sys.stderr)
        return done.stdout or ""

    def attach(self, *command: str) -> int:
        """Runs a command that talks to the person at the terminal; its exit code."""
        if self.dry_run:
            self._call(command, None, capture=False)
            return 0
        try:
            return subprocess.run(command).returncode
        except FileNotFoundError as error:
            raise CommandFailed(command, 127, f"{command[0]} is not installed, or not in PATH") from error
