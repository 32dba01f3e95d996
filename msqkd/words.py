"""Numbers and commands as people read them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Optional


def percent(share: float, digits: int = 1) -> str:
    """Write a share as a percentage such as ``99.5%``: 100 only for all, 0 only for none, and no decimals of 0."""
    text = of_hundred(100.0 * share, digits)
    return (text.rstrip("0").rstrip(".") if "." in text else text) + "%"


def of_hundred(value: float, digits: int = 2) -> str:
    """Write a number of percent with so many digits, as 100 only if it is 100, and as 0 only if it is 0."""
    smallest = 10.0**-digits
    if 0.0 < value < 100.0:
        value = min(max(value, smallest), 100.0 - smallest)
    return f"{value:.{digits}f}"


def shell_command(
    verb: str, recipe: str, settings: Optional[Sequence[str]] = None, output: Optional[object] = None
) -> str:
    """Write a command of msqkd so that it can be pasted into a shell."""
    words = ["msqkd", verb, recipe]
    for setting in settings or ():
        words += ["--set", setting]
    return shlex.join(words if output is None else [*words, "--output", str(output)])


def shell_setting(key: str, value: str) -> str:
    """Write a setting of a recipe as the option of a command, quoted for a shell."""
    return f"--set {shlex.quote(f'{key}={value}')}"
