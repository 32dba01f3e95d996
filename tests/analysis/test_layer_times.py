"""Tables of times: what is written is read again, and what is wrong is one sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.analysis.layer_times import KEYS, REST, LayerTimes, read_times
from msqkd.errors import DataError

LAYERS = ["stem", "block.conv", "fc"]
MICROSECONDS = st.floats(0, 1e9, allow_nan=False)


@st.composite
def tables(draw: st.DrawFn) -> LayerTimes:
    keys = ["float", *draw(st.lists(st.sampled_from(KEYS[1:]), unique=True))]
    layers = {name: {key: draw(MICROSECONDS) for key in keys} for name in LAYERS}
    return LayerTimes(layers, {key: draw(MICROSECONDS) for key in draw(st.sampled_from([[], keys]))})


@settings(deadline=None, max_examples=50)
@given(tables(), st.sampled_from([".json", ".yaml"]))
def test_a_table_is_read_as_it_was_written(times: LayerTimes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"times{suffix}"
        file.write_text(json.dumps(times.to_dict()) if suffix == ".json" else yaml.safe_dump(times.to_dict()))
        found = read_times(file, LAYERS)
    assert found == times == LayerTimes.of(times.to_dict())
    assert found.precisions == [key for key in KEYS if key in times.layers["stem"]]


def test_operations_without_a_choice_are_left_out_and_numbers_may_be_keys(tmp_path: Path) -> None:
    file = tmp_path / "times.yaml"
    file.write_text("stem: {float: 3, 8: 1.5}\nfc: {float: 2, 8: 1}\npool: {float: 9}\n")
    assert read_times(file, ["stem", "fc"], ["pool"]) == LayerTimes(
        {"stem": {"float": 3.0, "8": 1.5}, "fc": {"float": 2.0, "8": 1.0}}
    )


GOOD = {name: {"float": 2.0, "8": 1.0} for name in LAYERS}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"stm": {"float": 1}},
            "'stm' is no layer of the network; allowed: stem, block.conv, fc; did you mean 'stem'?",
        ),
        ({"fc": None}, "no times of fc; allowed: every layer of the network"),
        ({"fc": {"float": 1.0}}, "fc: no time at '8', as block.conv has it"),
        ({"fc": {"8": 1.0}}, "fc: no time at 'float', which every share of the budget is of"),
        ({"fc": {"float": 1.0, "int8": 1.0}}, "fc: 'int8' is no precision; allowed: float, float16, 2"),
        ({"fc": {"float": -1.0, "8": 1.0}}, "fc: float: found -1.0, allowed: microseconds, a number of 0 or more"),
        ({"fc": {"float": float("nan"), "8": 1.0}}, "fc: float: found nan, allowed: microseconds"),
        ({"fc": {"float": float("inf"), "8": 1.0}}, "fc: float: found inf, allowed: microseconds"),
        ({"fc": {"float": "1e3", "8": 1.0}}, "fc: float: found '1e3', allowed: microseconds"),
        ({"fc": {"float": True, "8": 1.0}}, "fc: float: found True, allowed: microseconds"),
        ({"fc": 3}, "fc: found 3, allowed: a mapping of precisions to microseconds"),
        ({REST: {"float": -2}}, "(rest): float: found -2"),
    ],
)
def test_what_is_no_table_of_the_network(tmp_path: Path, change: dict[str, object], text: str) -> None:
    table = {name: times for name, times in {**GOOD, **change}.items() if times is not None}
    file = tmp_path / "times.json"
    file.write_text(json.dumps(table))
    refused(file, text)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("t.json", "{", "t.json:1: no JSON: "),
        ("t.json", '{"fc": {"float": 1}, "fc": {"float": 2}}', "'fc' is given twice"),
        ("t.json", "[1]", "allowed: a mapping of layers to {precision: microseconds a sample}"),
        ("t.json", "[" * 100_000, "nested too deeply"),
        ("t.yaml", "fc: {float: 1\n", "no YAML: "),
        ("t.yaml", "fc: {float: 1}\nfc: {float: 2}\n", "t.yaml:2: fc: given twice"),
        ("t.yaml", "", "allowed: a mapping of layers"),
        ("t.yaml", "fc: {8: 1.0}\nstem: {8: 1.0}\nblock.conv: {8: 1.0}\n", "no time at 'float', which every share"),
    ],
)
def test_what_is_no_table_at_all(tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content)
    refused(tmp_path / name, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.json", "none.json cannot be read: No such file")


def refused(file: Path, text: str) -> None:
    with pytest.raises(DataError) as caught:
        read_times(file, LAYERS)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
