from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from msqkd.analysis import plots
from msqkd.platform import leave_quietly

QUICK = ("analysis", "data", "integer", "models", "recipe")
"""The folders of `pytest -m quick`: hardly anything in them compiles a network."""


_find_source = inspect.getsourcelines


@cache
def _source_of(file: str, code: CodeType) -> tuple[list[str], int]:
    return _find_source(code)


def _remembered_source(thing: Any) -> tuple[list[str], int]:
    """MindSpore asks for the source of the same functions in every compilation; finding it takes a twentieth of it."""
    code = getattr(inspect.unwrap(thing), "__code__", None) if callable(thing) else None
    if code is None:
        return _find_source(thing)
    lines, number = _source_of(code.co_filename, code)
    return list(lines), number


inspect.getsourcelines = _remembered_source


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).parts[0] in QUICK:
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _same_mode_afterwards() -> Iterator[None]:
    """A test may switch between GRAPH_MODE and PYNATIVE_MODE; the next one finds the mode as it was."""
    ms = sys.modules.get("mindspore")
    mode = ms.get_context("mode") if ms else None
    yield
    if ms:
        ms.set_context(mode=mode)


@pytest.fixture(autouse=True)
def _figures_are_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a small run's time is matplotlib's; tests that look at the figures are marked `figures`."""
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr(plots, "_svg", lambda figure, name: f'<svg class="{name}"></svg>')


def pytest_collection_finish() -> None:
    _forget_to_look_at_old_objects()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    yield
    _forget_to_look_at_old_objects()  # the values of the test's fixtures are gone by now


def _forget_to_look_at_old_objects() -> None:
    """MindSpore collects garbage in every compilation and keeps every compiled graph: without this, each compilation
    would search the objects of all tests before. Objects in cycles that die after they were frozen are never freed."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def pynative_mode() -> None:
    """Run the test in PYNATIVE_MODE: what is computed once or twice is not compiled for it."""
    import mindspore as ms

    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture
def graph_mode() -> None:
    """Run the test in GRAPH_MODE (what was set before comes back)."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


def pytest_unconfigure() -> None:
    leave_quietly()
