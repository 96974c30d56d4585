"""Verify's look at private networks and who is let through between them."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from skysail.contract.document import HostDocument, Network
from skysail.contract.report import Inventory
from skysail.inspect.difference import Difference
from skysail.store.schema import guests, instances, networks


def rows(connection: Connection) -> Iterator[Difference]:
    """Each guest is in the network of its account; that of an instance, in the one of its region."""
    known = {row.number: row for row in connection.execute(select(networks))}
    for row in connection.execute(
            select(guests.c.id, guests.c.network, guests.c.account_id, instances.c.region)
            .outerjoin(instances, instances.c.id == guests.c.instance_id)):
        held = known.get(row.network)
        if held is None or held.account_id != row.account_id or row.region not in (None, held.region):
            whose = f"account {held.account_id} in {held.region}" if held else "nobody"
            yield Difference(subject=f"guest {row.id}", saw=f"in network {row.network} of {whose}",
                             wanted=f"the network of account {row.account_id} in {row.region or 'its region'}")


def host(document: HostDocument, there: Inventory, subnets: bool) -> Iterator[Difference]:
    """Who is let through to each guest, against what the document says; ``subnets`` tells whether there are peer subnets."""
    joined = {network.number: network for network in document.networks}
    for guest in document.guests:
        if guest.role == "gone" or guest.id not in there.reached_by:
            continue
        subject, number = f"guest {guest.id} of {guest.instance}", guest.port.network
        network = joined.get(number, Network(number=number))
        wanted, found = tuple(sorted((number, *network.peers))), there.reached_by[guest.id]
        if wanted != found:
            yield Difference(subject=subject, saw=f"reached by guests of networks {list(found)}",
                             wanted=f"networks {list(wanted)}")
        if subnets and network.routed != (guest.id in there.routed):
            yield Difference(subject=subject, wanted="joined with them" if network.routed else "apart from them",
                             saw=f"{'joined with' if guest.id in there.routed else 'apart from'} the peer subnets")
