"""What an ARM user takes away: ``.ms`` and MindIR of a run or a checkpoint, held against the converter and the device.

`tools/export_lite.py` is its command line.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.analysis.parity import batch_size
from msqkd.data import Split, as_tuple, subset
from msqkd.deploy.benchmark_kit import write_kit
from msqkd.deploy.converter_run import convert_and_compare
from msqkd.deploy.vendor_ptq import OUTPUT as VENDOR
from msqkd.deploy.vendor_ptq import VendorPtq, write_vendor_ptq
from msqkd.environment import versions
from msqkd.errors import ExportError, RecipeError
from msqkd.exporters import FORMATS, LITE, MS, MS_FLOAT, MS_WEIGHT, export
from msqkd.files import PathLike, sha256, write_json
from msqkd.pipeline.build import (
    build_network,
    calibration_split,
    capture_network,
    load_bundle,
    plan_graph,
    random_weights,
)
from msqkd.pipeline.conversion import conversion_words
from msqkd.pipeline.export import Exported, calibration_parity, check_integers
from msqkd.pipeline.run import reopen
from msqkd.pipeline.rundir import RunDirectory
from msqkd.progress import Reporter
from msqkd.quant.ptq import calibrate
from msqkd.quant.qat import deployment_graph, quantize_cell
from msqkd.recipe import Recipe, load_recipe, make_recipe
from msqkd.targets.lite_arm import LITE_ARM
from msqkd.train.evaluate import input_batches

API_VERSION = "msqkd/export_lite/v1"
SUMMARY = "export.json"
"""The file that says what was written, and how it compares."""

_SUFFIXES = {MS: "", LITE: "", MS_WEIGHT: "_weight", MS_FLOAT: "_float"}


@dataclass(frozen=True)
class Source:
    """A network to be exported.

    Attributes:
        network: the network, its plan and its data.
        origin: where it is from, for the summary.
        checksums: SHA-256 of the files its run has exported, by format.
    """

    network: Exported
    origin: dict[str, str]
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What is written beside the int8 ``.ms`` and the marked MindIR.

    Attributes:
        weight_only, float_model: the ``.ms`` files that compute in float, with int8 and with float weights.
        converter: a converter (from `find_converter`) to run and to compare with.
        vendor_ptq: folder for the vendor's own quantisation of the float network.
        benchmark: samples of the folder for a comparison on the device; 0 writes none.
    """

    weight_only: bool = False
    float_model: bool = False
    converter: Optional[Path] = None
    vendor_ptq: Optional[Path] = None
    benchmark: int = 0

    def folders(self) -> list[Path]:
        """The folders written beside the main one."""
        return [] if self.vendor_ptq is None else [self.vendor_ptq]


# -- where the network is from -----------------------------------------------------------------------------------------
def from_run(path: PathLike, reporter: Reporter) -> Source:
    """The network a finished run exported, made again from the run's folder.

    Raises:
        ExportError: no finished run, a file that does not match its checksum, or another target.
        MsqkdError: the data or the network cannot be had any more.
    """
    folder = RunDirectory.finished(Path(path))
    checksums = folder.check_exports()
    recipe = make_recipe(folder.state["recipe"])
    _check_target(recipe)
    verified = folder.result("export")["verified"]
    by_format = {name: checksums[entry["file"]] for name, entry in verified.items() if entry["file"] is not None}
    return Source(reopen(folder, recipe, reporter), {"run": str(path)}, by_format)


def from_recipe(
    recipe: PathLike, checkpoint: Optional[PathLike], overrides: Sequence[str], reporter: Reporter
) -> Source:
    """A float network with trained weights, calibrated as its recipe says; nothing is trained.

    Args:
        recipe: a recipe file, or the name of a built-in one.
        checkpoint: the trained weights; None takes those the recipe names.
        overrides: ``key.path=value``.
        reporter: where progress is told.

    Raises:
        RecipeError: the recipe is wrong, or names no trained weights.
        ExportError: another target.
        MsqkdError: the network or the data cannot be had.
    """
    origin = {"recipe": str(recipe)}
    if checkpoint is not None:
        origin["checkpoint"] = str(checkpoint)
        overrides = [*overrides, "pretrain=null", f"model.checkpoint={json.dumps(str(checkpoint))}"]
    loaded = load_recipe(recipe, overrides)
    if loaded.pretrain is not None:
        raise RecipeError(
            f"{recipe} trains its float network first; give its trained weights with --checkpoint FILE, or the folder "
            "of a finished run in place of the recipe"
        )
    _check_target(loaded)
    return Source(_calibrated(loaded, reporter), origin)


def _check_target(recipe: Recipe) -> None:
    if recipe.target != LITE_ARM.name:
        raise ExportError(f"{recipe.name} is for target {recipe.target}; .ms files are for {LITE_ARM.name}")


def _calibrated(recipe: Recipe, reporter: Reporter) -> Exported:
    """The recipe's float network with ranges from its calibration samples."""
    ms.set_context(mode=ms.GRAPH_MODE)
    bundle = load_bundle(recipe)
    reporter.say(bundle.describe())
    captured = capture_network(recipe, build_network(recipe.model, "model"))
    warning = random_weights(recipe.model, {name: param.data for name, param in captured.params.items()}, "model")
    if warning is not None:
        reporter.warn(warning)
    graph = deployment_graph(captured)
    samples, section = calibration_split(recipe, bundle.train), recipe.calibration
    size = min(section.batch_size, len(samples))
    with reporter.task("calibration", -(-len(samples) // size)) as task:
        plan = calibrate(
            graph, plan_graph(recipe, graph), input_batches(samples, size),
            observer=section.observer, percentile=section.percentile or 99.99, progress=task.update,
        )  # fmt: skip
    graph, plan = quantize_cell(graph, plan).sync()  # with the clip ratios it chose
    return Exported(recipe, captured, graph, plan, bundle.test, samples)


# -- what is written ---------------------------------------------------------------------------------------------------
def write_bundle(source: Source, output: PathLike, wanted: Wanted, reporter: Reporter) -> dict[str, Any]:
    """Write everything wanted into a new folder; it appears when all is done, or not at all.

    Args:
        source: from `from_run` or `from_recipe`.
        output: the folder; it must be empty, or not exist.
        wanted: what is written beside the int8 ``.ms`` and the marked MindIR.
        reporter: where progress is told.

    Returns:
        The data of ``export.json``: `files` with size and SHA-256, `parity` (the float, fake-quantised and integer
        execution of the calibration samples), and `converter` and `vendor_ptq` where a converter was run.

    Raises:
        ExportError: a file cannot be written, does not compute as the network, or is not the one the run exported. A
            converter that fails is recorded in the data.
        MsqkdError: whatever else the user can mend.
    """
    with staged(Path(output), *wanted.folders()) as folders:
        return _Bundle(source, wanted, reporter, folders[0]).write(*folders[1:])


class _Bundle:
    def __init__(self, source: Source, wanted: Wanted, reporter: Reporter, folder: Path) -> None:
        self.source, self.network, self.wanted, self.reporter = source, source.network, wanted, reporter
        self.name, self.folder = source.network.recipe.name, folder

    def write(self, vendor: Optional[Path] = None) -> dict[str, Any]:
        result: dict[str, Any] = {
            "apiversion": API_VERSION,
            "name": self.name,
            "source": self.source.origin,
            "target": self.network.plan.target,
            "versions": versions(),
        }
        self._check_inputs(vendor is not None)
        count, available = self.wanted.benchmark, len(self.network.calibration)
        if count > available:
            raise ExportError(f"the benchmark was to have {count} samples; the calibration set has {available}")
        model = self._models()
        if count:
            write_kit(model, _array(subset(self.network.calibration, count)), self.folder / "benchmark")
            self.reporter.say(f"benchmark: {count} samples for the device; how to use them is in README.txt there")
        if self.wanted.converter is not None:
            result["converter"] = self._converted(self.wanted.converter, model)
        if vendor is not None:
            graph = deployment_graph(self.network.captured)
            per_channel = any(quant.axis is not None for quant in self.network.plan.weights.values())
            made = write_vendor_ptq(graph, _array(self.network.calibration), vendor, per_channel)
            self.reporter.say(f"vendor's quantisation: {len(self.network.calibration)} calibration files")
            if self.wanted.converter is not None:
                result["vendor_ptq"] = self._vendor(self.wanted.converter, made, model)
        result["parity"] = calibration_parity(self.network, self.reporter)
        result["files"] = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(self.folder.iterdir())
            if file.is_file()
        }
        write_json(self.folder / SUMMARY, result)
        return result

    def _check_inputs(self, vendor: bool) -> None:
        """What works on files of samples knows networks of one float input only."""
        graph, wanted = self.network.graph, self.wanted
        given = {"benchmark": bool(wanted.benchmark), "vendor PTQ": vendor}
        asked = [name for name, is_wanted in given.items() if is_wanted]
        kinds = [graph.values[name].type for name in graph.inputs]
        if asked and (len(kinds) != 1 or kinds[0] is None or kinds[0].dtype != "float32"):
            raise ExportError(
                f"{graph.name} takes {', '.join(graph.inputs)}; allowed for {' and '.join(asked)}: one float32 input; "
                "the .ms and MindIR files are written without"
            )

    def _models(self) -> Path:
        """Write the model files, hold them against the network and the run, and return the int8 one."""
        formats = [MS, LITE]
        formats += [MS_WEIGHT] if self.wanted.weight_only else []
        formats += [MS_FLOAT] if self.wanted.float_model else []
        for name in formats:
            file = self.folder / f"{self.name}{_SUFFIXES[name]}{FORMATS[name].suffix}"
            export(self.network.graph, self.network.plan, file, name)
            recorded = self.source.checksums.get(name)
            if recorded is not None and sha256(file) != recorded:
                raise ExportError(
                    f"the network in {self.source.origin['run']} no longer gives the {name} file its run exported: a "
                    "checkpoint there was changed, or msqkd or MindSpore is another version; run it again with --fresh"
                )
            self.reporter.say(f"{file.name}: {FORMATS[name].description}")
        model = self.folder / f"{self.name}.ms"
        check_integers(model, self.network)
        return model

    def _converted(self, converter: Path, model: Path) -> dict[str, Any]:
        """The marked MindIR through the converter: it needs no configuration file."""
        marked, output = self.folder / f"{self.name}.mindir", self.folder / f"{self.name}_converter"
        return self._compared(converter, marked, model, output)

    def _vendor(self, converter: Path, made: VendorPtq, model: Path) -> dict[str, Any]:
        """The float MindIR through the converter, quantised by the vendor's own means."""
        return self._compared(converter, made.model, model, made.folder / VENDOR, made.config)

    def _compared(
        self, converter: Path, model: Path, ours: Path, output: Path, config: Optional[Path] = None
    ) -> dict[str, Any]:
        """How a converter's file compares with ours; that there is none, or that it cannot be computed here, is an
        answer too."""
        split = self.network.calibration
        size = batch_size(self.network.graph, min(self.network.recipe.data.eval_batch_size, len(split)))
        found = convert_and_compare(converter, model, ours, output, input_batches(split, size), config)
        if found["compared"]:
            self.reporter.say(conversion_words(found))
        else:
            self.reporter.warn(conversion_words(found))
        return found


def _array(split: Split) -> np.ndarray:
    """All samples of a split, (N, ...) float32 in the network's layout."""
    result = np.empty((len(split), *split.shape), np.float32)
    done = 0
    for batch in input_batches(split, min(64, len(split))):
        (images,) = as_tuple(batch)
        result[done : done + len(images)] = images
        done += len(images)
    return result


# -- all or nothing ----------------------------------------------------------------------------------------------------
@contextmanager
def staged(*targets: Path) -> Iterator[list[Path]]:
    """Yield a temporary folder for each target; they take the targets' places when the block ends without an error.

    Raises:
        ExportError: as `check_places`.
    """
    places = check_places(*targets)
    folders: list[Path] = []
    try:
        for place in places:
            folders.append(Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=_existing(place.parent))))
        yield folders
        umask = os.umask(0)
        os.umask(umask)
        for folder, place in zip(folders, places):
            folder.chmod(0o777 & ~umask)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder, place)
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def check_places(*targets: Path) -> list[Path]:
    """The absolute paths of folders that are to be written; one may lie in another named before it.

    Raises:
        ExportError: one is there and not an empty folder, has no folder around it, or is or holds one named before it.
    """
    places = [Path(os.path.abspath(target)) for target in targets]
    for number, place in enumerate(places):
        if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
            raise ExportError(f"{place} is there already; choose an empty or new folder")
        if any(place == other or place in other.parents for other in places[:number]):
            raise ExportError(f"{place} cannot be or hold {places[0]}; choose another folder")
        _existing(place.parent)
    return places


def _existing(folder: Path) -> Path:
    """The nearest folder around `folder`, or itself, that exists.

    Raises:
        ExportError: what exists is no folder.
    """
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise ExportError(f"{place} is not a folder; choose another place for {folder}")
    return place
