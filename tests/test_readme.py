"""A newcomer follows the README by the letter: its tour runs as it stands there, on a cloud that ``up`` makes."""

from __future__ import annotations

import pytest

from newcomer import commands, newcomer
from skysail.serve import processes

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


def test_the_readmes_tour() -> None:
    with newcomer() as somebody:
        told = somebody.shell(commands("README.md", "Five minutes"))
        for words in ("web-1", "hello from web-1", "load average", "8080", "rows and machine agree"):
            assert words in told, told
        assert (somebody.folder / "desk" / "aws" / "bin" / "aws").exists()

        # What it leaves: the first instance, and nothing else; up again changes nothing, down takes everything.
        assert somebody.shell("./skysail list --json").count('"name":"first"') == 1
        before = somebody.shell("./skysail status --json")
        somebody.shell("./skysail up")
        assert somebody.shell("./skysail status --json") == before
        assert "reseeded due to virtual machine fork" in somebody.shell("./skysail logs first")
        somebody.shell("./skysail down --guests")
        assert processes.guests(somebody.config) == []
