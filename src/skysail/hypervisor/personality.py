"""Who a guest is: what is made fresh on the host for each one, and its two forms: a message to the personaliser inside a
clone, and a NoCloud seed for a guest that boots cold.

Source: cloud-init documentation, "NoCloud" and "Network configuration, version 2".
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from skysail.contract.document import Guest
from skysail.kit.process import run


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Made once per guest and kept: SSH host key (OpenSSH texts), machine-id, and the GUID of its vmgenid device."""

    host_private: str
    host_public: str
    machine_id: str
    generation_id: str


def make() -> Identity:
    """A fresh identity."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    octets = secrets.token_hex(16)
    return Identity(
        host_private=key.export_private_key().decode(), host_public=key.export_public_key().decode().strip(),
        machine_id=secrets.token_hex(16),
        generation_id="-".join((octets[:8], octets[8:12], octets[12:16], octets[16:20], octets[20:])))


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """The network that guests find: prefix length of the private network, gateways, resolvers. Without ``gateway_ipv6``
    there is no IPv6."""

    prefix: int
    gateway: str
    gateway_ipv6: str = ""
    resolvers: tuple[str, ...]

    def ipv6(self, guest: Guest) -> str:
        """The guest's IPv6 address with its length, alone on its link; empty where it has none."""
        return f"{guest.port.public_ipv6}/128" if self.gateway_ipv6 and guest.port.public_ipv6 else ""


def message(guest: Guest, identity: Identity, around: Surroundings) -> dict[str, Any]:
    """What the personaliser in a clone is told, in one line."""
    person = guest.personality
    return {
        "hostname": person.hostname, "machine_id": identity.machine_id, "user": person.user,
        "authorized_keys": list(person.authorized_keys), "trusted_user_ca": list(person.trusted_user_ca),
        "host_keys": {"private": identity.host_private, "public": identity.host_public},
        "ipv4": f"{guest.port.private_ipv4}/{around.prefix}", "gateway": around.gateway,
        "ipv6": around.ipv6(guest), "gateway_ipv6": around.gateway_ipv6,
        "resolvers": list(around.resolvers), "epoch": time.time(), "seed_hex": os.urandom(64).hex(),
        "user_data": launch_script(person.user_data), "instance_id": guest.id, "disk_bytes": guest.volume.size_gib << 30,
    }


def launch_script(user_data: str) -> str:
    """What cloud-init is given: bare commands become a shell script, as on Lightsail; anything it knows stays as it is."""
    marks = ("#!", "#cloud-", "#include", "#part-handler", "Content-Type:", "MIME-Version:", "From ", "## template:")
    if not user_data.strip() or user_data.lstrip().startswith(marks):
        return user_data
    return "#!/bin/sh\n" + user_data


def seed(guest: Guest, identity: Identity, around: Surroundings) -> dict[str, str]:
    """The files of a NoCloud seed. The owner's user data stays as it is, ours goes into vendor data, so that
    cloud-init itself merges the two."""
    person = guest.personality
    vendor = {
        "ssh_keys": {"ed25519_private": identity.host_private, "ed25519_public": identity.host_public},
        "ssh_deletekeys": True, "ssh_authorized_keys": list(person.authorized_keys), "disable_root": True,
        "ssh_pwauth": False, "growpart": {"mode": "auto", "devices": ["/"]}, "resize_rootfs": True,
        "write_files": [
            {"path": "/etc/ssh/skysail_user_ca.pub", "content": "".join(f"{key}\n" for key in person.trusted_user_ca)},
            {"path": "/etc/ssh/sshd_config.d/10-skysail.conf",
             "content": "TrustedUserCAKeys /etc/ssh/skysail_user_ca.pub\n"}],
        "runcmd": [["systemctl", "reload-or-restart", "ssh"]],
    }
    addresses = [f"{guest.port.private_ipv4}/{around.prefix}"]
    routes: list[dict[str, Any]] = [{"to": "0.0.0.0/0", "via": around.gateway}]
    if ipv6 := around.ipv6(guest):
        addresses.append(ipv6)
        routes.append({"to": "::/0", "via": around.gateway_ipv6, "on-link": True})
    network = {
        "version": 2,
        "ethernets": {"primary": {
            "match": {"macaddress": guest.port.mac}, "addresses": addresses, "routes": routes, "accept-ra": False,
            "nameservers": {"addresses": list(around.resolvers)}}},
    }
    return {
        "meta-data": json.dumps({"instance-id": guest.id, "local-hostname": person.hostname}),
        "user-data": launch_script(person.user_data) or "#cloud-config\n{}\n",
        "vendor-data": "#cloud-config\n" + json.dumps(vendor), "network-config": json.dumps(network),
    }


def write_seed(files: dict[str, str], target: Path) -> None:
    """Burn the seed into an ISO 9660 image labelled CIDATA, atomically."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        half = target.with_suffix(".new")
        run(["xorriso", "-as", "genisoimage", "-quiet", "-V", "CIDATA", "-J", "-r", "-o", str(half), folder])
        half.replace(target)
