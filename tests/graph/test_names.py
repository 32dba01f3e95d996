"""The cases of names_cases.py, in a process of their own, as a user's program is one.

In a process that has compiled hundreds of other networks MindSpore's compiler may lose the scope of a cell without
parameters; then its operation is called after what it does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("names_cases.py")


def test_names_say_where_an_operation_is() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CASES.parents[2], check=False)
    assert done.returncode == 0, done.stdout[-4000:]
