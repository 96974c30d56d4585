"""A PowerDNS Authoritative Server, by its REST API.

One change of a zone is one PATCH, which PowerDNS makes in one transaction of its database: a resolver sees the zone before it
or after it. What PowerDNS holds is read before it is written, so nothing is assumed of what an interrupted change left. One
that still has the serial with which we left it need not be read: a large zone takes longer to read than to change.

To rectify a zone (to set what its names need beside their records: hashes, empty names in between, what is below a
delegation) PowerDNS reads all of it. So it is told to only where a change may need that, by a setting of the zone that it
heeds in the same transaction as the change. An unsigned zone has no NSEC3 parameters, and to be given them rectifies it.
Source: PowerDNS documentation, "HTTP API"; tried with 4.7 and 4.9 and their SQLite backend.
"""

from __future__ import annotations

import ipaddress
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import httpx

from skysail.contract.document import SOA_TIMES, RecordSet, Zone
from skysail.contract.report import HeldZone
from skysail.dns import NameServerAway, next_serial
from skysail.dns.listening import listeners
from skysail.kit.errors import SkysailError

# SQL that makes the backend's tables; with the package, so that it fits the server.
SCHEMA = Path("/usr/share/pdns-backend-sqlite3/schema/schema.sqlite3.sql")
SOA_TTL = 900
# No iterations and no salt (RFC 9276): names cannot be listed by walking, and that is all that it is for.
_NSEC3 = "1 0 0 -"
# Written by PowerDNS itself, or kept apart.
_NOT_OURS = ("SOA", "DNSKEY", "CDS", "CDNSKEY", "NSEC", "NSEC3", "NSEC3PARAM", "RRSIG")


def api_key(port: int, key_file: Path) -> str:
    """The key of the API on ``port`` of the loopback address, for as long as it is safe to be said there: the listener is the
    process of the user to whom the ``pdns.conf`` beside the key belongs. Any user of the machine could take the port of a
    name server that is away, and collect the key. Raises :class:`NameServerAway`."""
    try:
        key, owner = key_file.read_text().strip(), key_file.with_name("pdns.conf").stat().st_uid
        holders = listeners(port)
    except OSError as missing:
        raise NameServerAway(f"the name server's API key cannot be read: {missing}",
                             "run: sudo ./skysail up") from missing
    if not holders:
        raise NameServerAway(f"nothing listens on port {port}", "run: sudo ./skysail up")
    if holders - {owner}:
        raise NameServerAway(f"port {port} belongs to a process of another user", "set dns_api_port in skysail.toml")
    return key


class PowerDns:
    """The server whose API answers on ``port`` of the loopback address; its key is looked up at each call, for it may be made
    after us."""

    def __init__(self, port: int, key_file: Path) -> None:
        self._http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1/servers/localhost", timeout=30.0,
                                       trust_env=False)
        self._port = port
        self._key_file = key_file
        self._left: dict[str, HeldZone] = {}

    async def apply(self, zone: Zone, believing: bool = False) -> HeldZone:
        """See :class:`skysail.dns.Zones`."""
        found, held = await self._look(zone.name, self._left.pop(zone.name, None) if believing else None)
        serial = zone.serial
        if found is None:
            await self._call("POST", "/zones", 201, {
                "name": zone.name, "kind": "Native", "nameservers": [], **_settings(True), "rrsets": [
                    *(_change(wanted) for wanted in zone.record_sets), _change(_soa(zone, zone.serial))]})
        else:
            serial = await self._write(zone, found, held)
        left = HeldZone(name=zone.name, serial=serial, record_sets=zone.record_sets, ds=await self._sign(zone, found or {}))
        self._left[zone.name] = left
        return left

    async def _look(self, name: str, left: HeldZone | None) -> tuple[dict[str, Any] | None, tuple[RecordSet, ...]]:
        """The zone as it is said to be, and its record sets; those of ``left``, if it still has the serial."""
        if left is not None:
            found = await self._find(name, "?rrsets=false")
            if found is None or found["serial"] == left.serial:
                return found, left.record_sets
        found = await self._find(name)
        return found, _sets(found or {})

    async def _write(self, zone: Zone, found: Mapping[str, Any], sets: Iterable[RecordSet]) -> int:
        """Patch the record sets that differ, all at once; the serial that the zone then has."""
        # Of a large zone all but a few record sets are the very ones that were written before.
        sets = tuple(sets)
        common = {*map(id, sets)} & {*map(id, zone.record_sets)}
        held = {(one.name, one.type): one for one in sets if id(one) not in common}
        wanted = {(one.name, one.type): one for one in zone.record_sets if id(one) not in common}
        changes = [_change(one) for key, one in wanted.items() if held.get(key) != one]
        changes += [{"name": name, "type": kind, "changetype": "DELETE"} for name, kind in held.keys() - wanted.keys()]
        rectify = bool(zone.signing_key) or found["dnssec"] or _shifts(zone.name, sets, zone.record_sets)
        if found["soa_edit_api"] != "" or found["api_rectify"] < rectify or (changes and found["api_rectify"] > rectify):
            # Also a creation that was interrupted: it leaves a zone without settings and records.
            await self._call("PUT", f"/zones/{zone.name}", 204, _settings(rectify))
        serial = next_serial(zone, found["serial"], bool(changes))
        soa = _soa(zone, serial)
        if changes or serial != found["serial"] or _soa_of(found) not in ((), soa.records):
            await self._call("PATCH", f"/zones/{zone.name}", 204, {"rrsets": [*changes, _change(soa)]})
        return serial

    async def _sign(self, zone: Zone, found: Mapping[str, Any]) -> tuple[str, ...]:
        """Give the zone exactly its key; the delegation signer records of it. The new key is there before an old one goes."""
        if not zone.signing_key and not found.get("dnssec") and not found.get("nsec3param"):
            return ()
        path = f"/zones/{zone.name}/cryptokeys"
        signers: tuple[str, ...] | None = None
        strangers = []
        for listed in await self._call("GET", path, 200):
            key = await self._call("GET", f"{path}/{listed['id']}", 200)
            if signers is None and key["active"] and _secret(key["privatekey"]) == _secret(zone.signing_key) != "":
                signers = tuple(key.get("ds", ()))
            else:
                strangers.append(listed["id"])
        if signers is None and zone.signing_key:
            made = await self._call("POST", path, 201, {"keytype": "csk", "active": True, "published": True,
                                                        "privatekey": zone.signing_key})
            signers = tuple(made.get("ds", ()))
        for stranger in strangers:
            await self._call("DELETE", f"{path}/{stranger}", 204)
        if zone.signing_key and found.get("nsec3param") != _NSEC3:
            await self._call("PUT", f"/zones/{zone.name}", 204, {**_settings(True), "nsec3param": _NSEC3})
        if not zone.signing_key:
            await self._call("PUT", f"/zones/{zone.name}", 204, {**_settings(True), "nsec3param": ""})
        return signers or ()

    async def remove(self, name: str) -> None:
        self._left.pop(name, None)
        await self._call("DELETE", f"/zones/{name}", 204, absent=True)

    async def serials(self) -> Mapping[str, int]:
        return {zone["name"]: zone["serial"] for zone in await self._call("GET", "/zones?dnssec=false", 200)}

    async def observe(self) -> list[HeldZone]:
        found = []
        for name in sorted(await self.serials()):
            zone = await self._find(name)
            if zone is not None:
                keys = await self._call("GET", f"/zones/{name}/cryptokeys", 200) if zone["dnssec"] else []
                found.append(HeldZone(name=name, serial=_serial(zone), record_sets=_sets(zone),
                                      ds=tuple(signer for key in keys if key["active"] for signer in key.get("ds", ()))))
        return found

    async def check(self) -> list[str]:
        return [f"{name} is not installed; cure: sudo ./skysail up" for name, there in (
            ("pdns_server", shutil.which("pdns_server", path="/usr/sbin:/usr/local/sbin") is not None),
            ("PowerDNS' SQLite backend", SCHEMA.exists())) if not there]

    async def _find(self, name: str, options: str = "") -> dict[str, Any] | None:
        found: dict[str, Any] | None = await self._call("GET", f"/zones/{name}{options}", 200, absent=True)
        return found

    async def _call(self, method: str, path: str, expected: int, body: Mapping[str, Any] | None = None,
                    absent: bool = False) -> Any:
        """The answer's JSON, None where there is none; with ``absent`` also where the API finds no such zone."""
        key = api_key(self._port, self._key_file)
        try:
            answer = await self._http.request(method, path, json=body, headers={"X-API-Key": key})
        except httpx.HTTPError as silent:
            raise NameServerAway(f"the name server does not answer: {silent or type(silent).__name__}",
                                 "run: sudo ./skysail up") from silent
        if absent and answer.status_code == 404:
            return None
        if answer.status_code != expected:
            raise SkysailError(f"the name server refused {method} {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json() if answer.content else None


def _settings(rectify: bool) -> dict[str, Any]:
    """Serials are ours ("" keeps PowerDNS from counting)."""
    # Without NSEC3 parameters, so that signing the zone again does rectify it.
    return {"soa_edit_api": "", "api_rectify": rectify} | ({} if rectify else {"nsec3param": ""})


def _shifts(apex: str, held: Sequence[RecordSet], wanted: Sequence[RecordSet]) -> bool:
    """Whether an unsigned zone needs more than its record sets when it changes from ``held`` to ``wanted``: a name comes or
    goes that lies between others, or below one that has no records itself (RFC 4592, 2.2.2), or there are delegations."""
    before, after = {one.name for one in held}, {one.name for one in wanted}
    if moved := before ^ after:
        depth = apex.count(".") + 1
        between = {above for name in before | after if name.count(".") > depth for above in _above(apex, name)}
        stays = before & after
        if any(name in between or any(above not in stays for above in _above(apex, name)) for name in moved):
            return True
    return any(one.type == "NS" and one.name != apex for one in chain(held, wanted))


def _above(apex: str, name: str) -> list[str]:
    """The names between a name and its zone's own."""
    labels = name.removesuffix(f".{apex}").split(".")
    return [] if name == apex else [f"{'.'.join(labels[cut:])}.{apex}" for cut in range(1, len(labels))]


def _soa(zone: Zone, serial: int) -> RecordSet:
    return RecordSet(name=zone.name, type="SOA", ttl=SOA_TTL,
                     records=(f"{zone.primary} {zone.hostmaster} {serial} {SOA_TIMES}",))


def _change(wanted: RecordSet) -> dict[str, Any]:
    return {"name": wanted.name, "type": wanted.type, "ttl": wanted.ttl, "changetype": "REPLACE",
            "records": [{"content": record, "disabled": False} for record in wanted.records]}


def _sets(found: Mapping[str, Any]) -> tuple[RecordSet, ...]:
    sets = [RecordSet(name=one["name"], type=one["type"], ttl=one["ttl"],
                      records=tuple(sorted(_plain(one["type"], record["content"]) for record in one["records"]
                                           if not record["disabled"])))
            for one in found.get("rrsets", ()) if one["type"] not in _NOT_OURS]
    return tuple(sorted(sets, key=lambda one: (one.name, one.type)))


def _plain(kind: str, content: str) -> str:
    """A record as documents write it. PowerDNS shortens IPv6 addresses, some to a form that it does not take back."""
    return ipaddress.IPv6Address(content).exploded if kind == "AAAA" else content


def _soa_of(found: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(record["content"] for one in found.get("rrsets", ()) if one["type"] == "SOA" for record in one["records"])


def _serial(found: Mapping[str, Any]) -> int:
    words = " ".join(_soa_of(found)).split()
    return int(words[2]) if len(words) > 2 else 0


def _secret(key: str) -> str:
    """The private number in the text of a key file."""
    return next((line.split()[1] for line in key.splitlines() if line.startswith("PrivateKey:")), "")
