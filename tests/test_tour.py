"""The tour of docs/tour.md, as it stands there: everything that an owner does with a site, on a cloud that ``up`` makes."""

from __future__ import annotations

import pytest

from newcomer import commands, newcomer

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.timeout(5400)]


def test_the_tour_of_an_owner() -> None:
    with newcomer() as owner:
        told = owner.shell(commands("docs/tour.md"), 5000)
        for words in ("owner@example.com is verified", "Directory listing", "kept since", "busiest", "ALARM: busy",
                      "rows and machine agree"):
            assert words in told, told
        assert owner.shell("./skysail list --json").strip() == "[]"
