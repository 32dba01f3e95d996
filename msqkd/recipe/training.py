"""The sections of a recipe that say on what and how a network is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional

from annotated_types import Gt, Le, Lt
from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from msqkd.recipe.fields import (
    Count,
    Factory,
    Fraction,
    FreeMapping,
    NotNegative,
    Number,
    PathPattern,
    Positive,
    Section,
    Text,
    _number,
    distinct,
    filled,
    only_with,
    value_of,
)
from msqkd.recipe.problems import Allowed, Problem, refuse_value, show


def _loss_scale(value: Any) -> Any:
    """A positive number, or the one word."""
    number = _number(value)
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf:
        return float(number)
    if value != "dynamic":
        refuse_value(f"found {show(value)}, allowed: a number above 0, or 'dynamic'")
    return value


LossScaleValue = Annotated[Any, AfterValidator(_loss_scale), Allowed("a number above 0, or 'dynamic'")]


class DataSection(Section):
    """The samples for training, calibration and evaluation."""

    name: Literal["digits", "cifar10", "mnist", "image_folder", "mindrecord", "arrays", "python"] = Field(
        description="The kind of dataset."
    )
    root: Optional[Text] = Field(default=None, description="Its folder (arrays: its .npz file); digits has none.")
    augment: Annotated[list[Text], AfterValidator(distinct)] = Field(
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
                    yield only_with(key, getattr(self, key), "name", "python")
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
        values = filled(values, "momentum", 0.9, value_of(values, "opt", "momentum") in ("momentum", "sgd"))
        scheduler = value_of(values, "scheduler")
        values = filled(values, "decay_rate", 0.1, scheduler in ("step_decay", "multi_step_decay"))
        values = filled(values, "decay_rate", 0.9, scheduler == "exponential_decay")
        values = filled(values, "power", 1.0, scheduler == "polynomial_decay")
        return filled(values, "loss_scale", "dynamic", value_of(values, "amp_level", "O0") != "O0")

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
                yield only_with("momentum", self.momentum, "opt", "momentum or sgd")
            if self.use_nesterov:
                yield only_with("use_nesterov", True, "opt", "momentum or sgd")
        if self.use_nesterov and self.momentum == 0:
            yield Problem(("use_nesterov",), "found true, not allowed with momentum: 0")
        if self.no_weight_decay and self.weight_decay == 0:
            yield Problem(("no_weight_decay",), "found a list, not allowed with weight_decay: 0, which decays nothing")
        if self.loss_scale is not None and self.amp_level == "O0":
            yield only_with("loss_scale", self.loss_scale, "amp_level", "O1, O2 or O3")
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
                yield only_with(key, value, "scheduler", " or ".join(owners))
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
