from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import msqkd
from msqkd import cli, environment
from msqkd.errors import RecipeError

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["msqkd", *arguments])
        code = cli.guarded(cli.app)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_version(command: Command) -> None:
    assert command("--version")[:2] == (0, msqkd.__version__ + "\n")


def test_help_names_every_verb(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert all(verb in out for verb in ("run", "train", "calibrate", "verify", "plan", "recipes", "doctor"))


def test_recipes_as_json(command: Command) -> None:
    code, out, _ = command("recipes", "--json")
    names = {entry["name"] for entry in json.loads(out)}
    assert code == 0
    assert {"digits_lenet5", "cifar10_resnet20_w8a8"} <= names
    assert "digits_lenet5" in command("recipes")[1]


def test_doctor_exits_with_1_when_something_is_wrong(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    good = environment.Finding("python", environment.OK, "3.11")
    monkeypatch.setattr(environment, "examine", lambda: [good])
    assert command("doctor")[0] == 0
    bad = environment.Finding("numpy", environment.PROBLEM, "2.1", "pip install 'numpy<2'")
    monkeypatch.setattr(environment, "examine", lambda: [good, bad])
    code, out, _ = command("doctor", "--json")
    assert code == 1
    assert json.loads(out)[1] == bad.to_dict()
    assert "pip install 'numpy<2'" in " ".join(command("doctor")[1].split())


def test_settings_may_follow_one_set_or_several(command: Command) -> None:
    results = [
        command("plan", "digits_lenet5", "--json", *given)
        for given in (
            ["--set", "quantization.weight.bits=4", "quantization.activation.delay=3"],
            ["--set", "quantization.weight.bits=4", "--set", "quantization.activation.delay=3"],
        )
    ]
    assert results[0] == results[1]
    data = json.loads(results[0][1])
    assert {weight["bits"] for weight in data["weights"]} == {4}
    assert {group["delay"] for group in data["groups"]} == {3}
    assert data["recipe"] == "digits_lenet5"


def test_the_plan_says_which_defects_it_avoids(command: Command) -> None:
    code, out, _ = command("plan", "digits_lenet5")
    assert code == 0
    assert "avoided: a maximum pool whose input and output parameters differ wraps" in out
    assert "(pool, pool_1)" in out
    assert "avoided:" not in command("plan", "digits_lenet5", "--set", "target=ascend")[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "digits_lenet"], "did you mean 'digits_lenet5'"),
        (["plan", "digits_lenet5", "--set", "trian.lr=1"], "--set trian.lr"),
        (["plan", "digits_lenet5", "--set", "train.lr"], "train.lr"),
        (["plan", "digits_lenet5", "train.lr=1"], "settings follow --set"),
        (["plan"], "RECIPE"),
        (["paln"], "paln"),
        (["verify"], "RUN"),
        (["verify", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(command: Command, arguments: list[str], text: str) -> None:
    code, out, err = command(*arguments)
    assert code == 2
    assert text in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""


def test_what_guards_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> Callable[[], None]:
        def command() -> None:
            raise error

        return command

    assert cli.guarded(raising(RecipeError("a.yaml:3: x [red] y"))) == 2
    assert capsys.readouterr().err == "msqkd: a.yaml:3: x [red] y\n"
    assert cli.guarded(raising(OSError(28, "No space left on device", "/out/f"))) == 2
    assert capsys.readouterr().err == "msqkd: /out/f: No space left on device\n"
    assert cli.guarded(raising(KeyboardInterrupt())) == 130
    assert cli.guarded(raising(SystemExit(3))) == 3
    for text in ("---\nKernel select failed:\nUnsupported op [Einsum] on CPU, …", "The kernel Einsum unregistered."):
        assert cli.guarded(raising(RuntimeError(text))) == 2
        assert capsys.readouterr().err.startswith("msqkd: MindSpore has no kernel for Einsum on this device, ")
    for error in (ZeroDivisionError(), RuntimeError("of another kind")):
        with pytest.raises(type(error)):
            cli.guarded(raising(error))  # a defect of msqkd keeps its traceback


def test_as_a_process_it_says_the_sentence_and_nothing_else(tmp_path: Path) -> None:
    repository = str(Path(msqkd.__file__).resolve().parents[1])
    environment_ = {**os.environ, "PYTHONPATH": repository}
    environment_.pop("GLOG_v", None)
    done = subprocess.run(
        [sys.executable, "-m", "msqkd", "plan", "digits_lenet5", "--set", "model.name=lenet6"],
        capture_output=True, text=True, env=environment_, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("msqkd: model: there is no network 'lenet6'")
    assert list(tmp_path.iterdir()) == []
