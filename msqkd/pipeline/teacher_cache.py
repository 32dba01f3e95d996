"""Whether the teachers of a recipe answer from a file, and the training split that has their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Optional

from mindspore import nn

from msqkd import parallel
from msqkd.data import Split
from msqkd.distill.cache import StoredOutput, TaughtSplit, cached_answers
from msqkd.distill.shapes import class_axis
from msqkd.distill.step import CachedTeachers
from msqkd.errors import DataError, PlanError
from msqkd.graph.ir import Graph
from msqkd.progress import Reporter
from msqkd.recipe import DistillationSection, Recipe

_AUTO_BYTES = 1 << 30  # auto fills no more of a disk without being asked


class TeacherCache:
    """The cache a recipe asks for.

    Args:
        recipe: with a distillation section.
        split: the training split.
        epochs: how many a teacher is heard in, over all trainings.
        folder: where the files are.
        reporter: is told what is done, and where ``auto`` does nothing why.
    """

    def __init__(self, recipe: Recipe, split: Split, epochs: int, folder: Path, reporter: Reporter) -> None:
        assert recipe.distillation is not None
        self.recipe, self.split_given, self.epochs, self.folder, self.reporter = recipe, split, epochs, folder, reporter
        self.section: DistillationSection = recipe.distillation
        self.used = False
        self._taught: Optional[TaughtSplit] = None

    def decide(self, student: Graph) -> None:
        """Find out whether answers are kept, and say so.

        Raises:
            DataError: they are to be, though the samples are augmented.
            PlanError: the student has too few classes for `cache_top_k`.
        """
        section = self.section
        if section.cache == "off":
            return
        outputs = [self._stored(number, student) for number in section.outputs]
        reason = self._against(outputs)
        if reason and section.cache == "on":
            raise DataError(f"distillation.cache: found 'on', but {reason}; use cache_view: clean, or cache: off")
        self.used = not reason
        self.reporter.say(f"teacher: runs in every step, since {reason}" if reason else "teacher: its answers are kept")

    @cached_property
    def teachers(self) -> CachedTeachers:
        """What a training step takes in the place of the teachers."""
        several = len(self.recipe.teachers) if isinstance(self.recipe.teacher, list) else None
        return CachedTeachers(several, tuple(self.section.outputs))

    def split(self, teachers: Sequence[nn.Cell]) -> Split:
        """The training split with the answers of `teachers`, which are computed where there are none yet.

        Of several workers the first computes them all, and the others read its files.
        """
        if self._taught is None:
            caches = []
            if not parallel.is_first():
                parallel.wait()
            for index, (teacher, section) in enumerate(zip(teachers, self.recipe.teachers)):
                title = f"answers of teacher {index}" if len(teachers) > 1 else "answers of the teacher"
                with self.reporter.task(title, len(self.split_given)) as task:
                    caches.append(
                        cached_answers(
                            teacher,
                            self.split_given,
                            self.folder / f"teacher{index}.logits.npy",
                            outputs=self.section.outputs,
                            batch_size=self.recipe.data.eval_batch_size,
                            top_k=self.section.cache_top_k,
                            axis=self.section.axis,
                            origin=json.dumps(section.model_dump(exclude={"weight"}), sort_keys=True),
                            say=self.reporter.warn,
                            progress=task.update,
                        )
                    )
            if parallel.is_first():
                parallel.wait()
            self._taught = TaughtSplit(self.split_given, caches)
        return self._taught

    def _stored(self, number: int, student: Graph) -> StoredOutput:
        shape, top_k = student.shape(student.outputs[number]), self.section.cache_top_k
        axis = class_axis(len(shape), self.section.axis)
        if top_k is not None and not (len(shape) > 1 and top_k < shape[axis]):
            raise PlanError(
                f"distillation.cache_top_k: found {top_k}, allowed: less than the classes, {shape[axis]}, of output "
                f"{number}"
            )
        return StoredOutput(number, (1, *(max(size, 1) for size in shape[1:])), top_k, axis)

    def _against(self, outputs: Sequence[StoredOutput]) -> str:
        """Why answers are not kept."""
        if self.section.features:
            return "losses between layers need it there"
        if self.split_given.augmented and self.section.cache_view == "same":
            what = f"{self.split_given.name} is augmented" if self.recipe.data.augment else "its samples may change"
            return f"{what} and every view has an answer of its own"
        if self.section.cache == "on":
            return ""
        if self.epochs < 2:
            return "it is asked only once for each sample"
        size = sum(4 * prod(shape) for output in outputs for _, _, shape in output.fields) * len(self.split_given)
        if size * len(self.recipe.teachers) > _AUTO_BYTES:
            return f"its answers would take {size * len(self.recipe.teachers) / 2**30:.1f} GiB"
        return ""
