"""A trained model with its preprocessing as one program: uint8 images in, answer and the model's outputs out.

`stablehlo` makes it an artifact of `jax.export` that runs wherever JAX runs and needs nothing of this library; `onnx`
makes it an ONNX graph by jax2onnx.
"""

import dataclasses
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_densevit.errors import UserError
from jax_densevit.experiment import Loaded

PLATFORMS = ("cpu", "cuda", "tpu")
# Entries of answers that compare with the picture that was given as if it were the truth.
_ABOUT_TRUTH = ("truth", "coarse", "symbols", "bits", "autoregressive_bits", "parallel_bits")
_LARGEST = 2**31 - 2**20  # bytes of an artifact: the format's offsets are 32-bit
_EXACT = 1e-5  # of float32 outputs, relative to the largest where that is above 1
_COARSE = 3e-2  # the same of models that compute in fewer bits


@dataclasses.dataclass(frozen=True)
class Program:
    """Images in, arrays by name out; a pure function of JAX.

    Attributes:
      run: `run(image, *coarse) -> {name: array}`; runs inside `jit`.
      inputs: name -> shape of one example; all uint8.
      floats: the names of the model's own outputs, by which programs are compared.
      tolerance: how far they may differ, relative to the largest where that is above 1.
    """

    run: Callable[..., dict[str, jax.Array]]
    inputs: dict[str, tuple[int, ...]]
    floats: tuple[str, ...]
    tolerance: float


def make_program(loaded: Loaded, size: tuple[int, int]) -> Program:
    """The program of a loaded model for images of (height, width) `size`.

    Outputs are what the task's `decode` answers (for segmentation "labels" and "confidence", for colorization "image"
    and "gray") and the arrays that the model returns ("logits"), at the resolution of its heads. With sliding windows
    or several views, where the model does not see the picture once and whole, there is the answer alone. ColTran's
    upsamplers have a second input, "coarse", the picture of the stage before.
    """
    plain = {"attention": "xla", "remat": "none"}  # what every platform has
    model = loaded.model.clone(**{name: value for name, value in plain.items() if hasattr(loaded.model, name)})
    task, inputs = loaded.task, {"image": (*size, 3)}
    if task is not None and "coarse" in inspect.signature(task.decode).parameters:
        inputs["coarse"] = (*task.coarse_size, 3)

    def run(image, *coarse):
        calls = []

        def forward(*arguments):
            calls.append(model.apply(loaded.variables, *arguments, train=False))
            return calls[-1]

        if task is None:
            forward(*loaded.inputs(image))
            return _arrays(calls[0])
        more = {"coarse": coarse[0]} if coarse else {}
        answer = task.decode(forward, {"image": image}, full=True, **more)
        answer = {name: value for name, value in answer.items() if name not in _ABOUT_TRUTH}
        whole = len(calls) == 1 and getattr(task, "mode", "whole") == "whole"
        return {**answer, **(_arrays(calls[0]) if whole else {})}

    shapes = jax.eval_shape(run, *_examples(inputs, 1))
    floats = tuple(name for name, leaf in shapes.items() if jnp.issubdtype(leaf.dtype, jnp.floating))
    exact = jnp.dtype(getattr(model, "dtype", jnp.float32)) == jnp.float32
    return Program(run, inputs, floats, _EXACT if exact else _COARSE)


def stablehlo(program: Program, batch: int, platforms: tuple[str, ...] = PLATFORMS) -> bytes:
    """The program as a serialized `jax.export` artifact, weights inside.

    Args:
      batch: images per call; 0 leaves it open.
      platforms: names of `PLATFORMS`; it runs on each of them.

    Raises:
      UserError: more than two gigabytes; a program whose batch cannot be left open.
    """
    size = export.symbolic_shape("batch")[0] if not batch else batch
    function = jax.jit(program.run)
    try:
        exported = export.export(function, platforms=platforms)(*_examples(program.inputs, size))
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if batch:
            raise
        raise UserError(
            "The batch of this program cannot be left open (sliding windows are cut by its size); say --batch=1."
        ) from error
    artifact = bytes(exported.serialize())
    if len(artifact) > _LARGEST:
        raise UserError(f"The program has {len(artifact):,} bytes, and jax.export's files end at 2 GiB.")
    return artifact


def run_stablehlo(artifact: bytes, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of an artifact on this machine."""
    return jax.device_get(export.deserialize(bytearray(artifact)).call(*arrays.values()))


def onnx(program: Program, batch: int, path: Path) -> None:
    """Writes the program as an ONNX graph (opset 23), weights inside.

    An output that is called as an input is, as ONNX forbids, has "_out" behind its name.

    Args:
      batch: images per call; jax2onnx 0.17 cannot leave it open in what decoding does.

    Raises:
      UserError: jax2onnx is not installed, or has no translation for a part of the model.
    """
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError('ONNX needs jax2onnx: pip install "jax_densevit[onnx]".') from error
    examples = _examples(program.inputs, batch)
    outputs = sorted(jax.eval_shape(program.run, *examples))  # the order in which JAX flattens a dict
    try:
        to_onnx(
            program.run,
            examples,
            return_mode="file",
            output_path=str(path),
            export_mode="web",  # one file, weights inside
            input_names=list(program.inputs),
            output_names=[f"{name}_out" if name in program.inputs else name for name in outputs],
        )
    except Exception as error:  # whatever it meets, in classes of its own
        version = importlib.metadata.version("jax2onnx")
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"jax2onnx {version} cannot translate this program ({cause}); --format stablehlo can."
        ) from error


def run_onnx(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of an ONNX file by ONNX Runtime on the CPU, by the program's own names."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError('Checking ONNX needs onnxruntime: pip install "jax_densevit[onnx]".') from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that it drops
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        values = session.run(None, dict(arrays))
    except Exception as error:  # of its own, without a common class
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} does not run what jax2onnx makes of this program ({cause}); "
            "--format stablehlo has no such limits."
        ) from error
    names = [output.name.removesuffix("_out") for output in session.get_outputs()]
    return dict(zip(names, values, strict=True))


def noise(program: Program, batch: int) -> dict[str, np.ndarray]:
    """Inputs to compare programs by: uint8 noise, always the same."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (batch, *shape), np.uint8) for name, shape in program.inputs.items()}


def live(program: Program, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of the program as it is, without a file."""
    return jax.device_get(jax.jit(program.run)(*arrays.values()))


def differences(
    program: Program, got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], bool]:
    """(largest difference of every output, whether the model's own are equal within the tolerance)."""
    found, equal = {}, got.keys() == want.keys()
    for name in got.keys() & want.keys():
        a, b = (np.asarray(values[name], np.float64) for values in (got, want))
        found[name] = float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")
        if name in program.floats:
            equal &= bool(found[name] <= program.tolerance * max(1.0, float(np.abs(b).max())))
    return found, equal


def _examples(inputs: Mapping[str, tuple[int, ...]], batch: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((batch, *shape), jnp.uint8) for shape in inputs.values()]


def _arrays(output: Any) -> dict[str, jax.Array]:
    """The fields of a model's output struct that are arrays."""
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {name: value for name, value in fields.items() if isinstance(value, jax.Array)}
