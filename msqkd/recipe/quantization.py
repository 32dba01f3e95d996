"""The sections of a recipe that say what is quantised, and how."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from msqkd.quant.config import WIDE_BITS
from msqkd.quant.presets import PRESETS
from msqkd.recipe.fields import (
    Count,
    NotNegative,
    Number,
    PathPattern,
    Percentile,
    Section,
    Steps,
    Text,
    filled,
    filled_below,
    only_with,
    value_of,
)
from msqkd.recipe.problems import Allowed, Problem, listing, refuse_value, show

PresetName = Literal["cnn", "mobile", "transformer", "detector"]
DEFAULT_PERCENTILE = 99.99
DEFAULT_DELAY, DEFAULT_PACT_DECAY = 100, 2e-4


def _symmetric(value: Any) -> Any:
    if value is False:
        refuse_value("found false, allowed: true, since every target has symmetric weights only")
    return value


SymmetricWeight = Annotated[
    bool, BeforeValidator(_symmetric), Allowed("true (every target has symmetric weights only)")
]
Bits = Annotated[int, Ge(2), Le(8)]


def _value_bits(value: Any) -> Any:
    good = isinstance(value, int) and not isinstance(value, bool) and (2 <= value <= 8 or value == WIDE_BITS)
    if value is not None and not good:
        refuse_value(f"found {show(value)}, allowed: {_VALUE_BITS}")
    return value


_VALUE_BITS = f"an integer from 2 to 8, or {WIDE_BITS} with precision: dynamic"
ValueBits = Annotated[int, BeforeValidator(_value_bits), Allowed(_VALUE_BITS)]
WeightLearning = Literal["none", "lsq"]
ActivationLearning = Literal["none", "lsq", "pact"]
WeightObserver = Literal["minmax", "mse"]
ActivationObserver = Literal["minmax", "ema", "percentile", "kl", "mse"]


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


class RangeSection(Section):
    """What every section with an observer of activations shares: the percentile belongs to one observer."""

    if TYPE_CHECKING:  # the subclasses have these fields, in the order they are written in
        observer: Optional[ActivationObserver]
        percentile: Optional[float]

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        observer = value_of(values, "observer", cls.model_fields["observer"].default)
        return filled(values, "percentile", DEFAULT_PERCENTILE, observer == "percentile")

    def _conflicts(self) -> Iterator[Problem]:
        if self.percentile is not None and self.observer != "percentile":
            yield only_with("percentile", self.percentile, "observer", "percentile")


class ActivationSection(RangeSection):
    """How activations are quantised in training."""

    bits: ValueBits = Field(default=8, description="Bits of an activation.")
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
        values = filled(values, "delay", DEFAULT_DELAY, value_of(values, "delay_epochs") is None)
        return filled(values, "pact_decay", DEFAULT_PACT_DECAY, value_of(values, "learned") == "pact")

    def _conflicts(self) -> Iterator[Problem]:
        yield from super()._conflicts()
        yield from _two_delays(self)
        if self.pact_decay is not None and self.learned != "pact":
            yield only_with("pact_decay", self.pact_decay, "learned", "pact")

    def overridden(self, by: Optional[ActivationOverride]) -> ActivationSection:
        """These settings with those that `by` gives in their place; a new observer drops the old one's percentile."""
        if by is None:
            return self
        own = {"percentile"} if by.observer is not None else set()
        own |= {"delay", "delay_epochs"} if by.delay is not None or by.delay_epochs is not None else set()
        own |= {"pact_decay"} if by.learned is not None else set()
        values = self.model_dump(exclude=own)
        return ActivationSection(**{**values, **by.model_dump(exclude_none=True)})


class ActivationOverride(RangeSection):
    """The activation settings a rule changes; null keeps the general setting."""

    bits: Optional[ValueBits] = Field(default=None, description="Bits of an activation.")
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


def _only_dynamic(found: str = f"found {WIDE_BITS},") -> str:
    return f"{found} allowed only with precision: dynamic"


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
    precision: Optional[Literal["int8", "weight-only", "dynamic", "float", "float16", "weight-only-float16"]] = Field(
        default=None,
        description="Compute these nodes in int8; in float with weights stored as integers; the same with inputs "
        "quantised at each call by their own range (dense layers and products with a parameter); in float; in float16, "
        "inputs, parameters and results; or the same with weights stored as integers. The last two on ascend only.",
    )
    weight: WeightOverride = Field(default=WeightOverride(), description="Weight settings to change.")
    activation: ActivationOverride = Field(default=ActivationOverride(), description="Activation settings to change.")

    def _conflicts(self) -> Iterator[Problem]:
        changed = [key for key in ("weight", "activation") if getattr(self, key).model_dump(exclude_none=True)]
        if self.precision is None and not changed:
            yield Problem((), "the rule sets nothing, allowed: precision, weight or activation with a value")
        if self.precision in ("float", "float16"):
            for key in changed:
                yield Problem((key,), f"not allowed with precision: {self.precision}, which has no integers")
        if self.precision in ("weight-only", "weight-only-float16") and "activation" in changed:
            text = f"not allowed with precision: {self.precision}, which quantises weights alone"
            yield Problem(("activation",), text)
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
        if self.precision == "int8" and self.activation.bits == WIDE_BITS:
            yield Problem(("activation", "bits"), _only_dynamic())
        for index, rule in enumerate(self.rules):
            bits = rule.activation.bits or self.activation.bits
            if (rule.precision or self.precision) == "int8" and bits == WIDE_BITS != self.activation.bits:
                yield Problem(("rules", index, "activation", "bits"), _only_dynamic())
            elif rule.precision == "int8" and bits == WIDE_BITS:
                text = f"found int8, and {_only_dynamic(f'activation.bits: {WIDE_BITS} is')}"
                yield Problem(("rules", index, "precision"), text)
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
        name = value_of(values, "preset")
        family = PRESETS.get(name) if isinstance(name, str) else None
        if family is not None:
            weight = family.config.weight_quantizer
            values = filled_below(values, "weight", "per_channel", weight.per_channel)
            values = filled_below(values, "weight", "observer", weight.observer)
        return values
