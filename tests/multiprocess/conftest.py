"""No process outlives the test that started it."""

import pytest
from started import STARTED


@pytest.fixture(autouse=True)
def nothing_keeps_running():
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()
