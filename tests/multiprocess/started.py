"""Processes that a test starts; `conftest.py` ends those that are left."""

import subprocess
from pathlib import Path

import soak_kill

STARTED: list[subprocess.Popen] = []


def start(*arguments) -> tuple[subprocess.Popen, Path]:
    """`soak_kill.start`, ended with the test."""
    process, output = soak_kill.start(*arguments)
    STARTED.append(process)
    return process, output
