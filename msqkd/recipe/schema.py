"""The recipe as typed, validated sections: one pydantic model a section, one described field a key.

Unknown keys, wrong types and out-of-range values are refused, and so is every setting that would have no effect next to
the others, so that what a recipe says is what is run. A default that depends on another setting (the momentum, which
some optimisers have and some have not; the percentile of one observer) is filled in here: whoever reads a recipe finds
None only where there is nothing to use.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Callable, Literal, Optional, Union, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from msqkd.distill.schedule import SCHEDULES, default_alpha, default_temperature
from msqkd.errors import did_you_mean
from msqkd.exporters import FORMATS
from msqkd.quant.presets import PRESETS
from msqkd.recipe.problems import ONE, SEVERAL, Allowed, Problem, dotted, listing, refuse, refuse_value, show

TargetName = Literal["lite_arm", "ascend"]
TARGETS: tuple[str, ...] = get_args(TargetName)
"""The names of the runtimes a recipe may aim at."""

PresetName = Literal["cnn", "mobile", "transformer", "detector"]
Comparison = Literal["qat", "float", "float_kd"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)
"""The trainings that can be reported beside the main one."""

DEFAULT_PERCENTILE = 99.99
DEFAULT_DELAY, DEFAULT_PACT_DECAY = 100, 2e-4
METRIC_DEVIATION = 0.01
LOW_BITS, HIGH_TEMPERATURE = 4, 2.0

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def path_pattern(pattern: str) -> re.Pattern[str]:
    """The compiled form of a rule's `path`, to be used with ``fullmatch`` on a cell path such as ``layer1.0.conv1``.

    ``re:...`` is a regular expression; anything else is a glob in which ``*`` and ``?`` also match dots, and in which a
    text without wildcards matches itself only. Raises ``re.error`` for a bad regular expression.
    """
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` (without a dot) as a text; everybody who writes it means the number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _json_problems(value: Any, path: tuple[Any, ...] = ()) -> Iterator[Problem]:
    """What in a free mapping could not be written to JSON and read back the same."""
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                yield from _json_problems(item, (*path, key))
            else:
                yield Problem(path, f"key {show(key)} is not a text; write it in quotes")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _json_problems(item, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(path, f"found {value}, allowed: a finite number")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        yield Problem(path, f"found {show(value)}, allowed: a text, number, true, false, null, list or mapping")


def _free(value: Any) -> Any:
    if isinstance(value, dict):
        refuse(_json_problems(value))
    return value


def _path(value: str) -> str:
    try:
        path_pattern(value)
    except re.error as error:
        refuse_value(f"found {value!r}, which is not a regular expression: {error}")
    return value


def _symmetric(value: Any) -> Any:
    if value is False:
        refuse_value("found false, allowed: true, since every target has symmetric weights only")
    return value


def _switch(value: Any) -> Any:
    """YAML 1.1 reads on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _samples(value: Any) -> Any:
    if value == 0 and not isinstance(value, bool):
        refuse_value("found 0, but calibration needs at least 1 sample to see a range of values")
    return value


def _scheduled(words: str, fits: Callable[[float], bool]) -> Callable[[Any], Any]:
    """The validator of a number that may change over the training; `words` say which numbers it `fits`."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and fits(value)

    def problems(given: dict[Any, Any]) -> Iterator[Problem]:
        keys = ("schedule", "from", "to")
        for key in given:
            if key not in keys:
                yield Problem((), f"unknown key {show(key)}, allowed: {listing(keys)}{did_you_mean(str(key), keys)}")
        kind = given.get("schedule")
        if kind not in SCHEDULES:
            found = "is missing" if kind is None else f"found {show(kind)}"
            hint = did_you_mean(kind, SCHEDULES) if isinstance(kind, str) else ""
            yield Problem(("schedule",), f"{found}, allowed: {listing(SCHEDULES)}{hint}")
        for key in ("from",) if kind == "constant" else ("from", "to"):
            if not number(given.get(key)):
                found = "is missing" if given.get(key) is None else f"found {show(given[key])}"
                yield Problem((key,), f"{found}, allowed: {words}")
        if kind == "constant" and "to" in given:
            yield Problem(("to",), f"found {show(given['to'])}, not allowed with schedule: constant")

    def validate(value: Any) -> Any:
        if isinstance(value, dict):
            given = {key: _number(item) for key, item in value.items() if item is not None}
            refuse(problems(given))
            return {key: item if key == "schedule" else float(item) for key, item in given.items()}
        value = _number(value)
        if not number(value):
            refuse_value(f"found {show(value)}, allowed: {words}, or a mapping {_SCHEDULE_WORDS}")
        return float(value)

    return validate


_SCHEDULE_WORDS = "{schedule: constant, linear or cosine, from: a number, to: a number}"


def _loss_scale(value: Any) -> Any:
    """A positive number, or the one word."""
    number = _number(value)
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    if value != "dynamic":
        refuse_value(f"found {show(value)}, allowed: a number above 0, or 'dynamic'")
    return value


def _distinct(value: list[Any]) -> list[Any]:
    twice = sorted({item for item in value if value.count(item) > 1})
    if twice:
        refuse_value(f"{listing(map(str, twice), 'and')} given twice")
    return value


Text = Annotated[str, Field(min_length=1), Allowed("a text that is not empty")]
RecipeName = Annotated[
    str,
    Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$"),
    Allowed("a text of a-z, 0-9, '_', '.' and '-' that starts with a letter or digit"),
]
Factory = Annotated[
    str,
    Field(pattern=r"^[^:\s][^:]*:[A-Za-z_]\w*$"),
    Allowed("a text like 'package.module:factory' or 'folder/file.py:factory'"),
]
PathPattern = Annotated[
    Text, AfterValidator(_path), Allowed("a cell path, a glob such as 'layer1.*' or 're:' and a regular expression")
]
FreeMapping = Annotated[dict[str, Any], BeforeValidator(_free), Allowed("a mapping")]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Fraction = Annotated[Number, Ge(0), Le(1)]
Percentile = Annotated[Number, Ge(90), Le(100)]
Count = Annotated[int, Ge(1)]
Bits = Annotated[int, Ge(2), Le(8)]
LossScaleValue = Annotated[Any, AfterValidator(_loss_scale), Allowed("a number above 0, or 'dynamic'")]
SymmetricWeight = Annotated[
    bool, BeforeValidator(_symmetric), Allowed("true (every target has symmetric weights only)")
]
Shape = Annotated[
    list[Count], Field(min_length=3, max_length=3), Allowed("a list of three integers [channels, height, width]")
]
Outputs = Annotated[
    list[Annotated[int, Ge(0)]],
    Field(min_length=1),
    AfterValidator(_distinct),
    Allowed("a list of numbers of outputs, counted from 0, at least one"),
]
Share = Annotated[
    Union[float, dict[str, Any]],
    BeforeValidator(_scheduled("a number from 0 to 1", lambda number: 0 <= number <= 1)),
    Allowed(f"a number from 0 to 1, or a mapping {_SCHEDULE_WORDS}"),
]
Temperature = Annotated[
    Union[float, dict[str, Any]],
    BeforeValidator(_scheduled("a number above 0", lambda number: number > 0)),
    Allowed(f"a number above 0, or a mapping {_SCHEDULE_WORDS}"),
]
Steps = Annotated[int, Ge(0)]
WeightLearning = Literal["none", "lsq"]
ActivationLearning = Literal["none", "lsq", "pact"]
WeightObserver = Literal["minmax", "mse"]
ActivationObserver = Literal["minmax", "ema", "percentile", "kl", "mse"]


def _filled(values: Any, key: str, default: Any, used: bool) -> Any:
    """`values` with `key` at its default when it is `used` but not given; pydantic refuses all but mappings."""
    if used and isinstance(values, dict) and values.get(key) is None:
        return {**values, key: default}
    return values


def _filled_below(values: Any, section: str, key: str, default: Any) -> Any:
    """`values` with `key` of `section` at its default, unless that is None or the key is given."""
    inner = _get(values, section, {}) if isinstance(values, dict) else None
    if default is None or not isinstance(inner, dict):
        return values
    return {**values, section: _filled(inner, key, default, True)}


def _get(values: Any, key: str, default: Any = None) -> Any:
    """The value of `key`, or `default` where it is absent or null."""
    value = values.get(key) if isinstance(values, dict) else None
    return default if value is None else value


def _with_own_loss(values: Any) -> Any:
    """`values` with the loss of train in pretrain and distillation too, where these are given and name none."""
    train = _get(values, "train")
    loss = _get(train, "loss")
    if loss is None:
        return values
    pretrain = _get(values, "pretrain")
    if isinstance(pretrain, dict) and pretrain.get("loss") is None and pretrain.get("loss_args") is None:
        values = {**values, "pretrain": {**pretrain, "loss": loss, "loss_args": _get(train, "loss_args", {})}}
    if _get(values, "distillation") is not None:
        values = _filled_below(values, "distillation", "hard_loss", "train_loss")
    return values


def _with_distillation_defaults(values: Any) -> Any:
    """`values` with the share and the temperature of the teacher that fit the fewest bits."""
    section = _get(values, "distillation")
    if not isinstance(section, dict):
        return values
    quantization = _get(values, "quantization")
    parts = ("weight",) if _get(quantization, "precision") == "weight-only" else ("weight", "activation")
    given = [_get(_get(quantization, part), "bits", 8) for part in parts]
    bits = min((number for number in given if isinstance(number, int) and 2 <= number <= 8), default=8)
    alpha = 1.0 if _get(section, "hard_loss") == "none" else default_alpha(bits)
    values = _filled_below(values, "distillation", "alpha", alpha)
    temperature = default_temperature(bits) if _get(section, "soft_loss", "kl") == "kl" else None
    return _filled_below(values, "distillation", "temperature", temperature)


class Section(BaseModel):
    """Base of every section: unknown keys refused, null for the default, no conversions between types, read-only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        """Drop the known keys that are null: everywhere in a recipe, null takes the default."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}

    def _conflicts(self) -> Iterator[Problem]:
        """The settings of this section that contradict each other; a subclass yields its own."""
        yield from ()

    @model_validator(mode="after")
    def _no_conflicts(self) -> Section:
        refuse(self._conflicts())
        return self


def _only_with(key: str, value: Any, owner: str, wanted: str) -> Problem:
    return Problem((key,), f"found {show(value)}, allowed only with {owner}: {wanted}")


class _Network(Section):
    """What the student's and the teacher's section share."""

    source: str
    name: Optional[Text] = Field(
        default=None, description="The network's name in its source; required by msqkd and mindcv."
    )
    target: Optional[Factory] = Field(
        default=None, description="The function that builds the network; source python only."
    )
    file: Optional[Text] = Field(
        default=None, description="The MindIR file that holds the network and its weights; source mindir only."
    )
    args: FreeMapping = Field(default={}, description="Keyword arguments of the network's factory.")
    input_shape: Optional[Shape] = Field(default=None, description="Shape of one input; null takes the network's own.")
    checkpoint: Optional[Text] = Field(
        default=None, description="File of trained weights: .ckpt, .safetensors, .npz, .pth, .pt or .th."
    )
    name_map: Optional[Text] = Field(
        default=None, description="JSON file {name in the checkpoint: name in the network}; with a checkpoint only."
    )

    @property
    def downloads(self) -> bool:
        """Whether the source itself brings trained weights (mindcv with ``args.pretrained: true``)."""
        return self.source == "mindcv" and self.args.get("pretrained") is True

    @property
    def has_weights(self) -> bool:
        """Whether the source itself brings trained weights, by a download or in its file."""
        return self.downloads or self.source == "mindir"

    def _conflicts(self) -> Iterator[Problem]:
        if self.source == "python":
            if self.target is None:
                yield Problem(("target",), "is missing, required by source: python, for instance 'my_nets:resnet'")
            if self.name is not None:
                yield Problem(("name",), f"found {self.name!r}, not allowed with source: python, which uses target")
        elif self.source in ("msqkd", "mindcv"):
            if self.name is None:
                yield Problem(("name",), f"is missing, required by source: {self.source}, for instance 'resnet50'")
            if self.target is not None:
                yield _only_with("target", self.target, "source", "python")
        if self.source == "mindir":
            if self.file is None:
                yield Problem(("file",), "is missing, required by source: mindir, for instance 'net.mindir'")
            for key in ("name", "target", "args", "checkpoint"):
                if getattr(self, key):
                    text = f"found {show(getattr(self, key))}, not allowed with source: mindir, whose file has it all"
                    yield Problem((key,), text)
        elif self.file is not None:
            yield _only_with("file", self.file, "source", "mindir")
        if self.name_map is not None and self.checkpoint is None:
            yield Problem(("name_map",), f"found {self.name_map!r}, allowed only with a checkpoint")
        if self.checkpoint is not None and self.downloads:
            yield Problem(("checkpoint",), "two origins of the weights, this file and args.pretrained: true; keep one")


InputDtype = Literal["float32", "int32", "int64", "bool"]


class InputSection(Section):
    """One input of the network, in the order of its arguments."""

    name: Optional[Text] = Field(
        default=None, description="The argument's name in the network, which is then checked; null takes it as it is."
    )
    shape: list[Count] = Field(description="Shape of one sample, without the batch; [] for a number.")
    dtype: InputDtype = Field(default="float32", description="Type of its values.")


class ModelSection(_Network):
    """The network to be quantised (the student)."""

    source: Literal["msqkd", "mindcv", "python", "mindir"] = Field(
        default="msqkd", description="Where the network comes from; mindir is a file without Python code."
    )
    inputs: list[InputSection] = Field(
        default=[],
        description="The inputs of a network that has several, or one that is not an image; in place of input_shape.",
    )
    outputs: Optional[Outputs] = Field(
        default=None,
        description="The outputs that are deployed, by their numbers; the others (auxiliary heads) are trained only. "
        "null deploys all.",
    )

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        if self.inputs and self.input_shape is not None:
            yield Problem(("inputs",), "two descriptions of the input, this one and input_shape; keep one")
        names = [item.name for item in self.inputs if item.name is not None]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Problem(("inputs",), f"the name '{name}' is given twice")


class TeacherSection(_Network):
    """The float network whose outputs the student imitates, or a list of several; used by `distillation` only."""

    source: Literal["self", "msqkd", "mindcv", "python", "mindir"] = Field(
        default="self", description="Where the teacher comes from; self is the trained float model itself."
    )
    weight: Positive = Field(
        default=1.0, description="What its soft loss counts among those of several teachers; combine weighted only."
    )

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        if self.source == "self":
            for key in ("name", "target", "args", "input_shape", "checkpoint"):
                if getattr(self, key):
                    yield Problem((key,), f"found {show(getattr(self, key))}, not allowed with source: self")
        elif self.checkpoint is None and not self.has_weights:
            yield Problem(
                ("checkpoint",),
                "is missing, a teacher must be trained; give the file of its weights here or with "
                "--set teacher.checkpoint=FILE",
            )


def _one_or_several(value: Any) -> str:
    return SEVERAL if isinstance(value, list) else ONE


Teachers = Annotated[
    Union[
        Annotated[TeacherSection, Tag(ONE)],
        Annotated[list[TeacherSection], Field(min_length=1), Tag(SEVERAL)],
    ],
    Discriminator(_one_or_several),
    Allowed("a section, or a list of sections, at least one"),
]


class DataSection(Section):
    """The samples for training, calibration and evaluation."""

    name: Literal["digits", "cifar10", "mnist", "image_folder", "mindrecord", "arrays", "python"] = Field(
        description="The kind of dataset."
    )
    root: Optional[Text] = Field(default=None, description="Its folder (arrays: its .npz file); digits has none.")
    augment: Annotated[list[Text], AfterValidator(_distinct)] = Field(
        default=[],
        description="Augmentations of the training images by name, in this order: flip, crop, color_jitter, … "
        "(docs/training.md has all of them).",
    )
    eval_batch_size: Count = Field(default=256, description="Samples a batch in evaluation.")
    mean: Optional[list[Number]] = Field(
        default=None, description="Mean of each channel; null takes the dataset's own."
    )
    std: Optional[list[Positive]] = Field(
        default=None, description="Standard deviation of each channel; null takes the dataset's own."
    )
    target: Optional[Factory] = Field(
        default=None, description="The function that gives the training and the test set; name python only."
    )
    args: FreeMapping = Field(default={}, description="Keyword arguments of target; name python only.")

    def _conflicts(self) -> Iterator[Problem]:
        if self.name == "digits" and self.root is not None:
            yield Problem(("root",), f"found {self.root!r}, not allowed with name: digits, which scikit-learn contains")
        if self.name == "python":
            if self.target is None:
                yield Problem(("target",), "is missing, required by name: python, for instance 'my_data.py:load'")
            for key in ("root", "augment", "mean", "std"):
                if getattr(self, key):
                    text = f"found {show(getattr(self, key))}, not allowed with name: python, whose target sees to it"
                    yield Problem((key,), text)
        else:
            for key in ("target", "args"):
                if getattr(self, key):
                    yield _only_with(key, getattr(self, key), "name", "python")
        if (self.mean is None) != (self.std is None):
            given, absent = ("mean", "std") if self.std is None else ("std", "mean")
            yield Problem((absent,), f"is missing, required beside {given}")
        elif self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            yield Problem(("std",), f"found {len(self.std)} values, allowed: {len(self.mean)}, as many as mean has")


class TrainSection(Section):
    """How a training runs: its length, optimiser and learning-rate schedule (the names are those of mindcv)."""

    epoch_size: Count = Field(default=1, description="Epochs.")
    batch_size: Count = Field(default=64, description="Samples a step (of each process).")
    loss: Optional[Factory] = Field(
        default=None,
        description="The class or function that gives the loss, a cell called with all outputs of the network, then "
        "the labels; null is the cross-entropy of the first output (in pretrain: the loss of train).",
    )
    loss_args: FreeMapping = Field(default={}, description="Keyword arguments of loss.")
    opt: Literal["momentum", "sgd", "adamw", "adam"] = Field(default="momentum", description="Optimiser.")
    lr: Positive = Field(default=0.01, description="Learning rate at the start of the schedule (after the warm-up).")
    momentum: Optional[Fraction] = Field(default=None, description="Momentum; opt momentum and sgd only, 0.9 there.")
    use_nesterov: bool = Field(default=False, description="Nesterov's form of momentum; opt momentum and sgd only.")
    weight_decay: NotNegative = Field(default=1e-4, description="Weight decay.")
    filter_bias_and_bn: bool = Field(default=True, description="No weight decay on biases and BatchNorm parameters.")
    no_weight_decay: list[PathPattern] = Field(
        default=[], description="More parameters without weight decay, by patterns of their names."
    )
    scheduler: Literal[
        "cosine_decay", "constant", "step_decay", "multi_step_decay", "polynomial_decay", "exponential_decay"
    ] = Field(default="cosine_decay", description="Learning-rate schedule, step by step.")
    warmup_epochs: NotNegative = Field(
        default=0.0, description="Epochs, a part of epoch_size, in which the learning rate rises linearly from 0."
    )
    min_lr: NotNegative = Field(
        default=0.0, description="Learning rate at the end; scheduler cosine_decay and polynomial_decay only."
    )
    decay_epochs: Optional[Count] = Field(
        default=None, description="Epochs between two decays; scheduler step_decay only, required there."
    )
    milestones: list[Count] = Field(
        default=[],
        description="Epochs after which the learning rate decays, rising; scheduler multi_step_decay only, required "
        "there.",
    )
    decay_rate: Optional[Annotated[Number, Gt(0), Le(1)]] = Field(
        default=None,
        description="Factor of each decay; scheduler step_decay and multi_step_decay, 0.1 there, and "
        "exponential_decay, 0.9 an epoch there.",
    )
    power: Optional[Positive] = Field(
        default=None, description="Exponent of the decay; scheduler polynomial_decay only, 1 there."
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="Label smoothing of the cross-entropy, in the trainings without distillation."
    )
    log_interval: Count = Field(default=50, description="Steps between two lines of the log.")
    max_bad_steps: Count = Field(
        default=10, description="Consecutive non-finite steps that are skipped before it stops."
    )
    ema: Optional[Annotated[Number, Gt(0), Lt(1)]] = Field(
        default=None,
        description="Share of the old value an average of the weights keeps at each step (less in the first steps); "
        "the average is what is measured and kept. null keeps no average.",
    )
    clip_grad: Optional[Positive] = Field(
        default=None, description="Largest global norm of the gradient; null does not clip."
    )
    accumulate: Count = Field(
        default=1, description="Batches computed one after the other for one step, with the mean of their gradients."
    )
    amp_level: Literal["O0", "O1", "O2", "O3"] = Field(
        default="O0",
        description="What computes in float16 in training: nothing; convolutions and matrix products; also what is "
        "element by element; also normalisation. Weights, quantisers, BatchNorm statistics and the loss stay float32.",
    )
    loss_scale: Optional[LossScaleValue] = Field(
        default=None,
        description="What the loss is multiplied by in the backward pass; amp_level O1 to O3 only, dynamic there.",
    )
    keep: Count = Field(
        default=2, description="States kept of a training that is not finished; where the last is damaged, the one "
        "before it is used."
    )  # fmt: skip
    keep_best: bool = Field(
        default=False, description="End with the weights of the epoch with the best metric on the test set instead of "
        "the last; among those after which nothing of the schedule is to come."
    )  # fmt: skip
    dropout: bool = Field(
        default=False, description="Drop in training what the network's dropout and drop-path cells drop."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        values = _filled(values, "momentum", 0.9, _get(values, "opt", "momentum") in ("momentum", "sgd"))
        scheduler = _get(values, "scheduler")
        values = _filled(values, "decay_rate", 0.1, scheduler in ("step_decay", "multi_step_decay"))
        values = _filled(values, "decay_rate", 0.9, scheduler == "exponential_decay")
        values = _filled(values, "power", 1.0, scheduler == "polynomial_decay")
        return _filled(values, "loss_scale", "dynamic", _get(values, "amp_level", "O0") != "O0")

    @property
    def samples_a_step(self) -> int:
        """How many samples one update of the weights sees."""
        return self.batch_size * self.accumulate

    def _conflicts(self) -> Iterator[Problem]:
        if self.loss is None and self.loss_args:
            yield Problem(("loss_args",), "found a mapping, allowed only beside loss")
        if self.loss is not None and self.label_smoothing > 0:
            yield Problem(("label_smoothing",), f"found {self.label_smoothing}, not allowed beside loss")
        if self.opt not in ("momentum", "sgd"):
            if self.momentum is not None:
                yield _only_with("momentum", self.momentum, "opt", "momentum or sgd")
            if self.use_nesterov:
                yield _only_with("use_nesterov", True, "opt", "momentum or sgd")
        if self.use_nesterov and self.momentum == 0:
            yield Problem(("use_nesterov",), "found true, not allowed with momentum: 0")
        if self.no_weight_decay and self.weight_decay == 0:
            yield Problem(("no_weight_decay",), "found a list, not allowed with weight_decay: 0, which decays nothing")
        if self.loss_scale is not None and self.amp_level == "O0":
            yield _only_with("loss_scale", self.loss_scale, "amp_level", "O1, O2 or O3")
        yield from self._schedule_conflicts()
        if self.min_lr > self.lr:
            yield Problem(("min_lr",), f"found {self.min_lr}, allowed: at most lr, {self.lr}")
        if self.warmup_epochs > self.epoch_size:
            yield Problem(
                ("warmup_epochs",), f"found {self.warmup_epochs}, allowed: at most epoch_size, {self.epoch_size}"
            )

    def _schedule_conflicts(self) -> Iterator[Problem]:
        """Settings of another schedule, and what would come after the end."""
        for key, owners in _SCHEDULE_KEYS.items():
            value = getattr(self, key)
            if value and self.scheduler not in owners:
                yield _only_with(key, value, "scheduler", " or ".join(owners))
        for key, owner in (("decay_epochs", "step_decay"), ("milestones", "multi_step_decay")):
            if self.scheduler == owner and not getattr(self, key):
                yield Problem((key,), f"is missing, required by scheduler: {owner}")
        if self.milestones != sorted(set(self.milestones)):
            yield Problem(("milestones",), f"found {self.milestones}, allowed: numbers that rise")
        last = max([self.decay_epochs or 0, *self.milestones])
        if last >= self.epoch_size:
            key = "milestones" if self.milestones else "decay_epochs"
            text = f"found {last}, allowed: less than epoch_size, {self.epoch_size}: nothing would decay after the end"
            yield Problem((key,), text)


_SCHEDULE_KEYS = {
    "decay_epochs": ("step_decay",),
    "milestones": ("multi_step_decay",),
    "decay_rate": ("step_decay", "multi_step_decay", "exponential_decay"),
    "power": ("polynomial_decay",),
    "min_lr": ("cosine_decay", "polynomial_decay"),
}
"""The schedules each of these keys belongs to."""


class WeightSection(Section):
    """How weights are quantised."""

    bits: Bits = Field(default=8, description="Bits of a weight.")
    per_channel: bool = Field(default=False, description="One scale per output channel instead of one per tensor.")
    symmetric: SymmetricWeight = Field(default=True, description="Zero point 0.")
    observer: WeightObserver = Field(
        default="minmax", description="How the range is chosen: the largest magnitude, or the least squared error."
    )
    learned: WeightLearning = Field(
        default="none",
        description="lsq trains the scale (arXiv:1902.08153), from 2·mean|w|/√(2^(bits-1)-1) on, or from the least "
        "squared error with observer mse.",
    )

    def overridden(self, by: Optional[WeightOverride]) -> WeightSection:
        """These settings with those that `by` gives in their place."""
        return self if by is None else WeightSection(**{**self.model_dump(), **by.model_dump(exclude_none=True)})


class WeightOverride(Section):
    """The weight settings a rule changes; null keeps the general setting."""

    bits: Optional[Bits] = Field(default=None, description="Bits of a weight.")
    per_channel: Optional[bool] = Field(
        default=None, description="One scale per output channel instead of one per tensor."
    )
    symmetric: Optional[SymmetricWeight] = Field(default=None, description="Zero point 0.")
    observer: Optional[WeightObserver] = Field(default=None, description="How the range is chosen.")
    learned: Optional[WeightLearning] = Field(default=None, description="Whether the scale is trained.")


class _RangeSection(Section):
    """What every section with an observer of activations shares: the percentile belongs to one observer."""

    if TYPE_CHECKING:  # the subclasses have these fields, in the order they are written in
        observer: Optional[ActivationObserver]
        percentile: Optional[float]

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        observer = _get(values, "observer", cls.model_fields["observer"].default)
        return _filled(values, "percentile", DEFAULT_PERCENTILE, observer == "percentile")

    def _conflicts(self) -> Iterator[Problem]:
        if self.percentile is not None and self.observer != "percentile":
            yield _only_with("percentile", self.percentile, "observer", "percentile")


class ActivationSection(_RangeSection):
    """How activations are quantised in training."""

    bits: Bits = Field(default=8, description="Bits of an activation.")
    symmetric: Optional[bool] = Field(default=None, description="Zero point 0; null takes what the target wants.")
    observer: ActivationObserver = Field(default="ema", description="How the range is chosen from the values seen.")
    percentile: Optional[Percentile] = Field(
        default=None, description="Part of the values inside the range, in %; observer percentile only, 99.99 there."
    )
    delay: Optional[Steps] = Field(
        default=None,
        description="Training steps that only observe the ranges before activations are quantised; 100 where neither "
        "it nor delay_epochs is given.",
    )
    delay_epochs: Optional[Steps] = Field(default=None, description="The same in epochs, in place of delay.")
    learned: ActivationLearning = Field(
        default="none",
        description="lsq trains the scale (arXiv:1902.08153), pact the upper end of what is never negative "
        "(arXiv:1805.06085), from the range on that the observer has found.",
    )
    pact_decay: Optional[NotNegative] = Field(
        default=None, description="L2 regularisation of the trained ends; learned pact only, 0.0002 there."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_delay(cls, values: Any) -> Any:
        values = _filled(values, "delay", DEFAULT_DELAY, _get(values, "delay_epochs") is None)
        return _filled(values, "pact_decay", DEFAULT_PACT_DECAY, _get(values, "learned") == "pact")

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        yield from _two_delays(self)
        if self.pact_decay is not None and self.learned != "pact":
            yield _only_with("pact_decay", self.pact_decay, "learned", "pact")

    def overridden(self, by: Optional[ActivationOverride]) -> ActivationSection:
        """These settings with those that `by` gives in their place; a new observer drops the old one's percentile."""
        if by is None:
            return self
        own = {"percentile"} if by.observer is not None else set()
        own |= {"delay", "delay_epochs"} if by.delay is not None or by.delay_epochs is not None else set()
        own |= {"pact_decay"} if by.learned is not None else set()
        values = self.model_dump(exclude=own)
        return ActivationSection(**{**values, **by.model_dump(exclude_none=True)})


class ActivationOverride(_RangeSection):
    """The activation settings a rule changes; null keeps the general setting."""

    bits: Optional[Bits] = Field(default=None, description="Bits of an activation.")
    symmetric: Optional[bool] = Field(default=None, description="Zero point 0.")
    observer: Optional[ActivationObserver] = Field(default=None, description="How the range is chosen.")
    percentile: Optional[Percentile] = Field(
        default=None,
        description="Part of the values inside the range, in %; observer percentile only, which the rule has to name.",
    )
    delay: Optional[Steps] = Field(default=None, description="Training steps that only observe.")
    delay_epochs: Optional[Steps] = Field(default=None, description="The same in epochs, in place of delay.")
    learned: Optional[ActivationLearning] = Field(default=None, description="Whether the scale is trained.")

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        yield from _two_delays(self)


def _two_delays(section: ActivationSection | ActivationOverride) -> Iterator[Problem]:
    if section.delay is not None and section.delay_epochs is not None:
        yield Problem(("delay_epochs",), "two delays, this one and delay; keep one")


class Match(Section):
    """Which nodes a rule is for: exactly one of the keys."""

    path: Optional[PathPattern] = Field(
        default=None, description="Path of a cell or operation; what is inside the cell is matched too."
    )
    type: Optional[Text] = Field(default=None, description="Class name of the cell or of a cell around it.")
    op: Optional[Text] = Field(default=None, description="Name of the operation in the captured graph.")
    position: Optional[Literal["first", "last"]] = Field(
        default=None, description="The first or the last weighted node."
    )

    def _conflicts(self) -> Iterator[Problem]:
        keys = list(type(self).model_fields)
        given = [key for key in keys if getattr(self, key) is not None]
        if len(given) != 1:
            found = listing(given, "and") if given else "none"
            yield Problem((), f"found {found}, allowed: exactly one of {listing(keys)}")


class Rule(Section):
    """Settings for some nodes only."""

    match: Match = Field(description="Which nodes the rule is for.")
    precision: Optional[Literal["int8", "weight-only", "dynamic", "float"]] = Field(
        default=None,
        description="Compute these nodes in int8; in float with weights stored as integers; the same with inputs "
        "quantised at each call by their own range (dense layers and products with a parameter); or in float.",
    )
    weight: WeightOverride = Field(default=WeightOverride(), description="Weight settings to change.")
    activation: ActivationOverride = Field(default=ActivationOverride(), description="Activation settings to change.")

    def _conflicts(self) -> Iterator[Problem]:
        changed = [key for key in ("weight", "activation") if getattr(self, key).model_dump(exclude_none=True)]
        if self.precision is None and not changed:
            yield Problem((), "the rule sets nothing, allowed: precision, weight or activation with a value")
        if self.precision == "float":
            for key in changed:
                yield Problem((key,), "not allowed with precision: float, which quantises nothing")
        if self.precision == "weight-only" and "activation" in changed:
            yield Problem(("activation",), "not allowed with precision: weight-only, which quantises weights alone")
        if self.precision == "dynamic":
            for key in ("observer", "learned"):
                if getattr(self.activation, key) is not None:
                    text = "not allowed with precision: dynamic, which takes ranges at each call"
                    yield Problem(("activation", key), text)


class BitStageSection(Section):
    """Bits from an epoch on; layers that a rule gives more keep them."""

    from_epoch: Steps = Field(description="The first epoch of the stage, counted from 0.")
    weight: Bits = Field(description="Bits of weights.")
    activation: Bits = Field(description="Bits of activations.")


class ProgressiveSection(Section):
    """Layers are quantised in parts, one after the other."""

    order: Literal["front", "back"] = Field(
        default="front", description="Begin with the layers at the input, or with those at the output."
    )
    stages: Annotated[int, Ge(2)] = Field(default=3, description="Parts; each costs a compilation.")
    interval: Optional[Count] = Field(default=None, description="Steps from one part to the next.")
    interval_epochs: Optional[Count] = Field(
        default=None, description="The same in epochs; exactly one of the two is given."
    )

    def _conflicts(self) -> Iterator[Problem]:
        if (self.interval is None) == (self.interval_epochs is None):
            found = "both" if self.interval is not None else "none"
            yield Problem((), f"found {found}, allowed: exactly one of interval or interval_epochs")


class ScheduleSection(Section):
    """What of the quantisation is in force when, in the quantisation-aware training."""

    progressive: Optional[ProgressiveSection] = Field(
        default=None, description="Quantise layer after layer; null quantises all from the beginning."
    )
    bits: list[BitStageSection] = Field(
        default=[],
        description="Stages of falling bits. The first begins at epoch 0, the last has the bits of quantization.weight "
        "and quantization.activation, which are exported.",
    )
    freeze_ranges_epoch: Optional[Count] = Field(
        default=None,
        description="Until this epoch the ranges of quantised activations go on to follow what is observed; null "
        "freezes them when they are quantised. Observers ema and minmax only.",
    )
    freeze_batchnorm_epoch: Optional[Count] = Field(
        default=None,
        description="From this epoch on BatchNorm keeps its statistics; batchnorm live only, null never.",
    )

    def epochs(self) -> Iterator[tuple[tuple[Any, ...], int]]:
        """Every key that names an epoch in which something begins, with it."""
        for index, stage in enumerate(self.bits):
            yield ("bits", index, "from_epoch"), stage.from_epoch
        if self.progressive is not None and self.progressive.interval_epochs is not None:
            last = self.progressive.interval_epochs * (self.progressive.stages - 1)
            yield ("progressive", "interval_epochs"), last
        for key in ("freeze_ranges_epoch", "freeze_batchnorm_epoch"):
            if getattr(self, key) is not None:
                yield (key,), getattr(self, key)

    def _conflicts(self) -> Iterator[Problem]:
        if self.bits and self.bits[0].from_epoch != 0:
            text = f"found {self.bits[0].from_epoch}, allowed: 0, where the first stage begins"
            yield Problem(("bits", 0, "from_epoch"), text)
        for index, (before, stage) in enumerate(zip(self.bits, self.bits[1:]), start=1):
            if stage.from_epoch <= before.from_epoch:
                text = f"found {stage.from_epoch}, allowed: above {before.from_epoch}, where the stage before begins"
                yield Problem(("bits", index, "from_epoch"), text)
            for key in ("weight", "activation"):
                if getattr(stage, key) > getattr(before, key):
                    text = f"found {getattr(stage, key)}, allowed: at most {getattr(before, key)}, since bits only fall"
                    yield Problem(("bits", index, key), text)


class QuantizationSection(Section):
    """What is quantised, and how."""

    precision: Literal["int8", "weight-only", "dynamic"] = Field(
        default="int8",
        description="How layers are computed in general: in int8; in float with weights stored as integers; the same "
        "with inputs of dense layers quantised at each call by their own range.",
    )
    preset: Optional[PresetName] = Field(
        default=None,
        description="Defaults for a family of networks, below everything the recipe says itself: "
        + "; ".join(f"{name} for {item.description}" for name, item in PRESETS.items())
        + ".",
    )
    weight: WeightSection = Field(default=WeightSection(), description="Weights in general.")
    activation: ActivationSection = Field(default=ActivationSection(), description="Activations in general.")
    batchnorm: Literal["fold", "freeze", "live"] = Field(
        default="fold",
        description="BatchNorm in training: folded into the convolutions, kept with frozen statistics, or kept live.",
    )
    rules: list[Rule] = Field(default=[], description="Exceptions, in order.")
    schedule: ScheduleSection = Field(
        default=ScheduleSection(), description="What of it is in force when, in the training."
    )
    noise: Optional[Annotated[Number, Gt(0), Lt(1)]] = Field(
        default=None,
        description="Share of every weight that is quantised in a step of the training, another random share each time "
        "(arXiv:2004.07320); null quantises all.",
    )

    def _conflicts(self) -> Iterator[Problem]:
        learned, observer = self.activation.learned, self.activation.observer
        if self.precision != "int8" and learned != "none":
            yield Problem(("activation", "learned"), f"found '{learned}', allowed only with precision: int8")
        schedule = self.schedule
        if schedule.bits:
            if self.precision != "int8":
                yield Problem(("schedule", "bits"), "found a list, allowed only with precision: int8")
            for key in ("weight", "activation"):
                last, planned = getattr(schedule.bits[-1], key), getattr(self, key).bits
                if last != planned:
                    text = f"found {last} in the last stage, allowed: {planned}, the bits of quantization.{key}"
                    yield Problem(("schedule", "bits", len(schedule.bits) - 1, key), text)
        if schedule.freeze_ranges_epoch is not None:
            place = ("schedule", "freeze_ranges_epoch")
            if learned == "lsq":
                yield Problem(place, "not allowed with activation.learned: lsq, whose scales are trained")
            if observer not in ("ema", "minmax"):
                yield Problem(place, f"not allowed with activation.observer: {observer}; allowed with ema and minmax")
        if schedule.freeze_batchnorm_epoch is not None and self.batchnorm != "live":
            yield Problem(("schedule", "freeze_batchnorm_epoch"), "allowed only with batchnorm: live")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        name = _get(values, "preset")
        family = PRESETS.get(name) if isinstance(name, str) else None
        if family is not None:
            weight = family.config.weight_quantizer
            values = _filled_below(values, "weight", "per_channel", weight.per_channel)
            values = _filled_below(values, "weight", "observer", weight.observer)
        return values


class FeatureSection(Section):
    """A loss between what a layer of the student and a layer of the teacher compute."""

    student: Text = Field(description="A layer of the student: the path of a cell, or the name of an operation.")
    teacher: Optional[Text] = Field(
        default=None, description="The layer of the teacher; null takes the one of the same name."
    )
    loss: Literal["mse", "attention", "similarity", "relational"] = Field(
        default="mse",
        description="mse of the values, through a trained 1x1 convolution where channels differ (FitNets); distance "
        "of the attention maps; of the similarities between samples; of the distances and angles between samples.",
    )
    weight: Positive = Field(default=1.0, description="What the loss is multiplied by.")
    of: Annotated[int, Ge(0)] = Field(default=0, description="Which of several teachers, counted from 0.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return _filled(values, "teacher", _get(values, "student"), _get(values, "student") is not None)


class DistillationSection(Section):
    """The loss by which the student also imitates the teacher (Hinton et al. 2015, arXiv:1503.02531)."""

    alpha: Share = Field(
        default=0.3,
        description="Weight of the soft loss (teacher); the hard loss (labels) has 1 - alpha. It may change from step "
        "to step over the training. Where not given, 0.3 with 8 bits and 0.1 more for each bit less (of weights or "
        "activations, whichever have fewer), and 1 with hard_loss: none.",
    )
    temperature: Optional[Temperature] = Field(
        default=None,
        description="Divides the logits of both networks in the soft loss; soft_loss kl only. It may change as alpha. "
        "null: 5 with 8 bits, falling evenly to 2 with 4 bits, and 2 below.",
    )
    hard_loss: Literal["cross_entropy", "label_smoothing", "train_loss", "none"] = Field(
        default="cross_entropy",
        description="Loss against the labels, of the first output; train_loss is that of train.loss, of all outputs, "
        "and the default where there is one.",
    )
    label_smoothing: Optional[Fraction] = Field(
        default=None, description="Smoothing; hard_loss label_smoothing only, 0.1 there."
    )
    soft_loss: Literal["kl", "mse", "cosine"] = Field(default="kl", description="Loss against the teacher's outputs.")
    outputs: Outputs = Field(default=[0], description="The outputs, by their numbers, the soft loss is the mean over.")
    combine: Literal["weighted", "best"] = Field(
        default="weighted",
        description="Several teachers: the mean of their soft losses by weight, or for each sample the teacher whose "
        "cross-entropy with the label is least.",
    )
    features: list[FeatureSection] = Field(default=[], description="Losses between layers, added to the others.")
    balance: Literal["none", "running"] = Field(
        default="none",
        description="running brings every term of the loss to the mean size the first has had so far; weights are "
        "shares then.",
    )
    cache: Annotated[Literal["off", "auto", "on"], BeforeValidator(_switch)] = Field(
        default="off",
        description="The teacher's answers to the training set are computed once and kept in the run's folder while it "
        "trains, in place of the teacher in every step; without features only. auto does so where that saves time and "
        "changes nothing, and says why not elsewhere.",
    )
    cache_view: Optional[Literal["same", "clean"]] = Field(
        default=None,
        description="What the teacher has seen: same is what the student sees, so nothing may be augmented; clean is "
        "the sample as it is, whose answer then stands for every augmented form. cache on or auto only, same there.",
    )
    cache_top_k: Optional[Annotated[int, Ge(1)]] = Field(
        default=None,
        description="Keep the K largest logits of an answer only, and the probability of all other classes together, "
        "which is spread evenly; for many classes. cache on or auto, and soft_loss kl only.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        values = _filled(values, "temperature", default_temperature(8), _get(values, "soft_loss", "kl") == "kl")
        values = _filled(values, "cache_view", "same", _switch(_get(values, "cache", "off")) != "off")
        return _filled(values, "label_smoothing", 0.1, _get(values, "hard_loss") == "label_smoothing")

    @property
    def needs_labels(self) -> bool:
        """Whether the training needs to know what is right."""
        return self.hard_loss != "none" or self.combine == "best"

    def _conflicts(self) -> Iterator[Problem]:
        if self.label_smoothing is not None and self.hard_loss != "label_smoothing":
            yield _only_with("label_smoothing", self.label_smoothing, "hard_loss", "label_smoothing")
        if self.temperature is not None and self.soft_loss != "kl":
            yield _only_with("temperature", self.temperature, "soft_loss", "kl")
        alone = self.hard_loss == "none" or self.alpha == 1
        if self.balance != "none" and alone and not self.features:
            yield Problem(("balance",), f"found '{self.balance}', not allowed where the soft loss is the only term")
        yield from self._cache_conflicts()

    def _cache_conflicts(self) -> Iterator[Problem]:
        for key, value in (("cache_view", self.cache_view), ("cache_top_k", self.cache_top_k)):
            if value is not None and self.cache == "off":
                yield Problem((key,), f"found {show(value)}, allowed only with cache: on or cache: auto")
        if self.cache_top_k is not None and self.soft_loss != "kl":
            yield _only_with("cache_top_k", self.cache_top_k, "soft_loss", "kl")
        if self.cache == "on" and self.features:
            text = "found 'on', not allowed with features, which watch the teacher's layers in every step"
            yield Problem(("cache",), text)


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
        metric = _get(values, "metric")
        return _filled(values, "name", metric.rpartition(":")[2], True) if isinstance(metric, str) else values

    def _conflicts(self) -> Iterator[Problem]:
        if self.metric is None:
            if self.name is not None:
                yield Problem(("name",), f"found {self.name!r}, allowed only beside metric")
            if not self.higher_is_better:
                yield Problem(("higher_is_better",), "found false, allowed only beside metric")


class CalibrationSection(_RangeSection):
    """How the ranges of activations are measured without training."""

    samples: Annotated[Count, BeforeValidator(_samples)] = Field(
        default=1000, description="Training samples looked at, at most."
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


ExportFormat = Literal["lite_mindir", "portable_mindir", "ms", "ms_weight", "ms_float", "onnx", "ascend_mindir"]
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
        AfterValidator(_distinct),
        Allowed(f"a list, at least one of {listing(get_args(ExportFormat), 'and')}"),
    ] = Field(
        default=DEFAULT_FORMATS["lite_arm"],
        description="lite_mindir for the MindSpore Lite converter, portable_mindir for any MindSpore, ms for MindSpore "
        "Lite without its converter (ms_weight: int8 weights and float computation; ms_float: float, for comparison), "
        "onnx for onnxruntime on x86 and ARM servers (needs the extra msqkd[onnx]). Target ascend takes ascend_mindir "
        "for Ascend NPUs, portable_mindir and onnx; the first two are its default.",
    )
    verify_tolerance: NotNegative = Field(
        default=1e-4,
        description="Largest absolute difference of outputs accepted when the portable file is verified.",
    )


class VerifySection(Section):
    """How far the device may be from the fake-quantised network. Every export ends with a comparison of the two on the
    calibration samples; `msqkd verify` compares them on the test set."""

    max_deviation: NotNegative = Field(
        default=0.1,
        description="Largest difference of top-1 accuracy between integer and fake-quantised execution, in points; "
        "without labels, the largest share of different answers, in percent. What chance explains (two standard "
        "errors of the answers that changed) passes; 0 accepts no difference. With evaluation.metric: the largest "
        "difference of the metric, in its own unit, 0.01 where not given, and nothing else passes.",
    )
    samples: Optional[Count] = Field(
        default=None, description="Test samples `msqkd verify` computes, at most; null takes the whole test set."
    )
    machine: Optional[Literal["x86", "arm64"]] = Field(
        default=None,
        description="Build of MindSpore Lite whose arithmetic is computed; target lite_arm only, arm64 there.",
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
    compare: Annotated[list[Comparison], AfterValidator(_distinct)] = Field(
        default=list(COMPARISONS),
        description="Trainings with the same budget reported beside the main one: QAT without distillation, float, "
        "float with distillation. Without distillation the default is ['float'].",
    )
    calibration: CalibrationSection = Field(default=CalibrationSection(), description="Calibration.")
    export: ExportSection = Field(default=ExportSection(), description="Export.")
    verify: VerifySection = Field(default=VerifySection(), description="Comparison with what the device computes.")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        alone = _get(values, "distillation") is None
        values = _filled(values, "compare", ["float"] if alone else list(COMPARISONS), True)
        values = _with_own_loss(values)
        values = _with_distillation_defaults(values)
        metric = _get(_get(values, "evaluation"), "metric")
        values = _filled_below(values, "verify", "max_deviation", None if metric is None else METRIC_DEVIATION)
        target = _get(values, "target", "lite_arm")
        formats = DEFAULT_FORMATS.get(target) if isinstance(target, str) else None
        values = _filled_below(values, "export", "formats", formats)
        return _filled_below(values, "verify", "machine", "arm64" if target == "lite_arm" else None)

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
