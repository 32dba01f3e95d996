"""One training step, with and without a teacher: a compiled cell that skips the update when the loss is not finite."""

from __future__ import annotations

from typing import Any, Optional

from mindspore import nn, ops

from msqkd.graph.ir import Graph
from msqkd.quant.qat import advance, forget_compilations


class TrainStep(nn.TrainOneStepCell):
    """`nn.TrainOneStepCell` whose network returns the loss, for networks that may hold quantised cells.

    Each call is one step: quantisers begin to quantise when their delay is over (the step is compiled anew then), and
    a step whose loss or gradient is NaN or infinite changes no weight and returns NaN. In GRAPH_MODE without data
    sinking. Where `Model.train` runs another step cell, `msqkd.train.callbacks.ActQuantDelay` begins the quantisation.

    Args:
        network: computes the loss.
        optimizer: over the trainable parameters.
        clip_grad: largest global norm of the gradient; None does not clip.

    Attributes:
        steps_done: number of calls so far; set it when a training is resumed.
    """

    def __init__(self, network: nn.Cell, optimizer: nn.Optimizer, clip_grad: Optional[float] = None) -> None:
        super().__init__(network, optimizer)
        self.steps_done = 0
        self.clip_grad = clip_grad
        self.not_a_number = float("nan")

    def __call__(self, *inputs: Any) -> Any:
        """Run one step and return the loss (scalar Tensor)."""
        if advance(self.quantized_part(), self.steps_done):
            forget_compilations(self)
        loss = super().__call__(*inputs)
        self.steps_done += 1
        return loss

    def quantized_part(self) -> nn.Cell:
        """The cell whose quantisers follow the steps."""
        return self.network

    def construct(self, *inputs):  # type: ignore[no-untyped-def]
        """Forward, backward and update; returns the loss."""
        loss = self.network(*inputs)
        sens = ops.fill(loss.dtype, loss.shape, self.sens)
        gradients = self.grad_reducer(self.grad(self.network, self.weights)(*inputs, sens))
        finite = ops.isfinite(self._sum(loss, gradients))
        if self.clip_grad is not None:
            gradients = ops.clip_by_global_norm(gradients, self.clip_grad)
        if finite:
            loss = ops.depend(loss, self.optimizer(gradients))
        else:
            loss = loss * self.not_a_number
        return loss

    def _sum(self, loss, gradients):  # type: ignore[no-untyped-def]
        """Not finite where anything is: a ReLU hides a NaN from the loss, but not from the gradients."""
        total = loss
        for gradient in gradients:
            total = total + gradient.sum()
        return total


def count_inputs(network: nn.Cell) -> int:
    """How many inputs a cell built from a graph has; 1 for any other."""
    graph = getattr(network, "graph", None)
    return len(graph.inputs) if isinstance(graph, Graph) else 1


class WithLoss(nn.Cell):
    """Loss of a network's answer: ``loss(network(x), labels)``.

    Args:
        network: of any number of inputs and outputs.
        loss: a cell of all outputs, then all labels: ``loss(output_0, output_1, labels)``.
        inputs: how many inputs the network has; what a batch has beyond them are labels. None takes what a cell of
            msqkd knows of itself, and 1 for any other.
    """

    def __init__(self, network: nn.Cell, loss: nn.Cell, inputs: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.loss = network, loss
        self.inputs = count_inputs(network) if inputs is None else inputs

    def construct(self, *batch):  # type: ignore[no-untyped-def]
        """Inputs and labels to a scalar."""
        outputs = self.network(*batch[: self.inputs])
        if isinstance(outputs, tuple):
            return self.loss(*outputs, *batch[self.inputs :])
        return self.loss(outputs, *batch[self.inputs :])


class OnFirst(nn.Cell):
    """A loss of (logits, labels) for a network of several outputs: the first is what it sees."""

    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.loss = loss

    def construct(self, *outputs_and_labels):  # type: ignore[no-untyped-def]
        """All outputs, then the labels, to a scalar."""
        return self.loss(outputs_and_labels[0], outputs_and_labels[-1])
