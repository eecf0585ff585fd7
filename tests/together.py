"""Commands that several processes on this machine run together."""

import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def run_together(
    command: Sequence[str],
    environment: Mapping[str, str],
    meanwhile: Callable[[], Any] = lambda: None,
    second: Sequence[str] = (),
) -> list[tuple[int, str, str]]:
    """Two processes with the flags that make them find each other: (exit code, standard output, standard error) each.

    `second` are more flags for the second of them. `meanwhile` is called here while they run; whatever happens, none
    outlives the call.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [*command, "--coordinator", address, "--num_processes", "2", "--process_id"]
    started = [
        subprocess.Popen([*flags, str(i), *more], stdout=-1, stderr=-1, text=True, env=dict(environment))
        for i, more in enumerate(((), second))
    ]
    try:
        meanwhile()
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]
