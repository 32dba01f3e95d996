"""Random programs through MindSpore Lite's own converter and runtime.

    MSLITE_HOME=FOLDER python bench/converter_fuzz.py [--programs 50] [--seed 0] [--first 0] [--json]

Every program is a random network of pictures or of tokens with random settings (bits, granularity, observer, a layer in
float), quantized after training. The vendor's converter converts its marked MindIR; the vendor's
runtime computes that file and msqkd's own `.ms` file. A program counts as refused where the converter or the runtime
does not take a file, and as not as planned where an int8 node has no equal in the converter's file. What msqkd itself
refuses to write is told apart.

The exit code is 1 unless nothing was refused, nothing differs and all is as planned.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from children import measured_apart, print_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for ten programs")
    parser.add_argument("--keep", type=Path, help="folder that keeps the files")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    from msqkd.deploy.vendor_runtime import vendor_python

    if vendor_python() is None:
        sys.exit("MindSpore Lite's package is not at hand: set MSLITE_HOME to the folder of its environment")
    numbers = range(args.first, args.first + args.programs)
    if args.child:
        print_results(numbers, partial(measured, args))
        return
    results: list[dict[str, Any]] = []
    for result in measured_apart(numbers, partial(_child_command, args), _ended, args.timeout):
        results.append(result)
        if not args.json:
            print(_row(result), flush=True)
    _report(args, results)


def _child_command(args: argparse.Namespace, first: int, count: int) -> list[str]:
    """Return the arguments of a process that measures `count` programs."""
    command = [__file__, "--child", "--seed", str(args.seed), "--first", str(first), "--programs", str(count)]
    return [*command, "--samples", str(args.samples), *(["--keep", str(args.keep)] if args.keep else [])]


def _ended(number: int, how: str) -> dict[str, Any]:
    """Return the result of a program that ended its process: it counts as failed."""
    return {"program": number, "kind": "", "parts": [], "failed": how}


def measured(args: argparse.Namespace, number: int) -> dict[str, Any]:
    """Make, quantize, convert and compute a program."""
    import mindspore as ms
    from converter import examine
    from random_blocks import random_network, random_tokens, randomize

    import msqkd
    from msqkd.deploy.vendor_runtime import vendor_python
    from msqkd.errors import MsqkdError

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(number)
    rng = np.random.default_rng([args.seed, number])
    kind = str(rng.choice(["pictures", "pictures", "tokens"]))
    found: dict[str, Any] = {"program": number, "kind": kind}
    python = vendor_python()
    assert python is not None
    try:
        net, parts, shape = random_network(rng) if kind == "pictures" else random_tokens(rng)
        found["parts"] = parts
        randomize(net, rng)
        net.set_train(False)
        data = rng.normal(size=(4, *shape)).astype(np.float32)
        weight = msqkd.WeightQuantizer(
            quant_dtype=f"int{int(rng.choice([8, 8, 8, 4]))}", per_channel=bool(rng.integers(3)),
            observer=str(rng.choice(["minmax", "mse"])),
        )  # fmt: skip
        config = msqkd.QuantConfig(weight, act_observer=str(rng.choice(["minmax", "percentile"])))
        rules = _rules(net, rng)
        found["rules"] = [f"{rule.pattern}: {rule.changes['precision']}" for rule in rules]
        with tempfile.TemporaryDirectory() as place:
            folder = args.keep or Path(place)
            folder.mkdir(parents=True, exist_ok=True)
            found.update(examine(f"program{number}", net, config, (data,), python, folder, args.samples, rules))
    except MsqkdError as error:
        text = str(error).splitlines()[0]
        found.update(
            {"converts": False, "why": text} if "MindSpore Lite does not run" in text else {"not_written": text}
        )
    except Exception as error:
        text = str(error).strip().splitlines()
        found["failed"] = f"{type(error).__name__}: {text[0][:300] if text else ''}"
    return found


def _rules(net: Any, rng: np.random.Generator) -> list[Any]:
    """Return rules that take a layer from int8, in one program of three."""
    import msqkd

    layers = [name for name, cell in net.cells_and_names() if type(cell).__name__ in ("Conv2d", "Dense", "LayerNorm")]
    if rng.integers(3):
        return []
    chosen = rng.choice(layers, size=min(len(layers), int(rng.integers(1, 3))), replace=False)
    return [msqkd.Rule("path", str(name), {"precision": "float"}) for name in chosen]


def _row(result: dict[str, Any]) -> str:
    words = f"{result['program']:4} {result['kind']} {' '.join(result.get('parts', []))}: "
    if "failed" in result:
        return words + f"FAILED {result['failed']}"
    if "not_written" in result:
        return words + f"msqkd refuses it: {result['not_written'][:160]}"
    if not result["converts"]:
        return words + f"REFUSED {result['why'][:300]}"
    nodes = "as planned" if result["nodes_equal"] else f"NOT AS PLANNED {result['nodes']}"
    different = f"{result['differing_values']} of {result['values']} values differ"
    return words + f"{nodes}, {different if result['differing_values'] else 'equal'}"


def _report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    from msqkd.environment import versions

    compared = [result for result in results if result.get("converts")]
    totals = {
        "programs": len(results), "refused": sum(result.get("converts") is False for result in results),
        "differing_values": sum(result["differing_values"] for result in compared),
        "values": sum(result["values"] for result in compared),
        "not_as_planned": [result["program"] for result in compared if not result["nodes_equal"]],
        "not_written": sum("not_written" in result for result in results),
        "failed": [result["program"] for result in results if "failed" in result],
        "seed": args.seed, "date": date.today().isoformat(), "versions": versions(),
    }  # fmt: skip
    print(json.dumps({**totals, "results": results}, indent=2) if args.json else json.dumps(totals))
    sys.exit(any(totals[key] for key in ("refused", "differing_values", "not_as_planned", "failed")))


if __name__ == "__main__":
    main()
