"""W8A8 without training: one scale a weight, the same after equalisation, and one scale a channel.

    python bench/equalisation.py RECIPE [--draws 5] [--set key=value …] [--json]

Each draw measures the ranges on other training images, so that mean ± standard deviation over draws tells what of a
difference is chance; accuracies are those of the fake-quantised network on the whole test set. RECIPE is one of a
trained classifier, such as recipes/cifar10_resnet20_w8a8.yaml; of it only the network and the data are used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import numpy as np

from msqkd.data import subset
from msqkd.environment import versions
from msqkd.pipeline.ptq import quantised_without_training
from msqkd.pipeline.ranking import quantised_metric
from msqkd.pipeline.stages import opened
from msqkd.platform import leave_quietly
from msqkd.progress import Reporter
from msqkd.recipe import load_recipe, make_recipe

VARIANTS = {
    "one scale a tensor": (False, []),
    "the same, equalised": (False, ["equalize"]),
    "the same, equalised, biases corrected": (False, ["equalize", "bias_correction"]),
    "one scale a channel": (True, []),
    "the same, biases corrected": (True, ["bias_correction"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--set", dest="settings", nargs="*", default=[])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, [*args.settings, "calibration.samples=1024"])
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(opened(recipe, scratch / "run", "calibrate", Reporter(quiet=True)))
        _ = base.metric, base.bundle, base.deployed  # made once, for all variants
        found = {name: [] for name in VARIANTS}
        for draw in range(args.draws):
            chosen = np.random.default_rng(draw).permutation(len(base.bundle.train))[: len(base.calibration)]
            for name, (per_channel, methods) in VARIANTS.items():
                values = recipe.to_dict()
                values["quantization"]["weight"]["per_channel"] = per_channel
                values["ptq"] = {"methods": methods}
                objects = base.variant(make_recipe(values))
                objects.__dict__["calibration"] = subset(base.bundle.train, chosen)
                network = quantised_without_training(objects)
                found[name].append(quantised_metric(objects, network, base.bundle.test))
                print(f"draw {draw + 1} of {args.draws}, {name}: {found[name][-1]:.2f}", file=sys.stderr)
    if args.json:
        print(json.dumps({"accuracy": found, "date": date.today().isoformat(), **versions()}, indent=2))
        return
    print(f"| weights | top-1 (%), {args.draws} draws of calibration samples |\n|---|---|")
    for name, values in found.items():
        spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
        print(f"| {name} | {np.mean(values):.2f} ± {spread:.2f} |")


if __name__ == "__main__":
    main()
    leave_quietly()
