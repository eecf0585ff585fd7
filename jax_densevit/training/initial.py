"""Starting from the parameters of another run: what fits is taken over, what is left out is named."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.paths import first_match, named_leaves
from jax_densevit.training.state import TrainState


def take_over(
    state: TrainState, workdir: str | Path, leave_out: Sequence[str] = (), info: DataInfo | None = None
) -> tuple[TrainState, str]:
    """A fresh state with the parameters and statistics of another workdir (its moving average where it has one).

    Args:
      state: a fresh state; its optimizer state and its step stay as they are.
      workdir: of the other run.
      leave_out: regular expressions over parameter paths: what matches keeps its initial value.
      info: of the data that training goes on with, to say where its normalisation is another one. Published recipes
        do that too (SETR's, whose ViT was trained with another), so it is no error.

    Returns:
      (state, what to tell the user: what was taken over, left out and not used, and another normalisation).

    Raises:
      UserError: no intact checkpoint there; a parameter that is missing or of another shape or dtype and not left out;
        a pattern that matches nothing.
    """
    other = Checkpoints(workdir, read_only=True)
    step = other.preferred_step()
    which = "ema" if (other.folder / str(step) / "ema").is_dir() else "params"
    variables = other.restore_variables(step, which)
    found = {"params": named_leaves(variables["params"]), "statistics": named_leaves(variables.get("batch_stats", {}))}
    wanted = {"params": named_leaves(state.params), "statistics": named_leaves(state.statistics)}
    left = first_match(leave_out, {**wanted["params"], **wanted["statistics"]}, "config.init.leave_out")
    problems, taken, unused = [], 0, 0
    new = {}
    for part, leaves in wanted.items():
        values = []
        for path, leaf in leaves.items():
            stored = found[part].get(path)
            if path in left:
                values.append(leaf)
            elif stored is None:
                problems.append(f"{path} is not there")
            elif stored.shape != leaf.shape or stored.dtype != leaf.dtype:
                problems.append(
                    f"{path} is {stored.dtype}{list(stored.shape)} there, {leaf.dtype}{list(leaf.shape)} here"
                )
            else:
                taken += 1
                with jax.transfer_guard("allow"):
                    values.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i, a=stored: a[i]))
        unused += len(found[part].keys() - leaves.keys())
        if not problems:
            new[part] = jax.tree.unflatten(jax.tree.structure(getattr(state, part)), values)
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(
            f"The parameters of {workdir} (step {step}) do not fit: {'; '.join(problems[:6])}{more}. Name those that "
            "may start afresh in config.init.leave_out."
        )
    average = state.ema
    if average is not None:
        # A copy: the step donates the state, and no buffer may be given away twice.
        average = jax.jit(
            lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=jax.tree.map(lambda a: a.sharding, state.ema)
        )(new)
    sentence = (
        f"Started from {workdir} (step {step}, {which}): {taken} arrays taken over, {len(left)} left at their initial "
        f"values, {unused} of the other run not used."
    )
    before = other.read_meta(step).get("info")
    if info is not None and before and (then := _input(DataInfo.from_json(before))) != (now := _input(info)):
        sentence += f" Images came to it with {then}, and come with {now} now: see mean and std of the data source."
    return state.replace(params=new["params"], statistics=new["statistics"], ema=average), sentence


def _input(info: DataInfo) -> str:
    """What is done to the values of an image before the model gets them."""
    numbers = {
        "mean": info.mean,
        "std": info.std,
        **({"contrast stretched to percentiles": info.stretch} if info.stretch else {}),
    }
    return ", ".join(f"{name} {' '.join(f'{value:.3g}' for value in values)}" for name, values in numbers.items())
