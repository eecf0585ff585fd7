"""Statistics of a set of pictures in one file, so that a reference is looked at once.

An `.npz` without pickles: `mu` and `sigma` as pytorch-fid has them, vectors for the kernel distance (all of them where
there are no more than 10,000), names, colorfulness, and as JSON what they were computed from. It is refused where that
is not what it is to be compared with.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import jax_densevit
from jax_densevit.distances.compare import Measured
from jax_densevit.distances.networks import FeatureNetwork
from jax_densevit.distances.protocols import Protocol, name_facts
from jax_densevit.errors import UserError
from jax_densevit.metrics.frechet import count, from_gaussian, gaussian, no_features
from jax_densevit.pretrained import read
from jax_densevit.writing import whole_file


def save_statistics(path: str | os.PathLike, measured: Measured, network: FeatureNetwork, protocol: Protocol) -> None:
    """Writes the file, whole or not at all.

    Raises:
      UserError: fewer than two pictures, or a place that cannot be written.
    """
    number = count(measured.frechet)
    if number < 2:
        raise UserError(f"{path}: statistics need at least two pictures, and there are {number}.")
    mean, covariance = gaussian(measured.frechet)
    facts = {
        "count": number,
        **_must_agree(network, protocol),
        **measured.facts,
        "jax_densevit": jax_densevit.__version__,
    }
    with whole_file(path) as part, open(part, "wb") as file:
        np.savez(
            file,
            mu=mean,
            sigma=covariance,
            rows=measured.kernel["rows"],
            place=measured.kernel["place"],
            colorfulness=measured.colorfulness,
            names=np.array(measured.names),
            facts=np.array(json.dumps(facts)),
        )


def load_statistics(path: str | os.PathLike, network: FeatureNetwork, protocol: Protocol) -> Measured:
    """Reads it back.

    Raises:
      UserError: no such file, one that is damaged or something else, or statistics of another network, of other
        weights, resizing or protocol.
    """
    arrays = read(path)
    lacking = {"mu", "sigma", "rows", "place", "colorfulness", "names", "facts"} - arrays.keys()
    if lacking:
        raise UserError(
            f"{path} does not say what it was computed from ({', '.join(sorted(lacking))} missing); compute it anew "
            "with --save_reference."
        )
    try:
        facts = json.loads(str(arrays["facts"]))
        wanted = _must_agree(network, protocol)
        different = [f"{key} {facts[key]!r} instead of {wanted[key]!r}" for key in wanted if facts[key] != wanted[key]]
        if different:
            raise UserError(f"The statistics {path} are no reference here: {', '.join(different)}.")
        return _measured(arrays, facts)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no file of statistics ({error}); compute it anew with --save_reference.") from error


def is_statistics(path: str | os.PathLike) -> bool:
    """Whether a reference is a file of statistics and no folder of pictures."""
    return Path(path).suffix == ".npz"


def _must_agree(network: FeatureNetwork, protocol: Protocol) -> dict[str, Any]:
    return {**network.facts(), "protocol": protocol.name}


def _measured(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> Measured:
    number, mean, covariance = int(facts.pop("count")), arrays["mu"], arrays["sigma"]
    rows, place, names = arrays["rows"], arrays["place"], tuple(str(name) for name in arrays["names"])
    color = arrays["colorfulness"].astype(np.float32)
    width = len(mean)
    fits = covariance.shape == (width, width) and rows.ndim == 2 and rows.shape[1] == width
    if not fits or len(rows) != len(place) or len(color) != len(names) or len(rows) > number:
        raise ValueError("its arrays do not fit each other")
    if not all(np.isfinite(array).all() for array in (mean, covariance, rows)) or number < 2:
        raise ValueError("its numbers are not finite")
    if name_facts(names)["list_sha256"] != facts["list_sha256"]:
        raise ValueError("its names do not match their hash")
    kernel = {"rows": rows.astype(np.float32), "place": place.astype(np.int64)}
    short = number == len(rows) <= width
    frechet = {**no_features(), "rows": kernel["rows"]} if short else from_gaussian(number, mean, covariance)
    return Measured(frechet, kernel, color, names, facts)
