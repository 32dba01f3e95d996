"""What msqkd captures: every network below, its cell compared with it, one training step, and the time it takes.

    python bench/coverage.py [--json] [--families] [--only vit_b_32_224 bert ...] [--pynative] [--timeout 900]

The default list is one network of each kind that is meant to work; ``--families`` adds the smallest network of every
other family of mindcv. Weights are random. Each network runs in a process of its own, so that its peak memory is its
own and one that fails takes no other with it.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Callable, Optional

CLASSES = 10
MAIN = (
    "resnet18", "resnet50", "mobilenet_v2_100", "mobilenet_v3_large_100", "efficientnet_b0", "densenet121",
    "googlenet", "inception_v3", "shufflenet_v2_x1_0", "vit_b_32_224", "swin_tiny", "convnext_tiny",
)  # fmt: skip
FAMILIES = (
    "BiT_resnet50", "cait_xxs24_224", "cmt_tiny", "coat_lite_tiny", "coat_tiny", "convit_tiny", "convnextv2_atto",
    "crossvit_9", "dpn92", "edgenext_xx_small", "efficientnet_v2_s", "ghostnet_050", "halonet_50t", "hrnet_w32",
    "inception_v4", "mae_b_16_224_finetune", "mixnet_s", "mlp_mixer_s_p32", "mnasnet_050", "mobilenet_v1_025",
    "mobilevit_xx_small", "nasnet_a_4x1056", "pit_ti", "pnasnet", "poolformer_s12", "pvt_tiny", "pvt_v2_b0",
    "regnet_x_200mf", "regnet_y_200mf", "repmlp_t224", "repvgg_a0", "res2net50", "resnest14", "resnetv2_50",
    "resnext50_32x4d", "rexnet_09", "seresnet18", "shufflenet_v1_g3_05", "skresnet18", "squeezenet1_0",
    "swinv2_tiny_window8", "vgg11", "visformer_tiny", "volo_d1", "xception", "xcit_tiny_12_p16_224",
)  # fmt: skip
SIDES = {
    "cmt_tiny": 160,
    "inception_v3": 299,
    "inception_v4": 299,
    "xception": 299,
    "crossvit_9": 240,
    "halonet_50t": 256,
    "swinv2_tiny_window8": 256,
}
KEYS = ("name", "nodes", "kinds", "capture_s", "difference", "pynative", "train", "again", "memory_x", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--families", action="store_true", help="also one network of every other family of mindcv")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks of mindcv alone")
    parser.add_argument("--pynative", action="store_true", help="also compare in PYNATIVE_MODE")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one network")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(measure(args.child, args.pynative)), flush=True)
        return
    names = args.only or [*MAIN, *(FAMILIES if args.families else ())]
    if not args.json:
        print(row(dict(zip(KEYS, KEYS))))
    results = []
    for name in names:
        results.append(run_child(name, args.pynative, args.timeout))
        if not args.json:
            print(row(results[-1]), flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


def run_child(name: str, pynative: bool, timeout: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name] + (["--pynative"] if pynative else [])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"no end in {timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[len("RESULT ") :])
    return {"name": name, "error": f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"}


def row(result: Mapping[str, Any]) -> str:
    widths = (24, 6, 5, 9, 11, 11, 22, 6, 8, 0)
    return " ".join(f"{result.get(key, '')!s:<{width}}" for key, width in zip(KEYS, widths)).rstrip()


def measure(name: str, pynative: bool) -> dict[str, Any]:
    """One network: built, captured, compared, trained by a step, built again from what was learnt."""
    import mindspore as ms
    import numpy as np

    from msqkd.graph.capture import capture
    from msqkd.graph.cell import read_parameters, to_cell
    from msqkd.models import build_model

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    side = SIDES.get(name) or next((int(s) for s in re.findall(r"_(\d{3})(?:_|$)", name) if int(s) % 32 == 0), 224)
    found: dict[str, Any] = {"name": name}
    stage = "build"
    try:
        net = build_model("mindcv", name, {"num_classes": CLASSES})
        size = sum(p.data.nbytes for p in net.get_parameters())
        before = peak()
        begin = time.perf_counter()
        stage = "capture"
        graph = capture(net, (3, side, side))
        found["capture_s"] = round(time.perf_counter() - begin, 1)
        found["memory_x"] = round((peak() - before) / size, 1)
        found["nodes"], found["kinds"] = len(graph.nodes), len({node.op for node in graph.nodes})
        stage = "cell"
        cell = to_cell(graph)
        x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32))
        net.set_train(False)
        stage = "forward"
        found["difference"] = difference(net(x), cell(x))
        if pynative:
            found["pynative"] = in_pynative(ms, net, cell, x)
        stage = "train"
        found["train"] = train(ms, cell, x)
        stage = "again"
        read_parameters(cell, graph)
        cell.set_train(False)
        found["again"] = difference(cell(x), to_cell(graph)(x))
    except Exception as error:  # whatever a network raises is what the table is for
        found["error"] = f"{stage}: {type(error).__name__}: {first_line(error)}"
    return found


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" -")), "")[:300]


def flat(result: Any) -> list[Any]:
    return [t for item in result for t in flat(item)] if isinstance(result, (tuple, list)) else [result.asnumpy()]


def difference(expected: Any, found: Any) -> float:
    """The largest difference, relative to the largest magnitude."""
    import numpy as np

    pairs = list(zip(flat(expected), flat(found)))
    return max(float(f"{np.abs(a - b).max() / max(np.abs(a).max(), 1e-30):.1e}") for a, b in pairs)


def in_pynative(ms: Any, net: Any, cell: Any, x: Any) -> str:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        expected = attempt(lambda: net(x))
        found = attempt(lambda: cell(x))
        if isinstance(found, Exception):
            return f"{'both' if isinstance(expected, Exception) else 'cell'} fail: {first_line(found)}"
        return "net fails" if isinstance(expected, Exception) else str(difference(expected, found))
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


def attempt(call: Callable[[], Any]) -> Any:
    try:
        result = call()
        flat(result)
    except Exception as error:
        return error
    return result


def train(ms: Any, cell: Any, x: Any) -> Optional[str]:
    """One step of gradient descent: ok, where the loss of the batch is smaller behind it and all numbers are finite."""
    import numpy as np
    from mindspore import nn

    forward = first_loss(nn, cell, ms.Tensor([1, 2], ms.int32))
    step = nn.TrainOneStepCell(forward, nn.SGD(cell.trainable_params(), 1e-4))
    step.set_train(True)
    first = float(step(x).asnumpy())
    second = float(step(x).asnumpy())
    finite = all(np.isfinite(p.asnumpy()).all() for p in cell.get_parameters())
    verdict = "ok" if finite and second < first else "not finite" if not finite else "loss grew"
    return f"{verdict} {first:.3f}->{second:.3f}"


def first_loss(nn: Any, cell: Any, labels: Any) -> Any:
    """A cell that gives the cross entropy of the first output."""

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.labels, self.loss = cell, labels, nn.CrossEntropyLoss()

        def construct(self, x: Any) -> Any:
            result = self.cell(x)
            return self.loss(result[0] if isinstance(result, tuple) else result, self.labels)

    return Loss()


if __name__ == "__main__":
    main()
    from msqkd.platform import leave_quietly

    leave_quietly()
