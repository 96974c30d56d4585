"""The operator's hands on instances that go to other hosts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from skysail.contract.migration import Terms
from skysail.hosts import roster
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import migration
from skysail.resources.migration import Migration
from skysail.serve import hosts
from skysail.serve.probe import Probe
from skysail.store.schema import guests, instances
from skysail.store.visit import visit

LOOK_SECONDS = 0.5


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """What came of emptying a host: what went elsewhere, or could not, and what is left, in words."""

    migrations: list[Migration] = []
    left: list[str] = []


def terms(config: Config, mib_per_second: float = 0.0, minutes: float = 60.0, post_copy: bool = False) -> Terms:
    """On which terms a guest moves, with the configuration's bound unless one is told."""
    bound = mib_per_second or config.migration_mib_per_second
    return Terms(bytes_per_second=round(bound * (1 << 20)), seconds=minutes * 60, post_copy=post_copy)


def begin(config: Config, name: str, region: str, account: str, to: str, on: Terms, force: bool = False) -> str:
    """Move an instance to another host; the operation's id. Raises SkysailError."""
    hosts.on_the_controller(config)

    def begun(connection: Connection) -> str:
        found = migration.find_instance(connection, name, region or config.default_region, account)
        return migration.begin(connection, found, time.time(), to, on, force)

    return visit(config, begun, str, write=True)


def call_off(config: Config, name: str, region: str, account: str) -> None:
    """Leave an instance where it is. Raises SkysailError where it does not move."""
    hosts.on_the_controller(config)
    visit(config, lambda connection: migration.call_off(
        connection, migration.find_instance(connection, name, region or config.default_region, account),
        "its operator called it off"), type(None), write=True)


def give_up_target(config: Config, name: str, region: str, account: str) -> None:
    """Have an instance go on where it stood, whose target is off for certain. Raises SkysailError."""
    hosts.on_the_controller(config)
    visit(config, lambda connection: migration.give_up_target(
        connection, migration.find_instance(connection, name, region or config.default_region, account)),
        type(None), write=True)


def seen(config: Config, wanted: Sequence[str] = ()) -> list[Migration]:
    """Migrations, the newest first: those ``wanted``, else all."""
    hosts.on_the_controller(config)
    wanted = list(wanted)
    return visit(config, lambda connection: migration.seen(connection, wanted), list[Migration])


def watch(config: Config, wanted: Sequence[str], told: Callable[[Sequence[Migration]], None]) -> list[Migration]:
    """Wait until they are over, saying now and then how they stand."""
    while True:
        found = seen(config, wanted)
        told(found)
        if all(one.state in ("succeeded", "failed") for one in found):
            return found
        time.sleep(LOOK_SECONDS)


def migrate(config: Config, name: str, region: str, account: str, to: str, on: Terms, probe: bool,
            told: Callable[[Sequence[Migration]], None], force: bool = False) -> Migration:
    """Move an instance, and wait until it is over; with ``probe`` see from this machine for how long it does not answer.
    Raises SkysailError where it cannot be begun, or does not answer this machine at all."""
    address = _address(config, name, region, account) if probe else ""
    if not address:
        return watch(config, [begin(config, name, region, account, to, on, force)], told)[0]
    with Probe(address) as echo:
        identifier = begin(config, name, region, account, to, on, force)
        watch(config, [identifier], told)
        outside_ms, broken = echo.longest_ms(), echo.broken()
    visit(config, lambda connection: migration.note_outside(connection, identifier, outside_ms, broken),
          type(None), write=True)
    return seen(config, [identifier])[0]


def drain(config: Config, host_id: str, on: Terms, told: Callable[[Sequence[Migration]], None],
          force: bool = False) -> Drained:
    """Give the host nothing new, and move every instance on it to others; returns when all have gone that can. Disks that are
    attached to nothing, and snapshots, are others' where those see them. Raises SkysailError when there is no such host."""
    hosts.on_the_controller(config)

    def begun(connection: Connection) -> list[str]:
        roster.cordon(connection, host_id, True)
        rows = connection.execute(select(instances).join(guests, guests.c.instance_id == instances.c.id).where(
            guests.c.host_id == host_id, instances.c.state.in_(("running", "stopped")))
            .order_by(instances.c.name)).mappings().all()
        return [str(operation["id"]) if (operation := migration.find_open(connection, row["id"])) is not None
                else migration.begin(connection, row, time.time(), "", on, force) for row in rows]

    wanted = visit(config, begun, list[str], write=True)
    moved = watch(config, wanted, told) if wanted else []
    visit(config, lambda connection: roster.let_go(connection, host_id), type(None), write=True)
    # What went is not left, though its host may still be putting the last of it away.
    end = time.monotonic() + 60
    while (left := visit(config, lambda connection: roster.held(connection, host_id), list[str])) and time.monotonic() < end \
            and any("on its way" in one for one in left):
        time.sleep(LOOK_SECONDS)
    return Drained(migrations=moved, left=left)


def _address(config: Config, name: str, region: str, account: str) -> str:
    """Where a probe reaches an instance. Raises SkysailError where it does not run, or has no public address."""
    def found(connection: Connection) -> str:
        row = migration.find_instance(connection, name, region or config.default_region, account)
        if row["state"] != "running":
            raise SkysailError(f"the instance {name} is {row['state']}", "only a running one answers a probe")
        guest = connection.execute(select(guests).where(guests.c.instance_id == row["id"])).mappings().one()
        return guest["public_ipv4"] or guest["public_ipv6"] or ""

    address = visit(config, found, str)
    if not address:
        raise SkysailError(f"the instance {name} has no public address to be probed at")
    return address


def summary(one: Migration) -> dict[str, Any]:
    """A migration in the few words of a table."""
    report = one.report
    sizes = f"{(report.memory_bytes + report.disk_bytes) / (1 << 20):.1f}" if report.memory_bytes or one.off else ""
    return {"instance": one.instance, "from": one.source, "to": one.target, "state": one.state,
            "percent": one.percent, "seconds": f"{report.seconds:.1f}" if report.seconds else "", "MiB": sizes,
            "rounds": report.rounds or "", "pause ms": f"{report.pause_ms:.0f}" if report.pause_ms else "",
            "outside ms": f"{report.outside_ms:.0f}" if report.outside_ms is not None else "",
            "way": "cut" if report.cut else "post-copy" if report.post_copy else "",
            "why": one.error or report.cut or one.why}


def words(one: Migration) -> str:
    """How it stands, in one line."""
    if one.state == "waiting":
        return f"{one.instance}: waits for its turn"
    if one.state == "failed":
        return f"{one.instance}: stays on {one.source}: {one.error}"
    way = f"{one.instance}: {one.source} to {one.target}"
    if one.state == "under way":
        return f"{way}: {one.phase} {one.percent} %"
    report = one.report
    seen_from = "" if report.outside_ms is None else f", {report.outside_ms:.0f} ms as seen from here" + (
        " (a connection broke)" if report.broken else "")
    if one.off:
        return f"{way} in {report.seconds:.1f} s while it was stopped: {report.disk_bytes / (1 << 20):.1f} MiB"
    cut = f"; it was started from its disk there, as after a power cut: {report.cut}" if report.cut else ""
    return (f"{way} in {report.seconds:.1f} s: {(report.memory_bytes + report.disk_bytes) / (1 << 20):.1f} MiB in "
            f"{report.rounds} rounds{', by post-copy' * report.post_copy}, paused {report.pause_ms:.0f} ms{seen_from}{cut}")
