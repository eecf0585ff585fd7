"""What devices could do at most, so that a run can say what share of it it uses."""

import jax

# Dense bfloat16 (float16 on Volta and Turing) TFLOP/s per JAX device, from the makers' data sheets; the first entry
# whose name is found in `device.device_kind` counts. A JAX device is a core of TPU v2 and v3, else a chip.
_PEAK_TFLOPS = (
    ("TPU7x", 1153.5),  # two devices per chip
    ("TPU v6", 918.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),
    ("TPU v4", 275.0),
    ("TPU v3", 61.5),
    ("TPU v2", 22.5),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("V100", 125.0),
    ("T4", 65.0),
)


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device in 16-bit matrix products; None where it is not known (every CPU)."""
    return peak_of(device.device_kind)


def peak_of(kind: str) -> float | None:
    """The same by the kind of device, such as "TPU v5p"."""
    for name, tera in _PEAK_TFLOPS:
        if name.lower() in kind.lower():
            return tera * 1e12
    return None
