"""`msqkd search`: a precision for every layer, the least loss within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms

from msqkd.analysis.diagnosis import with_fragment
from msqkd.analysis.fragments import rule_of
from msqkd.analysis.layer_times import LayerTimes, read_times
from msqkd.analysis.precisions import (
    AS_PLANNED,
    COSTS,
    FLOAT,
    IN_FLOAT,
    IN_HALF,
    LATENCY,
    SIZE,
    STORED_HALF,
    STORED_WIDE,
    Precision,
    layer_cost,
    layer_losses,
    with_bits,
)
from msqkd.analysis.search_report import write_search
from msqkd.analysis.sensitivity import Probe, SwitchedNetwork, loss_kind, whole_batches
from msqkd.bench import bench_layers
from msqkd.data import subset
from msqkd.errors import ExportError, PlanError
from msqkd.exporters import FORMATS, ONNX, PORTABLE
from msqkd.files import write_text
from msqkd.graph.ir import Graph
from msqkd.pipeline.build import plan_recipe
from msqkd.pipeline.export import guessed_plan
from msqkd.pipeline.latency import samples_of
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.ptq import quantised_without_training
from msqkd.pipeline.ranking import quantised_metric, ranking_split, sets_of
from msqkd.pipeline.stages import Stages, opened
from msqkd.progress import Reporter
from msqkd.quant.algorithms.methods import Improved
from msqkd.quant.algorithms.order import FLOAT_STAGE, STAGES
from msqkd.quant.plan import QuantPlan
from msqkd.quant.qat import deployment_graph
from msqkd.quant.search import Assignment, Choice, best_within, pareto_front
from msqkd.quant.uses import dynamic_obstacle
from msqkd.recipe import Recipe, dump_recipe, make_recipe
from msqkd.targets import get_target

VERB = "search"
FOUND = "searched.yaml"

_PROBED = 256  # samples each layer is tried with at each precision
_MEASURED = "measured here with onnxruntime"


@dataclass(frozen=True)
class Budget:
    """What a search may spend.

    Attributes:
        share: of what the float network takes, above 0 and at most 1.
        by: ``size`` of the weights, ``bops`` (see `msqkd.analysis.precisions.cost_of`) or ``latency``.
        points: how many assignments along the front are measured beside the one chosen.
        samples: labelled training samples they are measured on.
        times: of ``latency`` the file with the times of every layer (`msqkd.analysis.layer_times.read_times`); None
            measures them here.
    """

    share: float
    by: str = SIZE
    points: int = 4
    samples: int = 2000
    times: Optional[Path] = None


def search_recipe(
    recipe: Recipe, output: Path, budget: Budget, reporter: Optional[Reporter] = None, fresh: bool = False
) -> dict[str, Any]:
    """Choose the precision of every layer so that the network loses least within a budget.

    Each layer is tried alone at every precision its target and the recipe's files can hold, and losses are taken to add
    up (`msqkd.quant.search`). What is chosen is measured, and so are other points of the front. Everything is kept in
    the folder: run again after an interruption, it goes on.

    Args:
        recipe: the network, its data and its quantisation.
        output: the folder; ``searched.yaml`` in it is the recipe with a rule for each layer that differs,
            ``search.html`` and ``search.json`` show the front.
        budget: what may be spent.
        reporter: where progress is told.
        fresh: forget an earlier search in the folder.

    Returns:
        What is in ``search.json``.

    Raises:
        PlanError: nothing is within the budget; says what is the least that can be reached. A method of the recipe
            rounds for the bits a layer has now.
        DataError: the table of times does not fit the network.
        MissingDependencyError: times are to be measured, and onnxruntime is not installed.
        MsqkdError: whatever else the user can mend.
    """
    late = [name for name in recipe.ptq.methods if STAGES[name] != FLOAT_STAGE]
    if late:
        raise PlanError(
            f"ptq.methods: '{late[0]}' works on the bits a layer has; search without it, and add it to {FOUND}"
        )
    ms.set_context(mode=ms.GRAPH_MODE)
    times = _times(recipe, budget) if budget.by == LATENCY or budget.times is not None else None
    with opened(recipe, output, VERB, reporter, fresh) as objects:
        return _Search(objects, budget, times).run()


def widths_of(recipe: Recipe) -> tuple[int, ...]:
    """The bits a weight may have: fewer than 8 only where every file of the recipe stores them in fewer."""
    allowed = get_target(recipe.target).weight_bits
    return allowed if set(recipe.export.formats) == {PORTABLE} else tuple(bits for bits in allowed if bits == 8)


def offers_of(recipe: Recipe) -> list[Precision]:
    """What a layer may be computed at: what the target runs, and every file of the recipe holds."""
    offers = [IN_FLOAT, *map(with_bits, widths_of(recipe))]
    if get_target(recipe.target).float16_layers and all(FORMATS[name].float16 for name in recipe.export.formats):
        offers.insert(1, IN_HALF)
        if set(recipe.export.formats) == {PORTABLE}:
            offers.append(STORED_HALF)
    if all(FORMATS[name].wide for name in recipe.export.formats):
        offers.append(STORED_WIDE)
    return offers


def _takes(graph: Graph, name: str, precision: Precision) -> bool:
    """Whether a layer can have a precision that is offered."""
    return precision is not STORED_WIDE or dynamic_obstacle(graph, graph.node(name)) is None


def _times(recipe: Recipe, budget: Budget) -> Optional[LayerTimes]:
    """The times that are given; None where they are to be measured, which is possible.

    Raises:
        MsqkdError: as `search_recipe`; before anything is computed.
    """
    if budget.by != LATENCY:
        raise PlanError(f"--times: allowed only with --by {LATENCY}, found --by {budget.by}")
    captured, plan = plan_recipe(recipe)
    graph = deployment_graph(captured)
    if budget.times is not None:
        return read_times(budget.times, list(plan.weights), [node.name for node in graph.nodes])
    _check_measurable(graph, plan)
    return None


def _check_measurable(graph: Graph, plan: QuantPlan) -> None:
    from msqkd.exporters.onnx.runtime import onnxruntime_package

    onnxruntime_package()
    form = FORMATS[ONNX]
    assert form.check is not None
    try:
        form.check(graph, guessed_plan(plan))
    except ExportError as error:
        raise ExportError(
            f"--by {LATENCY}: onnxruntime, with which layers are measured here, cannot have the network: {error}; give "
            "the times of a device with --times"
        ) from error


class _Search(Stages):
    def __init__(self, objects: Objects, budget: Budget, times: Optional[LayerTimes]) -> None:
        super().__init__(objects)
        self.budget, self.unit, self.times = budget, COSTS[budget.by], times
        self.precisions: dict[str, Precision] = {}

    def run(self) -> dict[str, Any]:
        objects, budget = self.objects, self.budget
        measures = budget.by == LATENCY and self.times is None
        self.begin(4 + measures)
        self.ranking = ranking_split(objects, budget.samples)
        on_test = self.float_network()["accuracy"]
        if measures:
            self.times = self._measured_times()
        self.precisions = self._offered()
        layers = self._choices()
        whole = sum(next(item.cost for item in choices if item.name == FLOAT) for choices in layers.values())
        if not whole > 0:
            raise PlanError(f"in float the layers take {whole:g} {self.unit}, of which there are no shares")
        front = pareto_front(layers)
        chosen = best_within(front, budget.share * whole, self.unit, whole)
        points = [self._point(item, whole) for item in self._shown(front, chosen)]
        recipe = self._recipe(chosen)
        write_text(self.folder.file(FOUND), dump_recipe(recipe))
        confirmed = self._confirmed(recipe)
        counts = {name: list(chosen.names.values()).count(name) for name in dict.fromkeys(chosen.names.values())}
        result = {
            "name": self.recipe.name,
            "by": budget.by,
            "unit": self.unit,
            "budget": budget.share,
            "widths": list(widths_of(self.recipe)),
            "metric": objects.metric.to_dict(),
            "float": {"cost": whole, "test": on_test},
            "chosen": {"cost": chosen.cost, "share": chosen.cost / whole, "loss": chosen.loss, "test": confirmed,
                       "layers": chosen.names, "counts": counts},
            "front": [{"cost": item.cost, "loss": item.loss} for item in front],
            "points": points,
            "choices": {name: [vars(item) for item in choices] for name, choices in layers.items()},
            "times": self._times_told(),
            "sets": sets_of(objects, self.ranking),
            "recipe": dump_recipe(recipe),
        }  # fmt: skip
        write_search(result, self.folder.path)
        return result

    @cached_property
    def _found(self) -> Improved:
        """The network quantised as the recipe says."""
        return quantised_without_training(self.objects)

    def _measured_times(self) -> LayerTimes:
        """Kept with the folder: a second measurement would be another one."""

        def work() -> dict[str, Any]:
            samples = samples_of(self.ranking, 1)
            return {"table": bench_layers(self._found.graph, self._found.plan, samples).to_dict()}

        result = self.stage(
            "times", "Every layer in onnxruntime", work, lambda r: f"{_in_all(r['table'])} layers timed"
        )
        return LayerTimes.of(result["table"])

    def _times_told(self) -> Optional[dict[str, Any]]:
        if self.times is None:
            return None
        source = _MEASURED if self.budget.times is None else str(self.budget.times)
        return {"source": source, "rest": self.times.rest, "table": self.times.layers}

    def _offered(self) -> dict[str, Precision]:
        """What there is to choose from, by name; what is missing is said."""
        offers = offers_of(self.recipe)
        if widths_of(self.recipe) == (8,):
            self.reporter.say(
                "weights of 8 bits or float: files of this recipe hold fewer bits in 8 (portable_mindir alone does not)"
            )
        if self.times is not None:
            keys = [precision.key for precision in offers]
            for why, missing in (
                ("there are no times of it", [key for key in keys if key not in self.times.precisions]),
                ("target or files cannot hold it", [key for key in self.times.precisions if key not in keys]),
            ):
                if missing:
                    self.reporter.say(f"not offered, since {why}: {', '.join(missing)}")
            offers = [precision for precision in offers if precision.key in self.times.precisions]
        return {precision.name: precision for precision in offers}

    def _choices(self) -> dict[str, list[Choice]]:
        """By layer what it would cost and lose at each precision that is offered."""

        def work() -> dict[str, Any]:
            graph, plan = self._found.graph, self._found.plan
            names = list(plan.weights)
            found: dict[str, dict[str, float]] = {name: {FLOAT: 0.0} for name in names}
            offers = list(self.precisions.values())
            kinds = list(dict.fromkeys(item.kind for item in offers if item.kind != IN_FLOAT.kind))
            with self.reporter.task("layers tried", len(names) * len(kinds)) as task:
                for index, kind in enumerate(kinds):
                    alike = [precision for precision in offers if precision.kind == kind]
                    able = [name for name in names if _takes(graph, name, alike[0])]
                    if not able:
                        continue
                    network = self._found if kind == AS_PLANNED else self._all_at(alike[0], able)
                    progress = partial(_counted, task.update, index * len(names))
                    losses = layer_losses(network.graph, network.plan, self._probe(network), able, alike, progress)
                    for name, of_layer in losses.items():
                        found[name].update(of_layer)
            costs = {
                name: {
                    precision.name: {by: layer_cost(graph, plan, name, precision, by) for by in COSTS if by != LATENCY}
                    for precision in offers
                }
                for name in names
            }
            return {"losses": found, "costs": costs}

        title = "Every layer at every precision"
        key = f"layers at {', '.join(self.precisions)}"
        tried = self.stage(key, title, work, lambda r: f"{len(r['losses'])} layers tried")
        return {
            name: [
                Choice(item.name, self._cost(tried, name, item), losses[item.name])
                for item in self.precisions.values()
                if item.name in losses and self._is_timed(name, item)
            ]
            for name, losses in tried["losses"].items()
        }

    def _is_timed(self, name: str, precision: Precision) -> bool:
        return self.times is None or precision.key in self.times.layers[name]

    def _cost(self, tried: dict[str, Any], name: str, precision: Precision) -> float:
        if self.times is not None:
            return self.times.layers[name][precision.key]
        return float(tried["costs"][name][precision.name][self.budget.by])

    def _probe(self, network: Improved) -> Probe:
        size = min(64, len(self.ranking))
        samples = whole_batches(subset(self.ranking, _PROBED), size)
        kind = loss_kind(network.graph, self.objects.metric)
        return Probe(SwitchedNetwork(network.graph, network.plan), samples, size, kind)

    def _all_at(self, precision: Precision, names: Sequence[str]) -> Improved:
        """The network with every layer at a precision of another kind than the recipe's."""
        values = self.recipe.to_dict()
        for name in names:
            values = with_fragment(values, rule_of(name, **precision.settings))
        return quantised_without_training(self.objects.variant(make_recipe(values)))

    def _shown(self, front: Sequence[Assignment], chosen: Assignment) -> list[Assignment]:
        """Points to be measured: the chosen one, and others evenly along the front."""
        count = min(self.budget.points, len(front))
        places = [round(i * (len(front) - 1) / max(count - 1, 1)) for i in range(count)]
        shown = {front[place].cost: front[place] for place in places} | {chosen.cost: chosen}
        return [shown[cost] for cost in sorted(shown)]

    def _point(self, item: Assignment, whole: float) -> dict[str, Any]:
        recipe = self._recipe(item)

        def work() -> dict[str, Any]:
            objects = self.objects.variant(recipe)
            found = quantised_metric(objects, quantised_without_training(objects), self.ranking)
            return {"metric": found}

        self.reporter.stages += 1
        title = f"A network of {item.cost / whole:.3f} of the float {self.budget.by}"
        words = self.objects.metric.words
        found = self.stage(
            f"point {recipe.sha()[:16]}", title, work, lambda r: f"{words(r['metric'])} on the tuning set"
        )
        return {**found, "cost": item.cost, "share": item.cost / whole, "loss": item.loss}

    def _confirmed(self, recipe: Recipe) -> float:
        def work() -> dict[str, Any]:
            objects = self.objects.variant(recipe)
            return {"metric": quantised_metric(objects, quantised_without_training(objects), objects.bundle.test)}

        words = self.objects.metric.words
        title = "The network chosen, on the whole test set"
        found = self.stage(f"chosen {recipe.sha()[:16]}", title, work, lambda r: words(r["metric"]))
        return float(found["metric"])

    def _recipe(self, item: Assignment) -> Recipe:
        """The recipe with a rule for every layer that is not as the recipe says."""
        plan, values = self.objects.plan, self.recipe.to_dict()
        for name, chosen in item.names.items():
            precision = self.precisions[chosen]
            settings = dict(precision.settings)
            if precision.bits is not None and plan.weights[name].bits != precision.bits:
                settings["weight"] = {"bits": precision.bits}
            if settings:
                values = with_fragment(values, rule_of(name, **settings))
        return make_recipe(values)


def _counted(update: Callable[[int], None], before: int, done: int) -> None:
    update(before + done)


def _in_all(table: Mapping[str, Any]) -> int:
    return len(LayerTimes.of(table).layers)
