"""Run a recipe for several seeds and print the accuracies as mean ± standard deviation.

    python bench/seeds.py RECIPE [--calibrate] [--seeds 0 1 2] [--set key=value …] [--output DIR] [--json]

Each seed is a run of its own in DIR/seedN (finished ones are not repeated): `msqkd run RECIPE --set seed=N` gives the
same numbers. With --calibrate it is `msqkd calibrate`: nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np

from msqkd.environment import versions
from msqkd.pipeline.run import run_recipe
from msqkd.platform import leave_quietly
from msqkd.recipe import load_recipe

ROWS = {
    "float": "float",
    "float_ft": "float, fine-tuned with the same budget",
    "float_kd": "float, with the same distillation",
    "ptq": "PTQ only",
    "qat": "QAT",
    "qat_kd": "QAT + distillation",
    "exported": "exported INT8 file",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="settings", nargs="*", default=[])
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = []
    for seed in args.seeds:
        recipe = load_recipe(args.recipe, [*args.settings, f"seed={seed}"])
        folder = (args.output or Path("runs") / f"{recipe.name}_seeds") / f"seed{seed}"
        results.append(run_recipe(recipe, folder, train=not args.calibrate))
    table = summary([result["accuracy"] for result in results])
    if args.json:
        print(
            json.dumps(
                {"seeds": args.seeds, "accuracy": table, "date": date.today().isoformat(), **versions()}, indent=2
            )
        )
        return
    print(f"| network | top-1 (%), {len(args.seeds)} seeds | to float |\n|---|---|---|")
    for key, row in table.items():
        print(f"| {ROWS[key]} | {row['mean']:.2f} ± {row['std']:.2f} | {row['to_float']:+.2f} |")


def summary(accuracies: list[dict]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation (of the sample, 0 for one seed) and mean difference to float, by network."""
    table = {}
    for key in ROWS:
        values = [a[key] for a in accuracies if a[key] is not None]
        if len(values) == len(accuracies):
            differences = [a[key] - a["float"] for a in accuracies]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            table[key] = {"mean": float(np.mean(values)), "std": spread, "to_float": float(np.mean(differences))}
    return table


if __name__ == "__main__":
    main()
    leave_quietly()
