"""Takes a trained model elsewhere: `python -m jax_densevit.export --workdir DIR --format FORMAT --output FILE`.

    timm, setr, mmseg_setr, dpt, hf_dpt, ...   safetensors with the names of timm or of the original repository
    npz                                        the names of Google's ViT files
    stablehlo                                  a program that needs only JAX, a script that runs it, and its facts
    onnx                                       an ONNX graph of SETR, DPT, ... (pip install "jax_densevit[onnx]")

Parts that have no name elsewhere are left behind by name: a plain ViT from a SETR is `--format timm
--leave_out='^(?!backbone/)'`. Programs take uint8 images `[batch, height, width, 3]`, preprocessing and decoding are
inside; options of the decoding are flags, as in `predict`. Every file is read back and compared with the model before
it gets its name.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jax_densevit import program
from jax_densevit.console import run_command, split_options
from jax_densevit.errors import UserError, check_name
from jax_densevit.experiment import Loaded, load, versions
from jax_densevit.predict import check_outputs
from jax_densevit.pretrained import SOURCES, convert, read, restore_names
from jax_densevit.writing import whole_file, write_json

# Formats that are called otherwise than the sources whose names they have.
_NAMES = {"timm": "timm_vit", "npz": "vit_npz"}
_PROGRAMS = ("stablehlo", "onnx")
_RUNNER = '''"""Runs {file}: python {runner} {given} answers.npz

It needs JAX alone: pip install jax flatbuffers (in which JAX keeps its programs). Inputs are uint8 arrays:
{inputs}
"""

import sys
from pathlib import Path

import numpy as np
from jax import export

*inputs, output = sys.argv[1:]
program = export.deserialize(bytearray(Path(__file__).with_name({file!r}).read_bytes()))
answer = program.call(*(np.load(path) for path in inputs))
np.savez(output, **{{name: np.asarray(value) for name, value in answer.items()}})
for name, value in answer.items():
    print(name, value.dtype, value.shape)
'''


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="the folder that training or convert wrote")
    parser.add_argument("--format", required=True, help=f"{', '.join((*_PROGRAMS, *_NAMES, *SOURCES))}")
    parser.add_argument("--output", required=True, type=Path, help="the file; programs get a .json beside it")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the best, or the latest without a score")
    parser.add_argument("--which", choices=("best", "ema", "params"), default="best", help="which weights of it")
    parser.add_argument("--leave_out", action="append", default=[], metavar="PATTERN", help="weights: see above")
    parser.add_argument(
        "--size", default="", help="programs: side or HEIGHT,WIDTH of the images; by default the model's"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="programs: images per call; 0, the default, leaves it open"
    )
    parser.add_argument("--platforms", default=",".join(program.PLATFORMS), help="stablehlo: where it shall run")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    arguments, rest = parser.parse_known_args(argv)
    check_name("format", arguments.format, (*_PROGRAMS, *_NAMES, *SOURCES))
    if arguments.output.is_dir():
        raise UserError(f"The output {arguments.output} is a folder; name a file.")
    checkpoints, folder = Path(arguments.workdir, "checkpoints"), arguments.output.parent
    check_outputs({}, _file_names(arguments.output, arguments.format), checkpoints, folder, arguments.overwrite)
    decode = split_options(rest)
    loaded = load(arguments.workdir, step=arguments.step, which=arguments.which, decode=decode)
    if arguments.format not in _PROGRAMS:
        if decode:
            raise UserError(f"--{next(iter(decode))} is for programs; weights have no decoding.")
        source = _NAMES.get(arguments.format, arguments.format)
        print(export_weights(loaded, source, arguments.output, arguments.leave_out))
        return 0
    if arguments.leave_out:
        raise UserError("--leave_out is for weights; a program has all of them.")
    platforms = tuple(name for name in arguments.platforms.split(",") if name)
    for name in platforms:
        check_name("platform", name, program.PLATFORMS)
    made = program.make_program(loaded, _size(arguments.size, loaded))
    print(f"Translating {loaded.config.model.name}", flush=True)
    for line in export_program(loaded, made, arguments.format, arguments.output, arguments.batch, platforms):
        print(line)
    return 0


def _file_names(output: Path, form: str) -> list[str]:
    """The files that are made, the first called as was asked for."""
    facts = [f"{output.name}.json"] if form in _PROGRAMS else []
    return [output.name, *facts, *([f"run_{output.stem}.py"] if form == "stablehlo" else [])]


def export_weights(loaded: Loaded, source: str, output: Path, leave_out: Sequence[str] = ()) -> str:
    """Writes the weights under the names of `source`: `.npz` for `vit_npz`, else safetensors. Returns a sentence.

    The file gets its name once it was read back and every array has the same bits.

    Raises:
      UserError: an array without a name there, a file that cannot be written.
    """
    variables = jax.device_get(loaded.variables)
    tensors = restore_names(variables, source, loaded.model, leave_out=leave_out)
    with whole_file(output) as part:
        if source == "vit_npz":
            with open(part, "wb") as file:
                np.savez(file, **tensors)
        else:
            save_file(tensors, part, metadata={"format": "pt"})  # what Hugging Face's loaders ask for
        again = read(part)
        equal = again.keys() == tensors.keys() and all(np.array_equal(again[name], tensors[name]) for name in tensors)
        if equal and not leave_out:
            back = convert(again, source, loaded.model)
            equal = all(jax.tree.leaves(jax.tree.map(np.array_equal, back, dict(variables))))
        if not equal:
            raise UserError(f"{output} did not come back as it was written; nothing is left of it.")
    left = " (of a part of the model)" if leave_out else ""
    return f"Wrote {output}: {len(tensors)} arrays in the names of {source!r}{left}; read back, difference 0."


def export_program(
    loaded: Loaded, made: program.Program, form: str, output: Path, batch: int, platforms: Sequence[str]
) -> list[str]:
    """Writes the program, its facts as `<output>.json`, and for StableHLO a script that runs it. Returns sentences.

    It was run before it is written, and its outputs compared with the live model's on noise.

    Raises:
      UserError: what cannot be translated, outputs that differ by more than the tolerance, an unwritable file.
    """
    batch = batch or int(form == "onnx")
    arrays = program.noise(made, batch or 2)
    with whole_file(output) as part:
        if form == "stablehlo":
            artifact = program.stablehlo(made, batch, tuple(platforms))
            got = program.run_stablehlo(artifact, arrays)
            part.write_bytes(artifact)
        else:
            program.onnx(made, batch, part)
            got = program.run_onnx(part, arrays)
        found, equal = program.differences(made, got, program.live(made, arrays))
        if not equal:
            raise UserError(f"The program's outputs differ from the model's: {_listed(found)}; it is not written.")
    names = {index: name for index, name in enumerate(loaded.info.classes)}
    facts = {
        "inputs": {name: ["uint8", [batch or "batch", *shape]] for name, shape in made.inputs.items()},
        "outputs": {name: [str(array.dtype), [batch or "batch", *array.shape[1:]]] for name, array in got.items()},
        "classes": names,
        "palette": loaded.info.palette,
        "decoding": loaded.task.protocol() if loaded.task else {},
        "platforms": list(platforms) if form == "stablehlo" else ["onnx"],
        "difference_from_model": found,
        "workdir_step": loaded.step,
        "versions": versions(),
    }
    lines = [f"Wrote {output}: difference from the model on noise: {_listed(found)}."]
    _, about, *runners = (output.with_name(name) for name in _file_names(output, form))
    lines.append(f"Facts: {write_json(about, json.loads(json.dumps(facts)))}")
    for runner in runners:
        inputs = "\n".join(f"    {name} {[batch or 'batch', *shape]}" for name, shape in made.inputs.items())
        given = " ".join(f"{name}.npy" for name in made.inputs)
        with whole_file(runner) as part:
            part.write_text(_RUNNER.format(file=output.name, runner=runner.name, given=given, inputs=inputs))
        lines.append(f"Runs where only jax is: python {runner} {given} answers.npz")
    return lines


def _listed(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in sorted(found.items()))


def _size(text: str, loaded: Loaded) -> tuple[int, int]:
    """(height, width) from the flag, or the model's native size, or that of its training crops."""
    native: Any = getattr(loaded.model, "image_size", None) or tuple(loaded.config.data.crop)
    try:
        sides = tuple(int(side) for side in text.split(",")) if text else native
    except ValueError as error:
        raise UserError(f"--size={text} is neither a side nor HEIGHT,WIDTH in pixels.") from error
    sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"The images' size is {sides}; say --size=HEIGHT,WIDTH in pixels.")
    return sides


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
