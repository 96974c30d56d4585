"""The tree that an instance reads of itself, as on EC2: a function of its guest alone.

It tells what is true here and leaves out what has no counterpart: credentials, signatures, reservations, security groups.
Source: EC2 user guide, "Instance metadata categories" and "Instance identity documents".
"""

from __future__ import annotations

import hashlib
import json
import time
from ipaddress import IPv6Address

import msgspec

from skysail.contract.document import Guest, Metadata
from skysail.metadata import Record


def record(guest: Guest) -> Record | None:
    """What the guest is told; None for one that is told nothing."""
    if guest.metadata is None or guest.role == "gone":
        return None
    port = guest.port
    addresses = (port.private_ipv4, *((str(IPv6Address(port.public_ipv6)),) if port.public_ipv6 else ()))
    return Record(id=guest.id, addresses=addresses, options=guest.metadata.options, leaves=_leaves(guest, guest.metadata))


def digest(one: Record) -> str:
    """Names the content of a record; the process that answers computes the same of what it holds."""
    return hashlib.sha256(json.dumps(msgspec.to_builtins(one), sort_keys=True).encode()).hexdigest()


def _leaves(guest: Guest, told: Metadata) -> dict[str, str]:
    port, person, zone = guest.port, guest.personality, told.region + told.zone
    instance, image = f"i-{_name(told.instance_id)}", f"ami-{guest.volume.image[:17]}"
    card = f"meta-data/network/interfaces/macs/{port.mac}/"
    leaves = {
        "meta-data/ami-id": image, "meta-data/ami-launch-index": "0",
        "meta-data/block-device-mapping/ami": "/dev/vda", "meta-data/block-device-mapping/root": "/dev/vda",
        "meta-data/hostname": person.hostname, "meta-data/instance-action": "none", "meta-data/instance-id": instance,
        "meta-data/instance-life-cycle": "on-demand", "meta-data/instance-type": told.bundle,
        "meta-data/local-hostname": person.hostname, "meta-data/local-ipv4": port.private_ipv4, "meta-data/mac": port.mac,
        "meta-data/placement/availability-zone": zone, "meta-data/placement/region": told.region,
        "meta-data/services/domain": "amazonaws.com", "meta-data/services/partition": "aws",
        card + "device-number": "0", card + "interface-id": f"eni-{_name(port.id)}",
        card + "local-hostname": person.hostname, card + "local-ipv4s": port.private_ipv4, card + "mac": port.mac,
        card + "owner-id": told.account,
        "dynamic/instance-identity/document": json.dumps({
            "accountId": told.account, "architecture": "x86_64", "availabilityZone": zone, "imageId": image,
            "instanceId": instance, "instanceType": told.bundle, "pendingTime": time.strftime(
                "%Y-%m-%dT%H:%M:%SZ", time.gmtime(told.launched_at)),
            "privateIp": port.private_ipv4, "region": told.region, "version": "2017-09-30"}, indent=2),
    }
    if port.public_ipv4:
        leaves["meta-data/public-ipv4"] = leaves[card + "public-ipv4s"] = port.public_ipv4
        leaves[card + f"ipv4-associations/{port.public_ipv4}"] = port.private_ipv4
    if port.public_ipv6:
        leaves["meta-data/ipv6"] = leaves[card + "ipv6s"] = port.public_ipv6
    if person.authorized_keys:
        leaves["meta-data/public-keys/"] = f"0={told.key_name}"
        leaves["meta-data/public-keys/0/openssh-key"] = person.authorized_keys[0].strip() + "\n"
    if person.user_data:
        leaves["user-data"] = person.user_data
    # The one folder whose listing shows no slashes.
    return leaves | {"": "\n".join(("dynamic", "meta-data", *(("user-data",) if person.user_data else ())))}


def _name(identifier: str) -> str:
    """The seventeen hexadecimal digits that EC2 names things by."""
    return hashlib.sha256(identifier.encode()).hexdigest()[:17]
