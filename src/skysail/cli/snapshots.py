"""Verbs of snapshots: listed, written to a file, taken in from one."""

from __future__ import annotations

from pathlib import Path

import cyclopts

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration

app = cyclopts.App(name="snapshots", version=__version__, help="Snapshots, as files that another Skysail takes in.")


@app.command(name="list")
def list_snapshots(*, json: Json = False) -> None:
    """Snapshots of every account."""
    from skysail.serve import snapshots as operator

    found = operator.listed(configuration.load())
    show.as_json(found) if json else show.table(
        [operator.summary(one) for one in found], ["name", "of", "kind", "state", "size", "region", "created (UTC)"])


@app.command(name="export")
def export_snapshot(name: str, *, to: Path, region: str = "", account: str = "admin") -> None:
    """Write a snapshot to one file, with all that its disks stand on."""
    from skysail.serve import snapshots as operator

    size = operator.export(configuration.load(), name, to, region, account, show.step, show.detail)
    show.line(f"{to}: {size >> 20} MiB")


@app.command(name="import")
def import_snapshot(file: Path, *, name: str = "", region: str = "", account: str = "admin") -> None:
    """Make a snapshot of a file that was exported here or elsewhere."""
    from skysail.serve import snapshots as operator

    made = operator.bring_in(configuration.load(), file, name, region, account, show.step, show.detail)
    show.line(f"{made} is there: CreateInstancesFromSnapshot and CreateDiskFromSnapshot take it")
