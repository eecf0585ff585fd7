"""The checkpoints that a workdir has, newest first, and whether their bytes are as they were written."""

import logging
from pathlib import Path

import jax

from jax_densevit.errors import UserError
from jax_densevit.manifest import find_damage
from jax_densevit.training.best import BestScores
from jax_densevit.training.processes import from_process_0

log = logging.getLogger(__name__)


def local_folder(workdir: str | Path) -> Path:
    """The absolute path of a workdir; :class:`UserError` for a bucket's address, which would become a local folder."""
    if "://" in str(workdir):
        raise UserError(f"workdir {workdir} is no local path; mount the bucket (gcsfuse) and name the mount point.")
    return Path(workdir).absolute()


class StoredSteps:
    """The numbered folders in `<workdir>/checkpoints`; what is in them is of no concern here.

    Args:
      workdir: the folder of the run.
      best, strict: see :class:`~jax_densevit.training.checkpoint.Checkpoints`.
    """

    def __init__(self, workdir: str | Path, best: str = "", strict: bool = False):
        self.workdir = local_folder(workdir)
        self.folder = self.workdir / "checkpoints"
        self.strict = strict
        self.scores = BestScores(self.workdir, best)
        self._intact: set[int] = set()  # steps verified, or written, by this process

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending; not yet verified."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdecimal())

    def latest_intact(self) -> int | None:
        """The newest step whose files all match their manifest; None where there is no checkpoint at all.

        A damaged newer step is named in a warning. All processes get the answer of process 0.

        Raises:
          UserError: every checkpoint is damaged, or the newest is and `strict` is set.
        """
        found, message = -1, ""
        if jax.process_index() == 0:
            try:
                found = self._latest_intact()
            except UserError as error:
                found, message = -2, str(error)
        found = from_process_0(found)
        if found == -2:
            raise UserError(message or f"No intact checkpoint in {self.folder}: see the message of process 0.")
        return None if found < 0 else found

    def _latest_intact(self) -> int:
        steps, damaged = self.steps()[::-1], []
        for step in steps:
            damage = self._damage(step)
            if damage is None:
                if damaged:
                    log.warning(
                        "Checkpoint %s is damaged: %s. Continuing from step %d; %d step(s) are lost.",
                        ", ".join(str(number) for number, _ in damaged),
                        "; ".join(what for _, what in damaged),
                        step,
                        damaged[0][0] - step,
                    )
                return step
            damaged.append((step, damage))
            if self.strict:
                raise UserError(f"The newest checkpoint is damaged: {damage}; without strict the one before is used.")
        if steps:
            raise UserError(
                f"Every checkpoint in {self.folder} is damaged: {'; '.join(what for _, what in damaged)}. Restore the "
                "files from a copy, or start again in a new workdir; nothing is started from scratch here."
            )
        return -1

    def preferred_step(self) -> int:
        """The step to evaluate or predict with: the best one where a score was named, else the latest; intact.

        Raises:
          UserError: there is no intact checkpoint.
        """
        best = self.scores.latest()
        if best is not None and best["step"] in self.steps():
            damage = self._damage(best["step"])
            if damage is None:
                return best["step"]
            if self.strict:
                raise UserError(f"The best checkpoint is damaged: {damage}.")
            log.warning("The best checkpoint (step %d) is damaged: %s. Using the latest.", best["step"], damage)
        step = self.latest_intact()
        if step is None:
            raise UserError(f"There is no checkpoint in {self.folder}: name the workdir of a training run.")
        return step

    def verify(self, step: int) -> None:
        """Raises :class:`UserError` unless the checkpoint of `step` exists and every byte is as it was written."""
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"There is no checkpoint of step {step} in {self.folder}; there are: {known}.")
        damage = self._damage(step)
        if damage is not None:
            raise UserError(
                f"The checkpoint of step {step} is damaged: {damage}; name another step or restore the file."
            )

    def _damage(self, step: int) -> str | None:
        if step in self._intact:
            return None
        damage = find_damage(self.folder / str(step))
        if damage is None:
            self._intact.add(step)
        return damage
