"""The files of a run, each held against the network it stands for, and what the device will compute from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms

from msqkd.analysis.parity import Device, batch_size, compare_execution, differing_values, integer_outputs
from msqkd.data import Split, as_tuple, subset
from msqkd.errors import ExportError
from msqkd.exporters import ASCEND, FORMATS, LITE, MS, MS_FLOAT, ONNX, PORTABLE, Format, check_precisions, export
from msqkd.exporters.portable import write_float
from msqkd.exporters.verify import compare
from msqkd.files import sha256
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.integer.registry import X86
from msqkd.pipeline.build import metric_of
from msqkd.pipeline.rundir import RunDirectory, export_name
from msqkd.progress import Reporter
from msqkd.quant.fake_quant import OFF, QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import quantize_cell
from msqkd.recipe import Recipe
from msqkd.train.evaluate import input_batches, output_arrays
from msqkd.train.metric import Metric, Outputs, Scale
from msqkd.words import of_hundred, shell_setting

_DISAGREEMENT = 1.0  # percent of the samples for which a file may name another class, where equal is not to be had
_RELATIVE_ERROR = 0.02  # likewise, of the outputs of a network that names no classes
_FEW_SAMPLES = 64  # computed by the kernels of a file that is in float, in numpy
_ANY_RANGE = (0.0, 255.0)  # wide, and not symmetric: a zero point shows where none is allowed
_LARGE_TEST = 2000  # test samples; of more, the integer accuracy is left to `msqkd verify`


@dataclass(frozen=True)
class Exported:
    """A network on its way into files.

    Attributes:
        recipe: how it was made.
        captured: the float network, with what is trained only.
        graph, plan: what is exported, every range known.
        test, calibration: the samples it is measured on.
    """

    recipe: Recipe
    captured: Graph
    graph: Graph
    plan: QuantPlan
    test: Split
    calibration: Split

    @cached_property
    def metric(self) -> Metric:
        """What the network is judged by."""
        return metric_of(self.recipe)


# -- before anything is trained ----------------------------------------------------------------------------------------
def preflight(recipe: Recipe, graph: Graph, plan: QuantPlan) -> None:
    """Refuse now what export would refuse after the training.

    Args:
        recipe: whose files are to be written.
        graph, plan: the deployment graph and its plan; ranges and weights may be any.

    Raises:
        ExportError: a layer cannot be written for the target, or not in one of the formats.
        SimulationError: a step the simulator has no kernel for.
        MissingDependencyError: ONNX is wanted, and its packages are not installed.
    """
    if ONNX in recipe.export.formats:
        from msqkd.exporters.onnx.runtime import onnxruntime_package
        from msqkd.exporters.onnx.writer import onnx_package

        onnx_package()
        onnxruntime_package()
    guessed = guessed_plan(plan)
    Device(graph, guessed, recipe.verify.machine or X86)
    for form in (FORMATS[item] for item in recipe.export.formats):
        try:
            check_precisions(form, plan)
            if form.check is not None:
                form.check(graph, guessed)
        except ExportError as error:
            reason = f"no {form.suffix} file is possible: {error}"
            raise ExportError(f"export.formats: {reason}; {_without(recipe, form.name)}") from error
    if (plan.stored_weights() or plan.half_nodes()) and not plan.activations:
        name = next((name for name in recipe.export.formats if name in (LITE, ASCEND)), None)
        if name is not None:
            raise ExportError(
                f"export.formats: {name} carries the parameters of int8 layers, and no layer is int8 here (they "
                f"compute in float, whatever they store); {_without(recipe, name)}"
            )


def guessed_plan(plan: QuantPlan) -> QuantPlan:
    """A plan with some range wherever one is to be found yet, to try what depends on no number."""
    weights = {name: replace(quant, observer="minmax") for name, quant in plan.weights.items()}
    return replace(plan.with_ranges(dict.fromkeys(plan.groups, _ANY_RANGE)), weights=weights)


def _without(recipe: Recipe, name: str) -> str:
    """How a format is left out, as the end of a sentence."""
    others = ", ".join(other for other in recipe.export.formats if other != name)
    return f"leave {name} out with {shell_setting('export.formats', f'[{others or PORTABLE}]')}"


# -- the files ---------------------------------------------------------------------------------------------------------
def export_files(network: Exported, folder: RunDirectory, reporter: Reporter) -> dict[str, Any]:
    """Write every file of the recipe, read each back, and compute what the device will answer.

    Returns:
        What the export stage records: names, sizes and checksums of the files, how each was verified, accuracies on
        the test set in percent (or what the recipe's metric says), and the comparison of the three executions on the
        calibration samples.

    Raises:
        ExportError: a file cannot be written, or does not answer as the network.
    """
    recipe, graph, plan = network.recipe, network.graph, network.plan
    cell = quantize_cell(graph, plan)
    cell.set_phase(QUANTIZE)
    reference = output_arrays(cell, network.test, recipe.data.eval_batch_size)
    files = {"float": write_float(network.captured.deployed_part(), folder.file("float.mindir"))}
    verified: dict[str, Any] = {}
    for name in recipe.export.formats:
        form = FORMATS[name]
        files[name] = export(graph, plan, folder.file(export_name(recipe.name, form)), name)
        verified[name] = {"file": files[name].name, **examine(form, files[name], network, reference)}
    trained = network.metric(reference, network.test.labels, network.test.name)
    parity = calibration_parity(network, reporter)
    return {
        "accuracy": _exported_accuracy(verified, trained),
        "integer_accuracy": _integer_accuracy(network, reporter),
        "files": [file.name for file in files.values()],
        "sizes": {name: file.stat().st_size for name, file in files.items()},
        "sha256": {file.name: sha256(file) for file in files.values()},
        "verified": verified,
        "parity": parity,
    }


def _exported_accuracy(verified: dict[str, Any], trained: float) -> float:
    """The test accuracy of a file: of the portable one, which MindSpore itself computes, where there is one.

    `trained`, that of the network, stands for files that were not computed on the whole test set.
    """
    for name in (PORTABLE, *verified):
        if verified.get(name, {}).get("accuracy") is not None:
            return float(verified[name]["accuracy"])
    return trained


def examine(form: Format, file: Path, network: Exported, reference: Outputs) -> dict[str, Any]:
    """Hold an exported file against its network; empty for a format that only the device can compute.

    Args:
        form: the format of the file.
        file: where it is.
        network: what was exported.
        reference: the fake-quantised network's outputs on the test set.

    Raises:
        ExportError: the file is not the network.
    """
    if form.name == MS:
        return check_integers(file, network)
    if form.load is None:
        return {}
    if not form.int8:
        return _float_file(form, file, network)
    metric, test = network.metric, network.test
    found = output_arrays(_tensors(form.load(file)), test, network.recipe.data.eval_batch_size)
    result = {
        **compare(found, reference, metric.is_accuracy),
        "accuracy": metric(found, test.labels, test.name),
    }
    _refuse_another(form, file, result, len(test), network.recipe.export.verify_tolerance)
    return result


def check_integers(file: Path, network: Exported) -> dict[str, Any]:
    """Compute one batch with the program in a ``.ms`` file and with the one it was written from.

    Raises:
        ExportError: a value differs, or the file cannot be read.
    """
    from msqkd.exporters.device import lite_program
    from msqkd.exporters.ms.read import read_ms

    size = min(batch_size(network.graph, network.recipe.calibration.batch_size), len(network.calibration))
    batch = next(input_batches(network.calibration, size))
    machine = network.recipe.verify.machine or X86
    different, total = differing_values(
        lite_program(network.graph, network.plan), read_ms(file), as_tuple(batch), machine
    )
    if different:
        raise ExportError(
            f"{file.name} does not compute as the network it was written from: {different} of {total} values differ; "
            "allowed: none"
        )
    return {"differing_values": different, "compared_values": total}


def _float_file(form: Format, file: Path, network: Exported) -> dict[str, Any]:
    """Compare a file that computes in float with the network in float, its weights rounded where the file's are."""
    few = subset(network.test, min(_FEW_SAMPLES, len(network.test)))
    if form.name == MS_FLOAT:
        cell: Any = to_cell(network.graph)
    else:
        cell = quantize_cell(network.graph, network.plan)
        cell.set_phase(OFF)
    assert form.load is not None
    found = output_arrays(_tensors(form.load(file)), few, len(few))
    result: dict[str, Any] = compare(found, output_arrays(cell, few, len(few)), network.metric.is_accuracy)
    _refuse_another(form, file, result, len(few), network.recipe.export.verify_tolerance)
    return result


def _tensors(run: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """`run` with its outputs as Tensors, whatever library computes them."""

    def call(*batch: Any) -> tuple[Any, ...]:
        found = run(*batch)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(output if isinstance(output, ms.Tensor) else ms.Tensor(output) for output in outputs)

    return call


def _refuse_another(form: Format, file: Path, result: dict[str, Any], samples: int, tolerance: float) -> None:
    if form.name == PORTABLE:
        allowed = f"a difference of at most {tolerance:g}"
        wrong = result["max_abs_diff"] > tolerance
    elif "relative_error" in result:
        allowed = f"a relative error of at most {_RELATIVE_ERROR:g}"
        wrong = result["relative_error"] > _RELATIVE_ERROR
    else:
        # Equal but for the order of sums or the rounding of halves, which may move a value to the next level, and a
        # close call between two classes with it.
        allowed = f"at least {100 - _DISAGREEMENT:g} % equal answers"
        different = (100 - result["agreement"]) / 100 * samples
        wrong = different > max(samples * _DISAGREEMENT / 100, 2.5)
    if wrong:
        other = (
            f"equal answers {of_hundred(result['agreement'])} %"
            if "agreement" in result
            else f"relative error {result['relative_error']:.3g}"
        )
        raise ExportError(
            f"{file.name} does not answer as the trained network: largest difference {result['max_abs_diff']:.3g}, "
            f"{other}; allowed: {allowed}"
        )


# -- the device --------------------------------------------------------------------------------------------------------
def calibration_parity(network: Exported, reporter: Reporter) -> dict[str, Any]:
    """The comparison of the three executions on the calibration samples, held against the recipe's bound."""
    return split_parity(network, network.calibration, "calibration", network.recipe.verify.machine, reporter)


def split_parity(
    network: Exported, split: Split, which: str, machine: Optional[str], reporter: Reporter
) -> dict[str, Any]:
    """The comparison of the three executions on a split, as data with the split's name `which`.

    Raises as `msqkd.analysis.parity.compare_execution`.
    """
    size = batch_size(network.graph, min(network.recipe.data.eval_batch_size, len(split)))
    with reporter.task("float, fake-quantised and integer execution", len(split)) as task:
        parity = compare_execution(
            network.graph, network.plan, input_batches(split, size), split.labels, machine or X86, task.update,
            network.metric,
        )  # fmt: skip
    return {"split": which, **parity.to_dict(network.recipe.verify.max_deviation)}


def _integer_accuracy(network: Exported, reporter: Reporter) -> Optional[float]:
    """What the device will reach on the test set, by the metric; None where the set is large."""
    test = network.test
    if len(test) > _LARGE_TEST:
        return None
    device = Device(network.graph, network.plan, network.recipe.verify.machine or X86)
    size = batch_size(network.graph, min(network.recipe.data.eval_batch_size, len(test)))
    with reporter.task("integer execution of the test set", len(test)) as task:
        found = integer_outputs(device, input_batches(test, size), task.update)
        return network.metric(found, test.labels, test.name)


def deviation_words(parity: dict[str, Any]) -> str:
    """In a sentence, how far the device is from the fake-quantised network, and where the two part."""
    reached, scale = parity["accuracy"], Scale.of(parity["metric"])
    if reached["integer"] is None:
        found = f"gives other answers than the fake-quantised network to {of_hundred(parity['deviation'])} %"
    else:
        found = (
            f"reaches {scale.words(reached['integer'])}, the fake-quantised network "
            f"{scale.show(reached['fake_quantised'])}: a deviation of {scale.number(parity['deviation'])}{scale.points}"
        )
    text = (
        f"on the {parity['samples']} {parity['split']} samples the device {found} "
        f"(verify.max_deviation: {parity['max_deviation']:g})"
    )
    first = parity["first_beyond_one"] or parity["first_difference"]
    if first is None:
        return f"{text}; no int8 value differs"
    step = "step" if first["max_lsb"] == 1 else "steps"
    return f"{text}; they part at {first['layer']} ({first['op']}), by up to {first['max_lsb']} {step}"
