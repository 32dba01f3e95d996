"""The files of a run, each held against the network it stands for, and what the device will compute from them."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms

from msqkd.analysis.parity import Device, batch_size, compare_execution, differing_values, integer_outputs
from msqkd.analysis.report import plain
from msqkd.data import Split, as_tuple, draw
from msqkd.errors import ExportError, MsqkdError
from msqkd.exporters import (
    ASCEND,
    FORMATS,
    LITE,
    MS,
    MS_FLOAT,
    ONNX,
    PORTABLE,
    Format,
    check_batch,
    check_precisions,
    export,
)
from msqkd.exporters.portable import write_float
from msqkd.files import sha256
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.integer.registry import X86
from msqkd.pipeline.build import metric_of
from msqkd.pipeline.rundir import RunDirectory, export_name
from msqkd.progress import Reporter
from msqkd.quant.bounds import Distance, distance
from msqkd.quant.fake_quant import OFF, QUANTIZE
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import quantize_cell
from msqkd.recipe import Recipe
from msqkd.train.evaluate import input_batches, output_arrays
from msqkd.train.metric import Metric, Outputs, Scale
from msqkd.user_code import reason_of
from msqkd.words import of_hundred, shell_setting

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
        judge: a metric in place of the recipe's.
    """

    recipe: Recipe
    captured: Graph
    graph: Graph
    plan: QuantPlan
    test: Split
    calibration: Split
    judge: Optional[Metric] = None

    @cached_property
    def metric(self) -> Metric:
        """What the network is judged by."""
        return self.judge or metric_of(self.recipe)


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
            check_batch(form, graph)
            if form.check is not None:
                form.check(graph, guessed)
        except Exception as error:
            raise impossible(recipe, form, error) from error
    if (plan.stored_weights() or plan.half_nodes()) and not plan.activations:
        name = next((name for name in recipe.export.formats if name in (LITE, ASCEND)), None)
        if name is not None:
            raise ExportError(
                f"export.formats: {name} carries the parameters of int8 layers, and no layer is int8 here (they "
                f"compute in float, whatever they store); {_without(recipe, name)}"
            )


def impossible(recipe: Recipe, form: Format, error: Exception) -> ExportError:
    """Return the error of a format that cannot be written, with the way to leave it out."""
    reason = f"no {form.suffix} file is possible: {why(error)}"
    return ExportError(f"export.formats: {reason}; {_without(recipe, form.name)}")


def guessed_plan(plan: QuantPlan) -> QuantPlan:
    """A plan with some range wherever one is to be found yet, to try what depends on no number."""
    weights = {name: replace(quant, observer="minmax") for name, quant in plan.weights.items()}
    return replace(plan.with_ranges(dict.fromkeys(plan.groups, _ANY_RANGE)), weights=weights)


def _without(recipe: Recipe, name: str) -> str:
    """How a format is left out, as the end of a sentence."""
    others = ", ".join(other for other in recipe.export.formats if other != name)
    return f"leave {name} out with {shell_setting('export.formats', f'[{others or PORTABLE}]')}"


# -- the files ---------------------------------------------------------------------------------------------------------
class Files:
    """Writes the files of a network, reads each back and compares it with the network.

    Args:
        network: what is exported.
        place: the path of a file by its name.
    """

    def __init__(self, network: Exported, place: Callable[[str], Path]) -> None:
        self.network, self.place = network, place

    @cached_property
    def fake(self) -> Outputs:
        """Outputs of the fake-quantized network on the test set."""
        cell = quantize_cell(self.network.graph, self.network.plan)
        cell.set_phase(QUANTIZE)
        return self._outputs(cell)

    @cached_property
    def exact(self) -> Outputs:
        """Outputs of the float network on the test set."""
        return self._outputs(to_cell(self.network.graph))

    def _outputs(self, network: Any) -> Outputs:
        return output_arrays(network, self.network.test, self.network.recipe.data.eval_batch_size)

    def write_float(self) -> Path:
        """Write the float network."""
        return write_float(self.network.captured.deployed_part(), self.place("float.mindir"))

    def write(self, form: Format) -> Path:
        """Write the network in a format.

        Raises:
            MsqkdError: the format cannot hold the trained values, or the file cannot be written.
        """
        file = self.place(export_name(self.network.recipe.name, form))
        return export(self.network.graph, self.network.plan, file, form.name)

    def examine(self, form: Format, file: Path) -> dict[str, Any]:
        """Compare an exported file with its network; empty for a format that only the device can compute.

        Returns:
            What was measured, and under ``failed`` what is beyond the recipe's bounds, where anything is.

        Raises:
            ExportError: the file cannot be read, or holds another program than was written.
        """
        if form.name == MS:
            return check_integers(file, self.network)
        if form.load is None:
            return {}
        metric, test = self.network.metric, self.network.test
        run = _tensors(form.load(file))
        if not form.int8:
            return self._float_file(form, file, run)
        reference = self.fake
        found = self._outputs(run)
        near = distance(found, reference, metric.is_accuracy)
        excess = self._beyond(form, near, self.network.recipe.verify.bounds.excess(near))
        if excess:  # the float network is the measure of another arithmetic
            own, away = (distance(answers, self.exact, metric.is_accuracy) for answers in (reference, found))
            excess = self._beyond(form, near, self.network.recipe.verify.bounds.excess(near, own, away))
        return {**_record(file, near, excess), "accuracy": metric(found, test.labels, test.name)}

    def _float_file(self, form: Format, file: Path, run: Callable[..., Any]) -> dict[str, Any]:
        """Compare a file that computes in float with the network in float, its weights rounded where the file's are."""
        few = draw(self.network.test, _FEW_SAMPLES)
        if form.name == MS_FLOAT:
            cell: Any = to_cell(self.network.graph)
        else:
            cell = quantize_cell(self.network.graph, self.network.plan)
            cell.set_phase(OFF)
        found, reference = (output_arrays(network, few, len(few)) for network in (run, cell))
        near = distance(found, reference, self.network.metric.is_accuracy)
        return _record(file, near, self._beyond(form, near, self.network.recipe.verify.bounds.excess(near)))

    def _beyond(self, form: Format, near: Distance, excess: list[str]) -> list[str]:
        """Add the bound of the portable file, whose arithmetic is that of the fake-quantized network."""
        tolerance = self.network.recipe.export.verify_tolerance * max(near.largest, 1.0)
        if form.name != PORTABLE or near.max_abs_diff <= tolerance:
            return excess
        text = f"largest difference {near.max_abs_diff:.3g}, allowed: {tolerance:.3g} (export.verify_tolerance)"
        return [text, *excess]


def _record(file: Path, near: Distance, excess: Sequence[str]) -> dict[str, Any]:
    """Return what a run's state keeps of a comparison."""
    found: dict[str, Any] = near.to_dict()
    if excess:
        found["failed"] = f"{file.name} does not answer as the trained network: {'; '.join(excess)}"
    return found


def export_files(
    network: Exported, folder: RunDirectory, reporter: Reporter, before: Optional[Mapping[str, Any]] = None
) -> dict[str, Any]:
    """Write every file of the recipe, read each back, and compute what the device will answer.

    A format that fails keeps nothing from the others: the reason is recorded under ``failed``.

    Args:
        network: what is exported.
        folder: of the run.
        reporter: where progress is told.
        before: the result of an earlier export, of which formats that did not fail are kept.

    Returns:
        What the export stage records: names, sizes and checksums of the files, how each was verified, accuracies on
        the test set in percent (or what the recipe's metric says), and the comparison of the three executions on the
        calibration samples.
    """
    writer = Files(network, folder.file)
    files: dict[str, Path] = {}
    verified: dict[str, Any] = {}

    def attempt(name: str, file: Path, write: Callable[[], Path], examine: Callable[[Path], dict[str, Any]]) -> None:
        def work() -> dict[str, Any]:
            file.unlink(missing_ok=True)  # one that failed before
            files[name] = write()
            return examine(files[name])

        found = _or_reason(name, work, reporter)
        verified[name] = {"file": files[name].name if name in files else None, **found}

    attempt("float", folder.file("float.mindir"), writer.write_float, lambda file: {})
    if "failed" not in verified["float"]:
        del verified["float"]  # there is nothing to compare it with
    for name in network.recipe.export.formats:
        form = FORMATS[name]
        file = folder.file(export_name(network.recipe.name, form))
        held = before["verified"].get(name) if before is not None else None
        if held is not None and "failed" not in held and file.is_file():
            files[name], verified[name] = file, held
        else:
            attempt(name, file, partial(writer.write, form), partial(writer.examine, form))
    trained = network.metric(writer.fake, network.test.labels, network.test.name)
    if before is not None and "failed" not in before["parity"]:
        integer_accuracy, parity = before["integer_accuracy"], before["parity"]
    else:
        parity = _or_reason("device", lambda: _on_the_device(network, reporter), reporter)
        integer_accuracy = parity.pop("integer_accuracy", None)
        if "failed" in parity:
            parity = {"split": "calibration", "metric": network.metric.to_dict(), "exceeded": True, **parity}
    return {
        "accuracy": _exported_accuracy(verified, trained),
        "integer_accuracy": integer_accuracy,
        "files": [file.name for file in files.values()],
        "sizes": {name: file.stat().st_size for name, file in files.items()},
        "sha256": {file.name: sha256(file) for file in files.values()},
        "verified": verified,
        "parity": parity,
    }


def _or_reason(name: str, work: Callable[[], dict[str, Any]], reporter: Reporter) -> dict[str, Any]:
    """Return the result of `work`, or under ``failed`` why there is none; a failure is told.

    Whatever goes wrong here comes after the training, so it must not take the rest of the run with it.
    """
    try:
        found = work()
    except Exception as error:
        found = {"failed": why(error)}
    if "failed" in found:
        reporter.warn(f"{name} failed: {found['failed']}")
    return found


def why(error: Exception) -> str:
    """An error in a sentence: the user's as it is, another one with its place, which a report of the fault needs."""
    if isinstance(error, MsqkdError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{reason_of(error)}{place}"


def failures(verified: Mapping[str, Any], parity: Mapping[str, Any]) -> dict[str, str]:
    """Return why formats failed, by name, from what `export_files` recorded; the device is named ``device``."""
    found = {name: entry["failed"] for name, entry in verified.items() if entry.get("failed")}
    if parity.get("failed"):
        found["device"] = parity["failed"]
    return found


def _exported_accuracy(verified: dict[str, Any], trained: float) -> float:
    """The test accuracy of a file: of the portable one, which MindSpore itself computes, where there is one.

    `trained`, that of the network, stands for files that failed or were not computed on the whole test set.
    """
    for name in (PORTABLE, *verified):
        entry = verified.get(name, {})
        if entry.get("accuracy") is not None and "failed" not in entry:
            return float(entry["accuracy"])
    return trained


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
    program = lite_program(network.graph, network.plan)
    different, total = differing_values(program, read_ms(file), as_tuple(batch), machine)
    if different:
        raise ExportError(
            f"{file.name} does not compute as the network it was written from: {different} of {total} values differ; "
            "allowed: none"
        )
    return {"differing_values": different, "compared_values": total}


def _tensors(run: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """`run` with its outputs as Tensors, whatever library computes them."""

    def call(*batch: Any) -> tuple[Any, ...]:
        found = run(*batch)
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(output if isinstance(output, ms.Tensor) else ms.Tensor(output) for output in outputs)

    return call


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
    return {"split": which, **plain(parity.to_dict(network.recipe.verify.bounds))}


def _on_the_device(network: Exported, reporter: Reporter) -> dict[str, Any]:
    """Return the comparison on the calibration samples, and `integer_accuracy` beside it."""
    parity = calibration_parity(network, reporter)
    return {**parity, "integer_accuracy": _integer_accuracy(network, reporter)}


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
    if "failed" in parity:
        return f"the device could not be compared with the fake-quantised network: {parity['failed']}"
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
    if parity.get("excess"):  # not there in runs of earlier versions
        text += f"; beyond the bounds: {'; '.join(parity['excess'])}"
    first = parity["first_beyond_one"] or parity["first_difference"]
    if first is None:
        return f"{text}; no int8 value differs"
    step = "step" if first["max_lsb"] == 1 else "steps"
    return f"{text}; they part at {first['layer']} ({first['op']}), by up to {first['max_lsb']} {step}"
