"""Zip archives whose members are looked at in place: nothing is ever extracted to a path."""

import mmap
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from jax_densevit.errors import UserError

_LOCAL_HEADER = b"PK\x03\x04"
# Deflate reaches 1032 to 1 on zeros; weights reach no more than a few to 1.
_MAX_RATIO, _FREE_BYTES = 100, 2**30


class Members:
    """The members of a zip archive, memory-mapped.

    Attributes:
      path: of the archive.
      names: of its members, in the order of its directory.
    """

    def __init__(self, path: Path):
        """Maps the file and checks its directory.

        Raises:
          UserError: names that lead out of a folder or come twice; a size that no weights have.
          zipfile.BadZipFile: a truncated archive.
        """
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._zip = zipfile.ZipFile(path)
        infos = self._zip.infolist()
        self._infos = {info.filename: info for info in infos}
        for info in infos:
            name = info.filename
            if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts or "\0" in name:
                raise UserError(f"{path} has a member {name!r} that leads out of its folder; it is refused.")
        if len(self._infos) != len(infos):
            raise UserError(f"{path} has two members of the same name; it is refused.")
        unpacked = sum(info.file_size for info in infos)
        if unpacked > max(_FREE_BYTES, _MAX_RATIO * len(self._map)):
            raise UserError(
                f"{path} has {len(self._map):,} bytes and would unpack to {unpacked:,}, as no weights do; refused."
            )
        self.names = tuple(self._infos)

    def torch_root(self) -> str | None:
        """The folder of PyTorch's `data.pkl` in the archive; None where there is none."""
        roots = [name[: -len("data.pkl")] for name in self.names if name == "data.pkl" or name.endswith("/data.pkl")]
        return min(roots, key=len) if roots else None

    def size(self, name: str) -> int:
        """Unpacked size in bytes."""
        return self._infos[name].file_size

    def view(self, name: str) -> memoryview:
        """The bytes of a stored (not compressed) member where they lie in the mapped file; its checksum is checked."""
        info = self._infos[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path} has a compressed member {name!r}, which torch.save does not write.")
        at = info.header_offset
        if self._map[at : at + 4] != _LOCAL_HEADER:
            raise ValueError(f"no member begins at byte {at}")
        lengths = np.frombuffer(self._map, "<u2", 2, at + 26)
        start = at + 30 + int(lengths.sum())
        if info.file_size != info.compress_size or start + info.file_size > len(self._map):
            raise ValueError(f"{name} reaches beyond the end of the file")
        data = memoryview(self._map)[start : start + info.file_size]
        if zlib.crc32(data) != info.CRC:
            raise ValueError(f"the checksum of {name} is wrong")
        return data

    def open(self, name: str):
        """A member as a file that unpacks as it is read and checks its checksum at its end."""
        return self._zip.open(name)
