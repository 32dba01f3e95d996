"""The user's own samples: any number of arrays in, any number of labels, from memory or from an object of the user's.

What is read is held against what the network takes, batch by batch: a wrong shape or type is one sentence here, and a
compiler's page later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Optional, Protocol

import numpy as np

from msqkd.data.base import Arrays, InputSpec, Split, as_tuple, class_labels, taken
from msqkd.errors import DataError, did_you_mean
from msqkd.user_code import place_of, reason_of

_READ = 256  # samples a batch where labels are read for themselves


class Source(Protocol):
    """What the user's data may be: anything with these two methods."""

    def __len__(self) -> int:
        """The number of samples."""

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator]) -> tuple[Any, Any]:
        """The samples at `indices` (int64): inputs, and labels.

        Args:
            indices: which samples.
            rng: for random augmentation while training; None everywhere else.

        Returns:
            An array (n, ...) or a tuple of them in the order of the network's inputs (or a mapping by their names), and
            an array (n, ...) of labels or a tuple of them.
        """


class _Items:
    """A dataset of single samples, ``dataset[i]`` -> (inputs, labels), as a source."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator]) -> tuple[Any, Any]:
        """The samples, one by one, stacked."""
        inputs, labels = zip(*(self._dataset[int(index)] for index in indices))
        return _stacked(inputs), _stacked(labels)


def _stacked(samples: Sequence[Any]) -> Any:
    first = samples[0]
    if isinstance(first, Mapping):
        return {key: np.stack([np.asarray(sample[key]) for sample in samples]) for key in first}
    if isinstance(first, (tuple, list)):
        return tuple(np.stack([np.asarray(item) for item in column]) for column in zip(*samples))
    return np.stack([np.asarray(sample) for sample in samples])


class TensorSplit(Split):
    """Samples of the user's own, checked against the inputs of a network.

    Integers become the integer type the network takes, floating numbers likewise; of labels, integers become int32 and
    floating numbers float32. An input of another kind or shape raises DataError.
    """

    classes = ()

    def __init__(
        self, inputs: Any, labels: Any, specs: Sequence[InputSpec] = (), name: str = "data", *, held: bool = True
    ) -> None:
        """Hold arrays in memory, or read from a source.

        Args:
            inputs: an array, a tuple of them, or a mapping by the names of `specs`; a `Source` where `held` is False.
            labels: an array or a tuple of them; None for a source.
            specs: what the network takes; by default what the first sample is.
            name: what messages call it.
            held: whether `inputs` are arrays.

        Raises:
            DataError: the arrays have different lengths, or do not fit `specs`.
        """
        self.name = name
        self._limit: Optional[int] = None
        self._source: Optional[Source] = None if held else inputs
        self._specs = tuple(specs)
        self._inputs: tuple[np.ndarray, ...] = ()
        self._labels: Optional[Arrays] = None
        if held:
            self._inputs = self._checked_inputs(inputs)
            self._labels = self._checked_labels(labels)
            lengths = [len(array) for array in (*self._inputs, *as_tuple(self._labels))]
            if len(set(lengths)) > 1:
                found = " and ".join(map(str, lengths))
                raise DataError(f"{name}: its inputs and labels have {found} samples; all need the same number")
            self._length = lengths[0]
        else:
            self._length = self._length_of(inputs)
        if not held and self._length:
            self.batch(np.arange(min(2, self._length)))
        if not self._specs:
            raise DataError(f"{name} is empty")
        self.shape = self._specs[0].shape

    @classmethod
    def of(cls, data: Any, specs: Sequence[InputSpec], name: str) -> Split:
        """The split of whatever the user gives: arrays, an object with `batch`, or one with ``data[i]``.

        Raises:
            DataError: it is none of these.
        """
        if isinstance(data, Split):
            return data
        if isinstance(data, Mapping):
            if set(data) != {"inputs", "labels"}:
                found = ", ".join(map(str, data)) or "none"
                raise DataError(f"{name}: a mapping has the keys {found}; allowed: inputs and labels")
            return cls(data["inputs"], data["labels"], specs, name)
        if isinstance(data, tuple) and len(data) == 2:
            return cls(data[0], data[1], specs, name)
        if hasattr(data, "__len__") and callable(getattr(data, "batch", None)):
            return cls(data, None, specs, name, held=False)
        if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (str, tuple, np.ndarray)):
            return cls(_Items(data), None, specs, name, held=False)
        raise DataError(
            f"{name} is a {type(data).__name__}; allowed: (inputs, labels), a mapping with the keys inputs and labels, "
            "or an object with __len__ and either batch(indices, rng) or __getitem__"
        )

    @property
    def augmented(self) -> bool:
        """See `Split.augmented`: what a source does with `rng` is not known."""
        return self._source is not None

    def __len__(self) -> int:
        return self._length

    @cached_property
    def labels(self) -> Optional[Arrays]:  # type: ignore[override]
        """The labels of every sample; those of a source are read once, with all its samples."""
        return self._labels if self._source is None else self.labels_of(np.arange(len(self)))

    @property
    def held_labels(self) -> Optional[Arrays]:
        """See `Split.held_labels`; a source does not hold them."""
        return self._labels

    def labels_of(self, indices: np.ndarray) -> Optional[Arrays]:
        """See `Split.labels_of`."""
        if self._source is None:
            assert self._labels is not None
            return taken(self._labels, indices)
        parts = [self.batch(indices[at : at + _READ])[1] for at in range(0, len(indices), _READ)]
        columns = [np.concatenate(column) for column in zip(*map(as_tuple, parts))]
        return tuple(columns) if isinstance(parts[0], tuple) else columns[0]

    def check_labels(self, num_classes: int) -> None:
        """See `Split.check_labels`; those of a source are checked whenever they are read."""
        if self._source is None:
            super().check_labels(num_classes)
        else:
            self._limit = num_classes
            self.batch(np.arange(min(2, len(self))))

    def describe_samples(self) -> str:
        """Such as ``samples of ids 16 int32, mask 16 int32``."""
        return f"samples of {', '.join(map(str, self._specs))}"

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[Arrays, Arrays]:
        """See `Split.batch`; `rng` is handed to a source, arrays in memory have no augmentation."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"{self.name} has samples 0 to {len(self) - 1}, asked for {indices.tolist()}")
        if self._source is None:
            assert self._labels is not None
            inputs = tuple(array[indices] for array in self._inputs)
            return inputs if len(inputs) > 1 else inputs[0], taken(self._labels, indices)
        try:
            found = self._source.batch(indices, rng)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{self.name}: samples {_shown(indices)} cannot be read: {reason_of(error)}{place_of(error)}"
            ) from error
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            what = f"{len(found)} values" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
            raise DataError(f"{self.name}: batch() gave {what}; allowed: the pair (inputs, labels)")
        inputs, labels = self._checked_inputs(found[0]), self._checked_labels(found[1])
        for array in (*inputs, *as_tuple(labels)):
            if len(array) != len(indices):
                raise DataError(f"{self.name}: of {len(indices)} samples asked for, batch() gave {len(array)}")
        if self._limit is not None:
            self._check_limit(labels, indices)
        return inputs if len(inputs) > 1 else inputs[0], labels

    def _check_limit(self, labels: Arrays, indices: np.ndarray) -> None:
        found = class_labels(labels, self.name)
        for index, label in zip(indices, found):
            if not 0 <= label < (self._limit or 0):
                raise DataError(
                    f"{self.name}: label {label} of sample {index} is outside 0 to {(self._limit or 0) - 1}"
                )

    def _length_of(self, source: Any) -> int:
        try:
            return len(source)
        except Exception as error:
            raise DataError(f"{self.name}: its length cannot be had: {reason_of(error)}{place_of(error)}") from error

    # -- what is read, as it is handed on ----------------------------------------------------------------------------
    def _checked_inputs(self, given: Any) -> tuple[np.ndarray, ...]:
        if isinstance(given, Mapping):
            given = self._in_order(given)
        arrays = [
            _array(item, self.name, "an input") for item in (given if isinstance(given, (tuple, list)) else (given,))
        ]
        if not self._specs and all(array.ndim for array in arrays):
            self._specs = tuple(
                InputSpec(f"input {number}", array.shape[1:], _type_of(array)) for number, array in enumerate(arrays)
            )
        if len(arrays) != len(self._specs):
            names = ", ".join(spec.name for spec in self._specs)
            inputs = "input" if len(arrays) == 1 else "inputs"
            raise DataError(
                f"{self.name}: a sample has {len(arrays)} {inputs}, the network takes {len(self._specs)} ({names})"
            )
        return tuple(self._fitted(array, spec) for array, spec in zip(arrays, self._specs))

    def _in_order(self, given: Mapping[Any, Any]) -> tuple[Any, ...]:
        names = [spec.name for spec in self._specs]
        for name in given:
            if name not in names:
                hint = did_you_mean(str(name), names)
                raise DataError(f"{self.name}: the network has no input '{name}'; allowed: {', '.join(names)}{hint}")
        absent = [name for name in names if name not in given]
        if absent:
            raise DataError(f"{self.name}: there is no array for the network's input '{absent[0]}'")
        return tuple(given[name] for name in names)

    def _fitted(self, array: np.ndarray, spec: InputSpec) -> np.ndarray:
        wanted = np.dtype(spec.dtype)
        kinds = {"i": "iu", "f": "f", "b": "b"}[wanted.kind]
        if array.ndim == 0 or array.shape[1:] != spec.shape or array.dtype.kind not in kinds:
            needed = f"{spec.dtype} of shape ({', '.join(['N', *map(str, spec.shape)])})"
            raise DataError(
                f"{self.name}: input '{spec.name}' is {array.dtype} of shape {array.shape}; the network takes {needed}"
            )
        if wanted.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"{self.name}: input '{spec.name}' holds values that are not finite")
        return array.astype(wanted, copy=False)

    def _checked_labels(self, given: Any) -> Arrays:
        if given is None:
            raise DataError(f"{self.name} has no labels; training and evaluation need them")
        if isinstance(given, (tuple, list)) and any(isinstance(item, np.ndarray) for item in given):
            return tuple(self._label(item) for item in given)
        return self._label(given)

    def _label(self, given: Any) -> np.ndarray:
        array = _array(given, self.name, "labels")
        if array.ndim == 0:
            raise DataError(f"{self.name}: labels are a single value; an array with one entry a sample is needed")
        return array.astype(_type_of(array), copy=False)


def _array(given: Any, name: str, what: str) -> np.ndarray:
    """`given` as an array of numbers."""
    try:
        array = np.asarray(given.asnumpy() if hasattr(given, "asnumpy") else given)
    except Exception as error:  # ragged lists
        raise DataError(f"{name}: {what} cannot be made an array: {reason_of(error)}") from error
    if array.dtype.kind not in "iufb":
        raise DataError(f"{name}: {what} has type {array.dtype}; numbers are needed")
    return array


def _type_of(array: np.ndarray) -> str:
    """The type in which numbers of an array's kind are handed on."""
    return {"i": "int32", "u": "int32", "f": "float32", "b": "bool"}[array.dtype.kind]


def _shown(indices: np.ndarray) -> str:
    return f"{indices[0]} to {indices[-1]}" if len(indices) > 2 else ", ".join(map(str, indices))
