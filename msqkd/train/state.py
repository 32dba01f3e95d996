"""The state of a training on disk: written whole, checked when read, exact to the bit."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional
from zipfile import BadZipFile

import mindspore as ms
import numpy as np

from msqkd import parallel
from msqkd.errors import CheckpointError
from msqkd.files import PathLike, write_bytes
from msqkd.quant.qat import PHASES
from msqkd.train.step import TrainStep

_SCHEMA = 2
_META = "__meta__"
_DIGEST = hashlib.sha256().digest_size


class DamagedStateError(CheckpointError):
    """A state file that is not what was written."""


@dataclass
class History:
    """What is told of a training afterwards."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    learning_rate: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    skipped_steps: int = 0
    overflow_steps: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0  # of steps, with the wait for their data
    data_seconds: float = 0.0  # of that wait alone
    start_of_activation_quantisation: Optional[int] = None
    first_loss: Optional[float] = None  # of the first step whose loss was finite
    best_epoch: Optional[int] = None  # the one whose weights the training ends with, where it is not just the last
    pending: list[float] = field(default_factory=list)  # losses since the last entry of `loss`

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> History:
        """From what `asdict` gave, through JSON or not."""
        pairs = {name: [tuple(pair) for pair in held[name]] for name in ("loss", "learning_rate", "accuracy")}
        return cls(**{**held, **pairs})

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data; ``data_share`` is the part of the steps' time in which they waited for data, 0 to 1."""
        hidden = ("pending", "step_seconds", "data_seconds")
        told = {key: value for key, value in asdict(self).items() if key not in hidden}
        return {**told, "data_share": self.data_seconds / self.step_seconds if self.step_seconds else 0.0}


def save_state(step: TrainStep, network: Any, history: History, key: str, path: PathLike) -> None:
    """Write parameters, ranges, optimiser and history; `key` says which training it is."""
    arrays = _of_network(network)
    arrays.update({f"opt/{name}": value for name, value in _arrays(_own(step, network)).items()})
    write_archive(arrays, {"key": key, "steps": step.steps_done, "history": asdict(history)}, path)


def load_state(step: TrainStep, network: Any, key: str, path: PathLike) -> History:
    """Bring parameters, ranges and optimiser back to where `save_state` left them.

    Raises:
        CheckpointError: the file is damaged, or belongs to another training.
    """
    arrays, meta = read_archive(path)
    return _loaded(step, network, key, path, arrays, meta)


def _loaded(
    step: TrainStep, network: Any, key: str, path: PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> History:
    _restore_network(network, key, path, arrays, meta)
    restore(_own(step, network), arrays, "opt/", path)
    step.go_on(int(meta["steps"]))
    return History.of(meta["history"])


def share_state(step: TrainStep, network: Any, history: History) -> History:
    """Bring every worker to where worker 0 is; returns its history."""
    parallel.share_parameters([*network.get_parameters(), *_own(step, network)])
    steps, held = parallel.from_first([step.steps_done, asdict(history)])
    step.go_on(steps)
    return History.of(held)


def previous_file(path: PathLike, number: int) -> Path:
    """Where the state saved `number` saves before the last one is: ``qat.state.1.npz`` beside ``qat.state.npz``."""
    path = Path(path)
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def best_file(path: PathLike) -> Path:
    """Where the weights of the best epoch are: ``qat.state.best.npz`` beside ``qat.state.npz``."""
    path = Path(path)
    return path.with_name(f"{path.stem}.best{path.suffix}")


def save_best(network: Any, key: str, path: PathLike) -> None:
    """Write what the network holds as the best of the training whose state is in `path`."""
    write_archive(_of_network(network), {"key": key}, best_file(path))


def take_best(network: Any, key: str, path: PathLike) -> None:
    """Give the network what `save_best` wrote.

    Raises:
        CheckpointError: the file is damaged, or belongs to another training.
    """
    _restore_network(network, key, best_file(path), *read_archive(best_file(path)))


def keep_previous(path: PathLike, keep: int) -> None:
    """Make place for the next state, so that `keep` of them are there afterwards."""
    for number in range(keep - 1, 0, -1):
        newer = previous_file(path, number - 1)
        if newer.exists():
            os.replace(newer, previous_file(path, number))


def load_newest(
    step: TrainStep, network: Any, key: str, path: PathLike, keep: int, warn: Callable[[str], None]
) -> Optional[History]:
    """`load_state` of the newest state that is whole; what is damaged is said. None where nothing was saved.

    Raises:
        CheckpointError: all are damaged, or one belongs to another training.
    """
    files = [file for file in (previous_file(path, number) for number in range(keep)) if file.exists()]
    for file, older in zip(files, [*files[1:], None]):
        try:
            arrays, meta = read_archive(file)
        except DamagedStateError as error:
            if older is None:
                raise
            warn(f"{file.name} is damaged: the training goes on from the state before it, {older.name} ({error})")
            continue
        return _loaded(step, network, key, file, arrays, meta)
    return None


def write_archive(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], path: PathLike) -> None:
    """Write arrays and JSON-able data as one file with a checksum, whole or not at all."""
    content = json.dumps({"schema": _SCHEMA, **meta}).encode()
    stream = io.BytesIO()
    np.savez(stream, **arrays, **{_META: np.frombuffer(content, np.uint8)})
    data = stream.getvalue()
    write_bytes(path, hashlib.sha256(data).digest() + data)  # one file: a kill between two would look like damage


def read_archive(path: PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_archive` wrote.

    Raises:
        CheckpointError: it is damaged, or was written by another version.
    """
    arrays = _read(path)
    meta = json.loads(arrays.pop(_META).tobytes().decode())
    if meta["schema"] != _SCHEMA:
        raise CheckpointError(f"{path} belongs to another version of msqkd; remove it to start this training over")
    return arrays, meta


def restore(parameters: Iterable[Any], arrays: Mapping[str, np.ndarray], prefix: str, path: PathLike) -> None:
    """Set every parameter that a state has to the array of its name; `path` is where they come from, for messages.

    Raises:
        CheckpointError: one is missing, or has another shape.
    """
    for parameter in of_state(parameters):
        stored = arrays.get(prefix + parameter.name)
        if stored is None or stored.shape != tuple(parameter.shape):
            raise CheckpointError(f"{path} lacks '{parameter.name}'; remove it to start this training over")
        parameter.set_data(ms.Tensor(stored))


def _read(path: PathLike) -> dict[str, np.ndarray]:
    try:
        content = Path(path).read_bytes()
        digest, data = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise DamagedStateError(f"{path} is damaged: its checksum differs; remove it to start this training over")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise DamagedStateError(f"{path} cannot be read ({error}); remove it to start this training over") from error


def _of_network(network: Any) -> dict[str, np.ndarray]:
    return {f"net/{name}": value for name, value in _arrays(network.get_parameters()).items()}


def _restore_network(
    network: Any, key: str, path: PathLike, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    if meta.get("key") != key:
        raise CheckpointError(f"{path} belongs to another training; remove it to start this training over")
    restore(network.get_parameters(), arrays, "net/", path)


def _own(step: TrainStep, network: Any) -> list[Any]:
    """What the step has of its own: the optimiser's moments and step counter, the loss scale."""
    known = {id(parameter) for parameter in network.get_parameters()}
    return [parameter for parameter in step.state_parameters() if id(parameter) not in known]


def of_state(parameters: Iterable[Any]) -> list[Any]:
    """Those of `parameters` that belong into a state: the phases of quantisers follow from the number of steps."""
    return [parameter for parameter in parameters if not parameter.name.endswith(PHASES)]


def _arrays(parameters: Iterable[Any]) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy() for parameter in of_state(parameters)}
