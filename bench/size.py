"""What the exported files weigh beside the float32 MindIR of the captured network.

    python bench/size.py [--json] [--networks resnet20 resnet50] [--per-channel] [--precision weight-only] [--bits 4]
        [--clusters 16 [--shared]] [--deflated]

Weights are random and the ranges come from one random batch, which hardly matters to a size. --clusters applies the
method cluster of docs/ptq.md; --deflated gives the bytes of each file in a ZIP archive instead. Every format of
`msqkd.exporters.FORMATS` for the target lite_arm is a row; one whose package is not installed, or that cannot hold the
network in this precision, is left out, with a note.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from msqkd import QuantConfig, create_ptq_network, quantize
from msqkd.environment import versions
from msqkd.errors import ExportError, MissingDependencyError
from msqkd.exporters import FORMATS
from msqkd.exporters.portable import write_float
from msqkd.graph.capture import capture
from msqkd.models import build_model
from msqkd.platform import leave_quietly
from msqkd.quant.algorithms.base import Method
from msqkd.quant.algorithms.cluster import Cluster
from msqkd.quant.config import INT8, STORING

NETWORKS = {"resnet20": ("msqkd", (3, 32, 32)), "resnet50": ("mindcv", (3, 224, 224))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--per-channel", action="store_true")
    parser.add_argument("--precision", default=INT8, choices=(INT8, *STORING))
    parser.add_argument("--bits", type=int, default=8, help="of weights, 2 to 8")
    parser.add_argument("--clusters", type=int, help="integers that the weights of a layer may take, 2 to 128")
    parser.add_argument("--shared", action="store_true", help="the same ones for all layers")
    parser.add_argument("--deflated", action="store_true", help="compressed as in a ZIP archive")
    args = parser.parse_args()
    if args.shared and args.clusters is None:
        parser.error("--shared goes with --clusters")
    ms.set_context(mode=ms.GRAPH_MODE)
    changes = {"weight.per_channel": args.per_channel, "weight.quant_dtype": args.bits, "precision": args.precision}
    methods = [Cluster(args.clusters, args.shared)] if args.clusters is not None else []
    sizes = {name: file_sizes(name, changes, methods, args.deflated) for name in args.networks}
    if args.json:
        print(json.dumps({"sizes": sizes, "date": date.today().isoformat(), "versions": versions()}, indent=2))
        return
    print("| network | format | bytes | to float |\n|---|---|---|---|")
    for name, files in sizes.items():
        for kind, size in files.items():
            print(f"| {name} | {kind} | {size:,} | {size / files['float']:.4f} |")


def file_sizes(
    name: str, changes: dict[str, Any], methods: Sequence[Method] = (), deflated: bool = False
) -> dict[str, int]:
    """Bytes by format, `float` first; `changes` of the settings are as in `QuantConfig.override`."""
    ms.set_seed(0)
    source, shape = NETWORKS[name]
    net = build_model(source, name, {})
    images = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    config = QuantConfig(act_observer="minmax").override(changes)
    graph, plan = quantize(create_ptq_network(net, config, [images], methods=methods)).sync()
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": write_float(capture(net, shape), Path(folder) / "float.mindir")}
        for form in FORMATS.values():
            if plan.target not in form.targets:
                continue
            try:
                files[form.name] = form.write(graph, plan, Path(folder) / (form.name + form.suffix))
            except (MissingDependencyError, ExportError) as error:
                print(f"{form.name}: {error}", file=sys.stderr)
        return {kind: _deflated(file) if deflated else file.stat().st_size for kind, file in files.items()}


def _deflated(file: Path) -> int:
    return len(zlib.compress(file.read_bytes(), 9))


if __name__ == "__main__":
    main()
    leave_quietly()
