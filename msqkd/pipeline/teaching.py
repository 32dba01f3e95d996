"""The teachers of a recipe, and the loss by which a student imitates them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Optional, Union

import mindspore as ms
from mindspore import nn

from msqkd.checkpoints import LoadReport
from msqkd.data import Arrays, as_tuple
from msqkd.distill.layers import Feature, Links, link_features
from msqkd.distill.losses import DistillLoss, hard_loss
from msqkd.distill.schedule import Schedule
from msqkd.distill.shapes import check_outputs
from msqkd.errors import CaptureError, ModelError
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.ir import Graph
from msqkd.pipeline.build import example_input, load_network, random_weights, training_loss
from msqkd.recipe import DistillationSection, Recipe
from msqkd.train.step import OnFirst
from msqkd.user_code import reason_of


class Teaching:
    """The distillation of a recipe that has one: its teachers, made when first needed, and its losses.

    Args:
        recipe: with a distillation section.
        loaded: where it is noted what each teacher's checkpoint gave it.
    """

    def __init__(self, recipe: Recipe, loaded: dict[str, LoadReport]) -> None:
        assert recipe.distillation is not None
        self.recipe, self.loaded = recipe, loaded
        self.section: DistillationSection = recipe.distillation
        self.features = [
            Feature(item.student, item.teacher or item.student, item.loss, item.weight, item.of, item.axis)
            for item in self.section.features
        ]

    @property
    def needs_labels(self) -> bool:
        """Whether a training with this distillation looks at the labels."""
        return self.section.needs_labels

    def check(self, student: Graph, sample: Arrays) -> None:
        """Find out before any training whether student and teachers fit each other.

        Args:
            student: the captured network.
            sample: the input for one sample.

        Raises:
            ModelError: a teacher cannot take the student's input, or answers something else than the student.
            PlanError: layers that do not exist, or cannot be compared; a soft loss that cannot fit an output.
        """
        self.words(student)
        for index, net in enumerate(self._others):
            if net is not None:
                self._try(self._place(index), net, [ms.Tensor(array) for array in as_tuple(sample)], student)
        if self.section.combine == "best":
            judged = self.section.outputs[0]
            shape = student.shape(student.outputs[judged])
            if len(shape) != 2:
                raise ModelError(
                    f"distillation.combine: best judges teachers by the cross-entropy of output {judged}, which has "
                    f"shape {shape}; (N, classes) is needed"
                )
        self.links(student)

    def words(self, student: Graph) -> list[str]:
        """Say what the soft loss compares, one sentence an output.

        Raises:
            PlanError: The soft loss cannot fit an output.
        """
        shapes = {number: student.shape(student.outputs[number]) for number in self.section.outputs}
        return check_outputs(shapes, self.section.soft_loss, self.section.axis, "distillation")

    def named_hard_loss(self) -> Optional[nn.Cell]:
        """The loss against the labels where the distillation names one; called with all outputs, then the labels."""
        section = self.section
        if section.hard_loss == "train_loss":
            return None
        named = hard_loss(section.hard_loss, section.label_smoothing or 0.0, section.axis)
        return None if named is None else OnFirst(named)

    def cells(self, student: Graph) -> list[nn.Cell]:
        """The teachers, in evaluation mode; they give the values that features watch behind their outputs.

        Args:
            student: the captured float network with its trained weights, for ``source: self``.
        """
        watched = self.links(student).teachers
        made = []
        for index, net in enumerate(self._others):
            graph = student if net is None else self._graphs[index]
            if graph is None:
                made.append(net)
            else:
                made.append(to_cell(graph, Hooks(observe=watched[index])))
        return made

    def links(self, student: Graph) -> Links:
        """The losses between features for one training, with adapters of their own, and what they watch."""
        graphs = [student if net is None else graph for net, graph in zip(self._others, self._graphs)]
        return link_features(self.features, student, graphs, seed=self.recipe.seed)

    def loss(self, student: Graph, links: Links, steps: int) -> DistillLoss:
        """The loss of a training of so many steps.

        Raises:
            ModelError: as `msqkd.pipeline.build.training_loss`.
        """
        section, several = self.section, isinstance(self.recipe.teacher, list)
        own = section.hard_loss == "train_loss"
        hard = training_loss(self.recipe.train, student, "train") if own else self.named_hard_loss()
        return DistillLoss(
            hard,
            section.soft_loss,
            _over(section.alpha, steps),
            _over(1.0 if section.temperature is None else section.temperature, steps),
            section.outputs,
            links.losses,
            section.balance,
            [item.weight for item in self.recipe.teachers] if several else None,
            section.combine,
            section.axis,
        )

    # -- the networks -----------------------------------------------------------------------------------------------
    def _place(self, index: int) -> str:
        return f"teacher[{index}]" if isinstance(self.recipe.teacher, list) else "teacher"

    @cached_property
    def _others(self) -> list[Optional[nn.Cell]]:
        """The teachers that are not the float network itself; None for that."""
        made: list[Optional[nn.Cell]] = []
        for index, section in enumerate(self.recipe.teachers):
            net = None
            if section.source != "self":
                place = self._place(index)
                net, report = load_network(section, place)
                if report is not None:
                    self.loaded[place] = report
                random_weights(section, {item.name: item.asnumpy() for item in net.get_parameters()}, place)
            made.append(net)
        return made

    @cached_property
    def _graphs(self) -> list[Optional[Graph]]:
        """The graphs of those teachers of which a feature watches something."""
        return [self._watched_graph(index) for index in range(len(self._others))]

    def graph_of(self, index: int) -> Optional[Graph]:
        """The graph of a teacher; None for the float network itself.

        Raises:
            CaptureError: it cannot be captured.
        """
        net = self._others[index]
        if net is None:
            return None
        if self.recipe.teachers[index].source == "mindir":
            graph: Graph = net.graph.copy()
            read_parameters(net, graph)
            return graph
        return capture(net, example_input(self.recipe))

    def _watched_graph(self, index: int) -> Optional[Graph]:
        if all(feature.of != index for feature in self.features):
            return None
        try:
            return self.graph_of(index)
        except CaptureError as error:
            raise ModelError(f"{self._place(index)}: its layers cannot be watched: {error}") from error

    def _try(self, place: str, net: Any, sample: Sequence[ms.Tensor], student: Graph) -> None:
        """Raise ModelError unless a teacher answers what the student is asked."""
        try:
            found = net(*sample)
        except Exception as error:  # MindSpore raises whatever its compiler met
            shapes = " and ".join(str(tuple(item.shape)) for item in sample)
            raise ModelError(
                f"{place}: it cannot take the student's input of shape {shapes}: {reason_of(error)}"
            ) from error
        outputs = found if isinstance(found, tuple) else (found,)
        for number in self.section.outputs:
            if number >= len(outputs):
                raise ModelError(
                    f"{place}: it has {len(outputs)} outputs, and no output {number} for distillation.outputs"
                )
            shape, wanted = tuple(outputs[number].shape), student.shape(student.outputs[number])
            wanted = tuple(1 if size < 0 else size for size in wanted[:1]) + wanted[1:]
            if len(shape) != len(wanted) or any(b not in (a, -1) for a, b in zip(shape, wanted)):
                which = "answers have" if number == 0 else f"output {number} has"
                raise ModelError(
                    f"{place}: its {which} shape {shape}, the student's {wanted}; they must have the same classes"
                )


def _over(value: Union[float, dict[str, Any]], steps: int) -> Union[float, Schedule]:
    """A number of the recipe for a training of so many steps."""
    if not isinstance(value, dict):
        return value
    start = float(value["from"])
    return Schedule(value["schedule"], start, float(value.get("to", start)), steps)
