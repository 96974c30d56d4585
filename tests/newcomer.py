"""A newcomer at an empty machine: a data folder with nothing but a configuration, and a shell that runs what the
documentation says, letter by letter."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clouds import RealCloud, ensure_image, taken_slot
from conftest import keep_evidence
from skysail.serve import processes

ROOT = Path(__file__).parent.parent


def commands(page: str, heading: str = "", block: int = 0) -> str:
    """The shell commands of ``page``, a path below the checkout; with a ``heading``, one block below that one alone."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text[text.index(f"\n## {heading}\n"):] if heading else text, re.M | re.S)
    return blocks[block] if heading else "".join(blocks)


class Desk:
    """A shell that stands in the checkout, for the data folder ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        sudo.write_text('#!/bin/sh\n[ "$1" != -E ] || shift\nexec "$@"\n')
        sudo.chmod(0o755)
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script], cwd=desk, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env={
                **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
                "PATH": f"{sudo.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SKYSAIL_DATA": str(self.folder), "SKYSAIL_VENV": sys.prefix})
        try:
            said, complained = shell.communicate(timeout=seconds)
        finally:
            # What a script that failed had put into the background; the cloud's own processes have sessions of their own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
        assert shell.returncode == 0, f"exit {shell.returncode}\n{said}\n{complained}"
        return said


class Newcomer(RealCloud, Desk):
    """One cloud's owner to be."""


@contextlib.contextmanager
def newcomer() -> Iterator[Newcomer]:
    """Somebody with an empty data folder, beside whom the first image is there already; what was started goes at the end, and
    evidence stays of what failed."""
    ensure_image("debian_12")
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    with taken_slot() as slot:
        made = Newcomer(folder, slot, dns="powerdns")
        try:
            yield made
        except BaseException:
            keep_evidence(made, ROOT / "evidence" / "newcomer")
            raise
        finally:
            for name in ("controller", "agent", "dns"):
                processes.stop(made.config, name)
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)
