"""What candidates are ranked with: samples that are neither calibrated nor evaluated with, and their metric."""

from __future__ import annotations

from typing import Any

import numpy as np

from msqkd.data import Split, subset
from msqkd.errors import DataError
from msqkd.pipeline.objects import Objects
from msqkd.quant.algorithms.methods import Improved
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.qat import quantize_cell
from msqkd.train.evaluate import measured


def ranking_split(objects: Objects, samples: int) -> Split:
    """The training samples behind those of the calibration, at most so many.

    Raises:
        DataError: none is left, or they have no labels.
    """
    train, used = objects.bundle.train, len(objects.calibration)
    chosen = np.arange(used, min(used + samples, len(train)))
    if len(chosen) == 0:
        raise DataError(
            f"{train.name} has {len(train)} samples, and calibration takes {used}: none is left to rank candidates on; "
            "lower calibration.samples"
        )
    split = subset(train, chosen)
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
