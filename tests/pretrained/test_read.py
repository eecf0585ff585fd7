"""Weight files of every format come back bit for bit."""

import struct

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bundle_writer import write_bundle
from safetensors.numpy import save_file
from torch_writer import Tensor
from weight_arrays import ARRAYS, RNG, WRITERS, check, refuse

from jax_densevit.pretrained import contents, read
from jax_densevit.pretrained.crc32c import crc32c
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.state import TrainState


@pytest.mark.parametrize("form", WRITERS)
def test_torch(tmp_path, form):
    path = WRITERS[form](tmp_path / "a.pth", ARRAYS)
    got = read(path)
    check(got, ARRAYS)
    assert not any(array.flags.writeable for array in got.values() if array.size)
    if form == "zip":  # strides kept, so nothing was copied
        assert got["permuted"].strides == ARRAYS["permuted"].strides


@pytest.mark.parametrize("form", WRITERS)
def test_nested_dicts_are_flattened_and_scalars_kept_apart(tmp_path, form):
    tree = {
        "epoch": 3,
        "name": "vit",
        "loss": 0.5,
        "none": None,
        "model": {"a.weight": ARRAYS["weight"]},
        "optimizer": {"state": {0: {"step": 7, "exp_avg": ARRAYS["half"]}}, "groups": [{"lr": 1e-4, "params": (0, 1)}]},
    }
    got = contents(WRITERS[form](tmp_path / "a.pt", tree))
    check(got.tensors, {"model.a.weight": ARRAYS["weight"], "optimizer.state.0.exp_avg": ARRAYS["half"]})
    assert got.scalars == {
        "epoch": 3,
        "name": "vit",
        "loss": 0.5,
        "none": None,
        "optimizer.state.0.step": 7,
        "optimizer.groups.0.lr": 1e-4,
        "optimizer.groups.0.params.0": 0,
        "optimizer.groups.0.params.1": 1,
    }


@pytest.mark.parametrize("form", WRITERS)
def test_views_of_a_storage(tmp_path, form):
    """Offset, steps and expanded axes of a tensor that is a part of a larger storage."""
    values = np.arange(20, dtype=np.float32)
    tree = {"part": Tensor(values, 3, (2, 3), (10, 2)), "wide": Tensor(values, 1, (4, 2), (0, 1))}
    got = read(WRITERS[form](tmp_path / "a.bin", tree))
    np.testing.assert_array_equal(got["part"], [[3, 5, 7], [13, 15, 17]])
    np.testing.assert_array_equal(got["wide"], [[1, 2]] * 4)


def test_npz(tmp_path):
    arrays = {name.replace("w", "Transformer/w"): array for name, array in ARRAYS.items()}
    for save in (np.savez, np.savez_compressed):
        path = tmp_path / "a.npz"
        save(path, **arrays)
        check(read(path), arrays)  # bfloat16 went in as two raw bytes


def test_safetensors(tmp_path):
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in ARRAYS.items()}
    del arrays["brain"]
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    check(read(tmp_path / "a.safetensors"), arrays)
    # bfloat16, written by the format's definition: length, JSON, values.
    header = b'{"brain":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    content = struct.pack("<Q", len(header)) + header + ARRAYS["brain"].tobytes()
    (tmp_path / "b.safetensors").write_bytes(content)
    check(read(tmp_path / "b.safetensors"), {"brain": ARRAYS["brain"]})


def test_checksum():
    """The value that every implementation of CRC-32C is tested with, and lanes against bytes."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    for size in (65_535, 65_536, 65_537, 100_003):
        data = RNG.integers(0, 256, size).astype(np.uint8).tobytes()
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte
            for _ in range(8):
                value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        assert crc32c(data) == value ^ 0xFFFFFFFF


def test_tensorflow_bundle(tmp_path):
    names = {f"layer_{i}/{name}/.ATTRIBUTES/VARIABLE_VALUE": array for i, (name, array) in enumerate(ARRAYS.items())}
    prefix = write_bundle(tmp_path / "model-3", names)
    check(read(prefix), names)
    check(read(prefix.with_suffix(".index")), names)


def test_tensorflow_itself_writes_such_bundles(tmp_path):
    """TensorFlow is there where data is fed, so in the tests: its own file."""
    import tensorflow as tf

    many = [tf.Variable(RNG.normal(size=(i % 5, 3)).astype(np.float32)) for i in range(300)]
    tf.train.Checkpoint(many=many, brain=tf.Variable(tf.ones(3, tf.bfloat16))).write(str(tmp_path / "ckpt"))
    got = read(tmp_path / "ckpt")
    want = {f"many/{i}/.ATTRIBUTES/VARIABLE_VALUE": variable.numpy() for i, variable in enumerate(many)}
    got = {name: array for name, array in got.items() if name != "save_counter/.ATTRIBUTES/VARIABLE_VALUE"}
    check(got, want | {"brain/.ATTRIBUTES/VARIABLE_VALUE": np.ones(3, ml_dtypes.bfloat16)})


def test_orbax(tmp_path):
    """A tree of its own, and a checkpoint of ours: one item, a step, a workdir, whose newest step is read."""
    tree = {"layer": {"kernel": ARRAYS["weight"], "bias": ARRAYS["brain"]}, "step": np.array(3, np.int32)}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as writer:
        writer.save(tmp_path / "tree", args=ocp.args.StandardSave(tree))
    flat = {"layer.kernel": ARRAYS["weight"], "layer.bias": ARRAYS["brain"], "step": np.array(3, np.int32)}
    check(read(tmp_path / "tree"), flat)
    for step in (2, 10):
        state = TrainState(step, {"w": np.full(3, step, np.float32)}, {"mean": np.ones(2, np.float32)}, None, {})
        with Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(step, state, {}, {"config": {}})
    want = {"params.w": np.full(3, 10, np.float32), "statistics.mean": np.ones(2, np.float32)}
    check(read(tmp_path / "run"), want)
    check(read(tmp_path / "run/checkpoints/2"), {**want, "params.w": np.full(3, 2, np.float32)})
    check(read(tmp_path / "run/checkpoints/10/params"), {"w": want["params.w"]})
    file = max(
        (tmp_path / "run/checkpoints/10/params/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refuse(tmp_path / "run", "is damaged")
    refuse(tmp_path / "run/checkpoints/10/params", "is damaged")
    (tmp_path / "tree/_METADATA").write_text("{")
    refuse(tmp_path / "tree", "damaged")
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    refuse(tmp_path / "begun", "holds no checkpoint")
