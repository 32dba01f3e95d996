"""A teacher's answers to a training set: computed once, kept on disk, and given to every step in the teacher's place.

The file is a memory-mapped .npy with one record a sample, in the order of the split. Beside it a .json says which
teacher and which data it belongs to, and holds a checksum of every block of samples. While answers are missing the
file has another name, and grows block by block: what is interrupted goes on with the block it was at.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Optional

import numpy as np
from mindspore import nn

from msqkd.data import Arrays, Split, as_tuple
from msqkd.data.base import Subset
from msqkd.distill.shapes import class_axis
from msqkd.errors import DataError, ModelError, PlanError
from msqkd.files import PathLike, write_json
from msqkd.train.evaluate import input_batches, output_arrays

_SCHEMA = 1
_BLOCKS = 100  # at most so many, each of whole batches
_FINGERPRINT_BYTES = 1 << 30  # of samples that are read to recognise the data
_WORDS = {"teacher": "of another teacher", "data": "to other data"}


def compress(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `top_k` largest logits (..., K), their classes int64 (..., K), and what stands for all others (...).

    That is the logarithm of the mean of the others' exponentials: given to each of them it keeps the probability they
    have together, and spreads it evenly. `logits` are float (..., classes), with more classes than `top_k`.
    """
    order = np.argsort(-logits, axis=-1, kind="stable")
    classes = order[..., :top_k]
    others = np.take_along_axis(logits, order[..., top_k:], -1).astype(np.float64)
    peak = np.maximum(others[..., :1], -np.finfo(np.float64).max)  # where all others are -inf, so is their mean
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(others - peak).mean(-1)) + peak[..., 0]
    return np.take_along_axis(logits, classes, -1), classes, rest.astype(logits.dtype)


def expand(top: np.ndarray, classes: np.ndarray, rest: np.ndarray, count: int) -> np.ndarray:
    """Logits (..., count) from what `compress` gave."""
    logits = np.repeat(rest[..., None], count, axis=-1)
    np.put_along_axis(logits, classes.astype(np.int64), top, -1)
    return logits


@dataclass(frozen=True)
class StoredOutput:
    """How one output of a teacher is kept.

    Attributes:
        number: which output.
        shape: what a sample has of it: (rows, ...), one row where the output has the samples first.
        top_k: keep so many of the classes (`compress`); None keeps all.
        axis: of the classes in `shape`.
    """

    number: int
    shape: tuple[int, ...]
    top_k: Optional[int] = None
    axis: int = -1

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.shape[self.axis]

    @property
    def positions(self) -> tuple[int, ...]:
        """`shape` without the classes."""
        axis = self.axis % len(self.shape)
        return (*self.shape[:axis], *self.shape[axis + 1 :])

    @property
    def fields(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """The fields of a sample's record."""
        if self.top_k is None:
            return [(f"output{self.number}", "<f4", self.shape)]
        kept = (*self.positions, self.top_k)
        index = "<u2" if self.classes <= 1 << 16 else "<i4"
        names = [f"{name}{self.number}" for name in ("top", "classes", "rest")]
        return [(names[0], "<f4", kept), (names[1], index, kept), (names[2], "<f4", self.positions)]

    def write(self, records: np.ndarray, answers: np.ndarray) -> None:
        """Put `answers`, float32 (n, *shape), into n records."""
        place = self.axis % len(self.shape) + 1
        parts = (answers,) if self.top_k is None else compress(np.moveaxis(answers, place, -1), self.top_k)
        for (name, _, _), part in zip(self.fields, parts):
            records[name] = part

    def read(self, records: np.ndarray) -> np.ndarray:
        """The answers float32 (n, *shape) of n records."""
        parts = [np.ascontiguousarray(records[name], dtype) for (name, _, _), dtype in zip(self.fields, _NATIVE)]
        if self.top_k is None:
            return parts[0]
        logits = expand(parts[0], parts[1], parts[2], self.classes)
        return np.ascontiguousarray(np.moveaxis(logits, -1, self.axis % len(self.shape) + 1))


_NATIVE = (np.float32, np.int64, np.float32)


class AnswerCache:
    """The answers of one teacher by the sample's number in the split, from a file that `cached_answers` has checked."""

    def __init__(self, path: Path, outputs: Sequence[StoredOutput]) -> None:
        self.path, self.outputs = path, tuple(outputs)
        self._records = np.load(path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._records)

    def answers(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Float32 (n, rows, ...) for each output; logits of one row a sample are (n, 1, classes)."""
        records = self._records[indices]
        return tuple(output.read(records) for output in self.outputs)


class TaughtSplit(Split):
    """A training split whose samples carry, behind their labels, what each teacher answers."""

    def __init__(self, split: Split, caches: Sequence[AnswerCache]) -> None:
        """`caches` hold an answer for each sample of `split`; one cache a teacher."""
        self._split, self._caches = split, tuple(caches)
        self.name, self.labels, self.classes, self.shape = split.name, split.labels, split.classes, split.shape

    @property
    def augmented(self) -> bool:
        """See `Split.augmented`; the answers are those to the samples as they are."""
        return self._split.augmented

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[Arrays, Arrays]:
        """See `Split.batch`; the answers follow the labels, as `AnswerCache.answers` gives them."""
        inputs, labels = self._split.batch(indices, rng)
        answers = [answer for cache in self._caches for answer in cache.answers(np.asarray(indices, np.int64))]
        return inputs, (*as_tuple(labels), *answers)


def cached_answers(
    teacher: nn.Cell,
    split: Split,
    path: PathLike,
    *,
    outputs: Sequence[int] = (0,),
    batch_size: int = 256,
    top_k: Optional[int] = None,
    axis: Optional[int] = None,
    origin: str = "",
    say: Callable[[str], None] = print,
    progress: Optional[Callable[[int], None]] = None,
) -> AnswerCache:
    """The teacher's answers to every sample of a split, without augmentation; those missing in the file are computed.

    A file of another teacher, of other data or with another `top_k`, and one that is damaged, is made anew. The data
    is recognised by its samples: all of them up to 1 GiB, beyond that as many, evenly spaced.

    Args:
        teacher: in evaluation mode afterwards.
        split: its samples are numbered as here.
        path: of the .npy; the .json is beside it.
        outputs: numbers of the outputs kept.
        batch_size: samples the teacher sees at a time.
        top_k: keep so many logits a row, and the probability of all others together (`compress`).
        axis: Axis of the classes in the outputs, for `top_k`, as in `msqkd.distill.losses.DistillLoss`.
        origin: whatever else tells the teacher from others with the same weights.
        say: is told, in a sentence, why a file is made anew.
        progress: called with the number of samples done.

    Raises:
        PlanError: `top_k` is not below the number of classes.
        ModelError: an answer is not finite.
        DataError: the file cannot be written.
    """
    identity = {
        "teacher": _weights(teacher, origin), "data": _fingerprint(split), "samples": len(split),
        "outputs": list(outputs), "dtype": "float32", "top_k": top_k,
        "axis": None if top_k is None else "by rank" if axis is None else axis,
    }  # fmt: skip
    file = _File(Path(path), identity, min(batch_size, len(split)))
    try:
        reason = file.open()
        if reason:
            say(f"{path} {reason}; it is made anew")
        while not file.complete:
            first = file.done
            found = _answers(teacher, split, np.arange(first, min(first + file.block, len(split))), batch_size, outputs)
            file.append(found, top_k, axis)
            if progress is not None:
                progress(file.done)
        file.finish()
        return AnswerCache(file.path, file.outputs)
    except OSError as error:
        raise DataError(f"{path}, the teacher's answers, cannot be written: {error.strerror or error}") from error


class _File:
    """The .npy, under its other name until it is whole, and the .json beside it."""

    def __init__(self, path: Path, identity: dict[str, Any], batch_size: int) -> None:
        self.path, self.identity = path, identity
        self.about, self.part = path.with_suffix(".json"), path.with_name(f"{path.name}.part")
        self.block = batch_size * -(-identity["samples"] // (batch_size * _BLOCKS))
        self.outputs: list[StoredOutput] = []
        self.checksums: list[str] = []

    @property
    def done(self) -> int:
        """How many samples have their answers."""
        return min(len(self.checksums) * self.block, self.identity["samples"])

    @property
    def complete(self) -> bool:
        return self.done == self.identity["samples"]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype([field for output in self.outputs for field in output.fields])

    def open(self) -> str:
        """Take what is there; returns why it cannot be used, in which case it is removed."""
        present = [file for file in (self.path, self.part) if file.exists()]
        if not present:
            return ""
        own = self.block
        reason = self._taken(present[0])
        if reason:
            self.block, self.outputs, self.checksums = own, [], []
            for file in (self.path, self.part, self.about):
                file.unlink(missing_ok=True)
        return reason

    def _taken(self, file: Path) -> str:
        try:
            held = json.loads(self.about.read_text(encoding="utf-8"))
            identity, self.block, checksums = held["identity"], int(held["block"]), list(held["checksums"])
            outputs = [
                StoredOutput(each["number"], tuple(each["shape"]), each["top_k"], each.get("axis", -1))
                for each in held["outputs"]
            ]
            if held["schema"] != _SCHEMA or self.block < 1:
                raise ValueError("another version")
            differing = [key for key in self.identity if identity.get(key) != self.identity[key]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"has no checksums beside it that can be read ({type(error).__name__})"
        if differing:
            return f"holds answers {_WORDS.get(differing[0], f'with another {differing[0]}')}"
        self.outputs = outputs
        with file.open("rb") as stream:
            if stream.read(len(self._header())) != self._header():
                return "is damaged: its header is not the one written"
            for index, expected in enumerate(checksums):
                size = min(self.block, self.identity["samples"] - self.done) * self.dtype.itemsize
                if hashlib.sha256(stream.read(size)).hexdigest() != expected:
                    return f"is damaged: the checksum of block {index} of {len(checksums)} differs"
                self.checksums.append(expected)
        if file == self.path and not self.complete:
            return "is damaged: answers are missing"
        return ""

    def append(self, answers: Sequence[np.ndarray], top_k: Optional[int], axis: Optional[int]) -> None:
        """Write the next block; `answers` are float32 (n, rows, ...), one array an output."""
        if not self.outputs:
            numbers = self.identity["outputs"]
            self.outputs = [
                StoredOutput(n, found.shape[1:], top_k, class_axis(found.ndim - 1, axis))
                for n, found in zip(numbers, answers)
            ]
            for output in self.outputs:
                if top_k is not None and not 1 <= top_k < output.classes:
                    raise PlanError(
                        f"top_k is {top_k}; allowed: 1 to {output.classes - 1}, less than the classes of output "
                        f"{output.number}"
                    )
        records = np.empty(len(answers[0]), self.dtype)
        for output, found in zip(self.outputs, answers):
            output.write(records, found)
        header, content = self._header(), records.tobytes()
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with self.part.open("r+b" if self.checksums else "wb") as stream:
            if not self.checksums:
                stream.write(header)
            stream.truncate(len(header) + self.done * self.dtype.itemsize)  # a killed run may have written on
            stream.seek(0, os.SEEK_END)
            stream.write(content)
            _synced(stream)
        self.checksums.append(hashlib.sha256(content).hexdigest())
        held = {"schema": _SCHEMA, "identity": self.identity, "outputs": [asdict(output) for output in self.outputs]}
        write_json(self.about, {**held, "block": self.block, "checksums": self.checksums})

    def finish(self) -> None:
        """Give the whole file its name."""
        if self.part.exists():
            os.replace(self.part, self.path)

    def _header(self) -> bytes:
        stream = io.BytesIO()
        shape = (self.identity["samples"],)
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
        return stream.getvalue()


def _synced(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _answers(
    teacher: nn.Cell, split: Split, indices: np.ndarray, batch_size: int, outputs: Sequence[int]
) -> list[np.ndarray]:
    """The answers to some samples, float32 (n, rows, ...)."""
    count = len(indices)
    # A last block smaller than a batch would be compiled anew.
    filled = np.concatenate([indices, np.repeat(indices[-1:], max(min(batch_size, len(split)) - count, 0))])
    results = []
    for number, found in zip(outputs, output_arrays(teacher, Subset(split, filled), batch_size, outputs)):
        rows = found.reshape((len(filled), -1, *found.shape[1:]))[:count].astype(np.float32)
        finite = (np.isfinite(rows) | np.isneginf(rows)).all(axis=tuple(range(1, rows.ndim)))
        if not finite.all():
            sample = int(indices[np.flatnonzero(~finite)[0]])
            raise ModelError(f"the teacher's output {number} for sample {sample} of {split.name} is not finite")
        results.append(rows)
    return results


def _weights(teacher: nn.Cell, origin: str) -> str:
    """SHA-256 of a network's parameters and of where it comes from."""
    digest = hashlib.sha256(origin.encode())
    for parameter in sorted(teacher.get_parameters(), key=lambda parameter: parameter.name):
        _add(digest, parameter.name, [parameter.asnumpy()])
    return digest.hexdigest()


def _fingerprint(split: Split) -> str:
    """SHA-256 of samples of a split, as the network sees them: of all, or of as many as make 1 GiB."""
    one = sum(array.nbytes for array in as_tuple(split.batch(np.arange(1))[0]))
    count = min(len(split), max(_FINGERPRINT_BYTES // max(one, 1), 1))
    chosen = np.unique(np.linspace(0, len(split) - 1, count).round().astype(np.int64))
    digest = hashlib.sha256()
    for batch in input_batches(Subset(split, chosen), 256):
        _add(digest, "", as_tuple(batch))
    return digest.hexdigest()


def _add(digest: Any, name: str, arrays: Iterable[np.ndarray]) -> None:
    for array in arrays:
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array))
