"""Verbs for work on Skysail itself: a fleet on one machine."""

from __future__ import annotations

from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration

app = cyclopts.App(name="dev", version=__version__, help="For work on Skysail itself.")


@app.command(name="fleet")
def make_fleet(count: int, *, engines: Literal["real", "sim"] = "sim", qemu: tuple[str, ...] = (), name: str = "skyfleet",
               underlay: str = "100.115.94.0/24", port: int = 8700, stock: str = "", uids: int = 200_000,
               json: Json = False) -> None:
    """COUNT hosts on this machine, each a network namespace with an agent of its own, and their controller; safe to repeat.
    --qemu host-2=/opt/qemu/bin: the folder of another QEMU for a host. --stock: a folder whose images/ and templates/ the
    hosts use, such as another cloud's data folder. --uids: where the user ids of guests begin."""
    from skysail.serve import dev as development
    from skysail.serve import hosts as machines

    plan = development.Plan(name=name, underlay=underlay, engines=engines, hosts=count, stock=stock, uids=uids)
    found = development.fleet(configuration.load(), plan, show.step, dict(one.split("=", 1) for one in qemu), port)
    show.as_json([machines.plain(one) for one in found]) if json else show.table(
        [machines.summary(one) for one in found], ["host", "zones", "state", "accelerator", "qemu", "kernel", "seen"])


@app.command(name="enter")
def enter_host(host: str, /, *command: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run COMMAND on a host of the fleet in the data folder, as root."""
    from skysail.serve import dev as development

    return development.enter(configuration.load(), host, command)


@app.command(name="stop")
def stop_fleet() -> None:
    """End the fleet of the data folder; dev fleet brings it back."""
    from skysail.serve import dev as development

    development.stop(configuration.load(), show.step)
