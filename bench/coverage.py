"""What msqkd can do with a network: every one below captured, compared, trained a step, planned, calibrated, exported.

    python bench/coverage.py [--json | --markdown] [--families] [--user] [--only vit_b_32_224 encoder ...] [--pynative]
                             [--timeout 900]

The default list is one network of mindcv of each kind that is meant to work; ``--families`` adds the smallest network
of every other family of mindcv, ``--user`` the networks of tests/graph/user_networks.py. Weights are random. Each
network runs in a process of its own, so that one that fails takes no other with it.

Under a row stands what needs words: how many operations stay float and why (all of them: together with those in int8
they are the whole plan), and the sentence of every format that cannot be written.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

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
KEYS = (
    "name", "nodes", "capture_s", "difference", "pynative", "train", "again", "int8", "float", "ptq", "files", "tool_s",
    "error",
)  # fmt: skip
WIDTHS = (24, 6, 9, 10, 10, 22, 9, 6, 6, 6, 28, 7, 0)
MARKDOWN_HEAD = (
    "| network | operations | difference | a step of training | int8 | files | float, and what cannot be written |",
    "|---|---|---|---|---|---|---|",
)
FORMATS = ("lite_mindir", "portable_mindir", "ms", "onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all that was found, at the end")
    form.add_argument("--markdown", action="store_true", help="the table of docs/coverage.md")
    parser.add_argument("--families", action="store_true", help="also one network of every other family of mindcv")
    parser.add_argument("--user", action="store_true", help="also networks as users write them")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks alone")
    parser.add_argument("--pynative", action="store_true", help="also compare in PYNATIVE_MODE")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one network")
    parser.add_argument("--child", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("RESULT " + json.dumps(measure(args.child, args.pynative)), flush=True)
        return
    user = list(user_networks()) if args.user else []
    names = args.only or [*MAIN, *(FAMILIES if args.families else ()), *user]
    lines = markdown_lines if args.markdown else lambda result: [row(result), *details(result)]
    if not args.json:
        print("\n".join(MARKDOWN_HEAD) if args.markdown else row(dict(zip(KEYS, KEYS))))
    results = []
    for name in names:
        results.append(run_child(name, args.pynative, args.timeout))
        if not args.json:
            print("\n".join(lines(results[-1])), flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


def user_networks() -> Mapping[str, tuple[Callable[[], Any], tuple[Any, ...]]]:
    """Networks of the tests by name: how to make one, and its inputs."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from graph.user_networks import NETWORKS

    return NETWORKS


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
    cells = {**result, "files": " ".join(result["files"])} if isinstance(result.get("files"), dict) else result
    return " ".join(f"{cells.get(key, '')!s:<{width}}" for key, width in zip(KEYS, WIDTHS)).rstrip()


def details(result: Mapping[str, Any]) -> list[str]:
    reasons = [f"    {count:4} float: {reason}" for reason, count in result.get("reasons", {}).items()]
    return reasons + [f"    {form}: {sentence}" for form, sentence in result.get("refused", {}).items()]


def markdown_lines(result: Mapping[str, Any]) -> list[str]:
    """The row of a network in docs/coverage.md: the files there are, and in words what stands in the way of others."""
    name = f"`{result['name']}`"
    if "error" in result:
        error = result["error"].split(" (at ")[0].replace("|", "/")
        return [f"| {name} | {result.get('nodes', '')} | | | | | {error} |"]
    counts: Counter[str] = Counter()
    for reason, count in result["reasons"].items():
        counts[reason.split(":")[0]] += count
    floats = [f"{count} × {op}" for op, count in counts.most_common()]
    notes = [f"float: {', '.join(floats[:4])}{' and others' if len(floats) > 4 else ''}"] if floats else []
    notes += [f"no `{form}`: {first_clause(sentence)}" for form, sentence in result["refused"].items()]
    trained = result["train"].split(" ")[0]
    files = " ".join(result["files"])
    return [
        f"| {name} | {result['nodes']} | {result['difference']} | {trained} | {result['int8']} | {files} "
        f"| {'; '.join(notes).replace('|', '/')} |"
    ]


def first_clause(sentence: str) -> str:
    """What a refusal says, without the way out and the place."""
    return sentence.split(";")[0].split(", so ")[0].split(", which is")[0]


def measure(name: str, pynative: bool) -> dict[str, Any]:
    """One network: built, captured, compared, trained by a step, built again from what was learnt, then quantised."""
    import mindspore as ms

    from msqkd.graph.capture import capture
    from msqkd.graph.cell import read_parameters, to_cell

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(0)
    found: dict[str, Any] = {"name": name}
    stage = "build"
    try:
        net, inputs = make(ms, name)
        net.set_train(False)
        begin = time.perf_counter()
        stage = "capture"
        graph = capture(net, inputs)
        found["capture_s"] = round(time.perf_counter() - begin, 1)
        found["nodes"] = len(graph.nodes)
        stage = "cell"
        cell = to_cell(graph)
        tensors = list(flat_tensors(inputs))
        stage = "forward"
        found["difference"] = difference(net(*inputs), cell(*tensors))
        if pynative:
            found["pynative"] = in_pynative(ms, net, cell, inputs, tensors)
        stage = "quantise"
        quantise(graph, [tensor.asnumpy() for tensor in tensors], found)
        stage = "train"
        found["train"] = train(ms, cell, tensors)
        stage = "again"
        read_parameters(cell, graph)
        cell.set_train(False)
        found["again"] = difference(cell(*tensors), to_cell(graph)(*tensors))
    except Exception as error:  # whatever a network raises is what the table is for
        found["error"] = f"{stage}: {type(error).__name__}: {first_line(error)}"
    return found


def make(ms: Any, name: str) -> tuple[Any, tuple[Any, ...]]:
    """A network and the tensors it is called with."""
    import numpy as np

    from msqkd.models import build_model

    if name in user_networks():
        factory, inputs = user_networks()[name]
        return factory(), inputs
    side = SIDES.get(name) or next((int(s) for s in re.findall(r"_(\d{3})(?:_|$)", name) if int(s) % 32 == 0), 224)
    x = ms.Tensor(np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32))
    return build_model("mindcv", name, {"num_classes": CLASSES}), (x,)


def quantise(graph: Any, arrays: list[Any], found: dict[str, Any]) -> None:
    """Plan, calibration on one batch, every format; `tool_s` is the time of capture, plan and the default formats."""
    from msqkd.errors import MsqkdError
    from msqkd.exporters import export
    from msqkd.quant.config import QuantConfig
    from msqkd.quant.placement import make_plan
    from msqkd.quant.ptq import calibrate
    from msqkd.quant.qat import deployment_graph
    from msqkd.words import percent

    begin = time.perf_counter()
    deployed = deployment_graph(graph)
    plan = make_plan(deployed, QuantConfig(act_observer="minmax"))
    seconds = found["capture_s"] + time.perf_counter() - begin
    assert [node.name for node in plan.nodes] == [node.name for node in deployed.nodes], "the plan leaves nodes out"
    reasons = Counter(f"{node.op}: {node.reason}" for node in plan.nodes if node.precision == "float")
    found["int8"], found["float"] = percent(plan.int8_share()), sum(reasons.values())
    found["reasons"] = dict(reasons.most_common())
    plan = calibrate(deployed, plan, [arrays[0] if len(arrays) == 1 else tuple(arrays)])
    missing = [group.name for group in plan.groups.values() if group.range is None]
    found["ptq"] = "ok" if not missing else f"{len(missing)} ranges missing"
    files, refused = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS:
            begin = time.perf_counter()
            try:
                export(deployed, plan, f"{folder}/{form}", form)
                files[form.replace("_mindir", "")] = "ok"
            except MsqkdError as error:
                refused[form] = str(error)
            except Exception as error:
                refused[form] = f"RAISED {type(error).__name__}: {first_line(error)}"
            if form != "onnx":
                seconds += time.perf_counter() - begin
    found["files"], found["refused"], found["tool_s"] = files, refused, round(seconds, 1)


def flat_tensors(inputs: Any) -> Iterator[Any]:
    for item in inputs.values() if isinstance(inputs, dict) else inputs:
        if isinstance(item, (tuple, list)):
            yield from flat_tensors(item)
        else:
            yield item


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip(" -")), "")[:300]


def flat(result: Any) -> list[Any]:
    if isinstance(result, dict):
        result = list(result.values())
    return [t for item in result for t in flat(item)] if isinstance(result, (tuple, list)) else [result.asnumpy()]


def difference(expected: Any, found: Any) -> float:
    """The largest difference, relative to the largest magnitude."""
    import numpy as np

    pairs = [(np.float64(a), np.float64(b)) for a, b in zip(flat(expected), flat(found))]
    assert len(pairs) == len(flat(expected)) == len(flat(found)), "another number of outputs"
    return max(float(f"{np.abs(a - b).max() / max(np.abs(a).max(), 1e-30):.1e}") for a, b in pairs)


def in_pynative(ms: Any, net: Any, cell: Any, inputs: Any, tensors: Any) -> str:
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        expected = attempt(lambda: net(*inputs))
        found = attempt(lambda: cell(*tensors))
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


def train(ms: Any, cell: Any, tensors: list[Any]) -> str:
    """One step of gradient descent: ok, where the loss of the batch is smaller behind it and all numbers are finite.

    A step of 1e-4 overshoots in a deep network with random weights; smaller ones tell whether the direction is right.
    """
    import numpy as np
    from mindspore import nn

    kept = {p.name: p.asnumpy().copy() for p in cell.get_parameters()}
    verdict = "no parameters"
    for rate in (1e-4, 1e-6, 1e-8) if cell.trainable_params() else ():
        for parameter in cell.get_parameters():
            parameter.set_data(ms.Tensor(kept[parameter.name]))
        step = nn.TrainOneStepCell(first_loss(nn, cell), nn.SGD(cell.trainable_params(), rate))
        step.set_train(True)
        first, second = (float(step(*tensors).asnumpy()) for _ in range(2))
        finite = all(np.isfinite(p.asnumpy()).all() for p in cell.get_parameters())
        verdict = "ok" if finite and second < first else "loss grew" if finite else "not finite"
        verdict += f" {first:.4g}->{second:.4g}" + (f" at {rate:.0e}" if rate < 1e-4 else "")
        if verdict.startswith("ok"):
            break
    return verdict


def first_loss(nn: Any, cell: Any) -> Any:
    """A cell that gives the mean square of the first output's distance to 1."""
    from mindspore import ops

    class Loss(nn.Cell):
        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.cell = cell

        def construct(self, *inputs: Any) -> Any:
            result = self.cell(*inputs)
            return ops.square((result[0] if isinstance(result, tuple) else result) - 1.0).mean()

    return Loss()


if __name__ == "__main__":
    main()
    from msqkd.platform import leave_quietly

    leave_quietly()
