"""Which pictures are compared, and what is done to them first: protocols by name. Their numbers never mix."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jax_densevit.data.resize_modes import resize_picture
from jax_densevit.data.sources.photo_folder import PhotoFolder
from jax_densevit.errors import UserError
from jax_densevit.layers.resize import center_square, resize_area

_NAMED = 5  # names in a message
# SHA-256 of the names in the two lists that ColTran's authors published (big_vision, `coltran_fid_data`), without
# suffix, sorted, each ended by a newline.
COLTRAN_LISTS = {
    "51b6147ff396cbcc673d5115ef068cf7819211f4a433d72e7fd4b4f9bb9a4015": "the published list of pictures to colorize",
    "596c2a3fbc42a3ecd5d946fdde16aa892829a6f17258cc2129be10138fc320d1": "the published list of references",
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a comparison keeps to.

    Attributes:
      name: of `PROTOCOLS`.
      prepare: picture uint8 `[H, W, 3]` -> the picture that is compared, uint8.
      count: pictures on each side; 0 = any number.
      disjoint: no name may be on both sides.
      paired: every picture has its reference of the same name.
    """

    name: str
    prepare: Callable[[np.ndarray], np.ndarray]
    count: int = 0
    disjoint: bool = False
    paired: bool = False

    @property
    def complete(self) -> bool:
        """Whether a picture that cannot be read spoils it."""
        return bool(self.count or self.paired)

    def check(self, pictures: Sequence[str], references: Sequence[str]) -> None:
        """Raises a UserError unless the names of both sides are as the protocol wants them."""
        for side, names in (("pictures", pictures), ("references", references)):
            if self.count and len(names) != self.count:
                raise UserError(f"{self.name} compares {self.count:,} {side}, and there are {len(names):,}.")
        both = sorted({_base(name) for name in pictures} & {_base(name) for name in references})
        if self.disjoint and both:
            raise UserError(
                f"{self.name} compares with other pictures, and {len(both):,} are on both sides: {_some(both)}."
            )
        if self.paired:
            alone = sorted(set(pictures) ^ set(references))
            if alone:
                raise UserError(
                    f"{self.name} compares each picture with the reference of its name, and {len(alone):,} are on one "
                    f"side only: {_some(alone)}; choose with --picture_list and --reference_list."
                )


def _as_it_is(image: np.ndarray) -> np.ndarray:
    return image


def _square_256(image: np.ndarray) -> np.ndarray:
    return resize_area(center_square(image).astype(np.int32), (256, 256)).astype(np.uint8)


def _squashed_256(image: np.ndarray) -> np.ndarray:
    # OpenCV's INTER_LINEAR: bilinear between the middles of pixels, without antialiasing.
    return np.rint(resize_picture(image, (256, 256), "pytorch_fid")).astype(np.uint8)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Any two sets, as the files are.
        Protocol("as_they_are", _as_it_is),
        # ColTran's FID-5K (google-research issues 896 and 1020; big_vision's coltran_fid): 5,000 colorized pictures
        # against 5,000 other real ones, the middle square averaged to 256 x 256.
        Protocol("coltran_5k", _square_256, count=5000, disjoint=True),
        # That of DDColor and others: colorized pictures against their own originals, squashed to 256 x 256. Their own
        # code takes torchvision's network; numbers of ours are FIDs, and a perfect answer scores 0.
        Protocol("paired_256", _squashed_256, paired=True),
    )
}


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """Files to compare.

    Attributes:
      where: the folder.
      names: below it, without suffix, in the order of the list or sorted.
      paths: of the files.
    """

    where: str
    names: tuple[str, ...]
    paths: tuple[Path, ...]

    def facts(self) -> dict[str, object]:
        """JSON-ready: where, a hash of the names (base names, sorted, each ended by a newline), how many JPEGs."""
        jpegs = sum(path.suffix.lower() in (".jpg", ".jpeg") for path in self.paths)
        return {"where": self.where, **name_facts(self.names), **({"jpegs": jpegs} if jpegs else {})}


def name_facts(names: Sequence[str]) -> dict[str, str]:
    """`list_sha256` of names, and what `list` it is where it is a published one."""
    digest = hashlib.sha256("".join(f"{name}\n" for name in sorted(_base(name) for name in names)).encode()).hexdigest()
    published = COLTRAN_LISTS.get(digest)
    return {"list_sha256": digest, **({"list": published} if published else {})}


def find_pictures(folder: str, list_file: str = "") -> PictureSet:
    """The pictures below a folder, all or those that a text file lists, one name a line with or without suffix.

    Raises:
      UserError: no such folder, picture or list, or two files of one name.
    """
    paths = PhotoFolder(folder, list_file=list_file, gray="keep").paths
    return PictureSet(str(folder), tuple(paths), tuple(paths.values()))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
