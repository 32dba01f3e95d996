"""One training step, with and without a teacher: a compiled cell that skips the update when the loss is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd import parallel
from msqkd.errors import TrainingError
from msqkd.graph.ir import Graph
from msqkd.quant.qat import advance, forget_compilations
from msqkd.train.decay import check_step_sizes
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.statistics import SharedStatistics

_gathered = ops.MultitypeFuncGraph("gathered_gradient")


@_gathered.register("Tensor", "Tensor", "Tensor")
def _gather(first, held, gradient):  # type: ignore[no-untyped-def]
    """The sum so far, begun anew with the first part (what was held may be NaN)."""
    return ops.assign(held, ops.where(first, gradient, held + gradient))


_multiplied = ops.MultitypeFuncGraph("multiplied_gradient")


@_multiplied.register("Tensor", "Tensor")
def _multiply(factor, gradient):  # type: ignore[no-untyped-def]
    return gradient * factor


@dataclass(frozen=True)
class LossScale:
    """What the loss is multiplied by before the backward pass, so that float16 gradients do not vanish.

    A dynamic scale is halved at a step whose gradients overflow, which is skipped, and doubled after `window` steps
    without one, between 1 and 2²⁴ (Micikevicius et al., arXiv:1710.03740).
    """

    value: float = 1.0
    dynamic: bool = False
    window: int = 2000

    @classmethod
    def of(cls, given: Union[float, str, None]) -> LossScale:
        """From a recipe's ``loss_scale``: a number, ``dynamic`` (from 2¹⁶ on), or None for none."""
        return cls(2.0**16, True) if given == "dynamic" else cls(float(given or 1.0))


class TrainStep(nn.TrainOneStepCell):
    """`nn.TrainOneStepCell` whose network returns the loss, for networks that may hold quantised cells.

    Each call is one step: quantisers begin to quantise when their delay is over (the step is compiled anew then), and
    a step whose loss or gradient is NaN or infinite changes no weight and returns NaN. The optimiser counts such a step
    too, so that the learning rate of every step is that of the schedule. In GRAPH_MODE without data sinking. Where
    `Model.train` runs another step cell, `msqkd.train.callbacks.ActQuantDelay` begins the quantisation.

    Args:
        network: computes the loss.
        optimizer: over the trainable parameters.
        clip_grad: largest global norm of the gradient; None does not clip.
        accumulate: parts a batch is computed in, one after the other, for one update with the mean of their gradients:
            the memory is that of one part. A batch needs a multiple of as many samples.
        loss_scale: for a network that computes in float16.

    Attributes:
        steps_done: number of calls so far; `go_on` sets it when a training is resumed.

    Raises:
        TrainingError: the optimizer decays step sizes that are trained (`msqkd.decay_groups` leaves them out); at a
            call, where a batch cannot be cut into equal parts.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: nn.Optimizer,
        clip_grad: Optional[float] = None,
        accumulate: int = 1,
        loss_scale: LossScale = LossScale(),
    ) -> None:
        super().__init__(network, optimizer)
        check_step_sizes(self.quantized_part(), optimizer)
        self.steps_done = 0
        self.clip_grad = clip_grad
        self.not_a_number = float("nan")
        self.has_others = parallel.size() > 1
        if self.has_others:
            self.mean = parallel.Mean()
            if ms.get_context("device_target") == "CPU":  # elsewhere MindSpore joins the messages itself
                self.grad_reducer = parallel.Means([tuple(weight.shape) for weight in self.weights])
            self.statistics = SharedStatistics(self.quantized_part(), optimizer)
        self.parts = accumulate
        self.map_gradients = ops.HyperMap()
        if accumulate > 1:
            self.part = _counter("part")
            self.loss_sum = _state("loss_sum", 0.0)
            self.gradient_sums = self.weights.clone(prefix="gathered", init="zeros")
        self.scales = loss_scale.dynamic or loss_scale.value != 1.0
        self.dynamic, self.window = loss_scale.dynamic, loss_scale.window
        if self.scales:
            self.loss_scale = _state("loss_scale", loss_scale.value)
        counting = optimizer.optimizer if isinstance(optimizer, AveragingOptimizer) else optimizer
        self.counts = hasattr(counting, "global_step")
        if self.counts:
            self.scheduled_step = counting.global_step
        if loss_scale.dynamic:
            self.steps_of_scale, self.overflows = _counter("steps_of_scale"), _counter("overflows")

    def __call__(self, *inputs: Any) -> Any:
        """Run one step and return the loss (scalar Tensor), the mean over the parts of the batch."""
        if advance(self.quantized_part(), self.steps_done):
            forget_compilations(self)
        loss = super().__call__(*inputs) if self.parts == 1 else self._in_parts(inputs)
        if self.has_others:
            self.statistics.share()
        self.steps_done += 1
        return loss

    def go_on(self, steps: int) -> None:
        """Go on after `steps` steps, with the quantisers as they were at the last of them."""
        self.steps_done = steps
        if steps and advance(self.quantized_part(), steps - 1):
            forget_compilations(self)

    def _in_parts(self, inputs: tuple[Any, ...]) -> Any:
        size, rest = divmod(len(inputs[0]), self.parts)
        if rest or not size:
            raise TrainingError(f"a batch of {len(inputs[0])} samples cannot be cut into {self.parts} equal parts")
        self.part.set_data(ms.Tensor(np.int32(0)))  # an interrupted step may have left it elsewhere
        for start in range(0, size * self.parts, size):
            loss = super().__call__(*(item[start : start + size] for item in inputs))
        return loss

    def align_schedule(self) -> None:
        """Give the next step the learning rate of its number, `steps_done`."""
        if self.counts:  # `set_data` does not reach a counter that a compiled step has written before
            ops.assign(self.scheduled_step, ms.Tensor(np.full(self.scheduled_step.shape, self.steps_done, np.int32)))

    def quantized_part(self) -> nn.Cell:
        """The cell whose quantisers follow the steps."""
        return self.network

    def state_parameters(self) -> list[Any]:
        """What changes from step to step beside the network: the optimiser's parameters, and the loss scale."""
        own = [self.loss_scale, self.steps_of_scale, self.overflows] if self.dynamic else []
        return [*self.optimizer.get_parameters(), *own]

    def overflow_steps(self) -> int:
        """How many steps a dynamic loss scale has skipped so far."""
        return int(self.overflows.asnumpy()) if self.dynamic else 0

    def construct(self, *inputs):  # type: ignore[no-untyped-def]
        """Forward, backward and, at the end of a batch, update; returns the loss."""
        loss = self.network(*inputs)
        sens = ops.fill(loss.dtype, loss.shape, self.sens)
        if self.scales:
            sens = sens * self.loss_scale
        gradients = self.grad(self.network, self.weights)(*inputs, sens)
        if self.parts == 1:
            return self._update(loss, gradients, 1.0)
        first = self.part == 0
        loss = ops.assign(self.loss_sum, ops.where(first, loss, self.loss_sum + loss))
        gradients = self.map_gradients(ops.partial(_gathered, first), self.gradient_sums, gradients)
        part = ops.assign_add(self.part, 1)
        mean = loss / self.parts
        if part == self.parts:
            mean = self._update(mean, gradients, 1.0 / self.parts)
        return mean

    def _update(self, loss, gradients, share):  # type: ignore[no-untyped-def]
        """Change the weights, unless something is not finite; `share` is what a gradient counts."""
        gradients = self.grad_reducer(gradients)
        if self.has_others:
            loss = self.mean(loss)
        if self.scales:
            gradients = self.map_gradients(ops.partial(_multiplied, share / self.loss_scale), gradients)
        elif self.parts > 1:
            gradients = self.map_gradients(ops.partial(_multiplied, ops.fill(loss.dtype, (), share)), gradients)
        finite = ops.isfinite(self._sum(loss, gradients))
        if self.clip_grad is not None:
            gradients = ops.clip_by_global_norm(gradients, self.clip_grad)
        if finite:
            loss = ops.depend(loss, self.optimizer(gradients))
        else:
            loss = self._skipped(loss)
        if self.dynamic:
            loss = ops.depend(loss, self._rescale(finite))
        return loss

    def _skipped(self, loss):  # type: ignore[no-untyped-def]
        """NaN, unless a smaller scale may help: then it is an overflow, which is counted by itself."""
        if self.counts:
            loss = ops.depend(loss, ops.assign_add(self.scheduled_step, ops.ones_like(self.scheduled_step)))
        if self.dynamic:
            overflow = self.loss_scale > 1.0
            counted = ops.assign_add(self.overflows, ops.cast(overflow, ms.int32))
            return ops.depend(ops.where(overflow, loss, loss * self.not_a_number), counted)
        return loss * self.not_a_number

    def _rescale(self, finite):  # type: ignore[no-untyped-def]
        scale = self.loss_scale
        steps = ops.where(finite, self.steps_of_scale + 1, 0)
        grown = steps >= self.window
        wider = ops.where(grown, ops.minimum(scale * 2.0, 2.0**24), scale)
        after = ops.assign(self.loss_scale, ops.where(finite, wider, ops.maximum(scale * 0.5, 1.0)))
        return ops.depend(after, ops.assign(self.steps_of_scale, ops.where(grown, 0, steps)))

    def _sum(self, loss, gradients):  # type: ignore[no-untyped-def]
        """Not finite where anything is: a ReLU hides a NaN from the loss, but not from the gradients."""
        total = loss
        for gradient in gradients:
            total = total + gradient.sum()
        return total


def _state(name: str, value: float) -> Any:
    return ms.Parameter(ms.Tensor(np.float32(value)), name=f"train_step.{name}", requires_grad=False)


def _counter(name: str) -> Any:
    return ms.Parameter(ms.Tensor(np.int32(0)), name=f"train_step.{name}", requires_grad=False)


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
