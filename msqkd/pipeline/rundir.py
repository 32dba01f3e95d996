"""The folder of a run: what is finished, and for which recipe."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Optional

from msqkd import parallel
from msqkd.errors import ExportError, FolderError, RecipeError
from msqkd.exporters import FORMATS, Format
from msqkd.files import sha256, write_json, write_text
from msqkd.pipeline.lock import LOCK_FILE, lock, release
from msqkd.recipe import Recipe, dump_recipe, make_recipe

_STATE = "state.json"


def export_name(recipe_name: str, form: Format) -> str:
    """The name of a run's file in a format: ``digits_lite.mindir``."""
    return f"{recipe_name}_{form.name.removesuffix('_mindir')}{form.suffix}"


_TRAINED = "float|ptq|ptq_reference|float_ft|float_kd|qat|qat_kd|pretrain"
_EXPORTED = "|".join(".+" + re.escape(export_name("", form)) for form in FORMATS.values())
_OURS = re.compile(
    rf"state\.json|recipe\.yaml|plan\.json|(report|verify|analysis)\.(json|html)|bench\.(json|md)|bench_layers\.json|convert\.json|.+_converter\.ms|(tuned|searched)\.yaml|(tune|search)\.(json|html)|({_TRAINED})\.(ckpt|state(\.(\d+|best))?\.npz)|float\.mindir"
    rf"|{re.escape(LOCK_FILE)}|teacher\d+\.logits\.(npy|npy\.part|json)|{_EXPORTED}"
)
_KEYS = ("verb", "recipe_sha256", "recipe", "stages")
_BEGUN = {_STATE, "recipe.yaml", LOCK_FILE}
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.[a-z]+")  # as msqkd.files.replacing names them


def writable_folder(path: Path) -> Path:
    """`path`, created when needed; found out now, not after the work.

    Raises:
        FolderError: it cannot be created, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"output folder {path} cannot be created: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise FolderError(f"output folder {path} is not writable; choose another with --output")
    return path


class RunDirectory:
    """The output folder of one recipe; a context manager that lets other processes have it afterwards.

    Args:
        path: created when it does not exist.
        recipe: the recipe it belongs to.
        fresh: forget what is there.
        verb: the command that fills it, ``run`` or ``calibrate``.

    Attributes:
        unlocked: why other processes cannot be kept from the folder, in a sentence; None where they are.

    Raises:
        FolderError: the folder cannot be written, or another run is at work in it.
        RecipeError: it holds the run of another recipe; names the settings that differ.
    """

    def __init__(self, path: Path, recipe: Recipe, fresh: bool = False, verb: str = "run") -> None:
        self.path = path
        values: tuple[Any, ...] = (verb, recipe.sha(), recipe.to_dict(), {})
        self.state: dict[str, Any] = dict(zip(_KEYS, values))
        writable_folder(path)
        self.unlocked = lock(path)
        try:
            self._take(recipe, fresh)
        except BaseException:
            release(path)
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        release(self.path)

    def _take(self, recipe: Recipe, fresh: bool) -> None:
        path = self.path
        strangers = [child.name for child in path.iterdir() if not self._is_ours(child)]
        if strangers and (fresh or not (path / _STATE).exists()):
            raise FolderError(
                f"output folder {path} holds other files ({', '.join(sorted(strangers)[:3])}); "
                "choose an empty or new one with --output"
            )
        if fresh:
            self._clear()
        elif (path / _STATE).exists():
            held = self._read()
            if self._check(held, recipe):
                self.state = held
        self._remove_temporaries()
        self._write()
        write_text(path / "recipe.yaml", dump_recipe(recipe))

    @classmethod
    def of_other_worker(cls, path: Path, state: dict[str, Any]) -> RunDirectory:
        """The folder as a worker sees it that writes nothing there: the first one does.

        Args:
            path: the folder.
            state: the first worker's.

        Raises:
            ExportError: this worker does not see the folder.
        """
        if not (path / _STATE).is_file():
            raise ExportError(
                f"output folder {path} is not the first worker's, whose {_STATE} is not there; "
                "all workers need it on one file system: choose a shared folder with --output"
            )
        folder = cls.__new__(cls)
        folder.path, folder.state, folder.unlocked = path, state, None
        return folder

    @classmethod
    def begun(cls, path: Path) -> RunDirectory:
        """The folder of a run, however far it got; nothing in it is changed.

        Raises:
            ExportError: there is no such folder, or no run in it.
            RecipeError: its state is damaged.
        """
        if not (path / _STATE).is_file():
            what = f"it holds no {_STATE}" if path.is_dir() else "there is no such folder"
            raise ExportError(f"{path} is not the folder of a run: {what}; give one that msqkd run has filled")
        folder = cls.__new__(cls)
        folder.path, folder.unlocked = path, None
        folder.state = folder._read()
        return folder

    @classmethod
    def finished(cls, path: Path) -> RunDirectory:
        """The folder of a run that is finished; nothing in it is changed.

        Raises:
            ExportError: there is no such folder, or no finished run in it; says what is missing.
            RecipeError: its state is damaged.
        """
        folder = cls.begun(path)
        if not folder.done("export"):
            done = ", ".join(folder.state["stages"]) or "none"
            raise ExportError(
                f"the run in {path} is not finished: the stage export is missing (done: {done}); "
                f"run msqkd {folder.state['verb']} again with its recipe"
            )
        return folder

    def check_exports(self) -> dict[str, str]:
        """Hold every exported file against the checksum that was recorded; SHA-256 by file name.

        Raises:
            ExportError: a file is missing, or is not the one that was exported.
        """
        recorded: dict[str, str] = self.result("export")["sha256"]
        for name, checksum in recorded.items():
            file = self.path / name
            if not file.is_file():
                raise ExportError(f"{file} is missing, though the run exported it; run it again with --fresh")
            found = sha256(file)
            if found != checksum:
                raise ExportError(
                    f"{file} does not match its checksum in {_STATE}: SHA-256 {found}, when exported {checksum}"
                )
        return dict(recorded)

    def _read(self) -> dict[str, Any]:
        file = self.path / _STATE
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(held, dict) or not set(_KEYS) <= held.keys():
                raise ValueError("it is not the state of a run")
            return held
        except ValueError as error:
            raise RecipeError(f"{file} is damaged ({error}); start over with --fresh") from error

    def _check(self, held: dict[str, Any], recipe: Recipe) -> bool:
        """Return whether the run held is this recipe's; where nothing was done yet the folder is free for another.

        A recipe with another `verify` section goes on with the run: it exports again and is held to the new bounds.
        """
        same_verb = held["verb"] == self.state["verb"]
        if same_verb and held["recipe_sha256"] == recipe.sha():
            return True
        if same_verb and _with_defaults_of_now(held["recipe"]) == recipe.sha():
            held.update({key: self.state[key] for key in ("recipe_sha256", "recipe")})
            return True
        differing = _differences(held["recipe"], recipe.to_dict())
        if same_verb and differing and all(line.startswith("verify.") for line in differing):
            held.update({key: self.state[key] for key in ("recipe_sha256", "recipe")})
            held["stages"].pop("export", None)
            return True
        if not held["stages"] and {child.name for child in self.path.iterdir()} <= _BEGUN:
            return False
        if not same_verb:
            differing.insert(0, f"command: {held['verb']!r} → {self.state['verb']!r}")
        shown = ", ".join(differing[:5]) + (" …" if len(differing) > 5 else "")
        raise RecipeError(
            f"{self.path} holds a run of another recipe (differs in {shown}); "
            "choose another folder with --output, or start over with --fresh"
        )

    def _remove_temporaries(self) -> None:
        """What a killed run left half-written beside its files."""
        for child in self.path.iterdir():
            if _TEMPORARY.fullmatch(child.name):
                child.unlink()

    @staticmethod
    def _is_ours(child: Path) -> bool:
        """Whether a run writes a file of this name."""
        return child.is_file() and bool(_OURS.fullmatch(child.name) or _TEMPORARY.fullmatch(child.name))

    def _clear(self) -> None:
        for child in self.path.iterdir():
            if child.name != LOCK_FILE:  # which this process may hold
                child.unlink()

    def _write(self) -> None:
        write_json(self.path / _STATE, self.state)

    def done(self, stage: str) -> bool:
        """Whether `stage` was finished in this folder."""
        return stage in self.state["stages"]

    def result(self, stage: str) -> Any:
        """What `finish` recorded for a stage."""
        return self.state["stages"][stage]

    def forget(self, stage: str) -> None:
        """Do a stage again; until it is finished again, the folder keeps the earlier result."""
        del self.state["stages"][stage]

    def finish(self, stage: str, result: Any) -> None:
        """Record a finished stage with its JSON-able result; its files are already written."""
        self.state["stages"][stage] = result
        if parallel.is_first():
            self._write()

    def file(self, name: str) -> Path:
        """A file in the folder."""
        return self.path / name


def _with_defaults_of_now(recipe: Any) -> Optional[str]:
    """Return the checksum of a recipe that an earlier version recorded; settings new since then have their defaults."""
    try:
        return make_recipe(recipe).sha()
    except RecipeError:
        return None


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            d
            for key in keys
            if key != "result"
            for d in _differences(old.get(key), new.get(key), f"{place}.{key}".strip("."))
        ]
    return [] if old == new else [f"{place}: {old!r} → {new!r}"]
