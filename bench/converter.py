"""What MindSpore Lite's own converter makes of marked MindIR files, network by network.

    MSLITE_HOME=FOLDER python bench/converter.py [--only NAME ...] [--samples 4] [--keep FOLDER] [--direct] [--json]

Every network of `converter_networks`, or those named with --only (mindcv's too, for images of 64 × 64), gets random
weights and is quantized after training. The vendor's converter converts its marked MindIR; the vendor's runtime
computes that file and msqkd's own `.ms` file. Shown are the int8 nodes that have an equal in the converter's file
(operation, parameters, weights, biases), and the output values that differ.

With --direct the runtime loads the direct MindIR of each network, and its outputs are compared with MindSpore's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GLOG_v", "4")

import mindspore as ms
import numpy as np
from converter_networks import INTEGERS, NETWORKS
from mindspore import nn
from random_blocks import randomize

import msqkd
from msqkd.deploy.converter_run import feed, same_order
from msqkd.deploy.nodes import agreement
from msqkd.deploy.vendor_runtime import convert_command, first_error, run_ms, run_vendor, vendor_python
from msqkd.errors import MsqkdError
from msqkd.exporters.ms.read import read_ms

_CONFIG = msqkd.QuantConfig(msqkd.WeightQuantizer(per_channel=True), act_observer="minmax")


def randomised(net: nn.Cell, seed: int = 3) -> nn.Cell:
    """Give every parameter random values of a size that keeps the activations about 1."""
    randomize(net, np.random.default_rng(seed))
    net.set_train(False)
    return net


def compare(name: str, python: Path, folder: Path, samples: int) -> dict[str, Any]:
    """Quantize, convert and compute one network; returns a row of the table."""
    net, data = _network_and_data(name)
    return examine(name, net, _CONFIG, data, python, folder, samples)


def _network_and_data(name: str) -> tuple[nn.Cell, tuple[np.ndarray, ...]]:
    """Return a network with random weights, and eight samples of each of its inputs."""
    make, shape = NETWORKS[name] if name in NETWORKS else (partial(_zoo_network, name), (3, 64, 64))
    rng, shapes = np.random.default_rng(0), shape if isinstance(shape[0], tuple) else (shape,)
    if name in INTEGERS:
        limits = [INTEGERS[name], *[2] * (len(shapes) - 1)]
        data = tuple(rng.integers(0, end, (8, *size)).astype(np.int32) for end, size in zip(limits, shapes))
    else:
        data = tuple(rng.normal(size=(8, *size)).astype(np.float32) for size in shapes)
    return randomised(make()), data


def examine(
    name: str,
    net: nn.Cell,
    config: Any,
    data: tuple[np.ndarray, ...],
    python: Path,
    folder: Path,
    samples: int,
    rules: Any = (),
) -> dict[str, Any]:
    """Quantize a network after training, convert its marked file, and compute the file and our own with `samples`."""
    example = tuple(ms.Tensor(array[:1]) for array in data)
    made = msqkd.create_ptq_network(net, config, [data], example_input=example, rules=rules)
    quantised = msqkd.quantize(made)
    marked = msqkd.export(quantised, example, folder / name, "MINDIR")
    ours = msqkd.export(quantised, example, folder / f"{name}_ours", "MS")
    theirs = folder / f"{name}_theirs.ms"
    done = run_vendor(convert_command(python, marked, theirs.with_suffix("")))
    (folder / f"{name}.log").write_text(done.stdout)
    if done.returncode or not theirs.is_file():
        return {"network": name, "converts": False, "why": first_error(done.stdout)}
    programs = [read_ms(file) for file in (ours, theirs)]
    nodes, order, outputs = agreement(*programs), same_order(*programs), []
    for file, program, places in ((ours, programs[0], range(len(data))), (theirs, programs[1], order)):
        fed = feed(program, tuple(data[places.index(place)][:samples] for place in range(len(data))))
        outputs.append(run_ms(python, file, [array[:, None] for array in fed]))
    pairs = [(one.reshape(-1), other.reshape(-1)) for one, other in zip(*outputs)]
    span = max(float(np.ptp(array)) for array in outputs[0])
    largest = max(float(np.abs(one - other).max()) for one, other in pairs)
    return {
        "network": name, "converts": True, "nodes_equal": nodes.same_operations and not nodes.missing,
        "nodes": nodes.to_dict(), "values": sum(one.size for one, _ in pairs),
        "differing_values": sum(int((one != other).sum()) for one, other in pairs),
        "largest_difference": largest / span if span else largest,
    }  # fmt: skip


def load_directly(name: str, python: Path, folder: Path, samples: int) -> dict[str, Any]:
    """Quantize a network, and compute its direct MindIR in the vendor's runtime and the network in MindSpore."""
    net, data = _network_and_data(name)
    example = tuple(ms.Tensor(array[:1]) for array in data)
    quantised = msqkd.quantize(msqkd.create_ptq_network(net, _CONFIG, [data], example_input=example))
    file = Path(msqkd.export(quantised, example, folder / name, "MINDIR_DIRECT"))
    found = run_ms(python, file, [array[:samples, None] for array in data])
    wanted = []
    for number in range(samples):
        outputs = quantised(*(ms.Tensor(array[number : number + 1]) for array in data))
        wanted.append([item.asnumpy() for item in (outputs if isinstance(outputs, tuple) else (outputs,))])
    largest = 0.0
    for index, array in enumerate(found):
        reference = np.stack([row[index] for row in wanted])
        largest = max(largest, float(np.abs(array.reshape(reference.shape) - reference).max() / np.ptp(reference)))
    return {"network": name, "converts": True, "largest_difference": largest}


def _zoo_network(name: str) -> nn.Cell:
    """Make a network of mindcv without its weights; ``vit`` is a small vision transformer."""
    import mindcv
    from mindcv.models.vit import VisionTransformer

    if name == "vit":
        return VisionTransformer(
            image_size=64, patch_size=8, in_channels=3, embed_dim=192, depth=6, num_heads=3, num_classes=10
        )
    return mindcv.create_model(name, num_classes=10, pretrained=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(NETWORKS), help="names of networks")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="folder that keeps the files")
    parser.add_argument("--direct", action="store_true", help="load direct MindIR files in place of converting")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    python = vendor_python()
    if python is None:
        sys.exit("MindSpore Lite's package is not at hand: set MSLITE_HOME to the folder of its environment")
    ms.set_context(mode=ms.GRAPH_MODE)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = args.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.only:
            try:
                row = (load_directly if args.direct else compare)(name, python, folder, args.samples)
            except MsqkdError as error:
                row = {"network": name, "converts": None, "why": str(error).splitlines()[0]}
            except Exception:
                row = {"network": name, "converts": None, "why": traceback.format_exc().strip()[-300:]}
            rows.append(row)
            if not args.json:
                print(line(row), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))


def line(row: dict[str, Any]) -> str:
    """Format one row of the table."""
    if not row["converts"]:
        return f"| {row['network']} | {'no' if row['converts'] is False else 'not compared'} | {row['why'][:300]} | |"
    if "nodes" not in row:
        return f"| {row['network']} | runs | largest difference {row['largest_difference']:.2g} of the range |"
    nodes, found = f"{row['nodes']['of']} as planned", row["nodes"]
    if not row["nodes_equal"]:
        nodes = f"{found['equal']} of {found['of']} as planned; ours {found['missing']}, theirs {found['added']}"
    values = f"{row['differing_values']} of {row['values']} differ"
    if row["differing_values"]:
        values += f", by {row['largest_difference']:.2%} of the range"
    return f"| {row['network']} | yes | {nodes} | {values} |"


if __name__ == "__main__":
    main()
