"""Which teacher to take: what candidates know more than the network they are to teach, and what asking them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from rich.table import Table

from msqkd.train.metric import Scale
from msqkd.words import percent

_SOFT = 0.05
"""Below this share of the largest possible entropy, a soft label says hardly more than its class."""


def accuracy_noise(one: np.ndarray, other: np.ndarray, labels: np.ndarray) -> float:
    """Two standard errors of the difference of two accuracies on the same samples, in points.

    It follows from the samples that one of the two alone gets right (McNemar 1947): b and c of n, and the error is
    √(b + c − (b − c)² / n) / n.

    Args:
        one, other: logits (n, classes).
        labels: (n,).
    """
    first, second = one.argmax(-1) == labels, other.argmax(-1) == labels
    only, lost, count = int((first & ~second).sum()), int((second & ~first).sum()), len(labels)
    return float(200.0 * np.sqrt(max(only + lost - (only - lost) ** 2 / count, 0.0)) / count)


def softness(logits: np.ndarray, temperature: float) -> float:
    """Mean entropy of softmax(logits / temperature) (n, classes), as a share of the largest one: 0 to 1."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    exponents = np.exp(scaled)
    total = exponents.sum(-1, keepdims=True)
    entropy = np.log(total[:, 0]) - (exponents * scaled).sum(-1) / total[:, 0]
    return float(entropy.mean() / np.log(logits.shape[-1]))


def chosen_teacher(rows: Sequence[Mapping[str, Any]]) -> Optional[int]:
    """The number of the cheapest teacher that is not measurably worse than the best one; None where none answers better
    than the network, beyond the noise.

    Args:
        rows: with `gain` (metric over that of the network, positive is better), its `noise`, and `time`, the cost.
    """
    better = [number for number, row in enumerate(rows) if row["gain"] > row["noise"]]
    if not better:
        return None
    best = max(rows[number]["gain"] for number in better)
    equal = [number for number in better if rows[number]["gain"] >= best - rows[number]["noise"]]
    return min(equal, key=lambda number: (rows[number]["time"], number))


def remarks(row: Mapping[str, Any], scale: Scale, temperature: Optional[float]) -> list[str]:
    """What is to be said of a teacher, in sentences without a full stop."""
    gain, noise = row["gain"], row["noise"]
    within = f", within the noise of {scale.number(noise)}" if noise else ""
    if row["itself"]:
        told = ["the network itself: its soft labels alone are new"]
    elif gain > noise:
        told = [f"answers better by {scale.number(gain)}{scale.points}"]
    elif gain < -noise:
        told = [f"answers worse by {scale.number(-gain)}{scale.points}: it passes its mistakes on"]
    else:
        told = [f"answers no better ({gain:+.{scale.digits}f}{within})"]
    if temperature is not None and row["softness"] is not None and row["softness"] < _SOFT:
        told.append(
            f"its answers to training samples have {percent(row['softness'])} of the largest entropy at the "
            f"temperature {temperature:g}, hardly more than labels; a higher one shows more"
        )
    return told


def verdict(result: Mapping[str, Any]) -> str:
    """Which teacher to take, in a sentence."""
    rows, chosen, scale = result["teachers"], result["chosen"], Scale.of(result["metric"])
    if chosen is None:
        return (
            f"No teacher answers better than the network itself ({scale.show(result['student']['test'])}): "
            "teacher.source: self costs least."
        )
    row = rows[chosen]
    others = len(rows) > 1
    which = "the cheapest of the best" if others else "better than the network it teaches"
    return f"{row['place']} ({row['what']}) is {which}: {', '.join(row['remarks'])}."


def teachers_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The cells of the table: the network first, then every teacher."""
    scale, student = Scale.of(result["metric"]), result["student"]
    rows = [["network", student["what"], scale.number(student["test"]), "", scale.number(student["train"]), "",
             _millions(student["parameters"]), "", "", ""]]  # fmt: skip
    for row in result["teachers"]:
        soft = "" if row["softness"] is None else percent(row["softness"])
        cost = "" if row["cost"] is None else f"{row['cost']:.2f}"
        rows.append([
            row["place"], row["what"], scale.number(row["test"]), f"{row['gain']:+.{scale.digits}f}",
            scale.number(row["train"]), soft, _millions(row["parameters"]), cost, f"{row['time']:.2f}",
            "; ".join(row["remarks"]),
        ])  # fmt: skip
    return rows


HEADERS = ("which", "what", "test set", "gain", "training samples", "entropy", "parameters", "products ×", "time ×", "")
"""Of the columns of `teachers_rows`; ratios are to the network."""


def teachers_table(result: Mapping[str, Any]) -> Table:
    """For the terminal."""
    table = Table()
    for header in HEADERS:
        table.add_column(header, overflow="fold")
    for row in teachers_rows(result):
        table.add_row(*row)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
