"""Published sizes through the tables, by hand: `python tests/pretrained/full_size.py FOLDER [SYSTEM ...]`.

For every system: a file as PyTorch writes it (ColTran's: as TensorFlow does) with noise for weights, then in a process
of its own `read`, `convert` and back, every bit compared. Prints seconds of that process's CPU and its peak memory.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from bundle_writer import write_bundle
from torch_writer import write_zip

from jax_densevit.models import create_model
from jax_densevit.models.registry import example_inputs
from jax_densevit.pretrained import convert, read, restore_names

SYSTEMS = {
    "vit L/16 384": ("timm_vit", "vit", {"variant": "L/16", "image_size": 384}),
    "setr_pup L/16 768": ("setr", "setr_pup", {"variant": "L/16", "image_size": 768, "num_classes": 19, "scan": True}),
    "setr_mla L/16 768": ("mmseg_setr", "setr_mla", {"variant": "L/16", "image_size": 768, "flavor": "mmseg"}),
    "dpt large": ("dpt", "dpt", {"variant": "large", "num_classes": 150}),
    "dpt hybrid": ("dpt", "dpt", {"variant": "hybrid", "num_classes": 150}),
    "dpt large, Hugging Face": ("hf_dpt", "dpt", {"variant": "large", "num_classes": 150}),
    "uformer B": ("uformer", "uformer", {"variant": "B-modulator"}),
    "unet": ("unet", "unet", {"num_classes": 2}),
    "axial": ("axial", "axial", {}),
    "study uformer": ("study", "uformer", {"variant": "S", "num_classes": 40}),
    "coltran colorizer": ("coltran", "coltran_colorizer", {}),
    "coltran color upsampler": ("coltran", "coltran_color_upsampler", {}),
    "coltran spatial upsampler": ("coltran", "coltran_spatial_upsampler", {}),
}


def build(system):
    """(source, model, shapes of its variables)."""
    source, name, options = SYSTEMS[system]
    model = create_model(name, **options)
    size = getattr(model, "image_size", 64)
    inputs = example_inputs(model, (size, size) if isinstance(size, int) else tuple(size))
    return source, model, jax.eval_shape(model.init, jax.random.key(0), *inputs)


def noise(path, leaf):
    """float32, of the leaf's own seed."""
    seed = abs(hash(jax.tree_util.keystr(path))) % 2**32  # PYTHONHASHSEED is 0 in here
    return np.random.default_rng(seed).random(leaf.shape, np.float32)


def write(system, folder):
    """The file with noise."""
    source, model, shapes = build(system)
    names = restore_names(jax.tree_util.tree_map_with_path(noise, shapes), source, model)
    if source == "coltran":
        return write_bundle(folder / "full", names).with_suffix(".index")
    return write_zip(folder / "full.pth", {"state_dict": names, "epoch": 1})


def check(system, path):
    """Reads, converts, goes back; returns a line."""
    source, model, shapes = build(system)
    start = time.process_time()
    tensors = read(path)
    variables = convert(tensors, source, model)
    seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text()  # getrusage would tell the peak of the process that wrote, too
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20
    for at, leaf in jax.tree_util.tree_leaves_with_path(variables):
        assert np.array_equal(leaf, noise(at, leaf)), at
    back = restore_names(variables, source, model)
    tensors = {name.removeprefix("state_dict."): array for name, array in tensors.items()}
    assert all(np.array_equal(back[name], array) for name, array in tensors.items()) and len(back) == len(tensors)
    size = sum(file.stat().st_size for file in path.parent.glob("full*")) / 2**20
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return (
        f"| {system} | `{source}` | {count:,} | {size:,.0f} | {seconds:.1f} | {peak:.2f} | "
        f"{len(tensors)} arrays bit-equal both ways |"
    )


def main(folder, *systems):
    if systems[:1] == ("--check",):
        print(check(systems[1], Path(systems[2])), flush=True)
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for system in systems or SYSTEMS:
        path = write(system, folder)
        subprocess.run([sys.executable, __file__, str(folder), "--check", system, str(path)], check=True)
        for file in folder.glob("full*"):
            file.unlink()


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    main(*sys.argv[1:])
