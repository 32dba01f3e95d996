"""Networks by name: msqkd's own, mindcv's, and any Python factory."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple, Optional

from mindspore import nn

from msqkd.errors import MissingDependencyError, ModelError, MsqkdError, did_you_mean
from msqkd.models import cifar_resnet
from msqkd.models.lenet5 import LeNet5

SOURCES = ("msqkd", "mindcv", "python")


class ModelEntry(NamedTuple):
    """A network of msqkd's own: how it is made, and the (C, H, W) it is meant for."""

    factory: Callable[..., nn.Cell]
    input_shape: tuple[int, int, int]


MODELS: dict[str, ModelEntry] = {
    "lenet5": ModelEntry(LeNet5, (1, 32, 32)),
    "resnet20": ModelEntry(cifar_resnet.resnet20, (3, 32, 32)),
    "resnet32": ModelEntry(cifar_resnet.resnet32, (3, 32, 32)),
    "resnet44": ModelEntry(cifar_resnet.resnet44, (3, 32, 32)),
    "resnet56": ModelEntry(cifar_resnet.resnet56, (3, 32, 32)),
    "resnet110": ModelEntry(cifar_resnet.resnet110, (3, 32, 32)),
}
"""Every network of source ``msqkd``; all take num_classes and in_channels."""


def default_input_shape(source: str, name: Optional[str], args: Mapping[str, Any]) -> Optional[tuple[int, int, int]]:
    """The (C, H, W) a network of source ``msqkd`` is meant for, with C from ``in_channels``; None for other sources."""
    if source != "msqkd" or name not in MODELS:
        return None
    channels, height, width = MODELS[name].input_shape
    return args.get("in_channels", channels), height, width


def build_model(source: str, name: Optional[str], args: Mapping[str, Any], where: str = "model") -> nn.Cell:
    """Make a network.

    Args:
        source: ``msqkd`` (one of `MODELS`), ``mindcv`` (a name of ``mindcv.list_models()``) or ``python``.
        name: the network; for ``python`` ``package.module:factory`` or ``path/to/file.py:factory``.
        args: keyword arguments of the factory.
        where: the place in the user's recipe, for messages.

    Raises:
        ModelError: an unknown source, name or argument, a factory that fails or gives something else than a Cell.
        MissingDependencyError: mindcv is wanted and not installed.
    """
    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES)
        raise ModelError(f"{where}: source '{source}' is unknown; allowed: {', '.join(SOURCES)}{hint}")
    if not name:
        needed = "a target such as package.module:factory" if source == "python" else "a name"
        raise ModelError(f"{where}: source {source} needs {needed}")
    find = {"msqkd": _find_own, "mindcv": _find_mindcv, "python": _find_python}[source]
    factory = find(name, where)
    _check_arguments(factory, name, args, where)
    try:
        cell = factory(**args)
    except MsqkdError:
        raise
    except Exception as error:
        raise ModelError(f"{where}: '{name}' could not be made: {_reason(error)}{_place(error)}") from error
    if not isinstance(cell, nn.Cell):
        raise ModelError(f"{where}: '{name}' gave a {type(cell).__name__}; a mindspore.nn.Cell is needed")
    return cell


def _find_own(name: str, where: str) -> Callable[..., nn.Cell]:
    if name not in MODELS:
        raise _unknown(name, MODELS, where, f"allowed: {', '.join(MODELS)}")
    return MODELS[name].factory


def _find_mindcv(name: str, where: str) -> Callable[..., nn.Cell]:
    try:
        mindcv = importlib.import_module("mindcv")
    except ModuleNotFoundError as error:
        if error.name != "mindcv":
            raise ModelError(f"{where}: mindcv cannot be imported: {_reason(error)}") from error
        raise MissingDependencyError(
            f"{where}: source mindcv needs the package mindcv; install it with: pip install 'msqkd[mindcv]'"
        ) from None
    names = mindcv.list_models()
    if name not in names:
        raise _unknown(name, names, where, f"mindcv has {len(names)} others (mindcv.list_models())")

    def create(**args: Any) -> nn.Cell:
        return mindcv.create_model(name, **args)

    return create


def _find_python(target: str, where: str) -> Callable[..., nn.Cell]:
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise ModelError(f"{where}: target '{target}' must be package.module:factory or path/to/file.py:factory")
    module = _import_file(Path(place), where) if place.endswith(".py") else _import_module(place, where)
    factory = getattr(module, attribute, None)
    if factory is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ModelError(f"{where}: {place} has no '{attribute}'{did_you_mean(attribute, names)}")
    if not callable(factory):
        raise ModelError(f"{where}: '{target}' is a {type(factory).__name__}; a class or function is needed")
    return factory


def _import_module(name: str, where: str) -> ModuleType:
    # As `python -m` does: the user's own modules are usually in the folder the command is run from.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(f"{where}: module '{name}' cannot be imported: {_reason(error)}") from error


def _import_file(path: Path, where: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        near = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ModelError(f"{where}: {path} does not exist{did_you_mean(path.name, near)}")
    # A name of its own, so that two files called model.py do not take each other's place.
    name = f"msqkd_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{where}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: MindSpore looks the source of a Cell up through it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelError(f"{where}: {path} cannot be imported: {_reason(error)}") from error
    return module


def _check_arguments(factory: Callable[..., nn.Cell], name: str, args: Mapping[str, Any], where: str) -> None:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a callable without a readable signature: calling it will tell
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    allowed = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY]
    for key in args:
        if key not in allowed:
            listed = ", ".join(allowed) or "none"
            hint = did_you_mean(key, allowed)
            raise ModelError(f"{where}: '{name}' takes no argument '{key}'; allowed: {listed}{hint}")


def _unknown(name: str, names: Iterable[str], where: str, allowed: str) -> ModelError:
    return ModelError(f"{where}: there is no network '{name}'; {allowed}{did_you_mean(name, names)}")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _place(error: Exception) -> str:
    """Where in the factory's own code an error arose, as `` (at net.py:12)``; nothing where it was not in a file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if f"{os.sep}mindspore{os.sep}" not in frame.filename]
    return f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""
