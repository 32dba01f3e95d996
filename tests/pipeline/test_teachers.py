"""`msqkd teachers`: the teachers of a recipe beside its network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

Write, Command = Callable[..., Path], Callable[..., tuple[int, str, str]]


@pytest.fixture
def other(tmp_path: Path, tiny: Write) -> dict[str, Any]:
    """A teacher that knows nothing, with fewer parameters than the network."""
    from msqkd.checkpoints import save_checkpoint
    from msqkd.models import build_model

    tiny()  # writes nets.py
    rng = np.random.default_rng(1)
    weights = {p.name: p.asnumpy() for p in build_model("python", "nets.py:Other", {}).get_parameters()}
    save_checkpoint({name: rng.normal(0, 0.5, w.shape).astype(np.float32) for name, w in weights.items()}, "other.ckpt")
    return {"source": "python", "target": "nets.py:Other", "checkpoint": "other.ckpt"}


def test_teachers_beside_the_network(tiny: Write, msqkd: Command, tmp_path: Path, other: dict[str, Any]) -> None:
    schedule = {"schedule": "linear", "from": 6, "to": 2}
    recipe = tiny(teacher=[{"source": "self"}, other], distillation={"temperature": schedule})
    code, out, err = msqkd("teachers", recipe, "-o", "found", "--json")
    assert code == 0, err
    result = json.loads(out)
    itself, stranger = result["teachers"]
    assert itself["gain"] == itself["noise"] == 0
    assert itself["cost"] == 1
    assert (itself["test"], itself["train"]) == (result["student"]["test"], result["student"]["train"])
    assert itself["place"] == "teacher[0]"
    assert 0 < itself["softness"] < 1
    assert stranger["gain"] == pytest.approx(stranger["test"] - result["student"]["test"])
    assert stranger["gain"] < 0
    # stem 3x3x1x4, conv 3x3x4x4, both on 8x8, and fc 4x3; the other one 3x3x1x2 and 2x3
    assert result["student"]["products"] == (36 + 144) * 64 + 12
    assert stranger["cost"] == pytest.approx((18 * 64 + 6) / ((36 + 144) * 64 + 12))
    assert result["chosen"] is None
    assert "No teacher answers better" in result["verdict"]
    assert json.loads((tmp_path / "found" / "teachers.json").read_text()) == result
    code, out, err = msqkd("teachers", recipe, "-o", "found")  # done before: the same table
    assert code == 0, err
    assert "No teacher answers better" in out


def test_a_teacher_that_cannot_be_captured_is_compared_all_the_same(
    tiny: Write, msqkd: Command, tmp_path: Path
) -> None:
    from msqkd.checkpoints import save_checkpoint
    from msqkd.models import build_model

    recipe = tiny(teacher={"source": "python", "target": "nets.py:Branching", "checkpoint": "branching.ckpt"})
    weights = {p.name: p.asnumpy() for p in build_model("python", "nets.py:Branching", {}).get_parameters()}
    save_checkpoint(weights, "branching.ckpt")
    code, out, err = msqkd("teachers", recipe, "-o", "found", "--json")
    assert code == 0, err
    (teacher,) = json.loads(out)["teachers"]
    assert teacher["cost"] is None
    assert teacher["parameters"] > 0
    code, _, err = msqkd("teachers", recipe, "-o", "found")
    assert code == 0, err


def test_without_distillation_there_is_no_teacher(tiny: Write, msqkd: Command) -> None:
    code, _, err = msqkd("teachers", tiny(distillation=None), "-o", "found")
    assert code == 2
    assert "tiny has no distillation, so no teacher; add 'distillation: {}' and a teacher" in " ".join(err.split())
