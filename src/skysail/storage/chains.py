"""Files that stand on files, opened without believing what they say: every node of a chain is named, by format and by place.

A volume was written by its guest's process, so that programs look at it with no more rights than that. Source: qemu-img(1);
QEMU docs/interop/qcow2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from skysail.kit.process import run, run_while_wanted


def named(chain: Sequence[str]) -> str:
    """The chain as programs of QEMU take it, the nearest file first, which has no parent but those named here."""
    opened: dict[str, Any] | None = None
    for file in reversed(chain):
        opened = {"driver": "qcow2", "file": {"driver": "file", "filename": file}, "backing": opened}
    return f"json:{msgspec.json.encode(opened).decode()}"


def bounded(uid: int, *argv: str) -> list[str]:
    """``argv`` with the rights of ``uid`` and no more."""
    if uid == os.geteuid():
        return list(argv)
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
            "--inh-caps=-all", "--", *argv]


def convert(chain: Sequence[str], target: Path, uid: int) -> None:
    """Write all that the chain shows into the empty file ``target``, with the rights of ``uid``."""
    run(bounded(uid, "qemu-img", "convert", "-q", "-n", "--target-is-zero", "-O", "qcow2", named(chain), str(target)))


async def rebase(path: Path, chain: Sequence[str], under: Sequence[str], uid: int) -> None:
    """Let the file at ``path``, which stands on ``chain``, stand on ``under`` and read the same: what it would miss there is
    written into it. Whenever this ends, it still reads the same on ``chain``."""
    await run_while_wanted(bounded(uid, "qemu-img", "rebase", "-q", "-F", "qcow2", "-b", named(under) if under else "",
                                   named([str(path), *chain])))
    if under:
        # For whoever looks at the file by hand: the parent's name alone, not how it was opened.
        await run_while_wanted(bounded(uid, "qemu-img", "rebase", "-q", "-u", "-F", "qcow2", "-b", under[0],
                                       named([str(path)])))
