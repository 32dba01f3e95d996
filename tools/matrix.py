"""Try msqkd on other versions of Python and MindSpore: the quick tests and the main job, each in a fresh environment.

    python tools/matrix.py 3.9:2.9.0 3.11:2.7.0 [--folder DIR] [--only quick|main] [--json FILE]

A pair is PYTHON:MINDSPORE. The interpreter is `pythonX.Y`, searched on PATH and in ~/.pyenv/versions. Shown for each
pair: whether the installation, the quick tests (`pytest -m quick`) and the main job (`msqkd run digits_lenet5`)
succeeded, and its times. The exit code is 1 if anything failed. A full log of each pair is in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("install", "quick", "main")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="PYTHON:MINDSPORE")
    parser.add_argument("--folder", type=Path, help="for environments and logs; a temporary one by default")
    parser.add_argument("--only", choices=STEPS[1:], help="leave the other step out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    pairs = [read_pair(parser, text) for text in args.pairs]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="msqkd-matrix-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if step == "install" or args.only in (None, step)]
    rows = []
    for python, mindspore, interpreter in pairs:
        rows.append(try_pair(python, mindspore, interpreter, folder, steps))
        print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"date": date.today().isoformat(), "machine": platform.machine(), "rows": rows})
        )
    print(f"logs: {folder}")
    sys.exit(any(result["exit"] for row in rows for result in row["steps"].values()))


def read_pair(parser: argparse.ArgumentParser, text: str) -> tuple[str, str, str]:
    """Return the Python version, the MindSpore version and the interpreter of a pair."""
    if not re.fullmatch(r"3\.\d+:\d+\.\d+\.\d+\S*", text):
        parser.error(f"found '{text}', allowed: PYTHON:MINDSPORE such as 3.9:2.9.0")
    python, mindspore = text.split(":")
    interpreter = find_interpreter(python)
    if interpreter is None:
        parser.error(f"{text}: there is no python{python} on PATH or in ~/.pyenv/versions")
    return python, mindspore, interpreter


def find_interpreter(version: str) -> Optional[str]:
    """Return the path of `pythonX.Y`, or None."""
    folders = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin"))
    for candidate in [*(str(folder / "python") for folder in folders), shutil.which(f"python{version}")]:
        if candidate is None:
            continue
        command = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def try_pair(python: str, mindspore: str, interpreter: str, folder: Path, steps: list[str]) -> dict[str, Any]:
    """Install msqkd with one pair of versions and take the steps, each only if the installation succeeded."""
    place = folder / f"python{python}-mindspore{mindspore}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    programs = place / "venv" / "bin"
    commands = {
        "install": [
            [interpreter, "-m", "venv", place / "venv"],
            [programs / "pip", "install", "-q", f"mindspore=={mindspore}", f"{ROOT}[test]"],
        ],
        "quick": [[programs / "pytest", "-m", "quick", "-p", "no:cacheprovider"]],
        "main": [[programs / "msqkd", "run", "digits_lenet5", "--output", place / "run"]],
    }
    row: dict[str, Any] = {"python": python, "mindspore": mindspore, "steps": {}}
    with open(place / "log.txt", "w", encoding="utf-8") as log:
        for step in steps:
            row["steps"][step] = take(commands[step], log)
            if step == "install" and row["steps"][step]["exit"]:
                break
    report = place / "run" / "report.json"
    if report.is_file():
        row["accuracy"] = json.loads(report.read_text(encoding="utf-8"))["accuracy"].get("exported")
    row["log"] = str(place / "log.txt")
    return row


def take(commands: list[list[Any]], log: Any) -> dict[str, Any]:
    """Run commands until one fails; returns the exit code and the seconds."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    begun, code = time.monotonic(), 0
    for command in commands:
        words = [str(word) for word in command]
        log.write(f"$ {' '.join(words)}\n")
        log.flush()
        code = subprocess.run(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            break
    return {"exit": code, "seconds": round(time.monotonic() - begun, 1)}


def line(row: dict[str, Any]) -> str:
    """Return one line for people."""
    steps = ", ".join(
        f"{name} {'passed' if not found['exit'] else 'FAILED'} ({found['seconds']:.0f} s)"
        for name, found in row["steps"].items()
    )
    accuracy = f", exported accuracy {row['accuracy']:.2f}" if row.get("accuracy") is not None else ""
    return f"Python {row['python']}, MindSpore {row['mindspore']}: {steps}{accuracy}"


if __name__ == "__main__":
    main()
