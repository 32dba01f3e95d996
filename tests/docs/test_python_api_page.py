"""docs/python_api.md is executed as it stands."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python_api.md"


def test_every_code_block_runs(tmp_path, capsys):
    pytest.importorskip("mindcv")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 8
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), {"__name__": "page"})
    printed = capsys.readouterr().out
    assert "of 48 operations in int8" in printed
    assert printed.count("loss") == 4
