"""What the exported files weigh beside the float32 MindIR of the captured network.

    python bench/size.py [--json] [--networks resnet20 resnet50] [--per-channel]

Weights are random and the ranges come from one random batch, which hardly matters to a size. Every format of
`msqkd.exporters.FORMATS` for the target lite_arm is a row; one whose package is not installed is left out, with a note.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import mindspore as ms
import numpy as np

from msqkd import QuantConfig, create_ptq_network, quantize
from msqkd.environment import versions
from msqkd.errors import MissingDependencyError
from msqkd.exporters import FORMATS
from msqkd.exporters.portable import write_float
from msqkd.graph.capture import capture
from msqkd.models import build_model
from msqkd.platform import leave_quietly

NETWORKS = {"resnet20": ("msqkd", (3, 32, 32)), "resnet50": ("mindcv", (3, 224, 224))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--per-channel", action="store_true")
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    sizes = {name: file_sizes(name, args.per_channel) for name in args.networks}
    if args.json:
        print(json.dumps({"sizes": sizes, "date": date.today().isoformat(), "versions": versions()}, indent=2))
        return
    print("| network | format | bytes | to float |\n|---|---|---|---|")
    for name, files in sizes.items():
        for kind, size in files.items():
            print(f"| {name} | {kind} | {size:,} | {size / files['float']:.4f} |")


def file_sizes(name: str, per_channel: bool) -> dict[str, int]:
    """Bytes by format, `float` first."""
    ms.set_seed(0)
    source, shape = NETWORKS[name]
    net = build_model(source, name, {})
    images = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    config = QuantConfig(act_observer="minmax").override({"weight.per_channel": per_channel})
    graph, plan = quantize(create_ptq_network(net, config, [images])).sync()
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": write_float(capture(net, shape), Path(folder) / "float.mindir")}
        for form in FORMATS.values():
            if plan.target not in form.targets:
                continue
            try:
                files[form.name] = form.write(graph, plan, Path(folder) / (form.name + form.suffix))
            except MissingDependencyError as error:
                print(f"{form.name}: {error}", file=sys.stderr)
        return {kind: file.stat().st_size for kind, file in files.items()}


if __name__ == "__main__":
    main()
    leave_quietly()
