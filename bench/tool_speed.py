"""What the tool itself costs: seconds and memory of capture, plan and the export of every default format.

    python bench/tool_speed.py [--json] [--only resnet50 vit_b_32_224]

Weights and ranges are made up, which changes neither. Each network runs in a process of its own. Memory is the largest
resident size beyond what the process held with MindSpore imported and the network built, as a multiple of the
parameters' bytes; beside it stands what MindSpore alone takes to write the network once (`mindspore.export`). CPU
seconds tell what the machine's other work adds to the time on the wall.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from typing import Any, Callable

NETWORKS = {"resnet50": (3, 224, 224), "vit_b_32_224": (3, 224, 224)}
FORMATS = ("lite_mindir", "portable_mindir", "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--child", nargs=2, metavar=("NAME", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, who = args.child
        print("RESULT " + json.dumps(measure(name, mindspore_alone if who == "mindspore" else tool)), flush=True)
        return
    from msqkd.environment import versions

    results = {name: {who: run_child(name, who) for who in ("tool", "mindspore")} for name in args.only}
    if args.json:
        print(json.dumps({"results": results, "date": date.today().isoformat(), "versions": versions()}, indent=2))
        return
    print("| network | part | seconds | CPU seconds |\n|---|---|---|---|")
    for name, found in results.items():
        for part, (seconds, cpu) in found["tool"]["parts"].items():
            print(f"| {name} | {part} | {seconds:.1f} | {cpu:.1f} |")
        beyond, alone = (found[who]["peak"] / found[who]["parameters"] for who in ("tool", "mindspore"))
        print(f"| {name} | memory beyond the network: {beyond:.1f} × parameters; mindspore.export: {alone:.1f} × | | |")


def run_child(name: str, who: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, who]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if found is None:
        raise SystemExit(f"{name}: {(done.stderr.strip().splitlines() or ['no result'])[-1]}")
    return json.loads(found[len("RESULT ") :])


def measure(name: str, work: Callable[[Any, Any, Any], None]) -> dict[str, Any]:
    import mindspore as ms

    from msqkd.models import build_model

    ms.set_context(mode=ms.GRAPH_MODE)
    net = build_model("mindcv", name, {"num_classes": 10})
    before = peak()
    parts: dict[str, tuple[float, float]] = {}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        found = call()
        parts[part] = time.perf_counter() - begin, time.process_time() - cpu
        return found

    work(net, NETWORKS[name], timed)
    parts["total"] = sum(wall for wall, _ in parts.values()), sum(cpu for _, cpu in parts.values())
    parameters = sum(p.data.nbytes for p in net.get_parameters())
    return {"parts": parts, "peak": peak() - before, "parameters": parameters}


def tool(net: Any, shape: tuple[int, ...], timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    from msqkd.exporters import export
    from msqkd.graph.capture import capture
    from msqkd.quant.placement import make_plan
    from msqkd.quant.qat import deployment_graph

    graph = timed("capture", lambda: capture(net, shape))
    graph = timed("deployment", lambda: deployment_graph(graph))
    plan = timed("plan", lambda: make_plan(graph))
    plan = plan.with_ranges(dict.fromkeys(plan.groups, (-1.0, 3.0)))
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMATS:
            timed(form, lambda form=form: export(graph, plan, f"{folder}/{form}", form))


def mindspore_alone(net: Any, shape: tuple[int, ...], timed: Callable[[str, Callable[[], Any]], Any]) -> None:
    import mindspore as ms

    net.set_train(False)
    x = ms.Tensor(shape=[None, *shape], dtype=ms.float32)
    with tempfile.TemporaryDirectory() as folder:
        timed("export", lambda: ms.export(net, x, file_name=f"{folder}/net", file_format="MINDIR"))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
    from msqkd.platform import leave_quietly

    leave_quietly()
