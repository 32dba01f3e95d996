#!/usr/bin/env python
"""For ARM users: from a finished run, or a checkpoint and its recipe, to MindSpore Lite's files.

    python tools/export_lite.py runs/digits_lenet5 --output exported
    python tools/export_lite.py --recipe cifar10_resnet20_w8a8 --checkpoint net.ckpt --set data.root=DIR -o exported
    python tools/export_lite.py runs/digits_lenet5 -o exported --benchmark --converter mindspore-lite-2.7.0-linux-x64
    python tools/export_lite.py --check exported/benchmark dump

Written are NAME.ms (int8, ready for the device), NAME.mindir (float weights with the quantisation parameters, for
converter_lite) and export.json (checksums, and how the device's answers compare). Exit codes: 0; 1 where the device
deviates by more than the recipe's bound, or a dump differs; 2 for bad input, and where the converter makes no file
(what msqkd itself has written stays).
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any, Optional

from msqkd.cli import guarded, quiet_compiler
from msqkd.errors import ExportError
from msqkd.platform import leave_quietly


def main(arguments: Optional[list[str]] = None) -> int:
    """Run the tool; returns the exit code."""
    args = parse(arguments)
    return guarded(lambda: sys.exit(check(*args.check) if args.check else export(args)))


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    """The command line, its parts found to go together."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="export_lite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s RUN_DIR -o DIR [options] | --recipe RECIPE -o DIR [options] | --check FOLDER DUMP",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN_DIR", nargs="?", type=Path, help="folder of a finished `msqkd run`")
    source = parser.add_argument_group("in place of a run")
    source.add_argument("--recipe", help="recipe file, or name of a built-in one: calibrates its float network")
    source.add_argument("--checkpoint", metavar="FILE", help="trained float weights, in place of the recipe's")
    source.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
        help="change settings of the recipe",
    )  # fmt: skip
    output = parser.add_argument_group("what is written")
    output.add_argument("-o", "--output", metavar="DIR", type=Path, help="empty or new folder for everything")
    output.add_argument("--weight-only", action="store_true", help="also NAME_weight.ms: int8 weights, float kernels")
    output.add_argument("--float", dest="float_model", action="store_true", help="also NAME_float.ms: float32")
    output.add_argument(
        "--benchmark", action="store_true",
        help="also benchmark/: samples, the simulator's answers and scripts for a phone (adb) or a board (ssh)",
    )  # fmt: skip
    output.add_argument("--samples", metavar="N", type=_count, help="samples of --benchmark [8]")
    vendor = parser.add_argument_group("the vendor's converter")
    vendor.add_argument(
        "--converter", metavar="PATH", type=Path,
        help="converter_lite, the unpacked package, an environment with mindspore-lite, or its wheel: convert "
        "NAME.mindir and compare the result with NAME.ms",
    )  # fmt: skip
    vendor.add_argument(
        "--calibration-bins", metavar="DIR", type=Path,
        help="empty or new folder for the vendor's own quantisation as the baseline: the float MindIR, calibration "
        "files, configuration and command line; with --converter it is run and compared too",
    )  # fmt: skip
    device = parser.add_argument_group("after a run on the device")
    device.add_argument(
        "--check", metavar=("FOLDER", "DUMP"), nargs=2, type=Path,
        help="compare what the device dumped (a folder or a file) with the simulator; FOLDER is that of --benchmark",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    _check_together(parser, args)
    return args


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; 1 or more")
    return number


def _check_together(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    given = {key for key, value in vars(args).items() if value not in (None, False, [])}
    if args.check:
        others = given - {"check"}
        if others:
            parser.error(f"--check goes alone, found {', '.join(sorted(others))}")
        return
    if (args.run is None) == (args.recipe is None):
        parser.error("give a RUN_DIR or --recipe RECIPE" + (", not both" if args.run else ""))
    if args.output is None:
        parser.error("give the folder to write with --output DIR")
    if args.run is not None and (args.checkpoint or args.settings):
        parser.error("--checkpoint and --set go with --recipe; a run has its own recipe and weights")
    if args.samples is not None and not args.benchmark:
        parser.error("--samples goes with --benchmark")


def export(args: argparse.Namespace) -> int:
    """Write the files and say how the device will answer; 1 where it deviates too far."""
    quiet_compiler()
    # While it runs a network MindSpore answers Ctrl-C itself, by sending SIGTERM to the process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from msqkd.deploy.bundle import Wanted, check_places, from_recipe, from_run, write_bundle
    from msqkd.deploy.converter_run import find_converter
    from msqkd.pipeline.export import deviation_words
    from msqkd.progress import Reporter

    reporter = Reporter()
    wanted = Wanted(
        args.weight_only, args.float_model, find_converter(args.converter) if args.converter else None,
        args.calibration_bins, (args.samples or 8) if args.benchmark else 0,
    )  # fmt: skip
    check_places(args.output, *wanted.folders())
    if args.run is not None:
        source = from_run(args.run, reporter)
    else:
        source = from_recipe(args.recipe, args.checkpoint, args.settings, reporter)
    result = write_bundle(source, args.output, wanted, reporter)
    _tell(result, args.output)
    print(deviation_words(result["parity"]))
    made = [result[key] for key in ("converter", "vendor_ptq") if key in result]
    missing = [entry["reason"] for entry in made if entry["file"] is None]
    if missing:
        raise ExportError(missing[0])
    return int(result["parity"]["exceeded"])


def _tell(result: dict[str, Any], folder: Path) -> None:
    for name, entry in result["files"].items():
        print(f"{folder / name}  {entry['bytes']:,} bytes")


def check(folder: Path, dump: Path) -> int:
    """Compare a device's dump with the simulator; 1 where a value differs."""
    from msqkd.deploy.benchmark_check import check_dump

    found = check_dump(folder, dump)
    for node in found.nodes:
        if node.differing:
            print(f"{node.node}: {node.differing} of {node.values} values differ, by up to {node.max_difference:g}")
    if found.missing:
        print(f"without a dump: {', '.join(found.missing)}")
    if found.unknown:
        print(f"not in the model: {', '.join(found.unknown)}")
    first = f"; the first node that differs is {found.first.node}" if found.first else ""
    print(f"{found.differing} values of {len(found.nodes)} nodes differ on {found.samples} samples{first}")
    return int(found.differing > 0)


if __name__ == "__main__":
    code = main()
    leave_quietly()
    sys.exit(code)
