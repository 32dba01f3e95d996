"""What to quantise and how: the settings of a layer, and the rules that give them to layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional

from msqkd.errors import PlanError, did_you_mean

WEIGHT_OBSERVERS = ("minmax", "mse")
ACTIVATION_OBSERVERS = ("minmax", "ema", "percentile", "kl", "mse")
NONE, LSQ, PACT = "none", "lsq", "pact"
WEIGHT_RULES = (NONE, LSQ)
ACTIVATION_RULES = (NONE, LSQ, PACT)
"""By which rule step sizes are trained (see `msqkd.quant.learned`), if any."""

INT8, WEIGHT_ONLY, DYNAMIC, FLOAT_PRECISION = "int8", "weight-only", "dynamic", "float"
FLOAT16, WEIGHT_ONLY_FLOAT16 = "float16", "weight-only-float16"
PRECISIONS = (INT8, WEIGHT_ONLY, DYNAMIC, FLOAT_PRECISION, FLOAT16, WEIGHT_ONLY_FLOAT16)
"""How a layer is computed: in int8 with ranges known beforehand; in float with weights stored as integers; with weights
stored as integers and an input that is quantised by the range it has at each call; in float; in float16; or in float16
with weights stored as integers."""

STORING = (WEIGHT_ONLY, DYNAMIC, WEIGHT_ONLY_FLOAT16)
"""The precisions of layers that store integers and compute in float."""

HALF = (FLOAT16, WEIGHT_ONLY_FLOAT16)
"""The precisions of layers whose inputs, parameters and results are float16 numbers."""

_DELAYS = ("act_quant_delay", "act_quant_delay_epochs")
_DTYPE_BITS = {"int8": 8, "qint4x2": 4, "int4": 4}

WIDE_BITS = 16
"""The bits of values, beside 2 to 8, that the inputs of dynamic layers may have."""


def bits_of(dtype: Any, where: str, wide: bool = False) -> int:
    """Bits of a quantised dtype: an int from 2 to 8, ``mindspore.int8``, or the names ``int8`` and ``int2`` … ``int8``;
    with `wide` 16, ``mindspore.int16`` and ``int16`` too.

    Raises:
        PlanError: it is none of these.
    """
    if isinstance(dtype, int) and not isinstance(dtype, bool):
        bits: Optional[int] = dtype
    else:
        name = str(dtype).lower()
        bits = _DTYPE_BITS.get(name)
        if bits is None and name.startswith("int") and name[3:].isdigit():
            bits = int(name[3:])
    if bits is None or not (2 <= bits <= 8 or (wide and bits == WIDE_BITS)):
        more = f", or {WIDE_BITS} with precision '{DYNAMIC}'" if wide else ""
        raise PlanError(
            f"{where} is {dtype!r}; allowed: mindspore.int8, 'int2' … 'int8', or a number of bits from 2 to 8{more}"
        )
    return bits


def _check_name(name: str, allowed: tuple[str, ...], where: str) -> None:
    if name not in allowed:
        raise PlanError(f"{where} is '{name}'; allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}")


@dataclass(frozen=True)
class WeightQuantizer:
    """How the weight of a layer is quantised: symmetric, zero point 0, levels −(2^(b−1)−1) … 2^(b−1)−1.

    Attributes:
        quant_dtype: ``mindspore.int8``, 'int2' … 'int8', or the number of bits (2–8).
        per_channel: one scale per output channel instead of one per tensor.
        observer: ``minmax`` (scale from max|w|) or ``mse`` (the clipped maximum with the least squared error).
        learned: ``lsq`` trains the scale (see `msqkd.quant.learned`), from 2 · mean|w| / √(2^(b−1)−1) on, or from the
            least squared error with the observer ``mse``; ``none`` takes it from the weight at each step.
    """

    quant_dtype: Any = "int8"
    per_channel: bool = False
    observer: str = "minmax"
    learned: str = NONE

    def __post_init__(self) -> None:
        bits_of(self.quant_dtype, "WeightQuantizer.quant_dtype")
        _check_name(self.observer, WEIGHT_OBSERVERS, "WeightQuantizer.observer")
        _check_name(self.learned, WEIGHT_RULES, "WeightQuantizer.learned")

    @property
    def bits(self) -> int:
        """The number of bits, 2–8."""
        return bits_of(self.quant_dtype, "WeightQuantizer.quant_dtype")


@dataclass(frozen=True)
class QuantConfig:
    """The settings of a layer (or of every layer, as the default).

    Attributes:
        weight_quantizer: how weights are quantised.
        act_quant_dtype: dtype of activations, as `WeightQuantizer.quant_dtype`, or 16 bits with precision ``dynamic``;
            None is short for ``precision="float"``, and is not kept.
        act_quant_delay: training steps before activations are quantised; ranges are collected meanwhile.
        act_quant_delay_epochs: the same in epochs, in place of `act_quant_delay`.
        act_symmetric: symmetric activations (zero point 0); None lets the target decide.
        act_observer: minmax, ema, percentile, kl or mse.
        act_percentile: share in percent kept by the percentile observer (90–100).
        act_learned: ``lsq`` trains the scales from the observed range on, ``pact`` the upper ends of what is never
            negative (see `msqkd.quant.learned`); ``none`` keeps the range.
        precision: one of `PRECISIONS`. ``weight-only`` and ``weight-only-float16`` use the settings of weights alone,
            ``dynamic`` those and dtype, symmetry and delay of activations, ``float16`` none.
    """

    weight_quantizer: WeightQuantizer = field(default_factory=WeightQuantizer)
    act_quant_dtype: Any = "int8"
    act_quant_delay: int = 0
    act_symmetric: Optional[bool] = None
    act_observer: str = "ema"
    act_percentile: float = 99.99
    precision: str = INT8
    act_quant_delay_epochs: int = 0
    act_learned: str = NONE

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise PlanError(
                f"QuantConfig.precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}"
                f"{did_you_mean(str(self.precision), PRECISIONS)}"
            )
        if self.act_quant_dtype is None:
            if self.precision in (*STORING, *HALF):
                raise PlanError(
                    f"QuantConfig.act_quant_dtype is None, which keeps a layer float, and precision is "
                    f"'{self.precision}'; leave one of them out"
                )
            object.__setattr__(self, "precision", FLOAT_PRECISION)
            object.__setattr__(self, "act_quant_dtype", INT8)
        if not isinstance(self.weight_quantizer, WeightQuantizer):
            raise PlanError(
                f"QuantConfig.weight_quantizer is {self.weight_quantizer!r}; allowed: a WeightQuantizer, for instance "
                "WeightQuantizer(quant_dtype='int8', per_channel=True)"
            )
        bits = bits_of(self.act_quant_dtype, "QuantConfig.act_quant_dtype", wide=True)
        if bits == WIDE_BITS and self.precision == INT8:
            raise PlanError(f"QuantConfig.act_quant_dtype is {bits} bits; allowed only with precision '{DYNAMIC}'")
        _check_name(self.act_observer, ACTIVATION_OBSERVERS, "QuantConfig.act_observer")
        _check_name(self.act_learned, ACTIVATION_RULES, "QuantConfig.act_learned")
        for key, unit in (("act_quant_delay", "steps"), ("act_quant_delay_epochs", "epochs")):
            delay = getattr(self, key)
            if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
                raise PlanError(f"QuantConfig.{key} is {delay!r}; allowed: a number of {unit}, 0 or more")
        if self.act_quant_delay and self.act_quant_delay_epochs:
            raise PlanError(
                f"QuantConfig.act_quant_delay is {self.act_quant_delay} and act_quant_delay_epochs "
                f"{self.act_quant_delay_epochs}; give one of them"
            )
        if not 90 <= self.act_percentile <= 100:
            raise PlanError(f"QuantConfig.act_percentile is {self.act_percentile}; allowed: 90 to 100")

    @property
    def act_bits(self) -> Optional[int]:
        """Bits of activations, or None where they stay float."""
        if self.precision in (WEIGHT_ONLY, FLOAT_PRECISION, *HALF):
            return None
        return bits_of(self.act_quant_dtype, "QuantConfig.act_quant_dtype", wide=True)

    @property
    def is_float(self) -> bool:
        """Whether the layer stays float, its weights too."""
        return self.precision == FLOAT_PRECISION

    def override(self, changes: Mapping[str, Any]) -> QuantConfig:
        """A copy with some settings changed; keys are field names of QuantConfig and, for weights,
        ``weight.<field>``.

        A delay in one unit takes the place of one in the other. An `act_quant_dtype` without a `precision` says
        whether the layer is float: None makes it so, and a dtype quantises a float layer again.
        """
        allowed = self.as_changes()
        for key in changes:
            if key not in allowed:
                raise PlanError(
                    f"setting '{key}' is unknown; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"
                )
        weight = {key[7:]: value for key, value in changes.items() if key.startswith("weight.")}
        own = {key: value for key, value in changes.items() if not key.startswith("weight.")}
        for key, other in (_DELAYS, _DELAYS[::-1]):
            if key in own and other not in own:
                own = {**own, other: 0}
        if "act_quant_dtype" in own and "precision" not in own:
            if own["act_quant_dtype"] is None:
                own = {**own, "act_quant_dtype": self.act_quant_dtype, "precision": FLOAT_PRECISION}
            elif self.is_float:
                own["precision"] = INT8
        return replace(self, weight_quantizer=replace(self.weight_quantizer, **weight), **own)

    def as_changes(self) -> dict[str, Any]:
        """Every setting as the `changes` of a rule."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight_quantizer"}
        weight = {f"weight.{f.name}": getattr(self.weight_quantizer, f.name) for f in fields(self.weight_quantizer)}
        return {**own, **weight}


FLOAT = {"precision": FLOAT_PRECISION}
"""The changes of a rule that keeps a layer float."""


@dataclass(frozen=True)
class Rule:
    """Settings for the layers it matches.

    Attributes:
        kind: ``path`` (cell path: exact, glob, or ``re:`` and a regular expression), ``type`` (class of a cell the
            layer is in), ``op`` (operation) or ``position`` (``first`` or ``last`` layer with a weight).
        pattern: what to match.
        changes: settings that differ, as in `QuantConfig.override`.
        label: how messages and reports call the rule.
        is_default: it is one of a preset; that others override it is no news.
    """

    kind: str
    pattern: str
    changes: Mapping[str, Any]
    label: str = ""
    is_default: bool = False

    def __str__(self) -> str:
        return self.label or f"{self.kind}: {self.pattern}"
