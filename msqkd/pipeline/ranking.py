"""What candidates are ranked with: samples that are neither calibrated nor evaluated with, and their metric."""

from __future__ import annotations

from typing import Any

from msqkd.data import Split
from msqkd.errors import DataError
from msqkd.pipeline.objects import Objects
from msqkd.quant.algorithms.methods import Improved
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.qat import quantize_cell
from msqkd.train.evaluate import measured


def ranking_split(objects: Objects, samples: int) -> Split:
    """Training samples that are not calibrated on, at most so many (see `msqkd.data.fair_order`).

    Raises:
        DataError: none is left, or they have no labels.
    """
    train, split = objects.bundle.train, objects.beside_calibration(samples)
    if split is None:
        raise DataError(
            f"{train.name} has {len(train)} samples, and calibration takes {len(objects.calibration)}: none is left to "
            "rank candidates on; lower calibration.samples"
        )
    if split.labels is None:
        raise DataError(f"{train.name} has no labels; candidates cannot be ranked")
    return split


def quantised_metric(objects: Objects, found: Improved, split: Split) -> float:
    """The metric of a calibrated network on a split."""
    cell = quantize_cell(found.graph, found.plan)
    cell.set_phase(QUANTIZE)
    return measured(cell, split, objects.recipe.data.eval_batch_size, objects.metric)


def sets_of(objects: Objects, ranking: Split) -> dict[str, dict[str, Any]]:
    """Name and number of samples of the three sets, for a report."""
    sets = {"calibration": objects.calibration, "tuning": ranking, "evaluation": objects.bundle.test}
    return {name: {"name": split.name, "samples": len(split)} for name, split in sets.items()}
