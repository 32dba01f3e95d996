from __future__ import annotations

from typing import Any, Optional

import pytest

from msqkd.analysis import plots
from msqkd.analysis.heatmap import heat_map


def row(name: str, **parts: Any) -> dict[str, Any]:
    weight = {"sqnr_db": 40.0, "bits": 8, "count": 100, "max_over_percentile": 1.0}
    activation = {"sqnr_db": 42.0, "bits": 8, "outside": 0.0, "max_over_percentile": 1.0}
    found: dict[str, Any] = {"name": name, "value": f"{name}_out", "sqnr_db": 35.0}
    found |= {"weight": weight, "activation": activation}
    for part, value in parts.items():
        found[part] = {**found[part], **value} if value is not None else None
    return found


def column(found: Optional[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    assert found is not None
    place = [column["title"] for column in found["columns"]].index(title)
    return [row["cells"][place] for row in found["rows"]]


def test_the_worst_cell_is_marked_and_darkest() -> None:
    found = heat_map([row("a"), row("b", weight={"sqnr_db": 12.25}), row("c", weight={"sqnr_db": 38.0})])
    cells = column(found, "Weight SQNR")
    assert [cell["text"] for cell in cells] == ["40.0", "12.2", "38.0"]
    assert [cell["worst"] for cell in cells] == [False, True, False]
    assert [cell["colour"] for cell in cells] == ["", "bad6", ""]
    assert [line["name"] for line in found["rows"]] == ["a", "b", "c"]  # type: ignore[index]


def test_differences_of_no_weight_have_no_colour() -> None:
    found = heat_map([row("a"), row("b", weight={"sqnr_db": 39.0}, activation={"outside": 0.0001})])
    assert found is not None
    cells = [cell for line in found["rows"] for cell in line["cells"]]
    assert not any(cell["worst"] or cell["colour"].startswith("bad") for cell in cells)


def test_device_and_sensitivity_are_joined_to_their_layers() -> None:
    parity: list[dict[str, Any]] = [
        {"value": "b_out", "equal": 0.9}, {"value": "other", "equal": 0.1}, {"value": "a_out", "equal": None}
    ]  # fmt: skip
    losses = {"loss": "relative error", "layers": [{"name": "a", "only_loss": 0.5, "float_loss": 0.25}]}
    found = heat_map([row("a"), row("b")], parity, losses)
    assert [cell["text"] for cell in column(found, "Device ≠")] == ["", "10"]
    alone = column(found, "Loss alone")
    assert [cell["text"] for cell in alone] == ["0.5", ""]
    assert [cell["colour"] for cell in alone] == ["", ""]  # of one number none is worse
    words = {column["title"]: column["words"] for column in found["columns"]}  # type: ignore[index]
    assert words["Loss alone"] == "relative error of the outputs with this layer alone quantised"
    without = heat_map([row("a"), row("b")])
    assert without is not None
    assert not {"Device ≠", "Loss alone", "Loss without"} & {column["title"] for column in without["columns"]}


def test_shares_and_bits_are_neither_good_nor_bad() -> None:
    found = heat_map([row("a", weight={"count": 300, "bits": 4}), row("b"), row("x", weight=None)])
    shares = column(found, "Weights")
    assert [cell["text"] for cell in shares] == ["75", "25", ""]
    assert shares[0]["colour"] == "much6"
    assert not any(cell["worst"] for cell in shares)
    assert [cell["text"] for cell in column(found, "Weight bits")] == ["4", "8", ""]


@pytest.mark.parametrize(("outside", "text"), [(0.0, "0"), (1e-6, "< 0.01"), (0.0021, "0.21"), (0.25, "25")])
def test_shares_in_words(outside: float, text: str) -> None:
    assert column(heat_map([row("a", activation={"outside": outside})]), "Clipped")[0]["text"] == text


def test_nothing_known_is_no_map() -> None:
    assert heat_map([]) is None
    assert heat_map([{"name": "bare"}]) is None


@pytest.mark.parametrize("colours", [plots.BAD_COLOURS, plots.MUCH_COLOURS])
def test_every_step_is_darker_in_grey_and_text_stays_readable(colours: tuple[str, ...]) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    steps = [luminance(colour) for colour in colours]
    assert all(lighter > darker for lighter, darker in zip(steps, steps[1:]))
    ink = luminance(plots.INK)
    assert all((step + 0.05) / (ink + 0.05) >= 4.5 for step in steps)  # WCAG 2.1, level AA
