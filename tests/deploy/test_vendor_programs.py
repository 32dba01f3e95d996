"""What is done with programs of the vendor's: time limits, crashes, the wheel; and the comparison of two programs."""

from __future__ import annotations

import copy
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msqkd.deploy.converter_run import converter_at_hand, find_converter
from msqkd.deploy.nodes import agreement
from msqkd.deploy.vendor_install import install
from msqkd.deploy.vendor_runtime import ending, run_vendor, writing
from msqkd.errors import ExportError, MissingDependencyError
from msqkd.integer.program import Program, Step, Tensor, TensorQuant


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def test_a_program_that_does_not_end_is_ended_with_what_it_started(tmp_path: Path) -> None:
    file = script(tmp_path / "slow", f"echo loading; (sleep 2; touch {tmp_path}/late) & wait")
    begin = time.monotonic()
    with pytest.raises(ExportError, match=r"(?s)did not end within 0\.5 s.*loading"):
        run_vendor([str(file)], limit=0.5)
    assert time.monotonic() - begin < 2
    time.sleep(2)
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(("code", "words"), [(3, "exit code 3"), (-11, "SIGSEGV"), (-200, "signal 200")])
def test_how_a_program_ended(code: int, words: str) -> None:
    assert words in ending(code)


def test_a_full_disk() -> None:
    with pytest.raises(ExportError, match="somewhere cannot be written: No space left"), writing():
        raise OSError(28, "No space left on device", "somewhere")


# -- the package -------------------------------------------------------------------------------------------------------
HERE = "x86_64" if platform.machine().lower() in ("x86_64", "amd64") else platform.machine()


def wheel(folder: Path, tag: str = "cp37-cp37m", machine: str = HERE) -> Path:
    file = folder / f"mindspore_lite-2.0.0-{tag}-linux_{machine}.whl"
    file.write_bytes(b"")
    return file


def python(folder: Path, made: str = "mindspore_lite") -> Path:
    """An interpreter that says it has any version, makes environments and installs packages."""
    copy_of = folder / "python"
    return script(
        copy_of,
        'case "$2" in\n'
        f'venv) mkdir -p "$3/bin"; cp {copy_of} "$3/bin/python";;\n'
        f'pip) mkdir -p "$(dirname "$0")/../lib/python3.7/site-packages/{made}"; echo "$5" > {folder}/told;;\n'
        "esac",
    )


def test_a_wheel_is_set_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHON37", str(python(tmp_path)))
    file = wheel(tmp_path)
    found = find_converter(file)
    assert found == tmp_path / ".cache" / "msqkd" / file.stem / "bin" / "python"
    assert (tmp_path / "told").read_text().strip() == str(file)
    monkeypatch.setenv("PYTHON37", "nowhere")
    assert install(file) == found


def test_the_package_is_set_up_in_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSLITE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHON37", str(python(tmp_path)))
    assert install() == tmp_path / "home" / "bin" / "python"
    assert converter_at_hand() == tmp_path / "home" / "bin" / "python"
    assert (tmp_path / "told").read_text().startswith("mindspore-lite==2.0.0")


def test_what_is_installed_must_be_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON37", str(python(tmp_path, made="other")))
    with pytest.raises(ExportError, match="holds no package mindspore_lite"):
        install(home=tmp_path / "home")


def test_an_installation_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = script(tmp_path / "bin" / "python", 'case "$2" in venv) echo no disk; exit 1;; esac')
    monkeypatch.setenv("PYTHON37", str(fake))
    with pytest.raises(ExportError, match=r"(?s)failed.*no disk"):
        install(home=tmp_path / "home")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["bin"]


def test_without_the_python_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PYTHON31", raising=False)
    with pytest.raises(MissingDependencyError, match=r"no Python 3\.1,.*PYTHON31"):
        install(wheel(tmp_path, "cp31-cp31m"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mindspore_lite-2.0.0-cp37-cp37m-linux_riscv64.whl", "is for linux_riscv64"),
        ("mindspore-2.0.0-cp37-cp37m-linux_x86_64.whl", "is no wheel of mindspore-lite"),
        ("mindspore_lite-2.0.0-cp37-cp37m-linux_x86_64.whl", "is not there"),
    ],
)
def test_another_wheel(name: str, words: str, tmp_path: Path) -> None:
    if words != "is not there":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=words):
        find_converter(tmp_path / name)


def test_the_converter_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSLITE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert converter_at_hand() is None
    program = script(tmp_path / "converter_lite", "")
    assert converter_at_hand() == program.resolve()


# -- two programs ------------------------------------------------------------------------------------------------------
def quant(scale: float, zero_point: int = 0) -> TensorQuant:
    return TensorQuant(np.array([scale]), np.array([zero_point]))


def dense(op: str, shape: tuple[int, ...], columns: list[int]) -> Program:
    """A layer of two rows, with the columns of its weight in an order."""
    weight = np.array([[1, 2, 3], [4, 5, 6]], np.int8)[:, columns].reshape(shape)
    program = Program("net", ["x"], ["y"])
    program.add(Tensor("x", "int8", (1, 3), None, quant(0.1)))
    program.add(Tensor("w", "int8", weight.shape, weight, quant(0.02)))
    program.add(Tensor("b", "int32", (2,), np.array([7, 8], np.int32)))
    program.add(Tensor("y", "int8", (1, 2), None, quant(0.3, 5)))
    program.steps = [Step("layer", op, ["x", "w", "b"], ["y"], {}, True)]
    return program


def test_a_dense_layer_and_a_pointwise_convolution_agree() -> None:
    one, other = dense("MatMulFusion", (2, 3), [0, 1, 2]), dense("Conv2DFusion", (2, 1, 1, 3), [2, 0, 1])
    found = agreement(one, other)
    assert (found.of, found.missing, found.added, found.same_operations) == (1, (), (), True)


@pytest.mark.parametrize("what", ["scale", "zero_point", "weight", "weight_scale", "bias", "operation", "float"])
def test_other_parameters_do_not_agree(what: str) -> None:
    one, other = (dense("MatMulFusion", (2, 3), [0, 1, 2]) for _ in range(2))
    other = copy.deepcopy(other)
    if what in ("scale", "zero_point"):
        other.tensors["y"].quant = quant(0.31, 5) if what == "scale" else quant(0.3, 6)
    elif what == "weight":
        other.tensors["w"].data[0, 0] += 1  # type: ignore[index]
    elif what == "weight_scale":
        other.tensors["w"].quant = quant(0.021)
    elif what == "bias":
        other.tensors["b"].data[1] += 1  # type: ignore[index]
    else:
        step = other.steps[0]
        other.steps = [replace(step, op="AddFusion") if what == "operation" else replace(step, quantized=False)]
    found = agreement(one, other)
    assert found.missing == ("layer",)
    assert found.same_operations == (what not in ("operation", "float"))
    assert found.to_dict()["equal"] == 0
