"""`msqkd tune`: cures for a quantised network that has lost too much, the cheap ones first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from msqkd.analysis.diagnosis import with_fragment
from msqkd.analysis.fragments import rule_of
from msqkd.analysis.sensitivity import Probe, SwitchedNetwork, loss_kind, whole_batches
from msqkd.analysis.tune_report import write_tuning
from msqkd.data import Split, subset
from msqkd.errors import DataError, ExportError, FolderError, PlanError, SimulationError, TrainingError
from msqkd.files import write_text
from msqkd.graph.cell import to_cell
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.ptq import quantised_without_training
from msqkd.pipeline.ranking import quantised_metric, ranking_split, sets_of
from msqkd.pipeline.run import run_recipe
from msqkd.pipeline.stages import Stages, opened
from msqkd.pipeline.teachers import teachers_beside
from msqkd.platform import without_kernel
from msqkd.progress import Reporter
from msqkd.quant.algorithms.methods import Improved
from msqkd.quant.algorithms.order import STAGES, against_order
from msqkd.recipe import Recipe, dump_recipe, make_recipe
from msqkd.train.evaluate import output_arrays
from msqkd.user_code import reason_of

VERB = "tune"
TUNED = "tuned.yaml"

_OBSERVERS: tuple[dict[str, Any], ...] = (
    {"observer": "percentile", "percentile": 99.99},
    {"observer": "percentile", "percentile": 99.9},
    {"observer": "mse", "percentile": None},
    {"observer": "kl", "percentile": None},
    {"observer": "minmax", "percentile": None},
)
_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("equalize", {}), ("equalize", {"relu6": "within"}), ("smoothquant", {}), ("split", {}),
    ("weight_ranges", {}), ("bias_correction", {}), ("adaround", {}), ("reconstruct", {}),
)  # fmt: skip
_FLOAT_LAYERS = (1, 2, 4, 8, 16)
_SENSITIVITY_SAMPLES = 256
_FIRST = "as the recipe says"


@dataclass(frozen=True)
class Goal:
    """When a tuning ends.

    Attributes:
        max_drop: the most the metric may lose to float, in its own unit (points of accuracy); 0 or more.
        trials: the most networks tried; None for no limit.
        minutes: the most that trials may take together, over all starts; a trial that was begun is finished. None for
            no limit.
        samples: labelled training samples that trials are ranked on.
    """

    max_drop: float
    trials: Optional[int] = None
    minutes: Optional[float] = None
    samples: int = 2000


@dataclass(frozen=True)
class Candidate:
    """A recipe to be tried: what is new in it, and all of it as a mapping."""

    title: str
    values: dict[str, Any]
    trains: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recipe itself."""
        return make_recipe(self.values)


def tune_recipe(
    recipe: Recipe, output: Path, goal: Goal, reporter: Optional[Reporter] = None, fresh: bool = False
) -> dict[str, Any]:
    """Try cures until the quantised network has lost no more than the goal allows.

    The cheap ones come first: other observers, a scale for each channel, methods of post-training quantisation, the
    layers that do most harm in float, and at last the recipe's own training. A cure that helps is kept when the next
    one is tried. Trials are ranked on training samples that are neither calibrated nor evaluated with; what reaches the
    goal there is confirmed on the whole test set. Trials are kept in the folder: run again after an interruption, it
    goes on with the next one, to the same result.

    Args:
        recipe: the network, its data, and the quantisation it begins with.
        output: the folder; ``tuned.yaml`` in it reproduces the best network, ``tune.html`` and ``tune.json`` tell how
            it was found.
        goal: when it ends.
        reporter: where progress is told.
        fresh: forget an earlier tuning in the folder.

    Returns:
        What is in ``tune.json``.

    Raises:
        DataError: too few labelled samples; a metric that is not finite, or that noise does better on.
        MsqkdError: whatever else the user can mend.
    """
    with opened(recipe, output, VERB, reporter, fresh) as objects:
        return _Tuning(objects, goal).run()


class _Tuning(Stages):
    def __init__(self, objects: Objects, goal: Goal) -> None:
        super().__init__(objects)
        self.goal, self.metric = goal, objects.metric
        self.trials: list[dict[str, Any]] = []
        self.teachers: Optional[dict[str, Any]] = None
        self.built: dict[str, tuple[Objects, Improved]] = {}

    def run(self) -> dict[str, Any]:
        self.begin(2)
        self.tuning = ranking_split(self.objects, self.goal.samples)
        on_test = self.float_network()["accuracy"]
        base = self.stage("float on the tuning set", "Metric", self._float_metric, self._float_words)["metric"]
        for candidate in self._candidates():
            if self._is_over():
                break
            trial = self._try(candidate, base, on_test)
            if _drop(trial) <= self.goal.max_drop and self._confirm(trial, on_test)["test_drop"] <= self.goal.max_drop:
                return self._tell(trial, True, base, on_test)
        best = self._confirm(min(self.trials, key=_drop), on_test)
        return self._tell(best, False, base, on_test)

    def _float_metric(self) -> dict[str, Any]:
        """The metric of the float network, which must see a difference between its answers and noise."""
        size, outputs = self.recipe.data.eval_batch_size, self.objects.deployed_outputs
        answers = output_arrays(to_cell(self.objects.captured), self.tuning, size, outputs)
        labels, where = self.tuning.labels, self.tuning.name
        found = self.metric(answers, labels, where)
        order = np.random.default_rng(self.recipe.seed).permutation(len(self.tuning))
        noise = self.metric(tuple(output[order] for output in answers), labels, where)
        if self.metric.lost(found, noise) < 0:
            raise DataError(
                f"evaluation.metric gives {self.metric.words(found)} for the float network and better, "
                f"{self.metric.words(noise)}, for its answers in random order; set evaluation.higher_is_better: "
                f"{'false' if self.metric.higher_is_better else 'true'}, or mend the metric"
            )
        return {"metric": found, "noise": noise}

    def _float_words(self, result: Mapping[str, Any]) -> str:
        return f"float {self.metric.words(result['metric'])} on the {len(self.tuning)} samples trials are ranked on"

    # -- trials -------------------------------------------------------------------------------------------------------
    def _candidates(self) -> Iterator[Candidate]:
        """What is tried next, given what was found so far."""
        start = Candidate(_FIRST, self.recipe.to_dict())
        yield start
        own = self.recipe.calibration
        for observer in _OBSERVERS:
            if (observer["observer"], observer["percentile"]) != (own.observer, own.percentile):
                name = observer["observer"] + (f" {observer['percentile']}" if observer["percentile"] else "")
                yield _with(start, f"observer {name}", {"calibration": observer})
        best = self._best(start)
        if not self.recipe.quantization.weight.per_channel:
            yield _with(
                best, "weights with a scale for each channel", {"quantization": {"weight": {"per_channel": True}}}
            )
            best = self._best(best)
        for name, settings in _METHODS:
            added = _with_method(best, name, settings)
            if added is not None and ("relu6" not in settings or self._has_relu6):
                yield added
                best = self._best(best)
        worst = self._worst_layers(best)
        for count in (number for number in _FLOAT_LAYERS if number <= len(worst)):
            layers = worst[:count]
            values = best.values
            for name in layers:
                values = with_fragment(values, rule_of(name, precision="float"))
            yield Candidate(_titled(best, f"float: {', '.join(layers)}"), values)
        best = self._best(best)
        self._compare_teachers()
        values = {**best.values, "ptq": {}, "compare": []}
        yield Candidate(f"{best.title}; training", values, trains=True)

    @property
    def _has_relu6(self) -> bool:
        return any(node.op == "ReLU6" for node in self.objects.deployed.nodes)

    def _best(self, before: Candidate) -> Candidate:
        """The candidate of the best trial without training so far."""
        untrained = [trial for trial in self.trials if not trial["trains"]]
        if not untrained:
            return before
        found = min(untrained, key=_drop)
        return Candidate(found["title"], found["recipe"])

    def _try(self, candidate: Candidate, base: float, on_test: float) -> dict[str, Any]:
        recipe = candidate.recipe
        key = f"trial {recipe.sha()[:16]}" + (" with training" if candidate.trains else "")
        self.reporter.stages += 1

        def work() -> dict[str, Any]:
            told = {"title": candidate.title, "trains": candidate.trains, "recipe": recipe.to_dict()}
            try:
                if candidate.trains:
                    return {**told, **self._trained(recipe, on_test)}
                found = self._measured(recipe, self.tuning)
            except (PlanError, ExportError, SimulationError, TrainingError, RuntimeError) as error:
                why = _not_possible(error)
                if why is None:
                    raise
                return {**told, "metric": None, "drop": None, "error": why}
            return {**told, "metric": found, "drop": self.metric.lost(base, found)}

        def words(result: Mapping[str, Any]) -> str:
            if result.get("error"):
                return f"not possible: {result['error']}"
            found = result["metric"] if result["metric"] is not None else result["test_metric"]
            return f"{self.metric.words(found)}, {result['drop']:+.{self.metric.scale.digits}f} lost"

        title = f"Trial {len(self.trials) + 1}{self._of()}: {candidate.title}"
        trial: dict[str, Any] = self.stage(key, title, work, words)
        self.trials.append(trial)
        least = min(map(_drop, self.trials))
        if math.isfinite(least):
            self.reporter.say(f"best so far: {self.metric.scale.number(least)} lost{self._left()}")
        return trial

    def _trained(self, recipe: Recipe, on_test: float) -> dict[str, Any]:
        """Train; the network is exported and measured on the test set at once."""
        place = self.folder.path.with_name(f"{self.folder.path.name}_trained_{recipe.sha()[:8]}")
        found = run_recipe(recipe, place, self.reporter)["accuracy"]["exported"]
        return {"metric": None, "drop": self.metric.lost(on_test, found), **self._on_test(found, on_test)}

    def _confirm(self, trial: dict[str, Any], on_test: float) -> dict[str, Any]:
        """The trial, with what its network reaches on the whole test set."""
        if "test_metric" in trial:
            return trial
        recipe = make_recipe(trial["recipe"])

        def work() -> dict[str, Any]:
            return self._on_test(self._measured(recipe, self.objects.bundle.test), on_test)

        self.reporter.stages += 1
        title = f"Confirmation on the whole test set: {trial['title']}"
        words = self.metric.words
        found = self.stage(
            f"confirmed {recipe.sha()[:16]}", title, work, lambda r: f"{words(r['test_metric'])} on the test set"
        )
        trial.update({name: found[name] for name in ("test_metric", "test_drop")})
        return trial

    def _measured(self, recipe: Recipe, split: Split) -> float:
        return quantised_metric(*self._build(recipe), split)

    def _build(self, recipe: Recipe) -> tuple[Objects, Improved]:
        """The network of a recipe; the last one is kept, to be confirmed or looked into."""
        key = recipe.sha()
        if key not in self.built:
            objects = self.objects.variant(recipe)
            self.built = {key: (objects, quantised_without_training(objects))}
        return self.built[key]

    def _worst_layers(self, best: Candidate) -> list[str]:
        """The layers whose quantisation does most harm, the worst first."""

        def work() -> dict[str, Any]:
            _, found = self._build(best.recipe)
            size = min(64, len(self.tuning))
            samples = whole_batches(subset(self.tuning, _SENSITIVITY_SAMPLES), size)
            network = SwitchedNetwork(found.graph, found.plan, found.reference)
            probe = Probe(network, samples, size, loss_kind(found.graph, self.metric))
            losses = {name: probe.loss({name}) for name in network.names}
            return {"layers": sorted((name for name in losses if losses[name] > 0), key=lambda name: -losses[name])}

        self.reporter.stages += 1
        key = f"layers {best.recipe.sha()[:16]}"
        found = self.stage(key, "Which layers do most harm", work, lambda r: ", ".join(r["layers"][:5]))
        nodes = {node.name for node in self.objects.plan.nodes}
        return [name for name in found["layers"] if name in nodes]

    def _compare_teachers(self) -> None:
        """What the teachers of the training to come know more than the network."""
        if self.recipe.distillation is None:
            return
        self.reporter.stages += 1
        found = self.stage(
            "teachers", "Teachers", lambda: teachers_beside(self.objects, self.tuning), lambda r: r["verdict"]
        )
        self.teachers = found

    # -- what it comes to ----------------------------------------------------------------------------------------------
    def _on_test(self, found: float, on_test: float) -> dict[str, Any]:
        return {"test_metric": found, "test_drop": self.metric.lost(on_test, found)}

    def _is_over(self) -> bool:
        goal = self.goal
        return (goal.trials is not None and len(self.trials) >= goal.trials) or (
            goal.minutes is not None and bool(self.trials) and self._spent() >= goal.minutes
        )

    def _spent(self) -> float:
        """The minutes of all trials."""
        return sum(float(trial["seconds"]) for trial in self.trials) / 60

    def _left(self) -> str:
        """What of the budget is left, in words: the longest it may still take."""
        goal, spent = self.goal, self._spent()
        ends = []
        if goal.minutes is not None:
            ends.append(goal.minutes - spent)
        if goal.trials is not None:
            ends.append(spent / len(self.trials) * (goal.trials - len(self.trials)))
        return f"; at most {max(min(ends), 0.0):.0f} min left" if ends else ""

    def _of(self) -> str:
        return f" of at most {self.goal.trials}" if self.goal.trials is not None else ""

    def _tell(self, best: dict[str, Any], reached: bool, base: float, on_test: float) -> dict[str, Any]:
        recipe = dump_recipe(make_recipe(best["recipe"]))
        write_text(self.folder.file(TUNED), recipe)
        result = {
            "name": self.recipe.name,
            "reached": reached,
            "max_drop": self.goal.max_drop,
            "metric": self.metric.to_dict(),
            "float": {"tuning": base, "test": on_test},
            "best": {key: best[key] for key in ("title", "drop", "test_metric", "test_drop", "trains")},
            "sets": sets_of(self.objects, self.tuning),
            "trials": [{key: value for key, value in trial.items() if key != "recipe"} for trial in self.trials],
            "teachers": self.teachers,
            "recipe": recipe,
        }
        write_tuning(result, self.folder.path)
        return result


def _not_possible(error: Exception) -> Optional[str]:
    """Say why a trial's settings do not fit the network; None for an error that is not about them.

    A network may have no place for a method (a transformer nothing to equalize), a file or the device may not hold what
    it would become, the training may diverge, or MindSpore has no kernel for it. A folder in use is none of these.
    """
    if isinstance(error, FolderError):
        return None
    if isinstance(error, RuntimeError):
        return f"MindSpore: {reason_of(error)}" if without_kernel(error) else None
    return str(error)


def _drop(trial: Mapping[str, Any]) -> float:
    """What a trial lost; infinite where it was not possible."""
    return math.inf if trial["drop"] is None else float(trial["drop"])


def _titled(before: Candidate, what: str) -> str:
    return what if before.title == _FIRST else f"{before.title}; {what}"


def _with(before: Candidate, what: str, fragment: Mapping[str, Any]) -> Candidate:
    """`before` with a fragment of a recipe put in."""
    return Candidate(_titled(before, what), with_fragment(before.values, fragment))


def _with_method(before: Candidate, method: str, settings: Mapping[str, Any]) -> Optional[Candidate]:
    """`before` with one more method, or another setting of it; None where no order of the methods is possible."""
    held = before.values["ptq"]["methods"]
    wanted = [name for name in STAGES if name in {*held, method}]
    if (wanted == held and not settings) or against_order(wanted):
        return None
    words = ", ".join(f"{key} {value}" for key, value in settings.items())
    added = _with(before, f"{method} ({words})" if words else method, {"ptq": {method: settings}})
    added.values["ptq"]["methods"] = wanted
    return added
