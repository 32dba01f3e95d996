"""`msqkd teachers`: the teachers of a recipe beside the network they are to teach, before anything is trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np

from msqkd.analysis.precisions import multiplications
from msqkd.analysis.teachers import accuracy_noise, chosen_teacher, remarks, softness, verdict
from msqkd.data import Split, as_tuple
from msqkd.errors import CaptureError, PlanError
from msqkd.files import write_json
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.ranking import ranking_split
from msqkd.pipeline.stages import Stages, opened
from msqkd.pipeline.teaching import Teaching
from msqkd.progress import Reporter
from msqkd.quant.uses import PRODUCTS, weight_use
from msqkd.recipe import ModelSection, Recipe, TeacherSection
from msqkd.train.evaluate import output_arrays
from msqkd.train.metric import Outputs

VERB = "teachers"
REPORT = "teachers.json"

_ROUNDS, _WARM_UP = 15, 2
_LAYERS = ("Conv2D", "Conv2DTranspose", "Dense", *PRODUCTS)


def compare_teachers(
    recipe: Recipe, output: Path, samples: int = 2000, reporter: Optional[Reporter] = None, fresh: bool = False
) -> dict[str, Any]:
    """Measure what every teacher of a recipe knows more than its network, and what asking it costs.

    Args:
        recipe: with a distillation; its teacher, or list of teachers, are the candidates.
        output: a folder; ``teachers.json`` in it is what is returned.
        samples: training samples, beside the whole test set, that teachers are asked about.
        reporter: where progress is told.
        fresh: forget an earlier comparison in the folder.

    Returns:
        The metric; `student` and, for each of `teachers`, its metric on the test set and on training samples, `gain`
        over the network and the `noise` of that, `softness` of its answers (see `msqkd.analysis.teachers`), its
        `parameters`, the `cost` in products and the `time` of a batch, both as ratios to the network, and `remarks`;
        the number `chosen`, or None; `verdict`.

    Raises:
        PlanError: the recipe has no distillation.
        MsqkdError: whatever else the user can mend.
    """
    if recipe.distillation is None:
        raise PlanError(f"{recipe.name} has no distillation, so no teacher; add 'distillation: {{}}' and a teacher")
    with opened(recipe, output, VERB, reporter, fresh) as objects:
        return _Comparison(objects, samples).run()


class _Comparison(Stages):
    def __init__(self, objects: Objects, samples: int) -> None:
        super().__init__(objects)
        self.samples = samples

    def run(self) -> dict[str, Any]:
        self.begin(2)
        asked = ranking_split(self.objects, self.samples)
        self.float_network()
        found: dict[str, Any] = self.stage(
            "teachers", "Teachers", lambda: teachers_beside(self.objects, asked), lambda result: result["verdict"]
        )
        result = {"name": self.recipe.name, **found}
        write_json(self.folder.file(REPORT), result)
        return result


def teachers_beside(objects: Objects, asked: Split) -> dict[str, Any]:
    """The teachers of a recipe beside its float network, as `compare_teachers` returns it.

    Args:
        objects: of a recipe with a distillation.
        asked: labelled training samples.
    """
    student, metric, test = objects.captured, objects.metric, objects.bundle.test
    section = objects.recipe.distillation
    assert section is not None
    temperature = _first(section.temperature)
    teaching = Teaching(_without_features(objects.recipe), objects.loaded)
    teaching.check(student, objects.bundle.train.batch(np.arange(1))[0])
    network = to_cell(student)
    cells, sections = teaching.cells(student), objects.recipe.teachers
    size, chosen = objects.recipe.data.eval_batch_size, objects.deployed_outputs
    batch = _batch(objects)
    products = _products(student)

    def answers(cell: Any, split: Split) -> Outputs:
        return output_arrays(cell, split, size, chosen)

    exact, known = answers(network, test), answers(network, asked)
    base = metric(exact, test.labels, test.name)
    told = {
        "what": _named(objects.recipe.model),
        "test": base,
        "train": metric(known, asked.labels, asked.name),
        "parameters": _parameters(student),
        "products": products,
    }
    rows = []
    with objects.reporter.task("teachers", len(cells)) as task:
        for number, (cell, source) in enumerate(zip(cells, sections)):
            itself = source.source == "self"
            found, taught = (exact, known) if itself else (answers(cell, test), answers(cell, asked))
            reached = metric(found, test.labels, test.name)
            graph = _graph_of(teaching, number, student)
            row = {
                "place": f"teacher[{number}]" if len(cells) > 1 else "teacher",
                "what": _named(source),
                "itself": itself,
                "test": reached,
                "gain": metric.lost(reached, base),
                "noise": accuracy_noise(found[0], exact[0], np.asarray(test.labels)) if metric.is_accuracy else 0.0,
                "train": metric(taught, asked.labels, asked.name),
                "softness": softness(taught[0], temperature) if temperature and _has_classes(taught) else None,
                "parameters": sum(parameter.size for parameter in cell.get_parameters()),
                "cost": _products(graph) / max(products, 1) if graph is not None else None,
                "time": _time_ratio(cell, network, batch),
            }
            rows.append({**row, "remarks": remarks(row, metric.scale, temperature)})
            task.update(number + 1)
    result = {"metric": metric.to_dict(), "student": told, "teachers": rows, "chosen": chosen_teacher(rows),
              "asked": {"test": len(test), "train": len(asked)}}  # fmt: skip
    return {**result, "verdict": verdict(result)}


def _without_features(recipe: Recipe) -> Recipe:
    """Losses between layers have no part in a comparison of answers."""
    assert recipe.distillation is not None
    return recipe.model_copy(update={"distillation": recipe.distillation.model_copy(update={"features": []})})


def _named(section: Union[ModelSection, TeacherSection]) -> str:
    return section.name or section.source


def _first(temperature: Union[float, dict[str, Any], None]) -> Optional[float]:
    """A temperature, or the one a schedule begins with."""
    return float(temperature["from"]) if isinstance(temperature, dict) else temperature


def _has_classes(answers: Outputs) -> bool:
    return answers[0].ndim == 2 and answers[0].shape[1] > 1


def _graph_of(teaching: Teaching, number: int, student: Graph) -> Optional[Graph]:
    try:
        return teaching.graph_of(number) or student
    except CaptureError:  # it can teach all the same; its products are not known
        return None


def _parameters(graph: Graph) -> int:
    return sum(param.data.size for param in graph.params.values())


def _products(graph: Graph) -> int:
    """The multiplications of all layers with a weight, for one sample."""
    uses = ((node, weight_use(graph, node)) for node in graph.nodes if node.op in _LAYERS)
    return sum(multiplications(graph, node.name, use.index) for node, use in uses if use is not None)


def _batch(objects: Objects) -> tuple[Any, ...]:
    train = objects.bundle.train
    count = min(objects.recipe.train.batch_size, len(train))
    return tuple(map(ms.Tensor, as_tuple(train.batch(np.arange(count))[0])))


def _time_ratio(cell: Any, network: Any, batch: tuple[Any, ...]) -> float:
    """How long a cell takes for a batch, in the time of the network: median of turns, each of both."""
    cell.set_train(False)

    def seconds(one: Any) -> float:
        begin = time.perf_counter()
        found = one(*batch)
        (found if isinstance(found, tuple) else (found,))[0].asnumpy()
        return time.perf_counter() - begin

    for _ in range(_WARM_UP):
        seconds(cell), seconds(network)
    return float(np.median([seconds(cell) / seconds(network) for _ in range(_ROUNDS)]))
