"""What the exported files weigh beside the float32 MindIR of the captured network.

    python bench/size.py [--json] [--networks resnet20 resnet50] [--per-channel] [--precision weight-only] [--bits 4]

Weights are random and the ranges come from one random batch, which hardly matters to a size. Every format of
`msqkd.exporters.FORMATS` for the target lite_arm is a row; one whose package is not installed, or that cannot hold the
network in this precision, is left out, with a note.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
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
from msqkd.quant.config import INT8, STORING

NETWORKS = {"resnet20": ("msqkd", (3, 32, 32)), "resnet50": ("mindcv", (3, 224, 224))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--per-channel", action="store_true")
    parser.add_argument("--precision", default=INT8, choices=(INT8, *STORING))
    parser.add_argument("--bits", type=int, default=8, help="of weights, 2 to 8")
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    changes = {"weight.per_channel": args.per_channel, "weight.quant_dtype": args.bits, "precision": args.precision}
    sizes = {name: file_sizes(name, changes) for name in args.networks}
    if args.json:
        print(json.dumps({"sizes": sizes, "date": date.today().isoformat(), "versions": versions()}, indent=2))
        return
    print("| network | format | bytes | to float |\n|---|---|---|---|")
    for name, files in sizes.items():
        for kind, size in files.items():
            print(f"| {name} | {kind} | {size:,} | {size / files['float']:.4f} |")


def file_sizes(name: str, changes: dict[str, Any]) -> dict[str, int]:
    """Bytes by format, `float` first; `changes` of the settings are as in `QuantConfig.override`."""
    ms.set_seed(0)
    source, shape = NETWORKS[name]
    net = build_model(source, name, {})
    images = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    config = QuantConfig(act_observer="minmax").override(changes)
    graph, plan = quantize(create_ptq_network(net, config, [images])).sync()
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": write_float(capture(net, shape), Path(folder) / "float.mindir")}
        for form in FORMATS.values():
            if plan.target not in form.targets:
                continue
            try:
                files[form.name] = form.write(graph, plan, Path(folder) / (form.name + form.suffix))
            except (MissingDependencyError, ExportError) as error:
                print(f"{form.name}: {error}", file=sys.stderr)
        return {kind: file.stat().st_size for kind, file in files.items()}


if __name__ == "__main__":
    main()
    leave_quietly()
