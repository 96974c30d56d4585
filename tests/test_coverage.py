"""The generated page says what is true."""

from __future__ import annotations

from pathlib import Path

from skysail.serve.coverage import page


def test_the_page_is_the_action_table() -> None:
    assert (Path(__file__).parent.parent / "docs" / "coverage.md").read_text() == page()
