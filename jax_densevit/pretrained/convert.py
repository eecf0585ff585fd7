"""Published arrays as the variables of a model, and back, by a table of names per source."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.embedding import native_grid, resize_positions
from jax_densevit.layers.transformer import stack_blocks, unstack_blocks
from jax_densevit.models.registry import example_inputs
from jax_densevit.pretrained.tables import SOURCES
from jax_densevit.pretrained.tables.table import Row, Source

_STATISTICS = ("mean", "var")
_LISTED = 8  # names per kind in a message


@dataclasses.dataclass(frozen=True)
class Report:
    """How a file fits a model.

    Attributes:
      loaded: paths of our arrays that the file has.
      filled: paths of ours that files of this source may lack, and the value that they get.
      missing: (path of ours, what it is called there) of arrays that it lacks.
      misshapen: sentences about arrays of another shape or type.
      unexpected: names of the file that the model has no place for.
      unused: names of the file that have no meaning here: buffers, and layers that the published module never calls.
      left_out: what `leave_out` named, paths of ours and names of the file.
      drawn: those of ours among them, whose values are drawn anew.
      resized: sentences about position tables.
    """

    loaded: tuple[str, ...]
    filled: Mapping[str, float]
    missing: tuple[tuple[str, str], ...]
    misshapen: tuple[str, ...]
    unexpected: tuple[str, ...]
    unused: tuple[str, ...]
    left_out: tuple[str, ...]
    drawn: tuple[str, ...]
    resized: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, misshapen or unexpected."""
        return not (self.missing or self.misshapen or self.unexpected)

    def __str__(self) -> str:
        """One sentence."""
        parts = [f"{len(self.loaded)} arrays loaded"]
        parts += [f"{len(self.filled)} filled in ({_names(self.filled)})"] if self.filled else []
        parts += list(self.resized)
        missing = [f"{path} (there {theirs})" for path, theirs in self.missing]
        for count, names, what in (
            (len(missing), missing, "missing"),
            (len(self.misshapen), self.misshapen, "of another shape"),
            (len(self.unexpected), self.unexpected, "unexpected"),
            (len(self.left_out), self.left_out, "left out"),
            (len(self.unused), (), "of no use here"),
        ):
            if count:
                parts.append(f"{count} {what}" + (f" ({_names(names)})" if names else ""))
        return ", ".join(parts)


def _names(names: Sequence[str] | Mapping[str, float]) -> str:
    names = list(names)
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def convert(
    tensors: Mapping[str, np.ndarray],
    source: str,
    model: Any,
    *,
    leave_out: Sequence[str] = (),
    pos_rule: str | None = None,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Variables of `model` from a file of `source`.

    Args:
      tensors: what `read` gives; wrappers such as `state_dict.` and `module.` are taken off.
      source: a name of `SOURCES`.
      model: a model of ours, unbound. Its fields say what is wanted: sizes, classes, flavour, `scan`.
      leave_out: regular expressions, searched for in our paths (`decode_head/classifier/kernel`) and in the file's
        names: what matches of ours is drawn anew by `model.init`, what matches of the file's is not loaded.
      pos_rule: how position tables of another grid are resized, a name of `layers.embedding.POSITION_RULES`; None takes
        the source's own rule.
      key: of what is drawn anew; None is `jax.random.key(0)`.

    Returns:
      `{"params": ..., "batch_stats": ...}` (the latter where the model has statistics), NumPy arrays in the model's
      types. `check` tells what was done.

    Raises:
      UserError: anything missing, unexpected or misshapen that is not left out, all in one sentence; a source for other
        models; a pattern that matches nothing.
    """
    report, arrays = _match(tensors, source, model, leave_out, pos_rule)
    if not report.fits:
        raise UserError(
            f"These weights do not fit as {source!r} of this {type(model).__name__}: {report}; change the model's "
            "options, or name in leave_out what may stay behind."
        )
    plain = _plain(model)
    drawn: dict[str, Any] = {}
    if any(path not in arrays for path in _shapes(plain)):
        inputs = [jnp.zeros(x.shape, x.dtype) for x in _inputs(plain)]
        drawn = _flat(jax.jit(plain.init)(jax.random.key(0) if key is None else key, *inputs))
    variables: dict[str, Any] = {}
    for path, leaf in _shapes(plain).items():
        value = arrays[path]() if path in arrays else np.asarray(drawn[path])
        *folders, name = path.split("/")
        tree = variables.setdefault("batch_stats" if _is_statistic(path) else "params", {})
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[name] = np.asarray(value, leaf.dtype).reshape(leaf.shape)
    if getattr(model, "scan", False):
        variables["params"] = stack_blocks(variables["params"], getattr(model, "head_taps", ()))
    # Until here mostly views into the file: one copy each, that the file's later fate does not touch.
    return jax.tree.map(lambda array: np.require(array, requirements=["C", "O", "W"]), variables)


def check(
    tensors: Mapping[str, np.ndarray],
    source: str,
    model: Any,
    *,
    leave_out: Sequence[str] = (),
    pos_rule: str | None = None,
) -> Report:
    """How a file fits a model, nothing converted; arguments and errors as of `convert`, but for what does not fit."""
    return _match(tensors, source, model, leave_out, pos_rule)[0]


def restore_names(
    variables: Mapping[str, Any], source: str, model: Any, *, leave_out: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The inverse of `convert`: our variables under the names and in the layout of `source`, bit for bit.

    What `Report.unused` lists is not part of it, having no place in our model. Of `vit_npz` the names are those of the
    released files.

    Args:
      leave_out: regular expressions over our paths: what matches stays behind, such as the decoder where the file shall
        be one of a plain ViT.

    Raises:
      UserError: an array that files of `source` have no name for and that is not left out; a source for other models.
    """
    table, plain = _source(source, model), _plain(model)
    flat = _flat({**variables, "params": unstack_blocks(variables["params"])})
    rows, out = table.rows(plain), {}
    left, nameless = _left_out(leave_out, _shapes(plain)), []
    for path in _shapes(plain):
        if path in left:
            continue
        row, names = _row(rows, path)
        if row is None:
            nameless.append(path)
            continue
        pieces = row.layout.theirs(np.asarray(flat[path]))
        out |= {name: np.ascontiguousarray(piece) for name, piece in zip(names, pieces, strict=True)}
    if nameless:
        raise UserError(
            f"Files of source {source!r} have no name for {len(nameless)} arrays of this {type(model).__name__} "
            f"({_names(nameless)}); name in leave_out what may stay behind, or take another source."
        )
    return out


def _source(source: str, model: Any) -> Source:
    check_name("source of weights", source, SOURCES)
    table = SOURCES[source]
    if not isinstance(model, table.models):
        wanted = " or ".join(kind.__name__ for kind in table.models)
        raise UserError(f"Weights of source {source!r} are for {wanted}, not for {type(model).__name__}.")
    return table


def _match(tensors, source, model, leave_out, pos_rule):
    """A report, and for every array of ours that is there a function that makes it."""
    table, plain = _source(source, model), _plain(model)
    tensors = table.prepare(dict(tensors), model)
    rows = table.rows(plain)
    shapes = _shapes(plain)
    left = _left_out(leave_out, [*shapes, *tensors])
    arrays, taken = {}, set()
    filled, missing, misshapen, resized = {}, [], [], []
    for path, leaf in shapes.items():
        row, names = _row(rows, path)
        if path in left:
            taken.update(name for name in names if name in tensors)
            continue
        lacking = [name for name in names if name not in tensors]
        if row is not None and row.absent is not None and len(lacking) == len(names):
            filled[path] = row.absent
            arrays[path] = lambda leaf=leaf, row=row: np.full(leaf.shape, row.absent, leaf.dtype)
            continue
        taken.update(names)
        if row is None:
            missing.append((path, "without a name"))
            continue
        if lacking:
            missing.append((path, ", ".join(lacking)))
            continue
        parts = [tensors[name] for name in names]
        wanted = [piece.shape for piece in row.layout.theirs(np.empty(leaf.shape, bool))]
        problem = next(
            (
                f"{name} is {array.dtype}{list(array.shape)}, not {list(shape)}"
                for name, array, shape in zip(names, parts, wanted, strict=True)
                if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating)
            ),
            None,
        )
        if row.layout.positions and problem and parts[0].ndim == 3 and parts[0].shape[2] == leaf.shape[2]:
            rule = pos_rule or table.pos_rule
            make, problem = _positions(parts[0], names[0], leaf.shape, plain, rule)
            if make:
                arrays[path] = make
                resized.append(f"{names[0]} from {parts[0].shape[1]} to {leaf.shape[1]} rows (rule {rule!r})")
        if problem:
            misshapen.append(problem)
        elif path not in arrays:
            arrays[path] = lambda row=row, parts=parts, leaf=leaf: row.layout.ours(parts, leaf.shape)
    rest = [name for name in tensors if name not in taken and name not in left]
    unused = [name for name in rest if any(re.search(pattern, name) for pattern in table.unused)]
    report = Report(
        loaded=tuple(path for path in arrays if path not in filled),
        filled=filled,
        missing=tuple(missing),
        misshapen=tuple(misshapen),
        unexpected=tuple(name for name in rest if name not in unused),
        unused=tuple(unused),
        left_out=tuple(sorted(left)),
        drawn=tuple(path for path in shapes if path in left),
        resized=tuple(resized),
    )
    return report, arrays


def _positions(table, name, shape, model, rule):
    """A function that resizes their table to ours, or a sentence why there is none."""
    grid = native_grid(model.image_size, model.patch_size)
    prefix = shape[1] - grid[0] * grid[1]
    rows = table.shape[1]
    # Class tokens come first; their number is what is too much for a square.
    extra = next((n for n in (0, 1, 2) if rows > n and math.isqrt(rows - n) ** 2 == rows - n), None)
    if table.shape[0] != 1 or extra is None or extra < prefix:
        return None, f"{name} has {rows} rows, which are no square grid with {prefix} class tokens, not {shape[1]}"
    side = math.isqrt(rows - extra)

    def make():
        kept = np.concatenate([table[:, :prefix], table[:, extra:]], axis=1).astype(np.float32)
        return np.asarray(resize_positions(jnp.asarray(kept), (side, side), grid, rule, prefix=prefix))

    return make, None


def _left_out(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    left = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"leave_out: {pattern!r} is not a regular expression ({error}).") from error
        if not found:
            raise UserError(f"leave_out: {pattern!r} matches neither an array of the model nor of the file.")
        left |= found
    return left


def _row(rows: Sequence[Row], path: str) -> tuple[Row | None, tuple[str, ...]]:
    for row in rows:
        names = row.match(path)
        if names is not None:
            return row, names
    return None, ()


def _plain(model: Any) -> Any:
    """The model with the same arrays in its simplest form: unrolled, for any device."""
    plain = {"scan": False, "attention": "xla", "remat": "none"}
    return model.clone(**{name: value for name, value in plain.items() if hasattr(model, name)})


def _inputs(model: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    size = getattr(model, "image_size", 96)  # one that every model takes
    return example_inputs(model, (size, size) if isinstance(size, int) else tuple(size))


@functools.lru_cache(maxsize=4)
def _shapes(model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return _flat(jax.eval_shape(model.init, jax.random.key(0), *_inputs(model)))


def _flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Path -> leaf over parameters and statistics, whose paths never meet: their last names differ."""
    out = {}
    for tree in variables.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            out["/".join(str(entry.key) for entry in path)] = leaf
    return out


def _is_statistic(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in _STATISTICS
