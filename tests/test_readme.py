"""A newcomer follows the README by the letter: its tour runs as it stands there, on a cloud that ``up`` makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds import RealCloud, ensure_image, taken_slot
from conftest import keep_evidence
from skysail.serve import processes

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent
TOUR = re.search(r"^## Five minutes$.*?^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


class Newcomer(RealCloud):
    """A data folder with nothing but a configuration, and a shell that stands in the checkout."""

    def shell(self, script: str, seconds: float = 900) -> str:
        """What ``script`` prints; it ends at its first failure. ``sudo`` is not there where root works without it."""
        desk = self.folder / "desk"
        desk.mkdir(exist_ok=True)
        for name in ("src", "bench"):
            if (ROOT / name).exists() and not (desk / name).exists():
                (desk / name).symlink_to(ROOT / name)
        (desk / "skysail").unlink(missing_ok=True)
        (desk / "skysail").symlink_to(ROOT / "skysail")
        sudo = self.folder / "bin" / "sudo"
        sudo.parent.mkdir(exist_ok=True)
        sudo.write_text('#!/bin/sh\nexec "$@"\n')
        sudo.chmod(0o755)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=desk, capture_output=True, text=True,
                              timeout=seconds, check=False, env={
                                  **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
                                  "PATH": f"{sudo.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                                  "SKYSAIL_DATA": str(self.folder), "SKYSAIL_VENV": sys.prefix})
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def newcomer(request: pytest.FixtureRequest) -> Iterator[Newcomer]:
    for blueprint in ("debian_12", "nginx"):
        ensure_image(blueprint)
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    with taken_slot() as slot:
        made = Newcomer(folder, slot, dns="powerdns")
        try:
            yield made
        finally:
            for name in ("controller", "agent", "dns"):
                processes.stop(made.config, name)
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)


def test_the_readmes_tour(newcomer: Newcomer) -> None:
    assert TOUR is not None
    try:
        told = newcomer.shell(TOUR[1])
    except BaseException:
        keep_evidence(newcomer, ROOT / "evidence" / "readme")
        raise
    for words in ("web-1", "hello from web-1", "load average", "8080", "rows and machine agree"):
        assert words in told, told

    assert (newcomer.folder / "desk" / "aws" / "bin" / "aws").exists()

    # What it leaves: the first instance, and nothing else; up again changes nothing, down takes everything.
    assert newcomer.shell("./skysail list --json").count('"name":"first"') == 1
    before = newcomer.shell("./skysail status --json")
    newcomer.shell("./skysail up")
    assert newcomer.shell("./skysail status --json") == before
    assert "reseeded due to virtual machine fork" in newcomer.shell("./skysail logs first")
    newcomer.shell("./skysail down --guests")
    assert processes.guests(newcomer.config) == []
