from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable

import pytest

MINIMAL = {
    "apiversion": "msqkd/v1",
    "name": "tiny",
    "model": {"name": "lenet5", "checkpoint": "lenet5.ckpt"},
    "data": {"name": "digits"},
}


@pytest.fixture
def minimal() -> dict[str, Any]:
    """The smallest valid recipe, to be changed at will."""
    return copy.deepcopy(MINIMAL)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes recipe.yaml into an empty working directory; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write_file(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write_file
