"""Measures numbered networks in child processes.

MindSpore keeps every compiled graph, and a network may end the process that measures it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Callable

CHUNK = 10  # networks a process
_RESULT = "RESULT "


def print_results(numbers: range, measure: Callable[[int], dict[str, Any]]) -> None:
    """Measure in this process, a child, and print each result for the parent."""
    for number in numbers:
        print(_RESULT + json.dumps(measure(number)), flush=True)


def measured_apart(
    numbers: range,
    command: Callable[[int, int], list[str]],
    ended: Callable[[int, str], dict[str, Any]],
    timeout: float,
) -> Iterator[dict[str, Any]]:
    """Yield the result of each network, from children that call `print_results`.

    Args:
        numbers: of the networks.
        command: (first number, how many) -> arguments of the child, beginning with its script.
        ended: (number, how the process ended) -> the result of a network that ended it; another child goes on with the
            next network.
        timeout: seconds for `CHUNK` numbers.
    """
    start = numbers.start
    while start < numbers.stop:
        count = min(CHUNK - (start - numbers.start) % CHUNK, numbers.stop - start)
        try:
            done = subprocess.run(
                [sys.executable, *command(start, count)], capture_output=True, text=True, timeout=timeout, check=False
            )
            out, end = done.stdout, f"exit {done.returncode}: {done.stderr.strip()[-500:]}"
        except subprocess.TimeoutExpired as error:
            out, end = (error.stdout or b"").decode(), f"no end in {timeout:.0f} s"
        found = [json.loads(line[len(_RESULT) :]) for line in out.splitlines() if line.startswith(_RESULT)]
        yield from found
        start += len(found)
        if len(found) < count:
            yield ended(start, end)
            start += 1
