"""The state of a training on disk: written whole, checked when read, exact to the bit."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional
from zipfile import BadZipFile

import mindspore as ms
import numpy as np

from msqkd.errors import CheckpointError
from msqkd.files import PathLike, write_bytes
from msqkd.train.step import TrainStep

_SCHEMA = 2
_META = "__meta__"
_DIGEST = hashlib.sha256().digest_size


@dataclass
class History:
    """What is told of a training afterwards."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    learning_rate: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    skipped_steps: int = 0
    seconds: float = 0.0
    start_of_activation_quantisation: Optional[int] = None
    pending: list[float] = field(default_factory=list)  # losses since the last entry of `loss`

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {key: value for key, value in asdict(self).items() if key != "pending"}


def save_state(step: TrainStep, network: Any, history: History, key: str, path: PathLike) -> None:
    """Write parameters, ranges, optimiser and history; `key` says which training it is."""
    arrays = {f"net/{name}": value for name, value in _arrays(network.get_parameters()).items()}
    arrays.update({f"opt/{name}": value for name, value in _arrays(_own(step, network)).items()})
    meta = {"schema": _SCHEMA, "key": key, "steps": step.steps_done, "history": asdict(history)}
    arrays[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    data = stream.getvalue()
    write_bytes(path, hashlib.sha256(data).digest() + data)  # one file: a kill between two would look like damage


def load_state(step: TrainStep, network: Any, key: str, path: PathLike) -> History:
    """Bring parameters, ranges and optimiser back to where `save_state` left them.

    Raises:
        CheckpointError: the file is damaged, or belongs to another training.
    """
    arrays = _read(path)
    meta = json.loads(arrays.pop(_META).tobytes().decode())
    if meta["schema"] != _SCHEMA or meta["key"] != key:
        raise CheckpointError(f"{path} belongs to another training; remove it to start this training over")
    for prefix, parameters in (("net/", network.get_parameters()), ("opt/", _own(step, network))):
        for parameter in parameters:
            stored = arrays.get(prefix + parameter.name)
            if stored is None or stored.shape != tuple(parameter.shape):
                raise CheckpointError(f"{path} lacks '{parameter.name}'; remove it to start this training over")
            parameter.set_data(ms.Tensor(stored))
    step.steps_done = int(meta["steps"])
    held = meta["history"]
    pairs = {name: [tuple(pair) for pair in held[name]] for name in ("loss", "learning_rate", "accuracy")}
    return History(**{**held, **pairs})


def _read(path: PathLike) -> dict[str, np.ndarray]:
    try:
        content = Path(path).read_bytes()
        digest, data = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            raise CheckpointError(f"{path} is damaged: its checksum differs; remove it to start this training over")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to start this training over") from error


def _own(step: TrainStep, network: Any) -> list[Any]:
    """The optimiser's own parameters: moments, the step counter."""
    known = {id(parameter) for parameter in network.get_parameters()}
    return [parameter for parameter in step.optimizer.get_parameters() if id(parameter) not in known]


def _arrays(parameters: Any) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy() for parameter in parameters}
