"""One training process per workdir: a lock that outlives no process.

The kernel frees an `flock` when its process dies, however it dies. Between machines that share a file system (where
`flock` may not reach) the lock file's age decides: the owner touches it every 20 seconds.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from jax_densevit.errors import UserError

log = logging.getLogger(__name__)

TOUCH_SECONDS = 20.0
STALE_SECONDS = 120.0


class WorkdirLock:
    """A context that holds `workdir/.lock`.

    Raises:
      UserError: another process trains in the workdir; the message names it.
    """

    def __init__(self, workdir: str | Path):
        self._path = Path(workdir) / ".lock"
        self._handle = -1
        self._ended = threading.Event()

    def __enter__(self) -> "WorkdirLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            cause = f"Cannot write in workdir {self._path.parent}: {error.strerror}"
            raise UserError(f"{cause}; choose another --workdir.") from error
        owner = self._owner()
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise UserError(
                f"{self._describe(owner)} trains in {self._path.parent}: stop it or choose another."
            ) from None
        except OSError:  # a file system without locks: the age of the file decides alone
            pass
        if owner and owner.get("host") != socket.gethostname():
            age = self._age()
            if age < STALE_SECONDS:
                os.close(self._handle)
                raise UserError(
                    f"{self._describe(owner)} trained in {self._path.parent} {age:.0f} s ago; if it has ended, try "
                    f"again in {STALE_SECONDS - age:.0f} s."
                )
        if owner:
            log.warning("%s was ended in the middle of its work; taking over %s.", self._describe(owner), self._path)
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        threading.Thread(target=self._touch, name="workdir-lock", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        try:
            self._write(None)  # emptied, not removed: removing could free a lock that someone else just took
        except OSError as error:
            log.warning("%s could not be emptied (%s).", self._path, error.strerror)
        os.close(self._handle)

    def _owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(os.pread(self._handle, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _describe(self, owner: dict[str, Any]) -> str:
        return f"Process {owner.get('pid', '?')} on {owner.get('host', '?')} (since {owner.get('since', '?')})"

    def _write(self, owner: dict[str, Any] | None) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, b"" if owner is None else json.dumps(owner).encode(), 0)
        os.fsync(self._handle)

    def _age(self) -> float:
        """Seconds since the owner touched the lock, by the file system's own clock."""
        probe = self._path.with_name(f".lock.{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return max(0.0, now - os.fstat(self._handle).st_mtime)

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            try:
                os.utime(self._handle)
            except OSError:
                return  # the workdir is gone: saving says so
