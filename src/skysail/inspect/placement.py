"""Why an instance is where it is, and where else it could be: every host, by the rules of a placement, as it stands now.
Changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
from sqlalchemy import Connection, RowMapping, select

from skysail.contract.facts import HostFacts
from skysail.hosts import placement
from skysail.hosts.placement import Candidate, Need
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import placing
from skysail.store.schema import accounts, guests, hosts, instances
from skysail.store.visit import visit


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """One host. ``place`` counts those that could take the instance, the one that would before the others; 0 for one that
    could not, which ``refusals`` say why. ``of_owner``: how many other instances of the owner it holds. ``free_mib`` is the
    memory that it has left without the instance."""

    host: str
    holds: bool
    place: int
    refusals: tuple[str, ...]
    of_owner: int
    free_mib: int


def explain(config: Config, name: str, region: str = "", account: str = "admin") -> list[Judged]:
    """Every host, the best first, as one for the instance ``name``, were it to be placed now with the processor and the
    machine type that it has. Raises :class:`SkysailError` when there is no such instance."""
    region = region or config.default_region

    def judged(connection: Connection) -> list[Judged]:
        row = connection.execute(
            select(instances, guests.c.id.label("guest_id"), guests.c.host_id, guests.c.vcpus, guests.c.memory_mib,
                   guests.c.disk_gib, hosts.c.facts, hosts.c.pool)
            .join(guests, guests.c.instance_id == instances.c.id).join(hosts, hosts.c.id == guests.c.host_id)
            .join(accounts, accounts.c.id == instances.c.account_id)
            .where(instances.c.name == name, instances.c.region == region, accounts.c.name == account)).mappings().first()
        if row is None:
            raise SkysailError(f"there is no instance {name} of {account} in {region}", "see: sudo ./skysail list")
        found = placing.candidates(connection, config, row["account_id"], time.time(), without=[row["guest_id"]],
                                   bound=True)
        return list(_judged(row, found))

    return visit(config, judged, list[Judged])


def _judged(row: RowMapping, found: Sequence[Candidate]) -> Iterator[Judged]:
    facts = msgspec.convert(row["facts"], HostFacts | None)
    need = Need(zone=row["region"] + row["zone"], blueprint="", vcpus=row["vcpus"], memory_mib=row["memory_mib"],
                disk_gib=row["disk_gib"], pool=row["pool"], accelerator=facts.accelerator if facts else "",
                cpu_model=facts.guest_cpu if facts else "", machine_type=facts.guest_machine if facts else "")
    by_id = {one.id: one for one in found}
    for place, one in enumerate(placement.judge(found, need), 1):
        yield Judged(host=one.host, holds=one.host == row["host_id"], place=0 if one.refusals else place,
                     refusals=one.refusals, of_owner=by_id[one.host].of_owner, free_mib=max(by_id[one.host].free_mib, 0))


def summary(judged: Judged) -> dict[str, str]:
    """One host in the few words of a table."""
    verdict = "refused" if not judged.place else "would be taken" if judged.place == 1 else f"choice {judged.place}"
    others = f"{judged.of_owner} other instances of the owner, {judged.free_mib} MiB of memory free"
    return {"host": judged.host, "verdict": verdict + (", holds it" if judged.holds else ""),
            "why": "; ".join(judged.refusals) or others}
