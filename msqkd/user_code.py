"""The user's own Python: factories and functions by path (``package.module:name`` or ``path/to/file.py:name``).

A recipe names networks, datasets, losses and metrics in this way; whatever goes wrong in them is told in one sentence
that begins with the place in the recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

from msqkd.errors import ModelError, MsqkdError, did_you_mean

_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_FILES: dict[str, tuple[tuple[int, int], ModuleType]] = {}  # by module name: time and size of the file, and the module


def find_python(target: str, where: str) -> Callable[..., Any]:
    """The class or function that `target` names.

    Args:
        target: ``package.module:name`` or ``path/to/file.py:name``.
        where: the place in the user's recipe, for messages.

    Raises:
        ModelError: a text of another form, a module that cannot be imported, a name it does not have, or one that
            cannot be called.
    """
    place, _, attribute = target.rpartition(":")
    if not place or not attribute:
        raise ModelError(f"{where}: target '{target}' must be package.module:factory or path/to/file.py:factory")
    module = _import_file(Path(place), where) if place.endswith(".py") else _import_module(place, where)
    found = getattr(module, attribute, None)
    if found is None:
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ModelError(f"{where}: {place} has no '{attribute}'{did_you_mean(attribute, names)}")
    if not callable(found):
        raise ModelError(f"{where}: '{target}' is a {type(found).__name__}; a class or function is needed")
    return found


def make(factory: Callable[..., Any], name: str, args: Mapping[str, Any], where: str) -> Any:
    """What `factory` gives for the keyword arguments `args`; `name` is what messages call it.

    Raises:
        ModelError: it does not take an argument, or fails.
    """
    _check_arguments(factory, name, args, where)
    try:
        return factory(**args)
    except MsqkdError:
        raise
    except Exception as error:
        raise ModelError(f"{where}: '{name}' could not be made: {reason_of(error)}{place_of(error)}") from error


def _check_arguments(factory: Callable[..., Any], name: str, args: Mapping[str, Any], where: str) -> None:
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


def _import_module(name: str, where: str) -> ModuleType:
    # As `python -m` does: the user's own modules are usually in the folder the command is run from.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ModelError(f"{where}: module '{name}' cannot be imported: {reason_of(error)}") from error


def _import_file(path: Path, where: str) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        near = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise ModelError(f"{where}: {path} does not exist{did_you_mean(path.name, near)}")
    # A name of its own, so that two files called model.py do not take each other's place.
    name = f"msqkd_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    status = path.stat()
    stamp = (status.st_mtime_ns, status.st_size)
    known = _FILES.get(name)
    if known is not None and known[0] == stamp:  # network, data and loss of one file are to share its classes
        return known[1]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{where}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: MindSpore looks the source of a Cell up through it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ModelError(f"{where}: {path} cannot be imported: {reason_of(error)}") from error
    _FILES[name] = (stamp, module)
    return module


def reason_of(error: Exception) -> str:
    """The kind of an error and the first line of what it says that says something."""
    lines = [line.strip() for line in str(error).splitlines() if set(line.strip()) - set("-=")]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def place_of(error: Exception) -> str:
    """Where in the user's own code an error arose, as `` (at net.py:12)``; nothing where it was not in a file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_PACKAGE)]
    own = [frame for frame in frames if f"{os.sep}mindspore{os.sep}" not in frame.filename]
    return f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""
