"""`msqkd search`: a precision for every layer, the least loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import mindspore as ms

from msqkd.analysis.diagnosis import rule_for, with_fragment
from msqkd.analysis.precisions import COSTS, FLOAT, SIZE, layer_choices
from msqkd.analysis.search_report import write_search
from msqkd.analysis.sensitivity import Probe, SwitchedNetwork, loss_kind, whole_batches
from msqkd.data import subset
from msqkd.errors import PlanError
from msqkd.files import write_text
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.ptq import quantised_without_training
from msqkd.pipeline.ranking import quantised_metric, ranking_split, sets_of
from msqkd.pipeline.rundir import RunDirectory
from msqkd.pipeline.stages import Stages
from msqkd.progress import Reporter
from msqkd.quant.algorithms.order import FLOAT_STAGE, STAGES
from msqkd.quant.search import Assignment, Choice, best_within, pareto_front
from msqkd.recipe import Recipe, dump_recipe, make_recipe
from msqkd.targets import get_target

VERB = "search"
FOUND = "searched.yaml"

_PROBED = 256  # samples each layer is tried with at each width
_PORTABLE = "portable_mindir"


@dataclass(frozen=True)
class Budget:
    """What a search may spend.

    Attributes:
        share: of what the float network takes, above 0 and at most 1.
        by: ``size`` of the weights, or ``bops`` (see `msqkd.analysis.precisions.cost_of`).
        points: how many assignments along the front are measured beside the one chosen.
        samples: labelled training samples they are measured on.
    """

    share: float
    by: str = SIZE
    points: int = 4
    samples: int = 2000


def search_recipe(
    recipe: Recipe, output: Path, budget: Budget, reporter: Optional[Reporter] = None, fresh: bool = False
) -> dict[str, Any]:
    """Choose the precision of every weight so that the network loses least within a budget.

    Each layer is tried alone at every width its target and the recipe's files can hold, and losses are taken to add up
    (`msqkd.quant.search`). What is chosen is measured, and so are other points of the front. Everything is kept in the
    folder: run again after an interruption, it goes on.

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
        MsqkdError: whatever else the user can mend.
    """
    late = [name for name in recipe.ptq.methods if STAGES[name] != FLOAT_STAGE]
    if late:
        raise PlanError(
            f"ptq.methods: '{late[0]}' works on the bits a layer has; search without it, and add it to {FOUND}"
        )
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(recipe.seed)
    folder = RunDirectory(output, recipe, fresh, verb=VERB)
    with folder:
        return _Search(Objects(recipe, folder, reporter or Reporter(), train=False), budget).run()


def widths_of(recipe: Recipe) -> tuple[int, ...]:
    """The bits a weight may have: fewer than 8 only where every file of the recipe stores them in fewer."""
    allowed = get_target(recipe.target).weight_bits
    return allowed if set(recipe.export.formats) == {_PORTABLE} else tuple(bits for bits in allowed if bits == 8)


class _Search(Stages):
    def __init__(self, objects: Objects, budget: Budget) -> None:
        super().__init__(objects)
        self.budget, self.unit = budget, COSTS[budget.by]

    def run(self) -> dict[str, Any]:
        objects, budget = self.objects, self.budget
        self.begin(4)
        self.ranking = ranking_split(objects, budget.samples)
        on_test = self.float_network()["accuracy"]
        layers = self._choices()
        whole = sum(next(item.cost for item in choices if item.name == FLOAT) for choices in layers.values())
        front = pareto_front(layers)
        chosen = best_within(front, budget.share * whole, self.unit)
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
            "sets": sets_of(objects, self.ranking),
            "recipe": dump_recipe(recipe),
        }  # fmt: skip
        write_search(result, self.folder.path)
        return result

    def _choices(self) -> dict[str, list[Choice]]:
        widths, by = widths_of(self.recipe), self.budget.by
        if widths == (8,):
            self.reporter.say(
                "weights of 8 bits or float: files of this recipe hold fewer bits in 8 (portable_mindir alone does not)"
            )

        def work() -> dict[str, Any]:
            found = quantised_without_training(self.objects)
            size = min(64, len(self.ranking))
            samples = whole_batches(subset(self.ranking, _PROBED), size)
            network = SwitchedNetwork(found.graph, found.plan)
            probe = Probe(network, samples, size, loss_kind(found.graph, self.objects.metric))
            count = sum(bool(layer.weights) for layer in network.layers)
            with self.reporter.task("layers tried", count) as task:
                layers = layer_choices(found.graph, found.plan, probe, widths, by, task.update)
            return {"layers": {name: [vars(item) for item in choices] for name, choices in layers.items()}}

        key = f"choices by {by}"
        result = self.stage(key, "Every layer at every precision", work, lambda r: f"{len(r['layers'])} layers tried")
        return {name: [Choice(**item) for item in choices] for name, choices in result["layers"].items()}

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
            return {"metric": found, "cost": item.cost, "share": item.cost / whole, "loss": item.loss}

        self.reporter.stages += 1
        title = f"A network of {item.cost / whole:.3f} of the float {self.budget.by}"
        words = self.objects.metric.words
        found: dict[str, Any] = self.stage(
            f"point {recipe.sha()[:16]}", title, work, lambda r: f"{words(r['metric'])} on the tuning set"
        )
        return found

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
        for name, precision in item.names.items():
            node = self.objects.deployed.node(name)
            bits = None if precision == FLOAT else int(precision.split()[0])
            if bits is None:
                values = with_fragment(values, rule_for(node, precision="float"))
            elif plan.weights[name].bits != bits:
                values = with_fragment(values, rule_for(node, weight={"bits": bits}))
        return make_recipe(values)
