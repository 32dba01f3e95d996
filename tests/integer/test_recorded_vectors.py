"""Every recorded call and network, replayed; and the reading of such files."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import SimulationError
from msqkd.integer.registry import ARM64, MACHINES, X86
from msqkd.integer.vectors import NETWORK, Vector, load, main, replay

FOLDER = Path(__file__).parent / "vectors"
VECTORS = [vector for path in sorted(FOLDER.glob("*.npz")) for vector in load(path)]
# Where the runtime's mean over a plane reads memory that is not its input's.
UNDEFINED_ON_ARM64 = {
    "mean_21", "mean_hw_n3", "mean_hw_nokeep", "mean_hw_sameq", "mobileA/se_gap", "mobileA/gap", "mobileA"
}  # fmt: skip
META: dict[str, Any] = {
    "case": "wide_pool", "op": "MaxPoolFusion", "note": "", "tolerance_lsb": 0,
    "attrs": {"kernelSize": [9, 9], "strides": [1, 1], "padMode": 2, "global_": True},
    "inputs": [{"key": "input_0", "const": False, "dtype": "int8", "shape": [1, 2, 2, 1], "scale": [0.5],
                "zero_point": [3]}],
    "outputs": [{"key": "output", "dtype": "int8", "shape": [1, 1, 1, 1], "scale": [0.5], "zero_point": [3]}],
}  # fmt: skip


def write(path: Path, meta: Any, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)
    return path


def wide_pool(path: Path, answer: int = 7) -> Path:
    fed = np.array([1, -5, 7, 2], np.int8).reshape(1, 2, 2, 1)
    return write(path, META, input_0=fed, output=np.full((1, 1, 1, 1), answer, np.int8))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.case)
def test_the_simulator_answers_as_recorded(vector: Vector, machine: str) -> None:
    result = replay(vector, machine)
    if machine == ARM64 and vector.case in UNDEFINED_ON_ARM64:
        assert "undefined" in result.undefined
        return
    assert not result.undefined
    assert result.values == sum(slot.data.size for step in vector.steps or (vector,) for slot in step.outputs)
    assert result.max_difference <= (vector.tolerance if machine == X86 else 0), result


def test_only_the_bilinear_resize_in_float_may_be_one_off() -> None:
    allowed = [vector for vector in VECTORS if vector.tolerance]
    assert {vector.op for vector in allowed} == {"Resize"}
    assert all(vector.tolerance == 1 and vector.inputs[0].quant.zero_point[0] for vector in allowed)


def test_every_network_is_there_as_a_whole_and_node_by_node() -> None:
    networks = {vector.case: len(vector.steps) for vector in VECTORS if vector.op == NETWORK}
    assert networks == {"lenet5A": 10, "mobileA": 25, "resnet20A": 34}
    for name, steps in networks.items():
        assert sum(vector.case.startswith(f"{name}/") for vector in VECTORS) == steps


def test_a_file_of_one_call_is_read(tmp_path: Path) -> None:
    (vector,) = load(wide_pool(tmp_path / "one.npz"))
    assert vector.attrs == {"kernel_size": [9, 9], "strides": [1, 1], "pad_mode": 2, "global": True}
    result = replay(vector)
    assert (result.case, result.values, result.differing, result.passed) == ("wide_pool", 1, 0, True)


def test_a_difference_is_counted_and_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide_pool(tmp_path / "right.npz")
    wide_pool(tmp_path / "wrong.npz", answer=4)
    assert main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "wide_pool  1 of 1 values differ, by 3 at most (MISMATCH)",
        "2 cases, 2 values: 1 with a mismatch, 0 undefined",
    ]


def test_a_network_passes_on_what_it_computed_and_each_node_what_was_recorded(tmp_path: Path) -> None:
    with np.load(FOLDER / "net_mobileA.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["input"] = arrays["input"] + np.float32(0.5)
    np.savez_compressed(tmp_path / "moved.npz", **arrays)
    results = {vector.case: replay(vector) for vector in load(tmp_path / "moved.npz")}
    assert results["mobileA"].differing > 1000
    assert not results["mobileA/stem"].differing
    assert [case for case, result in results.items() if not result.passed] == ["mobileA/quant", "mobileA"]


def test_what_differs_within_the_tolerance_is_shown_and_exits_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FOLDER / "ops.npz", tmp_path)
    assert main([str(tmp_path / "ops.npz")]) == 0
    out = capsys.readouterr().out
    assert "resize_bil_zp" in out
    assert "(allowed)" in out
    assert "MISMATCH" not in out


def test_an_undefined_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--machine", "arm64", str(FOLDER / "net_mobileA.npz")]) == 0
    assert "mean of a 6x5 plane is undefined" in capsys.readouterr().out


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "msqkd.integer.vectors", str(FOLDER / "net_lenet5A.npz")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("0 with a mismatch, 0 undefined\n")


@pytest.mark.parametrize("damage", ["missing", "text", "truncated", "no meta", "no array", "no field"])
def test_an_unusable_file_is_named_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = tmp_path / "damaged.npz"
    if damage == "text":
        path.write_text("not an archive")
    elif damage == "truncated":
        wide_pool(path)
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "no meta":
        np.savez(path, output=np.zeros(1))
    elif damage == "no array":
        write(path, META, input_0=np.zeros((1, 2, 2, 1), np.int8))
    elif damage == "no field":
        write(path, {"case": "x"}, output=np.zeros(1))
    with pytest.raises(SimulationError, match=r"damaged\.npz is not a file of recorded vectors"):
        load(path)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_without_vectors_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: the folder {tmp_path} holds no .npz file\n"


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_byte_gives_vectors_or_one_sentence(position: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = wide_pool(Path(folder) / "flipped.npz")
        data = bytearray(path.read_bytes())
        data[position % len(data)] ^= change
        path.write_bytes(bytes(data))
        with contextlib.suppress(SimulationError):
            load(path)


def test_an_answer_of_another_shape_is_refused(tmp_path: Path) -> None:
    fed = np.zeros((1, 2, 2, 1), np.int8)
    path = write(tmp_path / "shape.npz", META, input_0=fed, output=np.zeros((1, 2, 2, 1), np.int8))
    with pytest.raises(SimulationError, match=r"wide_pool: computed \[\(1, 1, 1, 1\)\]; recorded: \[\(1, 2, 2, 1\)\]"):
        replay(load(path)[0])
