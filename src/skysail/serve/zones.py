"""Zones as the operator handles them: listed with what the name server says, exported, imported, signed.

What Lightsail's API has no action for is done on the rows, in one transaction each; the controller sees within a second that
a document grew.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select

from skysail.hosts.zones import ZoneCompiler
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import accounts, domains, zone_files, zone_keys
from skysail.resources import names as resource_names
from skysail.serve import processes
from skysail.store.schema import domain_entries, names, zone_reports
from skysail.store.schema import domains as rows
from skysail.store.vault import Vault
from skysail.store.visit import visit

# A zone of ten thousand records is written within it on a slow machine.
WAIT_SECONDS = 30.0


def listed(config: Config) -> list[dict[str, Any]]:
    """Every zone, by name: its state on the name server and its serial there, its entries' number, its DS record."""
    def zones(connection: Connection) -> list[dict[str, Any]]:
        counts = Counter(connection.execute(select(domain_entries.c.domain_id)).scalars())
        found = connection.execute(
            select(rows, zone_reports.c.state, zone_reports.c.serial.label("served"), zone_reports.c.reason)
            .outerjoin(zone_reports, zone_reports.c.domain_id == rows.c.id).order_by(rows.c.name)).mappings().all()
        return [{"name": row["name"], "account": row["account_id"],
                 "state": (row["state"] or "pending") if row["role"] == "serve" else "leaving", "serial": row["served"] or 0,
                 "entries": counts[row["id"]], "ds": row["ds"],
                 "signed": "yes" if row["ds"] else "no", "reason": row["reason"] or ""} for row in found]

    return visit(config, zones, list[dict[str, Any]])


def export(config: Config, name: str) -> str:
    """The zone as a master file, with aliases as what they are at this moment."""
    def text(connection: Connection) -> str:
        row = _get(connection, name)
        served: int = connection.execute(
            select(func.max(zone_reports.c.serial)).where(zone_reports.c.domain_id == row["id"])).scalar_one() or 0
        zone = next(zone for zone in ZoneCompiler().zones(connection, Vault.at(config.master_key)) if zone.id == row["id"])
        return zone_files.write(zone, max(served, zone.serial))

    return visit(config, text, str)


def bring_in(config: Config, file: Path, name: str = "", replace: bool = False) -> list[str]:
    """Give the file's domain its entries, all in one change; made for the admin account where it is not there. What was done,
    in words. Raises :class:`SkysailError` before anything is written."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as unreadable:
        raise SkysailError(f"{file} cannot be read: {unreadable}") from unreadable
    domain, entries, left_out = zone_files.read(text, name)
    now = time.time()

    def replaced(connection: Connection) -> str:
        account = accounts.find_account(connection, "admin")
        if account is None:
            raise SkysailError("this cloud has no admin account", "run: sudo ./skysail up")
        row = domains.find_row(connection, account, domain)
        if row is None:
            row = domains.create(connection, account, domain, config.name_servers, now)
            connection.execute(insert(names).values(account_id=account, region=resource_names.GLOBAL, name=domain,
                                                    resource_type="Domain", resource_id=row["id"]))
        elif not replace and domains.entries_of(connection, row["id"]):
            raise SkysailError(f"the domain {domain} has entries", "with --replace they go, and those of the file come")
        domains.replace_entries(connection, row, entries, now)
        return str(row["id"])

    made = visit(config, replaced, str, write=True)
    return [f"left out: {one}" for one in left_out] + [f"{domain}: {len(entries)} entries, {_settled(config, made)}"]


def sign(config: Config, name: str) -> dict[str, str]:
    """Sign the zone, if it is not; its DS record."""
    def signed(connection: Connection) -> dict[str, str]:
        row = _get(connection, name)
        if row["ds"]:
            return {"name": row["name"], "ds": row["ds"], "state": "signed before"}
        private, signer = zone_keys.make(row["name"])
        domains.changed(connection, row, time.time(), ds=signer,
                        signing_sealed=Vault.at(config.master_key).seal(private, f"zone:{row['id']}"))
        return {"id": row["id"], "name": row["name"], "ds": signer}

    found = visit(config, signed, dict[str, str], write=True)
    return found if "state" in found else found | {"state": _settled(config, found.pop("id"))}


def unsign(config: Config, name: str) -> dict[str, str]:
    """Sign the zone no more; its key is forgotten."""
    def unsigned(connection: Connection) -> dict[str, str]:
        row = _get(connection, name)
        if row["ds"]:
            domains.changed(connection, row, time.time(), ds="", signing_sealed=None)
        return {"id": row["id"], "name": row["name"], "ds": ""}

    found = visit(config, unsigned, dict[str, str], write=True)
    return found | {"state": _settled(config, found.pop("id"))}


def _get(connection: Connection, name: str) -> RowMapping:
    row = connection.execute(select(rows).where(
        rows.c.name == name.lower().removesuffix("."), rows.c.role == "serve")).mappings().first()
    if row is None:
        raise SkysailError(f"there is no domain {name}", "see: sudo ./skysail zones list")
    return row


def _settled(config: Config, domain_id: str) -> str:
    """Wait until every host says that it serves the zone as the rows have it; in words how it came out."""
    said = ""

    def looked(connection: Connection) -> str:
        serial = connection.execute(select(rows.c.serial).where(rows.c.id == domain_id)).scalar_one()
        found = connection.execute(select(zone_reports).where(zone_reports.c.domain_id == domain_id)).all()
        if found and all(row.state == "served" and row.serial >= serial for row in found):
            return "served"
        return next((f"not served yet: {row.reason}" for row in found if row.reason), "not served yet")

    def served() -> bool:
        nonlocal said
        said = visit(config, looked, str)
        return said == "served"

    if not config.agent_socket.exists():
        return "served when the cloud is up"
    return "served" if processes.wait_until(served, WAIT_SECONDS) else said
