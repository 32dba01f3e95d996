"""Errors a user can act on: one sentence that names the place, what was found and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MsqkdError(Exception):
    """Base of every error caused by the user's input; the command line prints it and exits with code 2."""


class RecipeError(MsqkdError):
    """A recipe that cannot be read, or asks for something impossible."""


class ModelError(MsqkdError):
    """A network that is unknown, or whose factory fails."""


class CheckpointError(MsqkdError):
    """A checkpoint that is missing, damaged, unsafe, or belongs to another network."""


class DataError(MsqkdError):
    """A dataset that is missing, empty, damaged, or does not fit the network."""


class CaptureError(MsqkdError):
    """A network that cannot be turned into a graph."""


class PlanError(MsqkdError):
    """A quantisation rule or setting that cannot be carried out."""


class TrainingError(MsqkdError):
    """A training that diverged or cannot be continued."""


class ExportError(MsqkdError):
    """A model that cannot be written in the requested form."""


class FolderError(ExportError):
    """An output folder that cannot be used: not writable, in use by another process, or full of other files."""


class SimulationError(MsqkdError):
    """A step the simulator cannot compute as the runtime would."""


class MissingDependencyError(MsqkdError):
    """An optional package is needed; the message says which extra installs it."""


def near_misses(name: str, options: Iterable[str], limit: int = 3) -> list[str]:
    """The `options` most similar to `name`, best first (at most `limit`, possibly none)."""
    table = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), list(table), n=limit, cutoff=0.5)
    return [table[key] for key in found]


def did_you_mean(name: str, options: Iterable[str], limit: int = 3) -> str:
    """A sentence end such as ``; did you mean 'conv1' or 'conv2'?`` or, without a near miss, ``''``."""
    found = near_misses(name, options, limit)
    if not found:
        return ""
    return "; did you mean " + " or ".join(f"'{item}'" for item in found) + "?"
