"""Layers by name, in the graphs of student and teacher: what a loss between features watches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Optional

from msqkd.distill.features import feature_loss
from msqkd.errors import PlanError, near_misses
from msqkd.graph.ir import Graph, Node
from msqkd.quant.qat import training_graph

_SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Feature:
    """One pair of layers and the loss between them.

    Attributes:
        student, teacher: names of layers: a cell's path, or the name of an operation in the graph.
        loss: a name of `msqkd.distill.features.FEATURE_LOSSES`.
        weight: what the loss is multiplied by.
        of: which teacher, where there are several.
        axis: of the channels in values of three dimensions (`feature_loss`).
    """

    student: str
    teacher: str
    loss: str = "mse"
    weight: float = 1.0
    of: int = 0
    axis: Optional[int] = None


@dataclass(frozen=True)
class Link:
    """A loss between two values the networks give beside their outputs; `msqkd.distill.losses.DistillLoss` takes them.

    Attributes:
        loss: the cell.
        weight: what it is multiplied by.
        of: number of the teacher.
    """

    loss: Any
    weight: float
    of: int


@dataclass(frozen=True)
class Links:
    """What `link_features` found.

    Attributes:
        losses: one a feature.
        student: the student's values to be observed, in the order of `losses`.
        teachers: those of each teacher.
    """

    losses: tuple[Link, ...] = ()
    student: tuple[str, ...] = ()
    teachers: tuple[tuple[str, ...], ...] = ()


def link_features(
    features: Sequence[Feature],
    student: Graph,
    teachers: Sequence[Optional[Graph]],
    where: str = "distillation.features",
    seed: int = 0,
) -> Links:
    """The losses between named layers, and the values networks have to give for them.

    The values are those of the captured graphs. They have the same names in every form that is trained, so they can be
    observed in all: ``quantize_cell(student, plan, observe=links.student)``, ``to_cell(student,
    Hooks(observe=links.student))``. What the device computes as one operation is one layer: a convolution whose
    BatchNorm is folded into it means the value behind the BatchNorm, in the teacher too.

    Args:
        features: the pairs of layers.
        student, teachers: the captured graphs; None for a teacher of which no feature is.
        where: the place in the user's recipe, for messages.
        seed: of the adapters.

    Raises:
        PlanError: a layer that does not exist (with near misses), has several results, or shapes no loss compares.
    """
    of_student = _Layers(student, "the student")
    roles = ["the teacher"] if len(teachers) == 1 else [f"teacher {index}" for index in range(len(teachers))]
    of_teachers = [None if graph is None else _Layers(graph, role) for graph, role in zip(teachers, roles)]
    losses: list[Link] = []
    seen: list[str] = []
    watched: list[list[str]] = [[] for _ in teachers]
    for index, feature in enumerate(features):
        place = f"{where}[{index}]"
        taught = of_teachers[feature.of] if 0 <= feature.of < len(teachers) else None
        if taught is None:
            numbers = [index for index, layers in enumerate(of_teachers) if layers is not None]
            raise PlanError(f"{place}.of: found {feature.of}, allowed: {numbers}, the teachers whose graphs are given")
        mine = of_student.value(feature.student, f"{place}.student")
        other = taught.value(feature.teacher, f"{place}.teacher")
        shapes = student.shape(mine), taught.graph.shape(other)
        loss = feature_loss(feature.loss, *shapes, where=place, seed=seed, axis=feature.axis)
        losses.append(Link(loss, feature.weight, feature.of))
        seen.append(mine)
        watched[feature.of].append(other)
    return Links(tuple(losses), tuple(seen), tuple(map(tuple, watched)))


class _Layers:
    """The layers of a captured graph by name."""

    def __init__(self, graph: Graph, role: str) -> None:
        self.graph, self.role = graph, role

    @cached_property
    def trained(self) -> set[str]:
        """The values between layers, which every form that is trained has."""
        return set(training_graph(self.graph, "fold").values)

    def value(self, name: str, where: str) -> str:
        """The value a layer gives, in the form that is trained."""
        graph = self.graph
        value = self._result(name, where)
        while value not in self.trained:
            readers = graph.consumers(value)
            if len(readers) != 1:
                raise PlanError(
                    f"{where}: '{name}' is inside an operation that is trained as one; name what follows it"
                )
            value = readers[0].output
        kind = graph.values[value].type
        if kind is None or kind.shape[:1] != (-1,) or kind.dtype != "float32":
            found = "no tensor" if kind is None else f"{kind.dtype} of shape {kind.shape}"
            raise PlanError(f"{where}: '{name}' gives {found}; float32 with the batch first is needed")
        return value

    def _result(self, name: str, where: str) -> str:
        graph = self.graph
        inside, far = {node.name for node in graph.nodes if node.name == name}, set(graph.values)
        if not inside:
            inside, far = self._cell(name)
        outer = {value for node in graph.nodes if node.name not in inside for value in node.inputs}
        results = [
            (node.name, value)
            for node in graph.nodes
            if node.name in inside
            for value in node.outputs
            if value in outer or value in graph.outputs
        ]
        if len(results) == 1:
            ((last, value),) = results
            near = [node for node in graph.consumers(value) if not far.intersection(node.outputs)]
            strayed = [node.name for node in near if self._has_strayed(node)]
            if strayed:
                raise PlanError(
                    f"{where}: it cannot be told whether '{strayed[0]}' belongs to '{name}' in {self.role}; name the "
                    f"operation meant, '{last}' or '{strayed[0]}'"
                )
            return value
        if results:
            names = dict.fromkeys(f"'{other}'" for other, _ in results)
            more = ", ..." if len(names) > _SHOWN else ""
            way_out = (
                f"one of {', '.join(list(names)[:_SHOWN])}{more}"
                if len(names) > 1
                else "an operation that reads the one meant"
            )
            raise PlanError(f"{where}: '{name}' has several results in {self.role}; name {way_out}")
        close = near_misses(name, self._names(), limit=5)
        guess = f"near misses: {', '.join(close)}" if close else f"for instance {', '.join(self._names()[:5])}"
        raise PlanError(f"{where}: {self.role}, {graph.name}, has no layer '{name}'; {guess}")

    def _cell(self, path: str) -> tuple[set[str], set[str]]:
        """The names of the operations of a cell, and the values that are computed behind layers after it.

        The compiler reads equal code once, so that an operation without parameters can say that it is in another cell.
        Layers with parameters know their place: what is said to be in the cell and comes behind a layer of another one
        is not, and what lies between two operations of the cell without such a layer is.
        """
        graph = self.graph
        within = {node.name for node in graph.nodes if f"{node.cell_path}.".startswith(f"{path}.")}
        inside: set[str] = set()
        near: set[str] = set()  # values computed from those of the cell, without a layer of another one
        far: set[str] = set()
        for node in graph.nodes:
            has_parameters = bool(graph.param_inputs(node))
            if node.name in within and (has_parameters or not far.intersection(node.inputs)):
                inside.add(node.name)
                near.update(node.outputs)
            elif far.intersection(node.inputs) or (has_parameters and near.intersection(node.inputs)):
                far.update(node.outputs)
            elif near.intersection(node.inputs):
                near.update(node.outputs)
        needed: set[str] = set()
        for node in reversed(graph.nodes):
            if node.name in inside or (near.intersection(node.outputs) and needed.intersection(node.outputs)):
                inside.add(node.name)
                needed.update(node.inputs)
        return inside, far

    def _has_strayed(self, node: Node) -> bool:
        """Whether an operation is not in the cell it says it is in."""
        placed = not node.cell_path or bool(self.graph.param_inputs(node))
        return not placed and node.name not in self._cell(node.cell_path)[0]

    def _names(self) -> list[str]:
        names: dict[str, None] = {}
        for node in self.graph.nodes:
            names.update(dict.fromkeys((*_around(node.cell_path), node.cell_path or node.name, node.name)))
        return list(names)


def _around(path: str) -> list[str]:
    """The cells around a cell, from the outermost: ``layer1.0.conv`` is in ``layer1`` and ``layer1.0``."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]
