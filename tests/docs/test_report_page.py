"""What docs/report.md says is what the code has."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from msqkd.analysis import advice, heatmap, report
from msqkd.analysis.distributions import SHOWN

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")


def test_every_rule_is_described() -> None:
    rules = set(re.findall(r'Advice\(\s*"([a-z ]+)"', inspect.getsource(advice)))
    assert len(rules) == 11
    assert set(re.findall(r"^\| `([a-z ]+)` \|", PAGE, flags=re.MULTILINE)) - {"rule"} == rules


def test_the_thresholds_are_those_of_the_rules() -> None:
    assert (advice.LOSS, advice.LOSS_PART, advice.GAIN, advice.GAIN_PART) == (0.5, 0.01, 0.1, 0.002)
    assert (advice.LOW_SQNR, advice.BELOW, advice.CLIPPED, advice.OUTLIERS) == (20.0, 10.0, 0.001, 3.0)
    text = " ".join(PAGE.split())
    told = ("0.5 points", "(1 % of another", "0.1 points (0.2 %)", "below 20 dB or 10 dB below", "longer than 3 ×")
    assert all(words in text for words in told)
    assert (advice.MOST, SHOWN) == (5, 6)
    assert "Five pieces at most" in PAGE
    assert "six layers at most" in PAGE


def test_every_column_and_section_is_described() -> None:
    source = inspect.getsource(heatmap)
    titles = re.findall(r'Measure\("([^"]+)"', source)
    assert len(titles) == 12
    assert all(title in PAGE for title in titles)
    template = (Path(report.__file__).parent / "report.html.j2").read_text(encoding="utf-8")
    anchors = set(re.findall(r'<section id="(\w+)">', template))
    rows = re.findall(r"^\| ([A-Z][^|]*) \|", PAGE, re.MULTILINE)
    assert anchors <= {words.strip().lower().replace(" ", "") for row in rows for words in row.split(",")}
