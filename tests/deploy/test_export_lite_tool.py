"""tools/export_lite.py: from a run or a checkpoint to what goes to the device, and back from it."""

from __future__ import annotations

import configparser
import errno
import importlib.util
import json
import platform
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from msqkd.cli import app
from msqkd.deploy import bundle
from msqkd.deploy.benchmark_kit import read_kit
from msqkd.deploy.converter_run import find_converter
from msqkd.errors import ExportError, MissingDependencyError
from msqkd.exporters.lite import read_marked
from msqkd.exporters.ms.read import read_ms
from msqkd.integer.simulator import Simulator
from msqkd.pipeline.convert import convert_file, convert_run
from msqkd.pipeline.run import run_recipe
from msqkd.progress import Reporter
from msqkd.recipe import load_recipe

NETS = """
from mindspore import nn, ops


class Tiny(nn.Cell):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.relu = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Dense(4, 3)

    def construct(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.bn(self.conv(x)) + x)
        return self.fc(ops.mean(x, (2, 3)))
"""
CALIBRATION = 24

Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe ``tiny.yaml``, its network and its data."""
    folder = tmp_path_factory.mktemp("export_lite")
    (folder / "nets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 48), ("test", 20)):
        kind = np.arange(count) % 3
        images = rng.integers(0, 60, (count, 8, 8, 1)) + (kind * 90).reshape(-1, 1, 1, 1)
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": kind.astype(np.int32)}
    np.savez(folder / "data.npz", **arrays)
    recipe = {
        "apiversion": "msqkd/v1",
        "name": "tiny",
        "model": {"source": "python", "target": f"{folder}/nets.py:Tiny", "input_shape": [1, 8, 8]},
        "data": {"name": "arrays", "root": str(folder / "data.npz"), "eval_batch_size": 10},
        "pretrain": {"epoch_size": 1, "batch_size": 12, "lr": 0.05},
        "quantization": {"activation": {"delay": 2}},
        "train": {"epoch_size": 1, "batch_size": 12, "lr": 0.01},
        "compare": [],
        "calibration": {"samples": CALIBRATION, "batch_size": 12},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def run_folder(place: Path) -> Path:
    """A finished run."""
    run_recipe(load_recipe(place / "tiny.yaml"), place / "run", Reporter(quiet=True))
    return place / "run"


@pytest.fixture(autouse=True)
def _same_signals_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    file = Path(__file__).parents[2] / "tools" / "export_lite.py"
    spec = importlib.util.spec_from_file_location("export_lite_tool", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Tool:
    """Runs the tool in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # of argparse
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def exported(run_folder: Path, script: ModuleType, place: Path) -> Path:
    """Everything the tool writes without a converter."""
    output = place / "exported"
    flags = ["--weight-only", "--float", "--benchmark", "--samples", "3"]
    bins = ["--calibration-bins", str(output / "vendor")]
    assert script.main([str(run_folder), "-o", str(output), *flags, *bins]) == 0
    return output


def program(file: Path, text: str) -> Path:
    """An executable shell script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def converter(file: Path, made: Path) -> Path:
    """A converter that answers with the file `made`, and keeps what it was told beside itself."""
    told = file.parent / "told"
    return program(
        file,
        f'echo "LD=$LD_LIBRARY_PATH" >> {told}\n'
        f'for word in "$@"; do echo "$word" >> {told}; case $word in\n'
        f'--outputFile=*) cp {made} "${{word#--outputFile=}}.ms";;\n'
        "--configFile=*) test -d calibration/x || exit 3;;\nesac; done",
    )


def sentence(err: str) -> str:
    """The message of a refusal, which comes last."""
    assert "Traceback" not in err
    return err[err.rindex("msqkd: ") :]


def left(folder: Path) -> set[str]:
    return {child.name for child in folder.iterdir()}


# -- what is written ---------------------------------------------------------------------------------------------------
def test_the_files_are_those_of_the_run(exported: Path, run_folder: Path) -> None:
    assert left(exported) == {
        "tiny.ms", "tiny.mindir", "tiny_weight.ms", "tiny_float.ms", "benchmark", "vendor", "export.json"
    }  # fmt: skip
    for ours, theirs in (("tiny.ms", "tiny_ms.ms"), ("tiny.mindir", "tiny_lite.mindir")):
        assert (exported / ours).read_bytes() == (run_folder / theirs).read_bytes()
    assert all(step.quantized for step in read_ms(exported / "tiny.ms").steps if step.op != "QuantDTypeCast")
    assert read_marked(exported / "tiny.mindir")[1], "the MindIR carries its parameters"
    for name in ("tiny_weight.ms", "tiny_float.ms"):
        assert not any(step.quantized for step in read_ms(exported / name).steps)


def test_the_summary(exported: Path) -> None:
    summary = json.loads((exported / "export.json").read_text())
    assert summary["target"] == "lite_arm"
    assert set(summary["files"]) == {"tiny.ms", "tiny.mindir", "tiny_weight.ms", "tiny_float.ms"}
    assert summary["files"]["tiny.ms"]["bytes"] == (exported / "tiny.ms").stat().st_size
    assert summary["parity"]["split"] == "calibration"
    assert summary["parity"]["samples"] == CALIBRATION
    assert summary["parity"]["machine"] == "arm64"


def test_it_ends_with_the_parity(run_folder: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = tool(run_folder, "-o", "out")
    assert code == 0
    last = out.splitlines()[-1]
    assert last.startswith(f"on the {CALIBRATION} calibration samples the device reaches ")
    assert "a deviation of " in last

    compare = bundle.calibration_parity
    monkeypatch.setattr(bundle, "calibration_parity", lambda *given: {**compare(*given), "exceeded": True})
    code, _, _ = tool(run_folder, "-o", "other")
    assert code == 1
    assert (Path("other") / "tiny.ms").is_file(), "the files are kept"


def test_a_checkpoint_and_its_recipe(place: Path, run_folder: Path, tool: Tool) -> None:
    recipe, weights = place / "tiny.yaml", run_folder / "float.ckpt"
    settings = ["--set", "calibration.samples=20", "verify.max_deviation=100"]
    code, _, err = tool("--recipe", recipe, "--checkpoint", weights, "-o", "out", *settings)
    assert code == 0, err
    changes = ["pretrain=null", f"model.checkpoint={weights}", "calibration.samples=20"]
    run_recipe(load_recipe(recipe, changes), Path("calibrated"), Reporter(quiet=True), train=False)
    assert Path("out/tiny.ms").read_bytes() == Path("calibrated/tiny_ms.ms").read_bytes()
    summary = json.loads(Path("out/export.json").read_text())
    assert summary["source"] == {"recipe": str(recipe), "checkpoint": str(weights)}
    assert summary["parity"]["samples"] == 20


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_a_recipe_without_weights(place: Path, tool: Tool) -> None:
    code, _, err = tool("--recipe", place / "tiny.yaml", "-o", "out")
    assert code == 2
    assert "--checkpoint FILE" in sentence(err)


def test_a_checkpoint_that_is_missing(place: Path, tool: Tool, tmp_path: Path) -> None:
    code, _, err = tool("--recipe", place / "tiny.yaml", "--checkpoint", "none.ckpt", "-o", "out")
    assert code == 2
    assert "none.ckpt" in sentence(err)
    assert not left(tmp_path)


def test_another_target(place: Path, run_folder: Path, tool: Tool) -> None:
    arguments = ["--recipe", place / "tiny.yaml", "--checkpoint", run_folder / "float.ckpt", "-o", "out"]
    code, _, err = tool(*arguments, "--set", "target=ascend")
    assert code == 2
    assert "ascend" in sentence(err)


@pytest.mark.parametrize("name", ["tiny_ms.ms", "tiny_lite.mindir", "float.mindir"])
def test_a_tampered_file(run_folder: Path, tool: Tool, tmp_path: Path, name: str) -> None:
    shutil.copytree(run_folder, "run")
    data = bytearray(Path("run", name).read_bytes())
    data[-1] ^= 1
    Path("run", name).write_bytes(data)
    code, _, err = tool("run", "-o", "out")
    assert code == 2
    assert f"{name} does not match its checksum" in sentence(err)
    assert left(tmp_path) == {"run"}


def test_tampered_weights(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    from msqkd.checkpoints import read_checkpoint, save_checkpoint

    shutil.copytree(run_folder, "run")
    weights = {name: np.asarray(data) * 2 for name, data in read_checkpoint("run/qat.ckpt").items()}
    save_checkpoint(weights, Path("run/qat.ckpt"))
    code, _, err = tool("run", "-o", "out")
    assert code == 2
    assert "no longer gives the ms file" in sentence(err)
    assert left(tmp_path) == {"run"}


def test_a_run_that_is_not_finished(run_folder: Path, tool: Tool) -> None:
    shutil.copytree(run_folder, "run")
    state = json.loads(Path("run/state.json").read_text())
    del state["stages"]["export"]
    Path("run/state.json").write_text(json.dumps(state))
    code, _, err = tool("run", "-o", "out")
    assert code == 2
    assert "not finished" in sentence(err)
    code, _, err = tool("nowhere", "-o", "out")
    assert code == 2
    assert "nowhere is not the folder of a run" in sentence(err)


def test_an_output_that_is_not_empty(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    for output, words in (("out", "is there already"), ("file", "is there already"), ("file/out", "is not a folder")):
        code, _, err = tool(run_folder, "-o", output)
        assert code == 2
        assert words in sentence(err)
    code, _, err = tool(run_folder, "-o", "new/out", "--calibration-bins", "new")
    assert code == 2
    assert "choose another folder" in sentence(err)
    assert left(tmp_path) == {"out", "file"}


def test_an_empty_output_is_taken(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert tool(run_folder, "-o", "out")[0] == 0
    assert left(tmp_path) == {"out"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "out"], ["run"], ["run", "--recipe", "r", "-o", "out"], ["run", "-o", "out", "--set", "seed=1"],
        ["run", "-o", "out", "--checkpoint", "c"], ["run", "-o", "out", "--samples", "3"],
        ["run", "-o", "out", "--benchmark", "--samples", "0"], ["--check", "out", "dump", "--float"],
    ],
)  # fmt: skip
def test_arguments_that_do_not_go_together(tool: Tool, arguments: list[str]) -> None:
    code, _, err = tool(*arguments)
    assert code == 2
    assert "error: " in err.splitlines()[-1]


# -- the converter -----------------------------------------------------------------------------------------------------
def test_the_converter_of_a_package(exported: Path, run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "tools/converter/lib").mkdir(parents=True)
    converter(package / "tools/converter/converter/converter_lite", exported / "tiny.ms")
    code, _, err = tool(run_folder, "-o", "out", "--converter", package, "--calibration-bins", "bins")
    assert code == 0, err
    told = (package / "tools/converter/converter/told").read_text().splitlines()
    marked, vendor = told[: told.index("--fmk=MINDIR") + 3], told[-5:]
    assert marked[0].split("=", 1)[1].split(":")[0] == str(package / "tools/converter/lib")
    assert "mindspore/lib" not in marked[0], "MindSpore's libraries are not those of the converter"
    assert not any(word.startswith("--configFile") for word in told[:4]), "the markers need no configuration"
    assert marked[2].endswith("/tiny.mindir")
    assert vendor[2].endswith("/float.mindir")
    assert vendor[4].endswith("/converter.cfg")
    assert left(Path("out")) == {"tiny.ms", "tiny.mindir", "tiny_converter.ms", "export.json"}
    summary = json.loads(Path("out/export.json").read_text())
    for key, name in (("converter", "tiny_converter.ms"), ("vendor_ptq", "vendor_ptq.ms")):
        found = summary[key]
        assert (found["file"], found["compared"], found["samples"]) == (name, True, CALIBRATION)
        assert (found["equal_outputs"], found["agreement"], found["max_difference"]) == (100.0, 100.0, 0.0)
        assert found["nodes"] == found["our_nodes"]
        assert all(node["int8"] for node in found["nodes"])


def test_a_converter_that_leaves_all_in_float(exported: Path, run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    fake = converter(tmp_path / "converter_lite", exported / "tiny_float.ms")
    code, _, err = tool(run_folder, "-o", "out", "--converter", fake)
    assert code == 0
    assert "int8 in 0 of" in " ".join(err.split())
    found = json.loads(Path("out/export.json").read_text())["converter"]
    assert found["equal_outputs"] < 100
    assert found["max_difference"] > 0
    assert not any(node["int8"] for node in found["nodes"])
    assert all(node["int8"] for node in found["our_nodes"])


def test_a_file_of_the_converter_that_cannot_be_computed(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "odd.ms").write_bytes(b"\0" * 64)
    fake = converter(tmp_path / "converter_lite", tmp_path / "odd.ms")
    code, _, err = tool(run_folder, "-o", "out", "--converter", fake)
    assert code == 0, "the file msqkd has written is none the worse for it"
    assert "cannot be compared" in " ".join(err.split())
    found = json.loads(Path("out/export.json").read_text())["converter"]
    assert found["compared"] is False
    assert "not a MindSpore Lite model" in found["reason"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo reading; echo no kernel for Foo; exit 7", ["exit code 7", "no kernel for Foo"]),
        ("echo done", ["wrote no tiny_converter.ms", "done"]),
        ("exit 1", ["exit code 1", "silent"]),
        ("echo half; kill -SEGV $$", ["it crashed: SIGSEGV", "half"]),
    ],
)
def test_a_converter_that_fails(run_folder: Path, tool: Tool, tmp_path: Path, text: str, words: list[str]) -> None:
    fake = program(tmp_path / "bin" / "converter_lite", text)
    code, _, err = tool(run_folder, "-o", "out", "--converter", fake, "--calibration-bins", "bins")
    assert code == 2
    assert all(word in sentence(err) for word in words)
    assert left(tmp_path) == {"bin", "out", "bins"}
    assert {"tiny.ms", "tiny.mindir", "export.json"} == left(Path("out")), "what msqkd has written stays"
    found = json.loads(Path("out/export.json").read_text())
    assert found["converter"]["file"] is None
    assert all(word in found["converter"]["reason"] for word in words)


def test_a_converter_that_is_not_there(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    empty = tmp_path / "package"
    empty.mkdir()
    for path in ("nowhere/converter_lite", empty):
        code, _, err = tool(run_folder, "-o", "out", "--converter", path)
        assert code == 2
        assert f"there is no converter_lite at {path}" in sentence(err)
    (tmp_path / "plain").write_text("")
    code, _, err = tool(run_folder, "-o", "out", "--converter", "plain")
    assert code == 2
    assert "not executable" in sentence(err)
    assert not (tmp_path / "out").exists()


def test_a_converter_for_another_processor(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    names = {62: "x86_64", 183: "aarch64"}
    foreign = 183 if platform.machine() in ("x86_64", "amd64", "AMD64") else 62
    fake = program(tmp_path / "converter_lite", "")
    fake.write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 9 + struct.pack("<HH", 3, foreign) + b"\0" * 44)
    code, _, err = tool(run_folder, "-o", "out", "--converter", fake)
    assert code == 2
    assert f"is a program for {names[foreign]}, and this machine is {platform.machine()}" in sentence(err)


def test_a_converter_that_is_no_program(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    fake = program(tmp_path / "converter_lite", "")
    fake.write_bytes(b"\x7fELF\x02\x01\x01" + b"\0" * 60)
    assert find_converter(fake) == fake.resolve()
    code, _, err = tool(run_folder, "-o", "out", "--converter", fake)
    assert code == 2
    assert "cannot be started on this machine" in sentence(err)


# -- msqkd convert -----------------------------------------------------------------------------------------------------
@pytest.fixture
def run_copy(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSLITE_HOME", str(tmp_path / "none"))
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


def test_convert_a_run(run_copy: Path, tmp_path: Path) -> None:
    fake = converter(tmp_path / "bin" / "converter_lite", run_copy / "tiny_ms.ms")
    done = CliRunner().invoke(app, ["convert", str(run_copy), "--converter", str(fake), "--samples", "5", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads((run_copy / "convert.json").read_text())
    assert json.loads(done.stdout) == found
    assert (found["file"], found["samples"], found["as_planned"]) == ("tiny_converter.ms", 5, True)
    assert found["parameters"]["equal"] == found["parameters"]["of"] > 0
    assert (found["equal_outputs"], found["runtime"]) == (100.0, None)
    assert (run_copy / "tiny_converter.ms").read_bytes() == (run_copy / "tiny_ms.ms").read_bytes()
    report = json.loads((run_copy / "report.json").read_text())
    assert report["converter"]["parameters"] == found["parameters"]
    assert '<section id="converter">' in (run_copy / "report.html").read_text()


def test_convert_a_run_of_which_the_converter_makes_another_network(
    exported: Path, run_copy: Path, tmp_path: Path
) -> None:
    fake = converter(tmp_path / "bin" / "converter_lite", exported / "tiny_float.ms")
    before = left(run_copy)
    done = CliRunner().invoke(app, ["convert", str(run_copy), "--converter", str(fake), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    found = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert found["as_planned"] is False
    assert len(found["parameters"]["missing"]) == found["parameters"]["of"]
    assert left(run_copy) == before


@pytest.mark.parametrize("beside", [True, False])
def test_convert_a_file(beside: bool, exported: Path, run_copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(exported / "tiny.mindir", folder)
    if beside:
        shutil.copy(exported / "tiny.ms", folder)
    fake = converter(tmp_path / "bin" / "converter_lite", exported / "tiny.ms")
    found = convert_file(folder / "tiny.mindir", str(fake), reporter=Reporter(quiet=True))
    assert found["reference"] == ("ms" if beside else "markers")
    assert found["as_planned"] is True
    assert found["agreement"] >= 90
    assert found["parameters"]["equal"] == found["parameters"]["of"] > 0
    other = converter(tmp_path / "other" / "converter_lite", exported / "tiny_float.ms")
    assert convert_file(folder / "tiny.mindir", str(other), reporter=Reporter(quiet=True))["as_planned"] is False


def test_convert_what_is_no_marked_file(exported: Path, run_folder: Path, tmp_path: Path) -> None:
    fake = converter(tmp_path / "bin" / "converter_lite", exported / "tiny.ms")
    (tmp_path / "odd.mindir").write_bytes(b"odd")
    for file, words in (
        (tmp_path / "none.mindir", "is not there"), (tmp_path / "odd.mindir", "MindIR"),
        (run_folder / "float.mindir", "holds no FakeQuantParam"),
    ):  # fmt: skip
        with pytest.raises(ExportError, match=words):
            convert_file(file, str(fake), tmp_path / "out")


def test_convert_without_a_converter(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="MSLITE_HOME"):
        convert_run(run_copy)


@pytest.mark.parametrize(
    ("text", "words"), [("echo loading; sleep 60 & wait", "within 1 s.*\n.*loading"), ("kill -SEGV $$", "SIGSEGV")]
)
def test_convert_with_a_converter_that_does_not_end(text: str, words: str, run_copy: Path, tmp_path: Path) -> None:
    before = left(run_copy)
    fake = program(tmp_path / "bin" / "converter_lite", text)
    with pytest.raises(ExportError, match=f"(?s){words}"):
        convert_run(run_copy, str(fake), limit=1.0)
    assert left(run_copy) == before | {"convert.json"}
    assert json.loads((run_copy / "convert.json").read_text())["file"] is None


def test_convert_on_a_full_disk(
    exported: Path, run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = converter(tmp_path / "bin" / "converter_lite", exported / "tiny.ms")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr("msqkd.deploy.converter_run.shutil.copyfile", full)
    with pytest.raises(ExportError, match="No space left on device"):
        convert_run(run_copy, str(fake))


def test_a_run_ends_with_the_converter(place: Path, run_folder: Path, tmp_path: Path) -> None:
    fake = converter(tmp_path / "bin" / "converter_lite", run_folder / "tiny_ms.ms")
    changes = ["pretrain=null", f"model.checkpoint={run_folder}/float.ckpt", "export.formats=[lite_mindir, ms]"]
    recipe = load_recipe(place / "tiny.yaml", [*changes, f"verify.converter={fake}"])
    result = run_recipe(recipe, tmp_path / "run", Reporter(quiet=True), train=False)
    assert result["converter"]["compared"] is True
    assert result["converter"]["file"] == "tiny_converter.ms"
    assert not {"convert.json", "tiny_converter.ms"} & left(tmp_path / "run"), "msqkd convert keeps its file"
    told = (fake.parent / "told").read_text()
    run_recipe(recipe, tmp_path / "run", Reporter(quiet=True), train=False)
    assert (fake.parent / "told").read_text() == told, "it is not run again"
    with pytest.raises(MissingDependencyError, match="no converter_lite"):
        run_recipe(
            load_recipe(place / "tiny.yaml", [*changes, "verify.converter=nowhere"]), tmp_path / "other",
            Reporter(quiet=True), train=False,
        )  # fmt: skip


def test_a_converter_that_fails_takes_nothing_from_a_run(place: Path, run_folder: Path, tmp_path: Path) -> None:
    fake = program(tmp_path / "bin" / "converter_lite", "echo no kernel; exit 3")
    changes = ["pretrain=null", f"model.checkpoint={run_folder}/float.ckpt", "export.formats=[lite_mindir, ms]"]
    recipe = load_recipe(place / "tiny.yaml", [*changes, f"verify.converter={fake}"])
    result = run_recipe(recipe, tmp_path / "run", Reporter(quiet=True), train=False)
    assert any("no kernel" in warning for warning in result["warnings"])
    assert result["converter"]["compared"] is False
    assert (tmp_path / "run" / "tiny_ms.ms").is_file()


def image_of(data: np.ndarray, images: np.ndarray) -> int:
    """The one image that `data` is, normalised, in the layout NHWC."""
    fits = [np.polyfit(image.ravel().astype(float), data.ravel(), 1) for image in images]
    (found,) = [
        index
        for index, (fit, image) in enumerate(zip(fits, images))
        if np.allclose(np.polyval(fit, image.astype(float)), data, atol=1e-4)
    ]
    return found


def test_the_vendors_own_quantisation(exported: Path, place: Path) -> None:
    folder = exported / "vendor"
    bins = sorted((folder / "calibration" / "x").glob("*.bin"))
    with np.load(place / "data.npz") as archive:
        images, labels = archive["train_images"], archive["train_labels"]
    assert len(bins) == CALIBRATION
    drawn = [image_of(np.fromfile(file, "<f4").reshape(8, 8, 1), images) for file in bins]
    assert len(set(drawn)) == CALIBRATION
    counts = np.bincount(labels[drawn])
    assert counts.max() - counts.min() <= 1
    config = configparser.ConfigParser()
    config.read(folder / "converter.cfg")
    assert config["common_quant_param"]["quant_type"] == "FULL_QUANT"
    assert config["data_preprocess_param"]["calibrate_path"] == "x:calibration/x"
    assert "target_device" not in config["full_quant_param"], "none is a CPU"
    assert "--configFile=converter.cfg" in (folder / "README.txt").read_text()
    assert "--modelFile=float.mindir" in (folder / "convert.sh").read_text()
    from msqkd.graph.mindir import read_mindir

    graph = read_mindir((folder / "float.mindir").read_bytes(), "float")
    assert (graph.inputs, graph.shape("x")) == (["x"], (1, 1, 8, 8)), "what the configuration names, with batch 1"


# -- the benchmark -----------------------------------------------------------------------------------------------------
def read_benchmark_data(text: str) -> dict[str, np.ndarray]:
    """As the tool reads it: pairs of lines until the end of the file; an output that is named again is not."""
    found: dict[str, np.ndarray] = {}
    lines = text.split("\n")
    assert len(lines) % 2 == 0, "a line feed at the end would be another output"
    for head, values in zip(lines[::2], lines[1::2]):
        name, rank, *sizes = head.split(" ")
        assert len(sizes) == int(rank)
        data = np.array(values.split(" "), np.float32)
        found[name] = data.reshape([int(size) for size in sizes])
    return found


def test_the_benchmark_expects_what_the_simulator_answers(exported: Path) -> None:
    kit = exported / "benchmark"
    assert (kit / "tiny.ms").read_bytes() == (exported / "tiny.ms").read_bytes()
    model = read_ms(kit / "tiny.ms")
    simulator = Simulator(model, "arm64")
    assert sorted(left(kit / "inputs")) == ["00000.bin", "00001.bin", "00002.bin"]
    for file in (kit / "inputs").iterdir():
        fed = np.fromfile(file, "<f4").reshape(1, 8, 8, 1)
        expected = dict(zip(model.outputs, simulator.run(fed)))
        found = read_benchmark_data((kit / "expected" / f"{file.stem}.txt").read_text())
        assert found.keys() == expected.keys()
        for name, data in expected.items():
            assert np.array_equal(found[name], data), "to the last bit"
    assert read_kit(kit).threshold == 0
    text = (kit / "README.txt").read_text()
    for option in ("modelFile", "inDataFile", "benchmarkDataFile", "accuracyThreshold", "loopCount", "numThreads"):
        assert f"--{option}=" in text
    assert "adb push" in text
    assert "@" not in text


def test_more_samples_than_there_are(run_folder: Path, tool: Tool, tmp_path: Path) -> None:
    code, _, err = tool(run_folder, "-o", "out", "--benchmark", "--samples", CALIBRATION + 1)
    assert code == 2
    assert f"the calibration set has {CALIBRATION}" in sentence(err)
    assert not left(tmp_path)


def write_dumps(kit: Path, folder: Path, run: str = "0") -> None:
    """Node outputs as a device would dump them that computes like the simulator."""
    model = read_ms(kit / "tiny.ms")
    producers = {name: (step.name, number) for step in model.steps for number, name in enumerate(step.outputs)}
    for file in (kit / "inputs").iterdir():
        place = folder / file.stem / run
        place.mkdir(parents=True)
        for name, data in Simulator(model, "arm64").trace(np.fromfile(file, "<f4").reshape(1, 8, 8, 1)):
            if name in producers:
                node, number = producers[name]
                shape = "".join(f"{size}_" for size in data.shape)
                kind = {"int8": "Int8", "float32": "Float32"}[str(data.dtype)]
                (place / f"{node}_output_{number}_shape_{shape}{kind}_NHWC.bin").write_bytes(data.tobytes())


FAKE_BENCHMARK = """\
for word in "$@"; do case $word in
  --modelFile=*) test -f "${word#*=}" || exit 11;;
  --inDataFile=*) test -f "${word#*=}" || exit 12; sample=$(basename "${word#*=}" .bin);;
  --benchmarkDataFile=*) test -f "${word#*=}" || exit 13;;
  --accuracyThreshold=*|--numThreads=*|--loopCount=*) ;;
  *) exit 14;;
esac; done
echo "$@"
if test -n "$MINDSPORE_DUMP_CONFIG"; then
  cp "$MINDSPORE_DUMP_CONFIG" "dump_$sample.json"
  mkdir -p dump && cp -r "$DUMPS/$sample" dump/
fi
test "$sample" != "$WRONG"
"""


def test_the_script_on_the_device(exported: Path, tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(exported / "benchmark", kit)
    write_dumps(kit, tmp_path / "dumps")
    program(kit / "benchmark", FAKE_BENCHMARK)
    monkeypatch.setenv("DUMPS", str(tmp_path / "dumps"))
    monkeypatch.setenv("WRONG", "none")
    done = subprocess.run(["sh", str(kit / "run.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 samples are not as simulated" in done.stdout
    assert "--loopCount=100" in done.stdout
    for sample in ("00000", "00001", "00002"):
        assert "--accuracyThreshold=0 " in (kit / "log" / f"{sample}.txt").read_text()
        settings = json.loads((kit / f"dump_{sample}.json").read_text())["common_dump_settings"]
        assert settings == {
            "dump_mode": 0, "input_output": 2, "kernels": [], "path": str(kit / "dump"), "net_name": sample
        }  # fmt: skip
    code, out, _ = tool("--check", kit, kit / "dump")
    assert code == 0
    assert out.startswith("0 values of ")
    assert "on 3 samples" in out

    monkeypatch.setenv("WRONG", "00001")
    done = subprocess.run(["sh", str(kit / "run.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "00001: NOT as simulated" in done.stdout
    assert "1 samples are not as simulated" in done.stdout


@pytest.mark.parametrize("name", ["run.sh", "phone.sh", "board.sh"])
def test_the_scripts_are_shell(exported: Path, name: str) -> None:
    subprocess.run(["sh", "-n", str(exported / "benchmark" / name)], check=True)
    assert "@" not in (exported / "benchmark" / name).read_text().replace('"$@"', "")


def test_the_script_for_a_phone(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`adb` is a stand-in that notes what it is asked."""
    kit = tmp_path / "kit"
    shutil.copytree(exported / "benchmark", kit)
    program(tmp_path / "bin" / "adb", f'echo "$@" >> {tmp_path}/asked; case "$*" in *"sh run.sh"*) exit 5;; esac')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    failed = subprocess.run(["sh", str(kit / "phone.sh"), "nowhere"], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert not (tmp_path / "asked").exists(), "the phone is not touched without a package"
    program(tmp_path / "package/tools/benchmark/benchmark", "")
    (tmp_path / "package/runtime/lib").mkdir(parents=True)
    (tmp_path / "package/runtime/lib/libmindspore-lite.so").write_text("")
    done = subprocess.run(["sh", str(kit / "phone.sh"), str(tmp_path / "package")], check=False)
    asked = (tmp_path / "asked").read_text()
    assert done.returncode == 5, "the exit code is that of the comparison"
    assert "push tiny.ms inputs expected run.sh" in asked
    assert "libmindspore-lite.so /data/local/tmp/msqkd/tiny/lib/" in asked
    assert asked.splitlines()[-1] == "pull /data/local/tmp/msqkd/tiny/dump ."


def test_one_value_that_differs(exported: Path, tool: Tool, tmp_path: Path) -> None:
    write_dumps(exported / "benchmark", tmp_path / "dump")
    (file,) = (tmp_path / "dump" / "00001").rglob("conv_output_0_*.bin")
    data = bytearray(file.read_bytes())
    data[5] = (data[5] + 1) % 256
    file.write_bytes(data)
    code, out, _ = tool("--check", exported, "dump")
    assert code == 1
    assert "conv: 1 of " in out
    assert "the first node that differs is conv" in out
    code, out, _ = tool("--check", exported, file)
    assert code == 1, "a single file can be checked"
    assert out.splitlines()[-1].startswith("1 values of 1 nodes differ on 1 samples")


def test_layouts_and_nodes_of_the_runtimes_own(exported: Path, tool: Tool, tmp_path: Path) -> None:
    write_dumps(exported / "benchmark", tmp_path / "dump")
    folder = tmp_path / "dump" / "00000" / "0"
    (folder / "runtime_transpose_output_0_shape_1_8_Float32_NHWC.bin").write_bytes(b"\0" * 32)
    (file,) = folder.glob("stem_output_0_*.bin")
    file.rename(folder / file.name.replace("_NHWC", "_NC4HW4"))
    code, out, _ = tool("--check", exported, "dump/00000")
    assert code == 0
    assert "not in the model: runtime_transpose" in out
    assert "without a dump: stem" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "and the model says|the model says"),
        (lambda file: file.rename(file.with_name(file.name.replace("Int8", "Float16"))), "the model says"),
        (lambda file: shutil.move(file.parent.parent, file.parents[2] / "other"), "name of a sample"),
        (lambda file: shutil.rmtree(file.parents[2]), "there is no dump"),
        (lambda file: [one.unlink() for one in file.parents[2].rglob("*.bin")], "holds no dump"),
    ],
)
def test_dumps_that_do_not_fit(
    exported: Path, tool: Tool, tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    write_dumps(exported / "benchmark", tmp_path / "dump")
    (file,) = (tmp_path / "dump" / "00001").rglob("conv_output_0_*.bin")
    change(file)
    code, _, err = tool("--check", exported / "benchmark", "dump")
    assert code == 2
    assert any(word in sentence(err) for word in words.split("|"))


def test_a_kit_that_was_changed(exported: Path, tool: Tool, tmp_path: Path) -> None:
    shutil.copytree(exported / "benchmark", "kit")
    write_dumps(tmp_path / "kit", tmp_path / "dump")
    code, _, err = tool("--check", "dump", "dump")
    assert code == 2
    assert "holds no kit.json" in sentence(err)
    file = tmp_path / "kit" / "inputs" / "00002.bin"
    file.write_bytes(file.read_bytes()[::-1])
    code, _, err = tool("--check", "kit", "dump")
    assert code == 2
    assert "00002.bin is missing or not the file that was written" in sentence(err)
    (tmp_path / "kit" / "kit.json").write_text("{}")
    code, _, err = tool("--check", "kit", "dump")
    assert code == 2
    assert "is damaged" in sentence(err)
