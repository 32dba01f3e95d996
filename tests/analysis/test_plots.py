from __future__ import annotations

import warnings
from xml.etree import ElementTree

import pytest

from msqkd.analysis import plots

pytestmark = pytest.mark.figures

STEPS = [plots.Step("float", 98.52, "float"), plots.Step("PTQ", 97.0, "int8"), plots.Step("out", 98.33, "exported")]


def texts(svg: str) -> list[str]:
    """The texts of a well-formed SVG, in order."""
    root = ElementTree.fromstring(svg)
    return [("".join(element.itertext())).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_staircase_labels_every_bar_with_its_number_and_its_distance_to_float() -> None:
    shown = texts(plots.staircase(STEPS, [plots.Step("control", 98.6, "control")]))
    for text in ("98.52", "97.00", "98.33", "98.60", "−1.52", "−0.19", "+0.08", "float", "PTQ", "out", "control"):
        assert text in shown


def test_the_staircase_zooms_but_never_below_zero_or_with_ticks_above_100() -> None:
    assert plots.staircase_floor([98.5, 98.4]) == pytest.approx(98.0)
    assert plots.staircase_floor([98.5, 10.0]) == 0.0
    ticks = [float(text) for text in texts(plots.staircase([plots.Step("a", 100.0, "float")])) if text[0].isdigit()]
    assert max(ticks) == 100.0


@pytest.mark.parametrize("steps", [[], STEPS[1:2]])
def test_the_staircase_needs_neither_a_float_network_nor_steps(steps: list[plots.Step]) -> None:
    shown = texts(plots.staircase(steps, [plots.Step("control", 50.0, "control")]))
    assert "50.00" in shown
    assert not any(text.startswith(("+", "−", "±")) for text in shown)


@pytest.mark.parametrize(("count", "charts"), [(1, 1), (16, 1), (17, 2), (54, 2), (90, 2), (91, 4), (160, 4)])
def test_layers_are_cut_into_charts_without_loss(count: int, charts: int) -> None:
    layers = [(f"layer{i}", 20.0 + i) for i in range(count)]
    drawn = plots.sqnr(layers)
    assert len(drawn) == charts
    shown = [text for svg in drawn for text in texts(svg) if text.startswith("layer")]
    assert shown == [name for name, _ in layers]


def test_no_layers_no_charts() -> None:
    assert plots.sqnr([]) == plots.ranges([], "weights") == []


def test_only_the_worst_layers_are_highlighted() -> None:
    values = [30.0, 10.0, 25.0, 28.0, 12.0, 26.0, 11.0, 27.0, 29.0, 24.0]
    assert plots.worst(values) == {1, 4, 6}
    assert plots.worst(values[:3]) == {1}
    svg = plots.sqnr([(f"l{i}", value) for i, value in enumerate(values)])[0]
    assert svg.count(f"fill: {plots.HIGHLIGHT}") == 6  # three bars and their numbers


def test_different_integers_show_their_share_and_size() -> None:
    rows = [("conv1", [0.5, 0.0, 0.0], "0.5 %, at most 1 step"), ("conv2", [2.0, 1.0, 0.25], "3.25 %, at most 4 steps")]
    (svg,) = plots.lsb(rows)
    shown = texts(svg)
    assert [text for text in shown if "conv" in text or "%, at" in text] == [
        "conv1", "conv2", "0.5 %, at most 1 step", "3.25 %, at most 4 steps",
    ]  # fmt: skip
    assert all(colour in svg for colour in plots.LSB_COLOURS)
    (svg,) = plots.lsb([("same", [0.0, 0.0, 0.0], "none")])
    assert "none" in texts(svg)
    assert plots.lsb([]) == []


def test_pairs_of_ratios_may_be_incomplete() -> None:
    rows = [("x", 51.0, None), ("conv1", 41.5, 41.25), ("equal", None, None)]
    (svg,) = plots.noise_pairs(rows)
    assert [text for text in texts(svg) if text in ("x", "conv1", "equal")] == ["x", "conv1", "equal"]
    assert plots.noise_pairs([("equal", None, None)]) == plots.noise_pairs([]) == []
    (svg,) = plots.noise_pairs([("low", -3.0, -4.0)])
    assert any(text.startswith("−") for text in texts(svg))


def test_clipping_is_what_exceeds_one_step() -> None:
    assert plots.RangeRow("a", -1.27, 1.28, -1.28, 1.285).clipped == (False, False)
    assert plots.RangeRow("a", -1.27, 1.28, -1.3, 1.0).clipped == (True, False)
    assert plots.RangeRow("a", 0.0, 2.55, 0.0, 2.6).clipped == (False, True)
    assert plots.RangeRow("a", 0.0, 2.55).clipped == (False, False)


def test_ranges_show_their_numbers_and_survive_zeros() -> None:
    rows = [plots.RangeRow("conv1", -0.5, 0.25, -0.4, 0.3), plots.RangeRow("dead", 0.0, 0.0, 0.0, 0.0)]
    shown = texts(plots.ranges(rows, "weights")[0])
    assert shown == ["conv1", "dead", "−0.5 … 0.25", "0 … 0"]


def test_long_names_keep_what_tells_them_apart() -> None:
    layers = [(f"blocks.encoder.layers.{i}.attention.query_key_value", 30.0) for i in range(12)]
    shown = [text for text in texts(plots.sqnr(layers)[0]) if "query" in text]
    assert len(set(shown)) == 12
    assert max(map(len, shown)) <= 34
    assert max(map(len, texts(plots.sqnr([("x" * 200, 1.0)])[0]))) == 34


def test_names_are_neither_markup_nor_tex() -> None:
    names = ["<b>&", r"$\frac{", "two\nlines", "层"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = texts(plots.sqnr([(name, 1.0) for name in names])[0])
    assert [text for text in shown if text in ("<b>&", r"$\frac{", "two lines", "层")] == [
        "<b>&",
        r"$\frac{",
        "two lines",
        "层",
    ]


def test_long_curves_are_thinned_and_marked() -> None:
    points = [(float(i), 1.0 / (i + 1)) for i in range(50_000)]
    svg = plots.training([plots.Curve("loss", "step", points, marked=1000)], "a")
    assert len(svg) < 100_000
    assert svg.count(plots.HIGHLIGHT) == 1
    assert plots.HIGHLIGHT not in plots.training([plots.Curve("loss", "step", points)], "a")


def test_tiny_losses_have_readable_ticks() -> None:
    shown = texts(plots.training([plots.Curve("loss", "step", [(0, 2.0e-6), (1, 2.1e-6)])], "a"))
    assert any(text.endswith("e−06") for text in shown)


def test_constant_accuracy_has_no_tick_above_100() -> None:
    curve = plots.Curve("accuracy, %", "epoch", [(1, 100.0), (2, 100.0)], percent=True)
    svg = plots.training([curve], "a")
    assert max(float(text) for text in texts(svg) if text.replace(".", "").isdigit()) == 100.0


def test_sizes_of_nothing_can_be_drawn() -> None:
    assert "0 B" in texts(plots.sizes([("float", "0 B", 0.0, "float")]))


def test_the_settings_of_the_caller_are_left_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.staircase(STEPS)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("value", "text"), [(0.19, "+0.19"), (-0.19, "−0.19"), (0.0, "±0.00"), (-0.001, "±0.00"), (1e-9, "±0.00")]
)
def test_signed(value: float, text: str) -> None:
    assert plots.signed(value) == text


def test_a_difference_agrees_with_the_printed_numbers() -> None:
    assert plots.difference(10.004, 9.996) == "±0.00"  # both print as 10.00
    assert plots.difference(10.006, 10.004) == "+0.01"


def test_what_each_layer_costs_is_a_bar_with_its_number() -> None:
    (chart,) = plots.losses([("conv1", 0.021), ("conv2", 0.0004)], "only", "KL divergence")
    shown = texts(chart)
    assert {"conv1", "conv2", "0.021", "0.0004", "KL divergence"} <= set(shown)
    assert plots.losses([], "only", "KL divergence") == []
    assert len(plots.losses([(f"layer{i}", 0.0) for i in range(40)], "only", "KL divergence")) == 2


def test_what_is_outside_of_a_range_is_highlighted_and_counts_are_plain_numbers() -> None:
    edges, counts = [0.0, 1.0, 2.0, 3.0], [1000, 10, 1]
    clipped = plots.distribution(edges, [counts], "one", "its values", (0.0, 1.5))
    whole = plots.distribution(edges, [counts], "one", "its values", (0.0, 3.0))
    assert {"its values", "1,000", "10", "1"} <= set(texts(clipped))
    assert "mathdefault" not in clipped
    assert plots.HIGHLIGHT in clipped
    assert plots.HIGHLIGHT not in whole


def test_every_channel_has_a_column_from_its_smallest_to_its_largest_value() -> None:
    shown = texts(plots.channels([-1.0, 0.0, -0.5], [1.0, 0.0, 2.0], "channels", "its weight, by channel", (-1, 1)))
    assert {"its weight, by channel", "channel", "0", "1", "2"} <= set(shown)
