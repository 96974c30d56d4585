"""Verbs of hosts: a machine joins; a host is given nothing new, emptied, turned off, forgotten; what is known of each."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from skysail import __version__
from skysail.cli import show
from skysail.cli.migrations import show_migrations
from skysail.cli.options import Json
from skysail.kit import config as configuration
from skysail.kit.errors import SkysailError
from skysail.resources.migration import Migration

app = cyclopts.App(name="host", version=__version__, help="The machines of the cloud.")


def join(url: str, token: str = "-", *, name: str = "", zone: str = "", address: str = "", port: int = 8703) -> None:
    """Make this machine a host of the cloud whose controller is at URL; TOKEN is made there by host token, and read from
    standard input where it is left out: a command line is seen by others. --name: what it is called, its host name unless
    told; --zone: which it serves; --address, --port: where the controller calls it."""
    from skysail.serve import join as joining

    if token == "-":
        token = getpass.getpass("token: ") if sys.stdin.isatty() else sys.stdin.readline()
    made = joining.join(configuration.load(), url, token, show.step, name=name, zone=zone, address=address, port=port)
    show.line(f"this machine is {made.host}; the controller shows it: sudo ./skysail host show {made.host}")


@app.command(name="token")
def make_token(*, host: str = "", zone: str = "", hours: float = 1.0, json: Json = False) -> None:
    """Let one machine join, once, within --hours. --host: as which, which may be there already and is then that machine;
    --zone: to serve it."""
    from skysail.serve import hosts as machines

    made = machines.make_token(configuration.load(), host, zone, hours)
    show.as_json(made) if json else show.line(
        f"on the machine, until {made['until']}:\n{made['command']}\nand give it this token:\n{made['token']}")


@app.command(name="cordon")
def cordon_host(name: str) -> None:
    """Give a host nothing new; what it holds stays."""
    from skysail.serve import hosts as machines

    machines.cordon(configuration.load(), name, True)
    show.line(f"{name} is given nothing new")


@app.command(name="uncordon")
def uncordon_host(name: str) -> None:
    """Give a host something new again."""
    from skysail.serve import hosts as machines

    machines.cordon(configuration.load(), name, False)
    show.line(f"{name} is given new instances again")


@app.command(name="drain")
def drain_host(name: str, *, mib_per_second: float = 0.0, minutes: float = 60.0,
               post_copy: Annotated[bool, Parameter(negative="")] = False,
               force: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> int:
    """Give a host nothing new, and move the instances on it to other hosts; exit status 1 while it holds anything then.
    --post-copy: as with migrate. --force: also to hosts with a QEMU that was not tried, or did not do."""
    from skysail.serve import migrate as migrations

    config = configuration.load()
    on = migrations.terms(config, mib_per_second, minutes, post_copy)
    done = migrations.drain(config, name, on, show_migrations, force)
    if json:
        show.as_json(done)
    else:
        _show_drained(done.migrations, done.left)
        show.line(f"{name} is given nothing new; {len(done.left) or 'nothing'} left")
    return 1 if done.left else 0


def _show_drained(gone: list[Migration], left: list[str]) -> None:
    """What went elsewhere, or could not, and what a drained host still has."""
    from skysail.serve import migrate as migrations

    show.finish()
    for one in gone:
        show.line(migrations.words(one))
    for what in left:
        show.line(f"left: {what}")


@app.command(name="upgrade")
def upgrade_host(name: str, *, qemu: str, force: Annotated[bool, Parameter(negative="")] = False,
                 mib_per_second: float = 0.0, minutes: float = 60.0) -> int:
    """Empty a host, so that it can be given another QEMU: refused, unless --force, until guests were tried between that
    version and all that they may come from or go to (see qualify). The packages are installed on the host itself, afterwards.
    """
    from skysail.serve import migrate as migrations
    from skysail.serve import qualify as trials

    config = configuration.load()
    version, against = trials.against_upgrade(config, name, qemu)
    if against and not force:
        raise SkysailError(f"{name} would be cut off with QEMU {version}: {'; '.join(against)}",
                           "try it: sudo ./skysail qualify --qemu VERSION --qemu VERSION; or say --force")
    done = migrations.drain(config, name, migrations.terms(config, mib_per_second, minutes), show_migrations, force)
    _show_drained(done.migrations, done.left)
    show.line(f"{name} is given nothing new; install QEMU {version} on it, then: sudo ./skysail host uncordon {name}")
    return 1 if done.left else 0


@app.command(name="fence")
def fence_host(name: str, *, is_off: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Turn a host off that does not answer, by the program that the configuration names (fence). --is-off: you vouch that it
    is off, and none of its guests runs. What waits for that goes on then."""
    from skysail.serve import hosts as machines

    machines.fence(configuration.load(), name, is_off, show.step)
    show.line(f"{name} is off for certain")


@app.command(name="remains")
def list_remains(name: str = "", *, discard: str = "", json: Json = False) -> None:
    """What is left of instances that went on elsewhere when their host failed, at host NAME or at all. --discard INSTANCE:
    have its former disks at host NAME thrown away."""
    from skysail.serve import hosts as machines

    if discard:
        machines.discard(configuration.load(), name, discard)
    found = machines.remains(configuration.load(), name)
    show.as_json(found) if json else show.table(
        [machines.remnant(one) for one in found], ["host", "instance", "guest", "went on", "when", "from", "left"])


@app.command(name="remove")
def remove_host(name: str) -> None:
    """Forget a host that holds nothing: it is called no more."""
    from skysail.serve import hosts as machines

    machines.remove(configuration.load(), name)
    show.line(f"{name} is no host of this cloud any more")


@app.command(name="list")
def list_hosts(*, json: Json = False) -> None:
    """Every host: its state, what it has, what of it is promised."""
    from skysail.serve import hosts as machines

    found = machines.listed(configuration.load())
    show.as_json([machines.plain(one) for one in found]) if json else show.table(
        [machines.summary(one) for one in found],
        ["host", "zones", "state", "guests", "vcpus", "memory GiB", "disk GiB", "qemu", "seen"])


@app.command(name="show")
def show_host(name: str, *, json: Json = False) -> None:
    """All that a host told of itself, and what it holds."""
    from skysail.serve import hosts as machines

    config = configuration.load()
    found = machines.get(config, name)
    failed = machines.prospects(config, name) if found.outage is not None else []
    if json:
        show.as_json(machines.plain(found) | ({"prospects": failed} if failed else {}))
        return
    show.pairs(machines.details(found))
    for one in failed:
        show.line(machines.prospect(one))
