"""The training loop: reproducible from (seed, epoch, step), interruptible at any step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np

from msqkd import parallel
from msqkd.data import Arrays, Split, as_tuple
from msqkd.errors import DataError, TrainingError
from msqkd.graph.cell import Hooks, read_parameters, to_cell
from msqkd.graph.ir import Graph
from msqkd.progress import Reporter, Task
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.evaluate import measured
from msqkd.train.metric import ACCURACY, Metric
from msqkd.train.optimizer import TrainSettings, learning_rates
from msqkd.train.prefetch import ahead
from msqkd.train.state import History, keep_previous, load_newest, save_best, save_state, share_state, take_best
from msqkd.train.step import TrainStep

_SAVE_SECONDS = 120.0  # between two saves within an epoch


@dataclass
class Training:
    """One training to be run.

    Attributes:
        title: for people.
        key: identifies it in its state file (recipe and role).
        network: the cell trained, generated from a graph (it has `graph`).
        step: the compiled step over it; its optimiser has one learning rate a step.
        settings: epochs, batch size and so on.
        train, test: what is trained on, and what the metric is measured on after every epoch.
        seed: of shuffling and augmentation.
        state_file: where the state is kept while it runs.
        eval_batch_size: samples a batch in evaluation.
        activation_delay: the step from which activations are quantised, for the record.
        metric: what is measured after every epoch.
        outputs: numbers of the outputs it is measured on; all by default.
        settled: the step from which the network computes as it will be deployed; `keep_best` looks at no epoch that
            ends before it.
    """

    title: str
    key: str
    network: Any
    step: TrainStep
    settings: TrainSettings
    train: Split
    test: Split
    seed: int
    state_file: Path
    eval_batch_size: int = 256
    activation_delay: Optional[int] = None
    metric: Metric = ACCURACY
    outputs: Optional[Sequence[int]] = None
    settled: int = 0


def steps_per_epoch(split: Split, samples: int) -> int:
    """Whole steps of so many samples a worker in an epoch (the rest is left out, other samples each epoch).

    Raises:
        DataError: the split has fewer samples than one step.
    """
    workers = parallel.size()
    if workers > 1 and len(split) < samples * workers:
        raise DataError(
            f"{split.name} has {len(split)} samples, fewer than one batch of {samples} for each of {workers} workers; "
            "choose a smaller batch_size or accumulate, or fewer workers"
        )
    samples *= workers
    if len(split) < samples:
        raise DataError(
            f"{split.name} has {len(split)} samples, fewer than one batch of {samples}; choose a smaller batch_size or "
            "accumulate"
        )
    return len(split) // samples


def fit(training: Training, reporter: Reporter) -> History:
    """Run (or continue) a training; the network holds the last weights afterwards, or their average where one is kept,
    or those of the best epoch where the settings say so.

    A KeyboardInterrupt saves the state before it goes on; the next call continues at the same step.

    Raises:
        TrainingError: the loss stayed NaN or infinite for `max_bad_steps` steps in a row; says where it arose.
        DataError: too few samples.
    """
    per_epoch = steps_per_epoch(training.train, training.settings.samples_a_step)
    history = History(start_of_activation_quantisation=training.activation_delay)
    if parallel.is_first():
        keep = training.settings.keep
        held = load_newest(training.step, training.network, training.key, training.state_file, keep, reporter.warn)
        history = history if held is None else held
    history = share_state(training.step, training.network, history)
    training.step.align_schedule()  # states of earlier versions were not counted on by skipped steps
    total = training.settings.epoch_size * per_epoch
    with (
        reporter.task(training.title, total, training.step.steps_done) as task,
        _interrupts_between_steps() as check_interrupt,
    ):
        run = _Run(training, history, per_epoch, reporter, check_interrupt)
        try:
            while True:
                run.measure()
                if training.step.steps_done >= total:
                    run.take_result()
                    return history
                run.epoch(task)
        except KeyboardInterrupt:
            if not run.in_step:
                run.save()
            raise


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the function given is called: half a step could not be continued. A second one does not wait.
    All workers of a training call it together, and stop together.

    So does SIGTERM, for while it runs a network MindSpore answers Ctrl-C itself, by sending SIGTERM to the process.
    """
    pressed: list[int] = []

    def check() -> None:
        if parallel.any_worker(bool(pressed)):
            raise KeyboardInterrupt

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield check  # only the main thread hears signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    def __init__(
        self,
        training: Training,
        history: History,
        per_epoch: int,
        reporter: Reporter,
        check_interrupt: Callable[[], None],
    ) -> None:
        self.training, self.history, self.per_epoch, self.reporter = training, history, per_epoch, reporter
        self.check_interrupt = check_interrupt
        optimizer = training.step.optimizer
        self.average = optimizer if isinstance(optimizer, AveragingOptimizer) else None
        self.rates = learning_rates(training.settings, per_epoch)
        self.in_step = False
        self.bad = 0
        self.clock = self.saved = time.monotonic()

    def epoch(self, task: Task) -> None:
        training, step = self.training, self.training.step
        epoch, first = divmod(step.steps_done, self.per_epoch)
        order = np.random.default_rng([training.seed, epoch]).permutation(len(training.train))
        size = training.settings.samples_a_step * parallel.size()
        # What is augmented is drawn a batch at a time, by every worker for itself.
        worker = [parallel.rank()] if parallel.size() > 1 else []

        def batch(index: int) -> tuple[Arrays, Arrays]:
            rng = np.random.default_rng([training.seed, epoch, index, *worker])
            chosen = order[index * size : (index + 1) * size]
            return training.train.batch(parallel.share_of_batch(chosen, training.settings.accumulate), rng)

        step.set_train()
        with ahead(batch, range(first, self.per_epoch)) as batches:
            while True:
                begin = time.monotonic()
                self.check_interrupt()
                following = next(batches, None)
                self.history.data_seconds += time.monotonic() - begin
                if following is None:
                    return
                inputs, labels = following
                loss = self._step(as_tuple(inputs), as_tuple(labels))
                self.history.step_seconds += time.monotonic() - begin
                task.update(
                    step.steps_done,
                    epoch=f"{epoch + 1}/{training.settings.epoch_size}",
                    loss=loss,
                    **self._last_measured(),
                )
                if time.monotonic() - self.saved > _SAVE_SECONDS:
                    self.save()

    def measure(self) -> None:
        """The metric after a whole epoch, unless it is known."""
        training, (epochs, rest) = self.training, divmod(self.training.step.steps_done, self.per_epoch)
        if rest or len(self.history.accuracy) == epochs:
            return
        with self.average.in_use() if self.average is not None else nullcontext():
            found = measured(
                training.network, training.test, training.eval_batch_size, training.metric, training.outputs,
                together=True,
            )  # fmt: skip
            if self._is_best(found):
                self.history.best_epoch = epochs
                if parallel.is_first():
                    save_best(training.network, training.key, training.state_file)
        self.history.accuracy.append((epochs, found))
        self.save()
        self.check_interrupt()

    def _is_best(self, found: float) -> bool:
        """Whether an epoch that reached this is the best so far; of equal ones the first."""
        training, best = self.training, self.history.best_epoch
        if not training.settings.keep_best or training.step.steps_done <= training.settled or np.isnan(found):
            return False
        before = dict(self.history.accuracy).get(best) if best is not None else None
        return before is None or (found > before if training.metric.higher_is_better else found < before)

    def take_result(self) -> None:
        """Give the network, when all is done, what the training ends with."""
        network = self.training.network
        if self.history.best_epoch is not None:
            if parallel.is_first():
                take_best(network, self.training.key, self.training.state_file)
            parallel.share_parameters(list(network.get_parameters()))
        elif self.average is not None:
            self.average.take()

    def _last_measured(self) -> dict[str, float]:
        metric = self.training.metric
        name = metric.name if metric.is_accuracy else f"test {metric.name}"
        return {name: self.history.accuracy[-1][1]} if self.history.accuracy else {}

    def _step(self, inputs: tuple[np.ndarray, ...], labels: tuple[np.ndarray, ...]) -> float:
        training, number = self.training, self.training.step.steps_done
        self.in_step = True
        if not parallel.any_worker(not all(np.isfinite(array).all() for array in inputs)):
            loss = float(training.step(*map(ms.Tensor, (*inputs, *labels))).asnumpy())
        else:
            loss = float("nan")
            training.step.steps_done += 1
            training.step.align_schedule()
        self._record(number, loss)
        self.in_step = False
        if np.isfinite(loss):
            self.bad = 0
            return loss
        self.bad += 1
        self.history.skipped_steps += 1
        if self.bad == 1:
            self.reporter.warn(f"the loss of step {number} is {loss}: the step is skipped")
        if self.bad >= training.settings.max_bad_steps:
            place = non_finite_place(training.network, *inputs)
            raise TrainingError(
                f"{training.title}: the loss is {loss} at step {number} after {self.bad} skipped steps in a row; "
                f"it first arises in {place}; "
                f"lower train.lr, {'' if training.settings.clip_grad else 'set train.clip_grad, '}"
                "or look at the data of these steps"
            )
        return loss

    def _record(self, number: int, loss: float) -> None:
        """Note the loss of a step, and the mean of the finite ones where a line of the log is due."""
        pending = self.history.pending
        if np.isfinite(loss):
            pending.append(loss)
            if self.history.first_loss is None and not self.history.loss:
                self.history.first_loss = loss
        interval = self.training.settings.log_interval
        if pending and ((number + 1) % interval == 0 or number + 1 == len(self.rates)):
            self.history.loss.append((number + 1, float(np.mean(pending))))
            self.history.learning_rate.append((number + 1, float(self.rates[number])))
            pending.clear()

    def save(self) -> None:
        if not parallel.is_first():
            return
        now = time.monotonic()
        self.history.overflow_steps = self.training.step.overflow_steps()
        self.history.seconds += now - self.clock
        self.clock = self.saved = now
        keep_previous(self.training.state_file, self.training.settings.keep)
        save_state(self.training.step, self.training.network, self.history, self.training.key, self.training.state_file)


def non_finite_place(network: Any, *inputs: np.ndarray) -> str:
    """In words, where the first NaN or infinity arises when `network` (built from a graph) sees `inputs`."""
    if not all(np.isfinite(array).all() for array in inputs):
        return "the input batch"
    graph: Graph = network.graph.copy()
    read_parameters(network, graph)
    for name, parameter in graph.params.items():
        if not np.isfinite(parameter.data).all():
            return f"parameter '{name}'"
    values = [output for node in graph.nodes for output in node.outputs[:1]]
    probe = to_cell(graph, Hooks(observe=values))
    probe.set_train(True)
    results = probe(*map(ms.Tensor, inputs))[len(graph.outputs) :]
    for node, result in zip(graph.nodes, results):
        if not np.isfinite(result.asnumpy()).all():
            return f"layer '{node.name}' ({node.op})"
    return "the loss or its gradient"
