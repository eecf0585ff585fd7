"""Hostile and damaged weight files run nothing and say so in a sentence."""

import hashlib
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from bundle_writer import write_bundle
from safetensors.numpy import save_file
from torch_writer import Tensor, write_legacy, write_zip
from weight_arrays import ARRAYS, WRITERS, check, refuse

from jax_densevit.errors import UserError
from jax_densevit.pretrained import memory, read


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_that_run_code(tmp_path, protocol):
    mark = tmp_path / "it-ran"
    payload = pickle.dumps({"a": Payload(mark)}, protocol=protocol)
    refuse(
        write_zip(tmp_path / "a.pth", {}, data_pickle=payload), r"asks for (posix|nt)\.system.*nothing of it was run"
    )
    bare = tmp_path / "b.pth"
    bare.write_bytes(payload)
    refuse(bare, "asks for|no known format")
    legacy = tmp_path / "c.pt"
    write_legacy(legacy, {"a": ARRAYS["weight"]})
    content = legacy.read_bytes()
    start = content.index(b"\x80\x02ccollections")
    legacy.write_bytes(content[:start] + payload)
    refuse(legacy, "asks for")
    assert not mark.exists()


@pytest.mark.parametrize(
    "instructions",
    [
        b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.",
        b"ctorch\nload\n(X\x01\x00\x00\x00atR.",
        b"ctorch.storage\n_load_from_bytes\n(X\x01\x00\x00\x00atR.",
        b"ctorch._utils\n__builtins__\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__Nsb.",
        b"ccollections\nOrderedDict\n)\x81.",
        b"\x82\x01.",
        b"(ibuiltins\neval\n.",
        b"ctorch\nFloatStorage\n)R.",
        b"r\xff\xff\xff\x7f.",
        b"h\x05.",
        b"]]a(e.e",
        b"}(]Ku.",
        b"Q.",
        b"(X\x06\x00\x00\x00moduleN\x4e\x4e\x4etQ.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"N.",
    ],
)
def test_instructions_that_no_tensor_needs(tmp_path, instructions):
    refuse(write_zip(tmp_path / "a.pth", {}, data_pickle=b"\x80\x02" + instructions), "a.pth")


def test_lists_in_lists_in_lists(tmp_path):
    """A thousand bytes that stand for 2^60 entries, and a list that holds itself."""
    doubling = b"]" + b"".join(b"q" + bytes([i]) + b"]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(60))
    refuse(write_zip(tmp_path / "a.pth", {}, data_pickle=b"\x80\x02" + doubling + b"."), "nests or repeats")
    refuse(write_zip(tmp_path / "a.pth", {}, data_pickle=b"\x80\x02]q\x00h\x00a."), "nests or repeats")


@pytest.mark.parametrize(
    "tensor",
    [
        (0, (10**9, 10**9), (0, 0)),
        (0, (2**40,), (1,)),
        (15, (2, 3), (10, 2)),
        (2**61, (1,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-3,), (1,)),
        (0, (2, 2), (1,)),
    ],
)
@pytest.mark.parametrize("form", WRITERS)
def test_absurd_shapes(tmp_path, form, tensor):
    path = WRITERS[form](tmp_path / "a.pth", {"a": Tensor(np.zeros(20, np.float32), *tensor)})
    refuse(path, "is damaged or not a weight file")


def test_storages_that_lie(tmp_path):
    tree = {"a": Tensor(np.zeros(20, np.float32), 0, (20,), (1,))}
    path = write_zip(tmp_path / "a.pth", tree, members={"archive/data/0": bytes(79)})
    refuse(path, "79 bytes for 20 values")
    refuse(write_zip(tmp_path / "a.pth", tree, members={"archive/byteorder": b"big"}), "big-endian")
    legacy = write_legacy(tmp_path / "b.pth", tree)
    legacy.write_bytes(legacy.read_bytes() + b"more")
    refuse(legacy, "4 bytes follow")


def test_zip_members_that_lead_elsewhere(tmp_path):
    for name in ("../outside", "archive/../../outside", "/outside", "..\\outside"):
        refuse(write_zip(tmp_path / "a.pth", ARRAYS, members={name: b"x"}), "leads out of its folder")
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
            file.writestr(f"{name}.npy", b"x")
        refuse(tmp_path / "a.npz", "leads out of its folder")
    assert not (tmp_path.parent / "outside").exists()


def test_object_arrays(tmp_path):
    mark = tmp_path / "it-ran"
    np.savez(tmp_path / "a.npz", a=np.array([Payload(mark)], dtype=object))
    refuse(tmp_path / "a.npz", "holds objects")
    assert not mark.exists()


def npy(header, content=b""):
    header = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def test_npz_bombs_and_lies(tmp_path):
    path = tmp_path / "a.npz"

    def write(content, method=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr("a.npy", content)

    write(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", bytes(8)))
    refuse(path, "more than there is")
    write(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }", bytes(12)))
    refuse(path, "damaged")
    write(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(12)))
    refuse(path, "longer than its header")
    write(npy("{'descr': '<f4', 'shape': __import__('os').system('touch it-ran')}", bytes(12)))
    refuse(path, "damaged")
    write(b"text")
    refuse(path, "damaged")
    # A directory that promises two gigabytes from a few bytes.
    write(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(8)))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 2**31)
    path.write_bytes(content)
    refuse(path, "as no weights do")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """One good file of every format: name -> (path, bytes of the file that gets damaged)."""
    folder = tmp_path_factory.mktemp("samples")
    arrays = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items() if name != "brain"}
    paths = {form: WRITERS[form](folder / f"{form}.pth", {"model": ARRAYS, "epoch": 3}) for form in WRITERS}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **arrays)
    save_file(arrays, folder / "a.safetensors")
    write_bundle(folder / "bundle", ARRAYS)
    paths |= {name: folder / f"{name}.npz" for name in ("plain", "packed")}
    paths |= {"safetensors": folder / "a.safetensors", "index": folder / "bundle.index"}
    paths["values"] = folder / "bundle.data-00000-of-00001"
    return {name: (path, path.read_bytes()) for name, path in paths.items()}


FORMATS = ("zip", "legacy", "plain", "packed", "safetensors", "index", "values")


@pytest.mark.parametrize("name", FORMATS)
def test_truncated_files(samples, name):
    path, whole = samples[name]
    good = path.with_suffix(".index") if name == "values" else path
    for size in {0, 1, 7, 16, len(whole) // 3, len(whole) // 2, len(whole) - 4 - 4 * (name == "values")}:
        path.write_bytes(whole[:size])
        refuse(good, ".")
    path.write_bytes(whole)
    read(good)


@pytest.mark.parametrize("name", FORMATS)
def test_flipped_bits(samples, tmp_path, name):
    """Either the same values, or one sentence; never other values where the format has checksums."""
    path, whole = samples[name]
    want = {
        key: np.array(array) for key, array in read(path.with_suffix(".index") if name == "values" else path).items()
    }
    copies = {other.name: tmp_path / other.name for other, _ in samples.values()}
    for other, content in samples.values():
        copies[other.name].write_bytes(content)
    path = copies[path.name]
    good = path.with_suffix(".index") if name == "values" else path
    places = np.random.default_rng(1).permutation(len(whole))[:150]
    accepted = 0
    for place in [0, *places]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(place % 8)
        # Files are replaced, never changed in place: views into the old one may be alive.
        path.unlink()
        path.write_bytes(flipped)
        try:
            got = read(good)
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            continue
        accepted += 1
        if name not in ("legacy", "safetensors"):
            # What the checksums do not cover: dates, attributes, padding, and the names in headers.
            assert [array.tobytes() for array in got.values()] == [array.tobytes() for array in want.values()]
    assert accepted < 151


def test_legacy_files_are_held_to_the_hash_in_their_name(tmp_path):
    plain = write_legacy(tmp_path / "plain.pth", ARRAYS)
    content = plain.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    good = tmp_path / f"vit_large_p16_384-{digest}.pth"
    good.write_bytes(content)
    check(read(good), ARRAYS)
    flipped = bytearray(content)
    flipped[-40] ^= 4
    good.unlink()
    good.write_bytes(flipped)
    if any(letter in "abcdef" for letter in digest):
        refuse(good, "SHA-256 does not begin with")
    dated = tmp_path / "model-20210619.pth"  # a date, no hash
    dated.write_bytes(content)
    check(read(dated), ARRAYS)


def test_other_files(tmp_path):
    refuse(tmp_path / "absent.pth", "cannot be read")
    (tmp_path / "a.pth").write_text("<html>not found</html>")
    refuse(tmp_path / "a.pth", "in no known format")
    (tmp_path / "b.npz").write_bytes(b"")
    refuse(tmp_path / "b.npz", "in no known format")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "is a directory without a checkpoint")
    refuse(write_zip(tmp_path / "c.pth", {"epoch": 3}), "holds no tensors")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    refuse(tmp_path / "d.zip", "something else than arrays")
    write_bundle(tmp_path / "e", {"a": ARRAYS["half"]}, compression=1)
    refuse(tmp_path / "e.index", "compressed")
    write_bundle(tmp_path / "f", {"a": ARRAYS["half"]}, shapes={"a": (10**12,)})
    refuse(tmp_path / "f.index", "14 bytes for the shape")
    write_bundle(tmp_path / "g", {"a": ARRAYS["half"]})
    (tmp_path / "g.data-00000-of-00001").unlink()
    refuse(tmp_path / "g.index", "is missing")
    refuse(write_zip(tmp_path / "h.pth", {"a": {"b": ARRAYS["half"]}, "a.b": 3}), "two entries 'a.b'")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    (tmp_path / "i.pth").write_bytes(buffer.getvalue())
    refuse(tmp_path / "i.pth", "compressed member")


def test_larger_than_the_machine(tmp_path, monkeypatch):
    """Twice the memory in one array (a file with a hole), and more arrays than any model: refused before it is read."""
    path, size = tmp_path / "huge.safetensors", 2 * memory.machine_bytes() // 8 * 8
    header = json.dumps({"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    with pytest.raises(UserError, match=r"GiB of arrays and this machine has .* use one with more"):
        read(path)
    arrays = {str(i): np.zeros(5, np.float32) for i in range(3)}
    save_file(arrays, tmp_path / "many.safetensors")
    np.savez(tmp_path / "many.npz", **arrays)
    for name, limit, cause in (("MAX_ARRAYS", 2, "holds 3 arrays"), ("machine_bytes", lambda: 50, "GiB of arrays")):
        with monkeypatch.context() as patch:
            patch.setattr(memory, name, limit)
            for kind in ("safetensors", "npz"):
                with pytest.raises(UserError, match=cause):
                    read(tmp_path / f"many.{kind}")
    assert len(read(tmp_path / "many.npz")) == len(read(tmp_path / "many.safetensors")) == 3
    (tmp_path / "params").mkdir()
    (tmp_path / "params/_METADATA").write_bytes(b"{")
    os.truncate(tmp_path / "params/_METADATA", 10**9)
    with pytest.raises(UserError, match="_METADATA lists more arrays than any model has"):
        read(tmp_path / "params")
