"""The operator's hands on the cloud's hosts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy import Connection

from skysail.hosts import admission, outages, roster
from skysail.hosts.authority import Authority
from skysail.hosts.outages import Outage
from skysail.hosts.roster import Host
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import rescue
from skysail.resources.rescue import Prospect, Remnant
from skysail.serve import joining, membership
from skysail.store.vault import Vault
from skysail.store.visit import visit

LOOK_SECONDS = 0.5
# How long a controller may take to notice that a host is to be fenced, to ask it once more, and to write down how it went.
ASKED_SECONDS = 40.0


def listed(config: Config) -> list[Host]:
    """Every host of the cloud."""
    on_the_controller(config)
    return visit(config, roster.listed, list[Host])


def make_token(config: Config, host: str, zone: str, hours: float) -> dict[str, str]:
    """What lets one machine join: where, the token, until when (UTC), and the command for that machine, which asks for the
    token: others there see command lines, and sudo logs them. Raises SkysailError where none could join."""
    on_the_controller(config)
    if not config.join_listen:
        raise SkysailError("this cloud lets no machine join",
                           "set join_listen in skysail.toml to an address of this machine that the others reach, then run: "
                           "sudo ./skysail up")
    zones = admission.zone_names(config.regions, config.default_region)
    if zone and zone not in zones:
        raise SkysailError(f"this cloud has no zone {zone}", f"it has {', '.join(zones)}")
    now = time.time()

    def made(connection: Connection) -> str:
        by = Authority.ensure(connection, Vault.at(config.master_key), now, config.certificate_seconds)
        return str(admission.make_token(connection, by, now, hours * 3600, host, zone))

    url, token = joining.url(config), visit(config, made, str, write=True)
    return {"url": url, "token": token, "command": f"sudo ./skysail join {url}",
            "until": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now + hours * 3600))}


def cordon(config: Config, host_id: str, cordoned: bool) -> None:
    """Give the host nothing new, or something again."""
    on_the_controller(config)
    visit(config, lambda connection: roster.cordon(connection, host_id, cordoned), type(None), write=True)


def remove(config: Config, host_id: str) -> None:
    """The host is no part of the cloud any more."""
    on_the_controller(config)
    visit(config, lambda connection: roster.remove(connection, host_id), type(None), write=True)


def fence(config: Config, host_id: str, is_off: bool, told: Callable[[str], None]) -> None:
    """Have a host that does not answer turned off by the operator's program, or with ``is_off`` take their word for it.
    ``told`` hears what is waited for. Raises SkysailError where that makes no sense, or it is not known to be off."""
    on_the_controller(config)
    if is_off:
        visit(config, lambda connection: outages.vouch(connection, host_id, time.time()), type(None), write=True)
        return
    if not config.fence:
        raise SkysailError("nothing is configured that turns a host off",
                           "set fence in skysail.toml, or when you know that it is off: "
                           f"sudo ./skysail host fence {host_id} --is-off")
    former = visit(config, lambda connection: outages.ask(connection, host_id, time.time()), int, write=True)
    told(f"{host_id}: the controller runs {config.fence[0]}")
    end = time.monotonic() + config.fence_seconds + ASKED_SECONDS
    while time.monotonic() < end:
        found = visit(config, outages.seen, dict[str, Outage]).get(host_id)
        if found is None:
            raise SkysailError(f"the host {host_id} answers again")
        if found.fenced_at is not None:
            return
        if found.tries > former and found.error:
            raise SkysailError(f"{host_id} is not known to be off: {found.error}", "it is tried again, later and later")
        time.sleep(LOOK_SECONDS)
    raise SkysailError(f"{host_id} is not known to be off yet", "does a controller run? sudo ./skysail status")


def prospects(config: Config, host_id: str) -> list[Prospect]:
    """What becomes of the instances of a host that has failed."""
    on_the_controller(config)
    return visit(config, lambda connection: rescue.prospects(connection, config, host_id, time.time()), list[Prospect])


def remains(config: Config, host_id: str) -> list[Remnant]:
    """What is left of instances at hosts that failed, or at one of them."""
    on_the_controller(config)
    return visit(config, lambda connection: rescue.left(connection, host_id), list[Remnant])


def discard(config: Config, host_id: str, instance: str) -> None:
    """Throw away what is left of an instance at a host that failed. Raises SkysailError where nothing is."""
    on_the_controller(config)
    visit(config, lambda connection: rescue.discard(connection, host_id, instance), int, write=True)


def on_the_controller(config: Config) -> None:
    """Raises SkysailError on a machine that is only a host: the rows are elsewhere."""
    if membership.find(config) is not None:
        raise SkysailError("this machine is a host of a cloud: its controller has the rows", "run this on the controller")


def get(config: Config, host_id: str) -> Host:
    """One host. Raises :class:`SkysailError` when there is none of that name."""
    for host in listed(config):
        if host.id == host_id:
            return host
    raise SkysailError(f"there is no host {host_id}", "see: sudo ./skysail host list")


def summary(host: Host) -> dict[str, Any]:
    """The few words of a host that a list shows."""
    facts = host.facts
    return {"host": host.id, "zones": " ".join(host.zones), "state": _state(host), "guests": host.guests,
            "vcpus": f"{host.promised_vcpus} of {host.vcpus}",
            "memory GiB": f"{_gib(host.promised_mib)} of {_gib(host.memory_mib)}",
            "disk GiB": f"{host.promised_gib} of {host.disk_gib}", "accelerator": host.accelerator,
            "qemu": facts.qemu.partition(" ")[0] if facts else "", "kernel": facts.kernel if facts else "",
            "skysail": facts.program if facts else "", "seen": _ago(host.seen_at)}


def details(host: Host) -> dict[str, Any]:
    """All that is known of a host, in an order to read."""
    told: dict[str, Any] = {
        "host": host.id, "address": host.address, "state": _state(host) + (f": {host.reason}" if host.reason else ""),
        "seen": _ago(host.seen_at) + (f", silent since {_ago(host.since)}" if host.since else ""),
        **({"failure": _failure(host.outage)} if host.outage else {}),
        "zones": " ".join(host.zones), "document": f"{host.observed_generation} of {host.generation}",
        "processors": f"{host.promised_vcpus} of {host.vcpus} promised", "guests": host.guests,
        "memory": f"{_gib(host.promised_mib)} of {_gib(host.memory_mib)} GiB promised",
        "disk": f"{host.promised_gib} of {host.disk_gib} GiB promised", "snapshots": host.snapshots,
        "images": " ".join(host.images)}
    if (facts := host.facts) is not None:
        told |= {"processor": facts.cpu, "flags": " ".join(facts.cpu_flags),
                 "accelerator": f"{facts.accelerator} ({facts.accelerator_seen})", "kernel": facts.kernel,
                 "underlay": facts.underlay, "disks": facts.pool or "files", "qemu": facts.qemu,
                 "guests get": f"{facts.guest_cpu} in {facts.guest_machine}",
                 "cpu models": " ".join(facts.cpu_models), "machine types": " ".join(facts.machine_types),
                 "post-copy": "not known" if facts.no_post_copy is None else facts.no_post_copy or "guests can come by it",
                 "skysail": f"{facts.program}, contract {facts.contract}"}
        if facts.certificate_until is not None:
            told["certificate"] = time.strftime("good until %Y-%m-%d %H:%M UTC", time.gmtime(facts.certificate_until))
    return told


def plain(host: Host) -> Any:
    """A host for programs."""
    return msgspec.to_builtins(host)


def remnant(one: Remnant) -> dict[str, Any]:
    """What is left of an instance, in the few words of a table."""
    of = f"snapshot {one.snapshot}, {_ago(one.snapshot_at)}" if one.how == "snapshot" else "its disks"
    return {"host": one.host, "instance": one.instance, "guest": one.guest, "went on": one.went_to, "when": _ago(one.left_at),
            "from": of, "left": "to be thrown away" if one.unwanted else " ".join(one.disks) or "nothing, once it is told so"}


def prospect(one: Prospect) -> str:
    """What becomes of an instance, in one line."""
    if one.how == "waits":
        return f"{one.instance} waits: {one.why}"
    return f"{one.instance} goes on on {one.target} " + ("with its disks" if one.how == "pool" else "from its last snapshot")


def _failure(outage: Outage) -> str:
    if outage.fenced_at is not None:
        return f"{'its operator vouched that it is off' if outage.vouched else 'fenced'}, {_ago(outage.fenced_at)}"
    if outage.due_at is not None:
        when = max(0.0, outage.due_at - time.time())
        tried = f", {outage.tries} tries so far: {outage.error or 'under way'}" if outage.tries else ""
        return f"to be fenced, in {when:.0f} s{tried}"
    return f"not fenced{': ' + outage.error if outage.error else ''}"


def _state(host: Host) -> str:
    return f"{host.state}, cordoned" if host.cordoned else host.state


def _gib(mib: int) -> str:
    return f"{mib / 1024:.1f}".removesuffix(".0")


def _ago(moment: float | None) -> str:
    return "never" if moment is None else f"{max(0.0, time.time() - moment):.0f} s ago"
