"""The recipe as typed, validated sections: one pydantic model a section, one described field a key.

Unknown keys, wrong types and out-of-range values are refused, and so is every setting that would have no effect next to
the others, so that what a recipe says is what is run. A default that depends on another setting (the momentum, which
some optimisers have and some have not; the percentile of one observer) is filled in here: whoever reads a recipe finds
None only where there is nothing to use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional, get_args

from annotated_types import Ge, Le
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from msqkd.distill.schedule import default_alpha, default_temperature
from msqkd.distill.shapes import LEAST_SAMPLES
from msqkd.exporters import FORMATS
from msqkd.quant.bounds import Bounds
from msqkd.recipe.distillation import DistillationSection
from msqkd.recipe.fields import (
    Count,
    Factory,
    Fraction,
    FreeMapping,
    NotNegative,
    Percentile,
    Section,
    Text,
    distinct,
    filled,
    filled_below,
    switch,
    value_of,
)
from msqkd.recipe.network import ModelSection, Teachers, TeacherSection
from msqkd.recipe.problems import Allowed, Problem, dotted, listing, refuse_value, show
from msqkd.recipe.ptq import PtqSection
from msqkd.recipe.quantization import ActivationObserver, QuantizationSection, RangeSection
from msqkd.recipe.training import DataSection, TrainSection

TargetName = Literal["lite_arm", "ascend"]
TARGETS: tuple[str, ...] = get_args(TargetName)
"""The names of the runtimes a recipe may aim at."""
Comparison = Literal["qat", "float", "float_kd"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)
"""The trainings that can be reported beside the main one."""
METRIC_DEVIATION = 0.01
LOW_BITS, HIGH_TEMPERATURE = 4, 2.0


def _samples(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        refuse_value("found 0, but calibration needs at least 1 sample to see a range of values")
    return value


RecipeName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$"),
    Allowed("a text of a-z, 0-9, '_', '.' and '-' that starts with a letter or digit"),
]


def _with_own_loss(values: Any) -> Any:
    """`values` with the loss of train in pretrain and distillation too, where these are given and name none."""
    train = value_of(values, "train")
    loss = value_of(train, "loss")
    if loss is None:
        return values
    pretrain = value_of(values, "pretrain")
    if isinstance(pretrain, dict) and pretrain.get("loss") is None and pretrain.get("loss_args") is None:
        values = {**values, "pretrain": {**pretrain, "loss": loss, "loss_args": value_of(train, "loss_args", {})}}
    if value_of(values, "distillation") is not None:
        values = filled_below(values, "distillation", "hard_loss", "train_loss")
    return values


def _with_distillation_defaults(values: Any) -> Any:
    """`values` with the share and the temperature of the teacher that fit the fewest bits."""
    section = value_of(values, "distillation")
    if not isinstance(section, dict):
        return values
    quantization = value_of(values, "quantization")
    parts = ("weight",) if value_of(quantization, "precision") == "weight-only" else ("weight", "activation")
    given = [value_of(value_of(quantization, part), "bits", 8) for part in parts]
    bits = min((number for number in given if isinstance(number, int) and 2 <= number <= 8), default=8)
    alpha = 1.0 if value_of(section, "hard_loss") == "none" else default_alpha(bits)
    values = filled_below(values, "distillation", "alpha", alpha)
    temperature = default_temperature(bits) if value_of(section, "soft_loss", "kl") == "kl" else None
    return filled_below(values, "distillation", "temperature", temperature)


class EvaluationSection(Section):
    """What a network is judged by."""

    metric: Optional[Factory] = Field(
        default=None,
        description="The function of (outputs, labels) that gives a number, both as arrays over the whole test set "
        "(tuples where there are several); null is top-1 accuracy of the first output, in percent.",
    )
    name: Optional[Text] = Field(default=None, description="What it is called; with metric only, its own name there.")
    higher_is_better: bool = Field(default=True, description="false for a metric that is an error; with metric only.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        metric = value_of(values, "metric")
        return filled(values, "name", metric.rpartition(":")[2], True) if isinstance(metric, str) else values

    def _conflicts(self) -> Iterator[Problem]:
        if self.metric is None:
            if self.name is not None:
                yield Problem(("name",), f"found {self.name!r}, allowed only beside metric")
            if not self.higher_is_better:
                yield Problem(("higher_is_better",), "found false, allowed only beside metric")


class CalibrationSection(RangeSection):
    """How the ranges of activations are measured without training."""

    samples: Annotated[Count, BeforeValidator(_samples)] = Field(
        default=1000, description="Training samples measured, at most: drawn by the seed, balanced over classes."
    )
    batch_size: Count = Field(default=50, description="Samples a batch.")
    iterations: Optional[Count] = Field(
        default=None, description="Stop after this many batches; null looks at all samples."
    )
    observer: ActivationObserver = Field(
        default="percentile", description="How the range is chosen from the values seen."
    )
    percentile: Optional[Percentile] = Field(
        default=None, description="Part of the values inside the range, in %; observer percentile only, 99.99 there."
    )


ExportFormat = Literal[
    "lite_mindir", "portable_mindir", "direct_mindir", "ms", "ms_weight", "ms_float", "onnx", "ascend_mindir"
]
DEFAULT_FORMATS: dict[str, list[ExportFormat]] = {
    "lite_arm": ["lite_mindir", "portable_mindir", "ms"],
    "ascend": ["ascend_mindir", "portable_mindir"],
}
"""The files written for each target where a recipe does not say."""


class ExportSection(Section):
    """The files written at the end."""

    formats: Annotated[
        list[ExportFormat],
        Field(min_length=1),
        AfterValidator(distinct),
        Allowed(f"a list, at least one of {listing(get_args(ExportFormat), 'and')}"),
    ] = Field(
        default=DEFAULT_FORMATS["lite_arm"],
        description="lite_mindir for the MindSpore Lite converter, portable_mindir for any MindSpore, direct_mindir "
        "for MindSpore Lite's MindIR loader, ms for MindSpore Lite without its converter (ms_weight: int8 weights and "
        "float computation; ms_float: float, for comparison), onnx for onnxruntime on x86 and ARM servers (needs the "
        "extra msqkd[onnx]). Target ascend takes ascend_mindir for Ascend NPUs, portable_mindir, direct_mindir and "
        "onnx; the first two are its default.",
    )
    verify_tolerance: NotNegative = Field(
        default=1e-4,
        description="Largest absolute difference of outputs accepted when the portable file is verified; where outputs "
        "are larger than 1, times the largest of them.",
    )


class VerifySection(Section):
    """How far the device, and every exported file, may be from the fake-quantised network. Every export ends with a
    comparison on the calibration samples; `msqkd verify` compares on the test set. [device.md](device.md#bounds) says
    where the bounds and their defaults come from."""

    max_deviation: NotNegative = Field(
        default=Bounds.max_deviation,
        description="Largest difference of top-1 accuracy between integer and fake-quantised execution, in points; "
        "without labels, the largest share of different answers, in percent. What chance explains (two standard "
        "errors of the answers that changed) passes; 0 accepts no difference. With evaluation.metric: the largest "
        "difference of the metric, in its own unit, 0.01 where not given, and nothing else passes.",
    )
    max_changed: NotNegative = Field(
        default=Bounds.max_changed,
        description="Largest share of samples with another top-1 class than in the fake-quantised network, in percent, "
        "of the device and of every file. Where quantisation itself changes more classes of the float network, as many "
        "pass, up to five times the bound. So do two standard errors of the bound; 0 accepts none. 0.75 % change in a "
        "W8A8 ResNet-20.",
    )
    max_relative_error: NotNegative = Field(
        default=Bounds.max_relative_error,
        description="With evaluation.metric: largest relative error (root mean square) of the outputs to the "
        "fake-quantised network. Beyond it max_sqnr_loss decides. 2 % is an SQNR of 34 dB.",
    )
    max_sqnr_loss: NotNegative = Field(
        default=Bounds.max_sqnr_loss,
        description="With evaluation.metric: dB that the SQNR of the outputs to float may be below that of the "
        "fake-quantised network. 3 dB is twice the energy of the noise.",
    )
    min_cosine: Fraction = Field(
        default=Bounds.min_cosine,
        description="With evaluation.metric: least cosine similarity of the outputs to the fake-quantised network, "
        "mean of the samples. Outputs as near to float as max_sqnr_loss allows pass too.",
    )
    samples: Optional[Count] = Field(
        default=None, description="Test samples `msqkd verify` computes, at most; null takes the whole test set."
    )
    machine: Optional[Literal["x86", "arm64"]] = Field(
        default=None,
        description="Build of MindSpore Lite whose arithmetic is computed; target lite_arm only, arm64 there.",
    )
    converter: Annotated[Text, BeforeValidator(switch)] = Field(
        default="auto",
        description="The vendor's converter, which `run` and `calibrate` end with where the format lite_mindir is "
        "written; its file is compared with the .ms file. A path (the program, the unpacked package, an environment "
        "with mindspore-lite, or its wheel); auto takes that of MSLITE_HOME or the converter_lite on the PATH, if "
        "there is one; off takes none.",
    )

    @property
    def bounds(self) -> Bounds:
        """The bounds, as `msqkd.quant.bounds` takes them."""
        return Bounds(
            self.max_deviation, self.max_changed, self.max_relative_error, self.max_sqnr_loss, self.min_cosine
        )


class Recipe(Section):
    """A whole recipe; `msqkd.recipe.load_recipe` reads one from a file, `make_recipe` validates a mapping."""

    apiversion: Literal["msqkd/v1"] = Field(description="Version of this format.")
    name: RecipeName = Field(description="Name of the recipe.")
    description: str = Field(default="", description="What it is, in a sentence.")
    result: FreeMapping = Field(default={}, description="The measured result, for the reader.")
    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = Field(default=0, description="Seed of every random choice.")
    target: TargetName = Field(default="lite_arm", description="The runtime that will execute the model.")
    model: ModelSection = Field(description="The network to be quantised.")
    teacher: Teachers = Field(default=TeacherSection(), description="The network, or the networks, that teach it.")
    data: DataSection = Field(description="The dataset.")
    pretrain: Optional[TrainSection] = Field(
        default=None, description="Float training from scratch, in place of model.checkpoint; null does none."
    )
    quantization: QuantizationSection = Field(default=QuantizationSection(), description="What is quantised.")
    distillation: Optional[DistillationSection] = Field(
        default=None,
        description="Distillation in the quantisation-aware training; null does none, {} uses the defaults.",
    )
    train: TrainSection = Field(default=TrainSection(), description="The quantisation-aware training.")
    evaluation: EvaluationSection = Field(default=EvaluationSection(), description="The metric.")
    compare: Annotated[list[Comparison], AfterValidator(distinct)] = Field(
        default=list(COMPARISONS),
        description="Trainings with the same budget reported beside the main one: QAT without distillation, float, "
        "float with distillation. Without distillation the default is ['float'].",
    )
    calibration: CalibrationSection = Field(default=CalibrationSection(), description="Calibration.")
    ptq: PtqSection = Field(default=PtqSection(), description="What makes quantisation without training lose less.")
    export: ExportSection = Field(default=ExportSection(), description="Export.")
    verify: VerifySection = Field(default=VerifySection(), description="Comparison with what the device computes.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        alone = value_of(values, "distillation") is None
        values = filled(values, "compare", ["float"] if alone else list(COMPARISONS), True)
        values = _with_own_loss(values)
        values = _with_distillation_defaults(values)
        metric = value_of(value_of(values, "evaluation"), "metric")
        values = filled_below(values, "verify", "max_deviation", None if metric is None else METRIC_DEVIATION)
        target = value_of(values, "target", "lite_arm")
        formats = DEFAULT_FORMATS.get(target) if isinstance(target, str) else None
        values = filled_below(values, "export", "formats", formats)
        return filled_below(values, "verify", "machine", "arm64" if target == "lite_arm" else None)

    def _conflicts(self) -> Iterator[Problem]:
        yield from self._weights_conflicts()
        yield from self._distillation_conflicts()
        yield from self._target_conflicts()
        yield from self._input_conflicts()
        yield from self._schedule_conflicts()
        if self.model.source == "mindir" and self.train.dropout:
            yield Problem(("train", "dropout"), "found true, not allowed with model.source: mindir, a file without it")
        shape, mean = self.model.input_shape, self.data.mean
        if shape is not None and mean is not None and len(mean) != shape[0]:
            text = f"found {len(mean)} values, allowed: {shape[0]}, the channels of model.input_shape"
            yield Problem(("data", "mean"), text)

    def _schedule_conflicts(self) -> Iterator[Problem]:
        """What would begin when the training is over."""
        section, epochs = self.quantization, self.train.epoch_size
        begins = [(("schedule", *path), epoch) for path, epoch in section.schedule.epochs()]
        begins.append((("activation", "delay_epochs"), section.activation.delay_epochs or 0))
        for index, rule in enumerate(section.rules):
            begins.append((("rules", index, "activation", "delay_epochs"), rule.activation.delay_epochs or 0))
        for path, epoch in begins:
            if epoch >= epochs:
                text = f"begins at epoch {epoch}, counted from 0, but the training (train.epoch_size) has {epochs}"
                yield Problem(("quantization", *path), text)

    def _input_conflicts(self) -> Iterator[Problem]:
        """What only images have."""
        if not self.model.inputs:
            return
        data = self.data
        if data.name not in ("arrays", "python"):
            text = f"found a list, not allowed with data.name: {data.name}, which gives images; use input_shape"
            yield Problem(("model", "inputs"), text)
        for key in ("augment", "mean", "std"):
            if getattr(data, key) and data.name != "python":
                text = f"found {show(getattr(data, key))}, not allowed with model.inputs: it is for images"
                yield Problem(("data", key), text)
        if data.name == "arrays":
            for index, item in enumerate(self.model.inputs):
                if item.name is None:
                    text = "is missing, required by data.name: arrays, whose arrays have the names of the inputs"
                    yield Problem(("model", "inputs", index, "name"), text)

    def _target_conflicts(self) -> Iterator[Problem]:
        """What only one target has."""
        for index, name in enumerate(self.export.formats):
            if self.target not in FORMATS[name].targets:
                possible = listing(other for other, form in FORMATS.items() if self.target in form.targets)
                yield Problem(
                    ("export", "formats", index), f"found '{name}', allowed with target: {self.target}: {possible}"
                )
        if self.verify.machine is not None and self.target != "lite_arm":
            yield Problem(("verify", "machine"), f"found '{self.verify.machine}', allowed only with target: lite_arm")
        if self.verify.converter not in ("auto", "off") and "lite_mindir" not in self.export.formats:
            text = f"found '{self.verify.converter}', allowed only with lite_mindir in export.formats"
            yield Problem(("verify", "converter"), text)

    def missing_weights(self) -> Optional[Problem]:
        """What is wrong where the float model has no origin of its weights: fine for planning, not for a run."""
        if self.pretrain is not None or self.model.checkpoint is not None or self.model.has_weights:
            return None
        return Problem(
            ("model", "checkpoint"),
            "is missing, quantisation starts from a trained model; give the file of its weights here or with "
            "--set model.checkpoint=FILE, or a pretrain section to train it first",
        )

    def _weights_conflicts(self) -> Iterator[Problem]:
        """The trained float model needs at most one origin."""
        if self.pretrain is not None:
            other = "args.pretrained: true" if self.model.downloads else "checkpoint" if self.model.checkpoint else ""
            other = "file" if self.model.source == "mindir" else other
            if other:
                yield Problem(
                    ("pretrain",), f"two origins of the weights, training from scratch and model.{other}; keep one"
                )

    @property
    def teachers(self) -> list[TeacherSection]:
        """The teacher, or the teachers, in a list."""
        return self.teacher if isinstance(self.teacher, list) else [self.teacher]

    def _teacher_conflicts(self, distillation: DistillationSection) -> Iterator[Problem]:
        """What needs several teachers, and what several teachers need."""
        count = len(self.teachers)
        weighed = count > 1 and distillation.combine == "weighted"
        for index, section in enumerate(self.teachers):
            if section.weight != 1 and not weighed:
                where = ("teacher", index, "weight") if isinstance(self.teacher, list) else ("teacher", "weight")
                reason = "with several teachers" if count == 1 else "with combine: weighted"
                yield Problem(where, f"found {section.weight}, allowed only {reason}")
        for index, feature in enumerate(distillation.features):
            if feature.of >= count:
                text = f"found {feature.of}, allowed: 0 to {count - 1}, the numbers of the teachers"
                yield Problem(("distillation", "features", index, "of"), text)
            least = LEAST_SAMPLES.get(feature.loss, 1)
            if self.train.batch_size < least:
                text = (
                    f"found '{feature.loss}', which compares the samples of a batch and needs at least {least}, but "
                    f"train.batch_size is {self.train.batch_size}"
                )
                yield Problem(("distillation", "features", index, "loss"), text)
        if distillation.combine == "best":
            where = ("distillation", "combine")
            if count == 1:
                yield Problem(where, "found 'best', allowed only with several teachers, a list of sections")
            for key, value in (("train.loss", self.train.loss), ("evaluation.metric", self.evaluation.metric)):
                if value is not None:
                    text = f"found 'best', not allowed with {key}: it needs labels that are the numbers of classes"
                    yield Problem(where, text)

    def _distillation_conflicts(self) -> Iterator[Problem]:
        if self.distillation is not None:
            yield from self._teacher_conflicts(self.distillation)
        if self.distillation is None:
            if self.teacher != TeacherSection():
                text = "not used without distillation; add 'distillation: {}', or drop it with --set teacher=null"
                yield Problem(("teacher",), text)
            for index, name in enumerate(self.compare):
                if name == "float_kd":
                    yield Problem(("compare", index), "found 'float_kd', allowed only with a distillation section")
                if name == "qat":
                    yield Problem(
                        ("compare", index),
                        "found 'qat', allowed only with a distillation section; without it that is the main training",
                    )
            return
        if self.distillation.hard_loss == "train_loss" and self.train.loss is None:
            text = "found 'train_loss', allowed only with train.loss"
            yield Problem(("distillation", "hard_loss"), text)
        if self.distillation.cache == "on" and self.distillation.cache_view == "same" and self.data.augment:
            text = (
                f"found 'on', not allowed with data.augment: {show(self.data.augment)}, by which the teacher would see "
                "other samples than the student; use cache_view: clean, or cache: off"
            )
            yield Problem(("distillation", "cache"), text)
        undistilled = {"qat", "float"} & set(self.compare)
        if self.train.loss is not None and self.distillation.hard_loss != "train_loss" and not undistilled:
            text = (
                f"found {self.train.loss!r}, but every training here has distillation with hard_loss: "
                f"{self.distillation.hard_loss}; use 'hard_loss: train_loss' there"
            )
            yield Problem(("train", "loss"), text)
        if self.train.label_smoothing > 0 and not undistilled:
            yield Problem(
                ("train", "label_smoothing"),
                f"found {self.train.label_smoothing}, but every training here has distillation; use "
                "'hard_loss: label_smoothing' in distillation",
            )

    def warnings(self) -> list[str]:
        """Sentences about settings that are possible but known to cost accuracy."""
        given = None if self.distillation is None else self.distillation.temperature
        highest = max(given["from"], given.get("to", 0.0)) if isinstance(given, dict) else given or 0.0
        if highest <= HIGH_TEMPERATURE:
            return []
        low = [place for place, bits in self._bits() if bits <= LOW_BITS]
        if not low:
            return []
        return [
            f"distillation.temperature: {highest:g} above {HIGH_TEMPERATURE:g} together with "
            f"{LOW_BITS} bits or fewer ({', '.join(low)}); published result: T=5 costs 12 points at W3A8 from scratch"
        ]

    def _bits(self) -> Iterator[tuple[str, int]]:
        """Every place where bits are set, with its value."""
        yield "quantization.weight.bits", self.quantization.weight.bits
        yield "quantization.activation.bits", self.quantization.activation.bits
        for index, rule in enumerate(self.quantization.rules):
            for key, override in (("weight", rule.weight), ("activation", rule.activation)):
                if override.bits is not None:
                    yield dotted(("quantization", "rules", index, key, "bits")), override.bits

    def to_dict(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain dicts, lists, texts and numbers."""
        return self.model_dump()

    def sha(self) -> str:
        """SHA-256 (64 hex digits) of the settings as canonical JSON: sorted keys, no spaces, defaults included.

        `result` is left out: it is written into the recipe after the run, and must not turn it into another recipe.
        """
        settings = {key: value for key, value in self.to_dict().items() if key != "result"}
        text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()
