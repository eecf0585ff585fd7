"""Which step was the best so far: `best.json`, the list of records, which survives restarts."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_densevit.manifest import write_text
from jax_densevit.training.processes import from_process_0

log = logging.getLogger(__name__)


class BestScores:
    """The records of one score.

    Args:
      workdir: of the run.
      score: the score that decides, e.g. "val/mIoU"; a leading "-" means that smaller is better. Empty: whatever score
        the file speaks of, for reading.
    """

    def __init__(self, workdir: Path, score: str = ""):
        self._path = workdir / "best.json"
        self.score, self._sign = score.removeprefix("-"), -1.0 if score.startswith("-") else 1.0

    def latest(self) -> dict[str, Any] | None:
        """{"score": name, "value": float, "step": int} of the best step so far; None where there is none."""
        records = self._read()
        return records[-1] if records else None

    def record(self, step: int, scores: Mapping[str, float]) -> bool:
        """Notes the scores of an evaluation; whether `step` is the best so far. Every process calls it.

        What was noted for this step or later ones before is forgotten: a resumed run evaluates a step again.
        """
        if self.score not in scores:
            return False
        best = 0
        if jax.process_index() == 0:
            value = float(scores[self.score])
            records = [entry for entry in self._read() if entry["step"] < step]
            if not math.isnan(value) and (not records or self._sign * value > self._sign * records[-1]["value"]):
                best = 1
                self._write([*records, {"score": self.score, "value": value, "step": step}])
        return bool(from_process_0(best))

    def forget_after(self, step: int) -> None:
        """Drops the records after `step`: training goes on from there and will make them again."""
        records = self._read()
        if jax.process_index() == 0 and any(entry["step"] > step for entry in records):
            self._write([entry for entry in records if entry["step"] <= step])

    def _read(self) -> list[dict[str, Any]]:
        try:
            records = json.loads(self._path.read_text(encoding="utf-8"))
            records = [{"score": r["score"], "value": float(r["value"]), "step": int(r["step"])} for r in records]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): the best step is not known.", self._path, type(error).__name__)
            return []
        return [entry for entry in records if self.score in ("", entry["score"])]

    def _write(self, records: list[dict[str, Any]]) -> None:
        write_text(self._path, json.dumps(records, indent=1) + "\n")
