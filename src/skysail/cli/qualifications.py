"""Verbs of pairs of QEMU's versions that guests go between: tried, listed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration
from skysail.serve import membership


def qualify(*names: str, qemu: tuple[str, ...] = (), machine: str = "",
            quick: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> int:
    """Move guests between two versions of QEMU on this machine, both ways, and compare all that they have; exit status 1 when
    anything is lost. Those of two hosts, or --qemu VERSION --qemu VERSION (7.2, or a folder that has the program). What was
    seen is kept with the cloud, and decides which hosts a running instance may go to. --quick: each condition once."""
    from skysail.serve import qualify as trials

    config = configuration.load()
    found = trials.qualify(config, names, qemu, machine, quick, show.progress)
    if config.master_key.exists() and membership.find(config) is None:
        trials.note(config, found)
    if json:
        show.as_json(found)
    else:
        show.finish()
        show.table(trials.cells(found), ["from", "to", "guest", "condition", "way", "seconds", "verdict"])
        for line in trials.explained(found):
            show.line(line)
        for one in found:
            show.line(f"guests from QEMU {one.sender} to {one.receiver}: {'whole' if one.good else 'not whole'}")
    return 0 if all(one.good for one in found) else 1


def list_qualifications(*, add: Path | None = None, json: Json = False) -> None:
    """Which versions of QEMU were tried with each other, and how that went. --add: take in what qualify --json said on
    another machine."""
    from skysail.serve import qualify as trials

    config = configuration.load()
    if add is not None:
        trials.note(config, trials.read(add))
    found = trials.listed(config)
    if json:
        show.as_json(found)
        return
    show.table([trials.summary(one) for one in found], ["from", "to", "machine", "by", "verdict", "trials", "tried (UTC)"])
    for line in trials.explained(found):
        show.line(line)
