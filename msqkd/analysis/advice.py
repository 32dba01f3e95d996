"""What to do next with a quantised network, in words: rules over what a run has measured.

Three states exclude each other, so that no advice contradicts another: the device does not compute what was promised;
the network has lost no more than `LOSS`; or it has lost more. In the first nothing is shipped, in the second nothing is
repaired, in the third remedies come in order of certainty: measured ones, those the layers' noise points to, a search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import median
from typing import Any, Optional

from msqkd.analysis.fragments import as_yaml, rule_of
from msqkd.errors import PlanError
from msqkd.exporters import ASCEND, LITE, MS, MS_WEIGHT, ONNX, PORTABLE
from msqkd.quant.config import INT8, NONE
from msqkd.quant.plan import BY_NEIGHBOURS
from msqkd.targets import get_target
from msqkd.train.metric import Scale

MOST = 5
"""So many pieces of advice at most."""

LOSS, LOSS_PART = 0.5, 0.01
"""A network that loses no more against float is good enough: points of accuracy, part of another metric's value."""

GAIN, GAIN_PART = 0.1, 0.002
"""A training that gains no more over calibration alone was not needed; in the same units."""

LOW_SQNR = 20.0
"""A weight or value of fewer dB by itself is looked into."""

BELOW = 10.0
"""So is one that is so many dB below the median layer's."""

CLIPPED = 1e-3
"""Share of a layer's values beyond its range that is worth a word."""

OUTLIERS = 3.0
"""A largest magnitude of more times the 99.9 percentile makes the range of all others coarse."""

_FULL_BITS = 8
_FILES = {"ascend": (ASCEND,), "lite_arm": (MS, MS_WEIGHT, LITE)}  # by target, what is shipped; in order of preference
_ANY_FILE = (PORTABLE, ONNX)
_TRAINED = {"qat_kd": "QAT with distillation", "qat": "QAT"}
_REACHED = ("exported", *_TRAINED, "ptq")  # the INT8 network: as exported, else as last measured before
_CONTROLS = {"float_kd": "distilled", "float_ft": "fine-tuned"}


@dataclass(frozen=True)
class Advice:
    """One thing to do, or to know.

    Attributes:
        rule: which one it is from; stable.
        text: sentences, with the numbers they follow from.
        command: what to type; empty where there is nothing to. RUN is the folder of the run, RECIPE its recipe.
        recipe: what to put into the recipe, as YAML; empty where there is nothing to.
    """

    rule: str
    text: str
    command: str = ""
    recipe: str = ""

    def to_dict(self) -> dict[str, str]:
        """As JSON-able data with stable keys."""
        return asdict(self)


def advise(result: Mapping[str, Any]) -> list[Advice]:
    """What follows from a run's result (see `msqkd.pipeline.result.assemble`), the most pressing first.

    Empty where the float or the quantised network was not measured. Parts of the result may be missing.
    """
    accuracy = result.get("accuracy") or {}
    base = accuracy.get("float")
    reached = next((accuracy[name] for name in _REACHED if accuracy.get(name) is not None), None)
    if base is None or reached is None:
        return []
    run = _Run(result, base, reached)
    found: list[Optional[Advice]]
    if run.parity.get("exceeded"):
        found = [run.deviation()]
    elif run.lost <= run.allowed:
        found = [run.shipped(), run.unneeded_training()]
    elif run.ptq_is_enough and run.trained is not None:
        found = [run.harmful_training()]
    else:
        found = [*run.measured(), *run.suspected(), run.analysis_wanted(), run.tuning()]
    if not any(item and "precision: float" in item.recipe for item in found):
        found.append(run.float_layers())
    found += [run.better_float(), run.slow_int8()]
    return [item for item in found if item is not None][:MOST]


class _Run:
    """A result with what float and INT8 reach, and the rules."""

    def __init__(self, result: Mapping[str, Any], base: float, reached: float) -> None:
        self.result, self.base, self.reached = result, base, reached
        self.accuracy: Mapping[str, Any] = result.get("accuracy") or {}
        self.scale = Scale.of(result.get("metric"))
        self.rising = (result.get("metric") or {}).get("higher_is_better", True)
        self.plan: Mapping[str, Any] = result.get("plan") or {}
        self.parity: Mapping[str, Any] = result.get("parity") or {}
        self.layers: Sequence[Mapping[str, Any]] = result.get("layers") or []
        self.trained = next((key for key in _TRAINED if self.accuracy.get(key) is not None), None)

    @cached_property
    def lost(self) -> float:
        """Against float: by the exported network, or by the device where that loses more."""
        found = (self.reached, self.accuracy.get("integer"))
        return max(self._gain(value, self.base) for value in found if value is not None)

    @property
    def allowed(self) -> float:
        return self._bound(LOSS, LOSS_PART)

    @property
    def ptq_is_enough(self) -> bool:
        ptq = self.accuracy.get("ptq")
        return ptq is not None and self._gain(ptq, self.base) <= self.allowed

    def _bound(self, points: float, part: float) -> float:
        return points if self.scale.unit else part * abs(self.base)

    def _gain(self, before: float, after: float) -> float:
        """How much better `after` is."""
        return after - before if self.rising else before - after

    def _size(self, difference: float) -> str:
        return self.scale.number(difference) + self.scale.points

    # -- the device --------------------------------------------------------------------------------------------------
    def deviation(self) -> Advice:
        parity = self.parity
        if parity.get("failed"):
            text = f"Do not ship yet: the device could not be compared with the network: {parity['failed']}"
            return Advice("device", text)
        which = f"{parity.get('samples')} {parity.get('split') or ''} samples".replace("  ", " ")
        text = (
            f"Do not ship yet: on the {which} the device deviates by {self._size(parity['deviation'])} from the "
            f"fake-quantised network, more than the bound of {parity.get('max_deviation'):g}."
        )
        if parity.get("excess"):
            text = f"Do not ship yet: on the {which} the device is beyond the bounds: {'; '.join(parity['excess'])}."
        place = parity.get("first_beyond_one") or parity.get("first_difference")
        fragment = ""
        if place:
            steps = "step" if place["max_lsb"] == 1 else "steps"
            text += f" They part at '{place['layer']}' ({place['op']}), by up to {place['max_lsb']} {steps}."
            planned = {node["name"]: node.get("precision", INT8) for node in self.plan.get("nodes") or []}
            if planned.get(place["layer"], "float") != "float":
                text += " Look on the test set too; if it is as bad there, leave that layer float."
                fragment = as_yaml(rule_of(place["layer"], precision="float"))
        return Advice("device", text, "msqkd verify RUN", fragment)

    # -- good enough -------------------------------------------------------------------------------------------------
    def shipped(self) -> Advice:
        how = f"loses {self._size(self.lost)}" if self.lost > 0 else "loses nothing"
        text = f"Nothing has to be mended: INT8 {how} against float ({self.scale.show(self.base)})"
        if self.lost > 0:
            count = (self.result.get("data") or {}).get("test")
            one = f"; one of the {count} test samples is {100 / count:.2g} points" if count and self.scale.unit else ""
            text += f", no more than {self._size(self.allowed)}{one}"
        text += "."
        file = self._file()
        if file:
            text += f" Ship {file}."
        if self.accuracy.get("integer") is None and self.parity.get("samples"):
            text += " Measure the device's integers on the whole test set before."
            return Advice("ship", text, "msqkd verify RUN")
        return Advice("ship", text)

    def _file(self) -> str:
        exports = {name: item for name, item in (self.result.get("export") or {}).items() if not item.get("failed")}
        names = (*_FILES.get(str(self.result.get("target")), ()), *_ANY_FILE)
        return next((str(exports[name]["file"]) for name in names if (exports.get(name) or {}).get("file")), "")

    def unneeded_training(self) -> Optional[Advice]:
        trained = self.trained
        if trained is None or not self.ptq_is_enough:
            return None
        ptq: float = self.accuracy["ptq"]
        reached: float = self.accuracy[trained]
        if self._gain(ptq, reached) > self._bound(GAIN, GAIN_PART):
            return None
        text = (
            f"The training was not needed: calibration alone (PTQ) reaches {self.scale.show(ptq)}, "
            f"{_TRAINED[trained]} {self.scale.show(reached)}."
        )
        return Advice("training", text, "msqkd calibrate RECIPE")

    # -- too much lost -----------------------------------------------------------------------------------------------
    def harmful_training(self) -> Advice:
        assert self.trained is not None
        ptq, reached = self.accuracy["ptq"], self.accuracy[self.trained]
        text = (
            f"The training did harm: calibration alone (PTQ) reaches {self.scale.show(ptq)}, {_TRAINED[self.trained]} "
            f"{self.scale.show(reached)}. Take the calibrated network, or train with a lower train.lr."
        )
        return Advice("training", text, "msqkd calibrate RECIPE")

    def measured(self) -> list[Advice]:
        """The first remedy of the two worst layers, where the run was analysed."""
        found = []
        for item in (self.result.get("analysis") or {}).get("diagnoses") or []:
            cause, remedy = next(iter(item.get("causes") or [""])), next(iter(item.get("remedies") or []), None)
            if remedy:
                because = f": {cause}" if cause else ""
                text = f"'{item['layer']}' does the {_ordinal(item['rank'])}harm{because}. Measured: {remedy['text']}."
                found.append(Advice("remedy", text, "", remedy["yaml"]))
        return found[:2]

    def suspected(self) -> list[Optional[Advice]]:
        """What the layers' own noise points to, where nothing was measured."""
        if self.result.get("analysis"):
            return []
        return [self._weight(), self._activation()]

    def _worst(self, part: str) -> Optional[tuple[Mapping[str, Any], float, float]]:
        """The row whose weight or value loses most to rounding, if that is much; its SQNR and the median one."""
        found = {
            i: row[part]["sqnr_db"]
            for i, row in enumerate(self.layers)
            if row.get(part) and row[part].get("sqnr_db") is not None
        }
        if not found:
            return None
        worst, usual = min(found, key=lambda i: found[i]), median(found.values())
        bad = found[worst] < LOW_SQNR or found[worst] < usual - BELOW
        return (self.layers[worst], found[worst], usual) if bad else None

    def _weight(self) -> Optional[Advice]:
        found = self._worst("weight")
        if found is None:
            return None
        row, noise, usual = found
        weight = row["weight"]
        observers = {one.get("node"): one.get("observer") for one in self.plan.get("weights") or []}
        text = f"The weight of '{row['name']}' loses most to rounding: {noise:.1f} dB, the median layer {usual:.1f}. "
        change: dict[str, Any]
        if not weight.get("per_channel") and self._takes_channels(row.get("op")):
            words, change = "Give every channel its own scale", {"per_channel": True}
        elif weight["bits"] < _FULL_BITS:
            words, change = f"It has {weight['bits']} bits; give it {_FULL_BITS}", {"bits": _FULL_BITS}
        elif observers.get(row["name"]) == "minmax" and (weight.get("max_over_percentile") or 0) > OUTLIERS:
            far = f"Its largest number is {weight['max_over_percentile']:.1f} × the 99.9 percentile"
            words, change = f"{far}: take the scale with the least squared error", {"observer": "mse"}
        else:
            return None
        return Advice("weight", f"{text}{words}.", "", as_yaml(rule_of(row["name"], weight=change)))

    def _takes_channels(self, op: Any) -> bool:
        try:
            support = get_target(str(self.plan.get("target"))).ops.get(str(op))
        except PlanError:
            return False
        return support is not None and not support.per_tensor

    def _activation(self) -> Optional[Advice]:
        found = self._worst("activation")
        if found is None:
            return None
        row, noise, usual = found
        activation = row["activation"]
        text = f"The values of '{row['name']}' lose most to rounding: {noise:.1f} dB, the median layer {usual:.1f}. "
        if activation["bits"] < _FULL_BITS and row.get("op") != "input":
            words = f"They have {activation['bits']} bits; give them {_FULL_BITS}."
            fragment = rule_of(row["name"], activation={"bits": _FULL_BITS})
            return Advice("activation", text + words, "", as_yaml(fragment))
        calibration, groups = self.result.get("calibration") or {}, self.plan.get("groups") or []
        trained = any(group["name"] == row.get("value") and group.get("learned", NONE) != NONE for group in groups)
        if trained or calibration.get("kept") == "trained":
            return None  # calibration has no say
        observer = calibration.get("observer")
        outside, far = activation.get("outside") or 0.0, activation.get("max_over_percentile") or 0.0
        if outside >= CLIPPED and observer not in ("minmax", "mse"):
            words = f"{100 * outside:.2g} % of them are clipped: take the range with the least squared error"
            other = "mse"
        elif far > OUTLIERS and observer in ("minmax", "ema"):
            words = f"The largest is {far:.1f} × the 99.9 percentile: leave the few outliers out of the range"
            other = "percentile"
        else:
            return None
        return Advice("activation", f"{text}{words}.", "", as_yaml({"calibration": {"observer": other}}))

    def analysis_wanted(self) -> Optional[Advice]:
        if self.result.get("analysis"):
            return None
        text = "Which layers cost most, and what helps them, is measured on training samples, in minutes."
        return Advice("analyze", text, "msqkd analyze RUN")

    def tuning(self) -> Advice:
        text = (
            f"INT8 loses {self._size(self.lost)} against float ({self.scale.show(self.base)}), more than "
            f"{self._size(self.allowed)}: let the remedies be tried, the cheap ones first, until little enough is lost."
        )
        return Advice("tune", text, f"msqkd tune RECIPE --max-drop {self.allowed:.3g}")

    # -- in any state ------------------------------------------------------------------------------------------------
    def float_layers(self) -> Optional[Advice]:
        """Float operations between int8 ones."""
        nodes = [node for node in self.plan.get("nodes") or [] if not node.get("fused_into")]
        places = [i for i, node in enumerate(nodes) if node.get("precision") == INT8]
        inside = nodes[places[0] : places[-1]] if places else []
        left = [node for node in inside if node.get("precision") == "float"]
        if not left:
            return None
        kinds = Counter((str(node.get("op")), str(node.get("reason"))) for node in left)
        causes = [kind for kind in kinds if kind[1] not in BY_NEIGHBOURS] or list(kinds)
        causes.sort(key=lambda kind: -kinds[kind])
        words = "; ".join(f"{kinds[op, reason]} {op}, {reason}" for op, reason in causes[:3])
        text = (
            f"{len(left)} of {len(nodes)} operations {'runs' if len(left) == 1 else 'run'} in float between int8 ones, "
            f"and the device converts values there and back: {words}. For speed, replace what has no int8 kernel, and "
            "let a rule keep float no more than the loss demands."
        )
        return Advice("float layers", text, "msqkd plan RECIPE")

    def better_float(self) -> Optional[Advice]:
        """A float control that is better than what INT8 began from."""
        found = {name: self.accuracy[name] for name in _CONTROLS if self.accuracy.get(name) is not None}
        if not found:
            return None
        best = max(found, key=lambda name: self._gain(0.0, found[name]))
        gained = self._gain(self.base, found[best])
        ahead = self._gain(self.reached, found[best])
        if min(gained, ahead) <= self._bound(GAIN, GAIN_PART):
            return None
        text = (
            f"The float network gains from the same training: {_CONTROLS[best]} it reaches "
            f"{self.scale.show(found[best])}, {self._size(gained)} better than before and {self._size(ahead)} better "
            "than INT8. Begin from there."
        )
        start: dict[str, Any] = {"model": {"checkpoint": f"RUN/{best}.ckpt"}, "pretrain": None}
        return Advice("float", text, "", as_yaml(start))

    def slow_int8(self) -> Optional[Advice]:
        """INT8 that is no faster where it was measured."""
        found = [item for item in self.result.get("latency") or [] if item.get("speed_up") is not None]
        if not found or max(item["speed_up"] for item in found) >= 1:
            return None
        best = max(found, key=lambda item: item["speed_up"])
        facts = best.get("environment") or {}
        text = (
            f"onnxruntime on {facts.get('cpu') or 'this CPU'} takes longer for int8 than for float "
            f"({best['int8']['median']:.3g} ms and {best['float32']['median']:.3g} ms for a batch of {best['batch']}): "
            "measure on the device itself before INT8 is chosen for its speed."
        )
        return Advice("latency", text)


def _ordinal(rank: int) -> str:
    return {1: "most ", 2: "second most "}.get(rank, "")
