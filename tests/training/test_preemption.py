"""Signals that reach the processes of a run at different times."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from jax_densevit.training.preemption import StopRequest


def test_a_late_sigterm_does_not_end_a_process_that_saves_already(monkeypatch, capfd):
    """Processes agreed to stop because another host got its SIGTERM; this host's own comes seconds later."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step >= 3)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.reached(2) and not stop.requested
        assert stop.reached(3) and stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert "a second signal ends at once" in capfd.readouterr().err
    signal.signal(signal.SIGTERM, before)
