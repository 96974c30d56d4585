"""A fleet on one machine, for development and tests: a controller, and hosts that are network namespaces, each with an agent
and a data folder of its own, and its own QEMU if wished. They join as machines do.

What machines have apart from each other, and hosts on one machine do not, their settings keep apart: the names of namespaces,
and the user ids of guests. They share images and templates, which are told apart by what they were made of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from skysail.hosts.admission import zone_names
from skysail.hosts.roster import Host
from skysail.kit import durable, process
from skysail.kit.config import GUEST_UIDS, Config, load
from skysail.kit.errors import SkysailError
from skysail.network.underlay import DEVICE, Underlay
from skysail.serve import blueprints, hosts, membership, processes, programs, up

# Between the first user ids of two hosts' guests: with those of its importer and its responder.
UIDS = GUEST_UIDS + 100
REPORT_SECONDS = 180.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet of a data folder was made as. ``stock`` has the folders ``images`` and ``templates`` of all hosts, ''
    for the fleet's own. Guests have user ids from ``uids`` on."""

    name: str
    underlay: str
    engines: Literal["real", "sim"]
    hosts: int = 0
    stock: str = ""
    uids: int = Config().guest_uid_base


def fleet(config: Config, plan: Plan, progress: Callable[[str], None], qemu: Mapping[str, str] | None = None,
          port: int = 8700) -> list[Host]:
    """The fleet's controller and its hosts run; safe to repeat, and with more hosts. ``qemu`` has, by host, the folder of
    another QEMU than the machine's. Needs root; the data folder is a new one, or has a fleet. Raises SkysailError."""
    process.require_root()
    held = find(config)
    if held is None and any(config.root.glob("*")) and config.root.exists():
        raise SkysailError(f"{config.data} has something else in it", "set SKYSAIL_DATA to a folder of its own")
    if held is not None and msgspec.structs.replace(held, hosts=plan.hosts) != plan:
        raise SkysailError(f"the fleet in {config.data} is {held.name} over {held.underlay} with {held.engines} hosts, "
                           "and was made with other options", "say the same, or take it away: sudo ./skysail dev stop")
    underlay = Underlay(plan.name, plan.underlay)
    config.root.mkdir(parents=True, exist_ok=True)
    durable.replace(_path(config), msgspec.json.encode(msgspec.structs.replace(plan, hosts=max(plan.hosts, _count(held)))))
    settings = config.root / "skysail.toml"
    if not settings.exists():
        durable.replace(settings, (f'engines = "{plan.engines}"\nport = {port}\nlocal_host = false\ndetached = true\n'
                                   f'join_listen = "{underlay.machine_address}"\npublic_pool = "{underlay.pool}"\n'
                                   f'public_ipv6 = "{underlay.prefix}"\n{_stock(config, plan)}').encode(), 0o644)
    config = load(config.data)
    # Here, where the archive can be reached: hosts find it in their stock.
    blueprints.ensure_first(config, progress)
    progress("network: making the underlay")
    underlay.ensure(plan.hosts)
    up.up(config, progress)
    zones = zone_names(config.regions, config.default_region)
    for number in range(1, plan.hosts + 1):
        other = (qemu or {}).get(f"host-{number}", "")
        _host(config, plan, underlay, number, zones[(number - 1) % len(zones)], other, progress)
    progress("waiting for the hosts' reports")
    if not processes.wait_until(lambda: all(one.state == "ready" and one.images for one in hosts.listed(config)),
                                REPORT_SECONDS, 0.5):
        raise SkysailError(f"a host of the fleet does not report within {REPORT_SECONDS:.0f} s", "see: skysail host list")
    return hosts.listed(config)


def stop(config: Config, progress: Callable[[str], None]) -> None:
    """End the fleet: agents, guests, controller, namespaces. Its folders stay; :func:`fleet` brings it back, with its guests
    as after a power cut. Raises SkysailError where there is none."""
    process.require_root()
    plan = find(config)
    if plan is None:
        raise SkysailError(f"{config.data} has no fleet", "set SKYSAIL_DATA to the folder that has it")
    underlay = Underlay(plan.name, plan.underlay)
    for number in range(1, plan.hosts + 1):
        folder = data_folder(config, number)
        if not folder.exists():
            continue
        progress(f"host-{number}: stopping")
        _skysail(underlay.entering(number), folder, "down", "--guests")
    up.down(load(config.data), progress)
    underlay.remove()


def enter(config: Config, host: str, words: Sequence[str]) -> int:
    """Run a command on a host of the fleet; its exit status. Raises SkysailError where there is no such host."""
    process.require_root()
    plan = find(config)
    numbers = {f"host-{number}": number for number in range(1, (plan.hosts if plan else 0) + 1)}
    if plan is None or host not in numbers:
        raise SkysailError(f"the fleet in {config.data} has no host {host}", f"it has {', '.join(numbers) or 'none'}")
    number = numbers[host]
    return subprocess.run([*Underlay(plan.name, plan.underlay).entering(number), *words], check=False,
                          env={**os.environ, "SKYSAIL_DATA": str(data_folder(config, number))}).returncode


def find(config: Config) -> Plan | None:
    """What the fleet in the data folder was made as; None where there is none."""
    try:
        return msgspec.json.decode(_path(config).read_bytes(), type=Plan)
    except FileNotFoundError:
        return None


def _host(config: Config, plan: Plan, underlay: Underlay, number: int, zone: str, qemu: str,
          progress: Callable[[str], None]) -> None:
    """The agent of a host runs, and its controller knows it."""
    name, folder = f"host-{number}", data_folder(config, number)
    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(folder / "skysail.toml", (
        f'engines = "{plan.engines}"\ndetached = true\nqemu_folder = "{qemu}"\n{_stock(config, plan)}'
        f'namespace = "{plan.name}-{number}g"\nlink = "{plan.name}g"\nsegment = "{DEVICE}"\n'
        f"guest_uid_base = {plan.uids + (number - 1) * UIDS}\n").encode(), 0o644)
    own = load(str(folder))
    entering = underlay.entering(number)
    if membership.find(own) is not None and membership.identity(own).whole:
        progress(f"{name}: looking after its agent")
        _skysail(entering, folder, "up", qemu=qemu)
        return
    progress(f"{name}: joining")
    made = hosts.make_token(config, name, zone, 1.0)
    _skysail(entering, folder, "join", made["url"], "--name", name, "--address", underlay.address(number), qemu=qemu,
             said=made["token"])


def _stock(config: Config, plan: Plan) -> str:
    root = Path(plan.stock) if plan.stock else config.root
    return f'images = "{root / "images"}"\ntemplates = "{root / "templates"}"\n'


def _skysail(entering: list[str], folder: Path, *words: str, qemu: str = "", said: str = "") -> None:
    """Run the command on a host, by this very program, and say that to it."""
    path = ":".join(filter(None, (qemu, programs.PATH)))
    process.run([*entering, sys.executable, "-m", "skysail.cli.main", *words], timeout=1800, input=said.encode(),
                env={**os.environ, "SKYSAIL_DATA": str(folder), "PATH": path})


def _path(config: Config) -> Path:
    return config.root / "fleet.json"


def data_folder(config: Config, number: int) -> Path:
    """The data folder of a host of the fleet."""
    return config.root / "fleet" / f"host-{number}"


def _count(plan: Plan | None) -> int:
    return plan.hosts if plan else 0
