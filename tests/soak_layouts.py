"""Trains every model on eight virtual devices in every layout and compares with one device, at sizes near real ones.

    python tests/soak_layouts.py [--tiny] [--steps 2] [--only NAME ...]
    python tests/soak_layouts.py --bytes        what a device holds of published models, and nothing is trained

Parameters have the published widths or half of them, pictures are small. Exit code 0 when the losses of every step are
those of one device within 1e-5, in float32, and norms of gradients, parameters and momentum afterwards within 1e-4:
gradients are sums over all pixels, in another order, and larger models round more. `--tiny` takes the models of the
tests, the smallest that eight devices divide (`tests/training/test_step_models.py` runs some of them on some layouts).
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is most of the work
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false",
}
sys.path[:0] = [str(HERE.parent), str(HERE / "training")]

import jax  # noqa: E402
import layouts  # noqa: E402

from jax_densevit.training.mesh import make_mesh  # noqa: E402

LIMIT, ROUNDING = 1e-5, 1e-4  # of losses; of everything else
_INSTANCES = {"slots": 4}
_COLTRAN = {"variant": "small", "image_size": 16}
_DEPTH = {"encoder_layers": 2, "outer_layers": 1, "inner_layers": 1}
# As `layouts.TINY`.
MODELS: dict[str, tuple[str, dict, str, dict, int]] = {
    "setr": ("setr_pup", {"variant": "S/16", "image_size": 64, "scan": True, "remat": "full"}, "segmentation", {}, 64),
    "dpt": ("dpt", {"variant": "base", "num_layers": 4, "image_size": 64}, "segmentation", {}, 64),
    "uformer": ("uformer", {"variant": "S", "depths": (2,) + (1,) * 8}, "colorization", {}, 32),
    "unet": ("unet", {"variant": "64"}, "segmentation", {}, 64),
    "unet_lite": ("unet_lite", {}, "segmentation", {}, 64),
    "axial": ("axial", {"num_layers": 4, "scan": True}, "segmentation", {}, 16),
    "colorizer": (
        "coltran_colorizer",
        {**_COLTRAN, **_DEPTH},
        "coltran_colorizer",
        {"image_size": 16, "photo_size": 16},
        16,
    ),
    "color upsampler": (
        "coltran_color_upsampler",
        {**_COLTRAN, "num_layers": 2},
        "coltran_color_upsampler",
        {"image_size": 16, "coarse_size": 16, "photo_size": 16},
        16,
    ),
    "spatial upsampler": (
        "coltran_spatial_upsampler",
        {**_COLTRAN, "num_layers": 2},
        "coltran_spatial_upsampler",
        {"image_size": 16, "coarse_size": 4, "photo_size": 16},
        16,
    ),
    "instance_seq2seg": ("instance_seq2seg", {"variant": "embedding"}, "instances", _INSTANCES, 32),
    "hungarian_unet": ("hungarian_unet", {"variant": "32"}, "instances", _INSTANCES, 32),
    "queries on unet": ("queries", {"variant": "unet", "image_size": 64}, "instances", _INSTANCES, 64),
}


def print_bytes() -> None:
    """MiB of parameters and AdamW's state on the fullest device, and how much more that is than one Nth of all."""
    meshes = {f"fsdp {count}": {"data": 1, "fsdp": count} for count in (1, 2, 4, 8)}
    meshes["fsdp 4, tensor 2"] = {"data": 1, "fsdp": 4, "tensor": 2}
    print(f"{'':36}", *(f"{title:>17}" for title in meshes))
    for name, variant, options in layouts.PUBLISHED:
        state, cells = layouts.state_of(name, variant, **options), []
        for sizes in meshes.values():
            count = math.prod(sizes.values())
            mesh = make_mesh(**sizes, devices=jax.devices()[:count])
            held = layouts.held(state, layouts.shardings_of(state, mesh))
            total = held if count == 1 else total
            cells.append(f"{held / 2**20:10,.1f} {held * count / total - 1:+5.1%}")
        title = f"{name} {variant}{' scanned' if options else ''}"
        print(f"{title:36}", *(f"{cell:>17}" for cell in cells))


def losses(numbers: list[dict[str, float]]) -> list[dict[str, float]]:
    """Of the numbers of every step, the loss and its terms."""
    return [{name: value for name, value in step.items() if name.startswith("loss")} for step in numbers]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--bytes", action="store_true")
    given = parser.parse_args()
    if given.bytes:
        print_bytes()
        return 0
    table, options = (layouts.TINY, {"minimum_bytes": 0}) if given.tiny else (MODELS, {})
    if unknown := set(given.only or ()) - table.keys():
        parser.error(f"there is no {' and no '.join(sorted(unknown))} among {', '.join(table)}")
    failed = []
    print(f"{'model':20} {'layout':16} {'losses':>8} {'numbers':>8} {'state':>8}   bytes on the fullest device")
    for name in given.only or table:
        subject = layouts.subject(name, table)
        start = time.process_time()
        numbers, state, held = layouts.trained(*subject, layouts.alone(), given.steps)
        size = max(held.values())
        for layout, sizes in layouts.LAYOUTS.items():
            found, after, held = layouts.trained(*subject, make_mesh(**sizes), given.steps, **options)
            compared = {
                "losses": (*layouts.largest_difference(losses(numbers), losses(found)), LIMIT),
                "numbers": (*layouts.largest_difference(numbers, found), ROUNDING),
                "state": (*layouts.largest_difference(state, after), ROUNDING),
            }
            cells = " ".join(f"{difference:8.1e}" for difference, _, _ in compared.values())
            print(f"{name:20} {layout:16} {cells}   1/{size / max(held.values()):.2f}", flush=True)
            failed += [
                f"{name}, {layout}, {what}: {difference:.1e} at {where}"
                for what, (difference, where, limit) in compared.items()
                if difference > limit
            ]
        print(f"{'':20} {size / 2**20:.1f} MiB on one device; {time.process_time() - start:.0f} s of CPU", flush=True)
    print("\n".join(failed) if failed else f"Losses within {LIMIT:g} of one device, the rest within {ROUNDING:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
