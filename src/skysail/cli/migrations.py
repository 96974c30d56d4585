"""Verbs of instances that go to other hosts: sent there, seen on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from skysail.cli import show
from skysail.cli.options import Json, Region
from skysail.kit import config as configuration
from skysail.resources.migration import Migration


def migrate(name: str, *, to: str = "", probe: Annotated[bool, Parameter(negative="")] = False,
            mib_per_second: float = 0.0, minutes: float = 60.0, post_copy: Annotated[bool, Parameter(negative="")] = False,
            call_off: Annotated[bool, Parameter(negative="")] = False,
            target_is_off: Annotated[bool, Parameter(negative="")] = False,
            force: Annotated[bool, Parameter(negative="")] = False, region: Region = "", account: str = "admin",
            json: Json = False) -> int:
    """Move an instance, running or stopped, to another host, --to the one told or to the best; exit status 1 when it stays.
    --post-copy: let it run there before all of its memory is, however fast it writes; if its former host fails meanwhile, it
    is started from its disk, and the exit status is 1.
    --probe: see from this machine for how long its address does not answer. --call-off: leave it where it is.
    --target-is-off: it was handed over to a host that is off for certain, and goes on where it stood. --force: also to a
    version of QEMU that was not tried, or did not do."""
    from skysail.serve import migrate as migrations

    config = configuration.load()
    if call_off or target_is_off:
        (migrations.call_off if call_off else migrations.give_up_target)(config, name, region, account)
        return 0
    done = migrations.migrate(config, name, region, account, to, migrations.terms(config, mib_per_second, minutes, post_copy),
                              probe, show_migrations, force)
    show.as_json(done) if json else show.line(migrations.words(done))
    return 0 if done.state == "succeeded" and not done.report.cut else 1


def show_migrations(found: Sequence[Migration]) -> None:
    """Show, on a terminal, how far each is."""
    show.bars({one.instance: one.percent for one in found})


def list_migrations(*, json: Json = False) -> None:
    """Instances that go to other hosts, that went, and that could not."""
    from skysail.serve import migrate as migrations

    found = migrations.seen(configuration.load())
    show.as_json(found) if json else show.table([migrations.summary(one) for one in found], [
        "instance", "from", "to", "state", "percent", "seconds", "MiB", "rounds", "pause ms", "outside ms", "way", "why"])
