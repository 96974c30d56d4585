"""A change of one instance's firewall on a host of a thousand, against a reload of the whole ruleset by `nft -f`.

The data plane is the real one, on the stage of namespaces that the tests use, with a port for each instance and one guest
that answers. Measured is the time from the port list that the agent hands to its fabric until the rules are in force and the
call returns. The peer is nft with the ruleset that Skysail would load for the same ports, as a whole: what a firewall that
is written as a file costs, its text not counted. The two take turns. A guest is asked, at the end, whether the rules act.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Annotated, Any

import cyclopts
import msgspec
from cyclopts import Parameter

from clouds import eventually, taken_slot
from skysail.cli import show
from skysail.contract.document import FirewallRule, Port
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root
from skysail.network import links, nftables
from skysail.network.plan import Layout
from stage import Stage

DEFAULT = (22, 80)


def port(number: int) -> Port:
    """The port of instance ``number``; every tenth has a firewall of its own, the others share the default one."""
    own = (2000 + number,) if number % 10 == 0 else ()
    return Port(id=f"g-{number}", mac=f"52:54:00:00:{number >> 8:02x}:{number & 255:02x}", network=1 + number % 7,
                private_ipv4=f"172.26.{number >> 8}.{number & 255}", public_ipv4=f"100.116.{number >> 8}.{number & 255}",
                public_ipv6=f"fd53:6b79:7361::{number:x}", firewall=tuple(
                    FirewallRule(protocol="tcp", from_port=one, to_port=one) for one in (*DEFAULT, *own)))


def figures(taken: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(taken) * 1e3, "max_ms": max(taken) * 1e3}


def bench(*, instances: int = 1000, changes: int = 30, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Change a firewall CHANGES times on a host of INSTANCES, and reload the whole ruleset as often."""
    require_root()
    if not 1 <= instances <= 16_000:
        raise SkysailError("instances takes 1 to 16,000")
    with taken_slot() as slot:
        layout = msgspec.structs.replace(Layout.of(Config()), namespace=f"skybench{slot}", public_pool="100.116.0.0/16")
        stage = Stage(f"skybench{slot}", layout)
        try:
            ports = {one.id: one for one in (port(10 + number) for number in range(instances))}
            show.step(f"a host of {instances} instances")
            began = time.monotonic()
            stage.apply(*ports.values())
            made = time.monotonic() - began
            first = next(iter(ports))
            guest = stage.guest(ports[first])
            show.step(f"{changes} changes, and as many reloads")
            ours, theirs = [], []
            for number in range(changes):
                # Another instance each time, and rules that no other has.
                name = list(ports)[number * 7 % instances]
                ports[name] = msgspec.structs.replace(ports[name], firewall=(*ports[name].firewall, FirewallRule(
                    protocol="tcp", from_port=10_000 + number, to_port=10_000 + number, cidrs=("203.0.113.0/24",))))
                wanted = list(ports.values())
                began = time.monotonic()
                stage.apply(*wanted)
                ours.append(time.monotonic() - began)
                ruleset = nftables.data_plane(layout, wanted)
                began = time.monotonic()
                links.inside(layout.namespace, lambda ruleset=ruleset: links.load(ruleset))
                theirs.append(time.monotonic() - began)
                stage.apply(*wanted)  # it sees that others changed rules, and is at rest again
            opened = msgspec.structs.replace(ports[first], firewall=(FirewallRule(
                protocol="tcp", from_port=9000, to_port=9000),))
            with guest.serves("0.0.0.0", 9000), guest.serves("0.0.0.0", 80):
                stage.apply(*(ports | {first: opened}).values())
                address = opened.public_ipv4
                eventually(lambda: stage.stranger.reaches(address, 9000), 30, "the opened port answers")
                if not stage.stranger.cut_off(address, 80):
                    raise SkysailError("the closed port answers")
        finally:
            stage.remove()
    show.finish()
    measured: dict[str, Any] = {"skysail": figures(ours), "nft": figures(theirs)}
    show.table([{"": name.replace("_", " "), "Skysail": f"{value:,.1f}", "nft -f": f"{measured['nft'][name]:,.1f}"}
                for name, value in measured["skysail"].items()], ["", "Skysail", "nft -f"])
    ratio = measured["nft"]["median_ms"] / measured["skysail"]["median_ms"]
    show.line(f"{instances} instances, made in {made:.1f} s; ratio {ratio:.1f}: nft's whole reload against our change")
    if json:
        show.as_json({"bench": "firewall", "ratio": ratio, "instances": instances, "changes": changes, "made_seconds": made,
                      **measured})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
