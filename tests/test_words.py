from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from msqkd.cli import app
from msqkd.progress import Reporter, terminal
from msqkd.words import of_hundred, percent, shell_command, shell_setting


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [(212, 212, "100%"), (211, 212, "99.5%"), (99999, 100000, "99.9%"), (0, 7, "0%"), (1, 100000, "0.1%"),
     (1, 2, "50%"), (2, 3, "66.7%")],
)  # fmt: skip
def test_a_share_is_100_percent_only_if_it_is_all(part: int, whole: int, words: str) -> None:
    assert percent(part / whole) == words


def test_percent_are_rounded_to_neither_end() -> None:
    assert [of_hundred(value) for value in (100.0, 99.9999, 0.00001, 0.0)] == ["100.00", "99.99", "0.01", "0.00"]
    assert of_hundred(99.9999, 3) == "99.999"


def test_commands_can_be_pasted_into_a_shell() -> None:
    settings = ["export.formats=[ms, onnx]", "data.root=/my data/*"]
    text = shell_command("run", "my recipes/a$b.yaml", settings, Path("out of it"))
    assert shlex.split(text) == [
        "msqkd", "run", "my recipes/a$b.yaml", "--set", settings[0], "--set", settings[1], "--output", "out of it"
    ]  # fmt: skip
    assert shell_setting("export.formats", "[ms, onnx]") == "--set 'export.formats=[ms, onnx]'"
    assert shell_command("run", "plain.yaml") == "msqkd run plain.yaml"


ODD = "a [mindcv] [bold]b[/bold] [/c] :smile: [runs/NAME]"


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal(width=200)
    table = Table(title=ODD)
    table.add_column(ODD)
    table.add_row(ODD)
    console.print(ODD)
    console.print(table)
    assert capsys.readouterr().out.count(ODD) == 4


def test_progress_is_printed_as_it_is() -> None:
    console = Console(record=True, width=200, force_terminal=True, highlight=False, emoji=False)
    reporter = Reporter(2, console)
    reporter.stage(ODD)
    reporter.say(ODD)
    reporter.warn(ODD)
    with reporter.task(ODD, 2) as task:
        task.update(1, note=ODD)
    assert console.export_text().count(ODD) >= 4


@pytest.mark.parametrize(
    ("verb", "text"), [("run", "[runs/NAME]"), ("verify", "[RUN]"), ("analyze", "[RUN, runs/NAME_ptq]")]
)
def test_help_keeps_its_brackets(verb: str, text: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert text in " ".join(result.output.split())
