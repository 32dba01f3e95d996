from __future__ import annotations

from pathlib import Path

from msqkd.exporters.docs import page

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m msqkd.exporters.docs > docs/formats.md"
