from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from msqkd.platform import leave_quietly


@pytest.fixture(autouse=True)
def _same_mode_afterwards() -> Iterator[None]:
    """A test may switch between GRAPH_MODE and PYNATIVE_MODE; the next one finds the mode as it was."""
    ms = sys.modules.get("mindspore")
    mode = ms.get_context("mode") if ms else None
    yield
    if ms:
        ms.set_context(mode=mode)


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_looked_at_again() -> Iterator[None]:
    """MindSpore keeps every compiled graph: a worker would search more of them at each collection."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def graph_mode() -> None:
    """Run the test in GRAPH_MODE (what was set before comes back)."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


def pytest_unconfigure() -> None:
    leave_quietly()
