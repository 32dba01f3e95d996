"""The data of the report, put together from what each stage recorded; its keys are stable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from msqkd.analysis.distributions import add_outliers, distributions
from msqkd.analysis.layers import layer_table
from msqkd.analysis.report import API_VERSION
from msqkd.analysis.statistics import Distribution, weight_statistics
from msqkd.data import Split, draw
from msqkd.environment import versions
from msqkd.graph.ir import Graph
from msqkd.quant.plan import QuantPlan
from msqkd.recipe import Recipe, dump_recipe
from msqkd.train.evaluate import input_batches

_MEASURED = ("float", "float_ft", "float_kd", "ptq", "qat", "qat_kd")
_TRAININGS = ("float_ft", "float_kd", "qat", "qat_kd")
_SQNR_SAMPLES = 256
_CALIBRATION = ("samples", "observer", "kept", "loss", "methods")


def training_only_rows(captured: Graph) -> list[dict[str, str]]:
    """What a captured network has beside its deployed part, one row an operation."""
    return [{"name": node.name, "op": node.op, "cell_path": node.cell_path} for node in captured.training_only()]


def layer_parts(
    graph: Graph, plan: QuantPlan, reference: Graph, test: Split
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Compute the rows of the report's layers, and the distributions it shows, on some test samples.

    Args:
        graph, plan: the exported network, every range known.
        reference: its float network.
        test: the test set.
    """
    samples = draw(test, _SQNR_SAMPLES)
    values: dict[str, Distribution] = {}
    layers = layer_table(graph, plan, reference, input_batches(samples, min(64, len(samples))), values)
    weights = weight_statistics(graph, plan)
    add_outliers(layers, values, weights)
    return layers, distributions(layers, values, weights)


def assemble(
    recipe: Recipe,
    stages: Mapping[str, Any],
    plan: QuantPlan,
    layers: Sequence[Mapping[str, Any]],
    distributions: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    started: datetime,
    warnings: Sequence[str],
    training_only: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """What `msqkd.analysis.report.write_report` takes.

    Args:
        recipe: the recipe that was run.
        stages: the result of every finished stage, by name.
        plan: the plan of the exported network, every range known.
        layers: the rows of `msqkd.analysis.layers.layer_table`.
        distributions: of the layers that matter, from `msqkd.analysis.distributions`.
        data: name of the data and its numbers of samples.
        started: when this run (or its last continuation) began.
        warnings: what was said beside the recipe's and the plan's own warnings.
        training_only: the operations that are not deployed, from `training_only_rows`.
    """
    exported = stages["export"]
    histories = {role: stages[role]["history"] for role in _TRAININGS if role in stages}
    if stages["float"]["history"]:
        histories["pretrain"] = stages["float"]["history"]
    sizes = dict(exported["sizes"])  # of a format that failed there is no file
    float_size, int8_size = sizes.pop("float", None), sizes.pop("portable_mindir", sizes.get("ms"))
    calibration = stages.get("calibration", stages["ptq"])
    accuracy = {name: stages[name]["accuracy"] if name in stages else None for name in _MEASURED}
    return {
        "apiversion": API_VERSION,
        "name": recipe.name,
        "description": recipe.description,
        "recipe": dump_recipe(recipe),
        "recipe_sha256": recipe.sha(),
        "started": started.isoformat(timespec="seconds"),
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "seed": recipe.seed,
        "target": recipe.target,
        "versions": versions(),
        "data": dict(data),
        "metric": exported["parity"]["metric"],
        "accuracy": {**accuracy, "exported": exported["accuracy"], "integer": exported["integer_accuracy"]},
        "size_bytes": {"float": float_size, "int8": int8_size, **sizes},
        "int8_share": plan.int8_share(),
        "sha256": exported["sha256"],
        "export": exported["verified"],
        "parity": exported["parity"],
        "converter": stages.get("converter"),
        "checkpoints": stages["float"].get("checkpoints", {}),
        "calibration": {key: calibration[key] for key in _CALIBRATION if key in calibration},
        "training": histories,
        "distillation": stages["plan"].get("distillation", []),
        "layers": list(layers),
        "distributions": list(distributions),
        "plan": {**plan.to_dict(), "training_only": list(training_only)},
        "warnings": [*recipe.warnings(), *plan.warnings, *warnings],
    }
