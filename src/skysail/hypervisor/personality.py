"""Who a guest is: what is made fresh on the host for each one, and its two forms: a message to the personaliser inside a
clone, and a NoCloud seed for a guest that boots cold.

Source: cloud-init documentation, "NoCloud", "User data formats" and "Network configuration, version 2".
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from pathlib import Path
from typing import Any

import asyncssh
import msgspec

from skysail.contract.document import Guest
from skysail.kit.process import run

SECTOR = 512


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


def identity_disk(told: dict[str, Any]) -> bytes:
    """:func:`message` as the content of a disk, for a guest of ours that boots from a copy of another one's."""
    line = json.dumps(told).encode() + b"\n"
    return line.ljust(-(-len(line) // SECTOR) * SECTOR, b"\0")


def launch_script(user_data: str) -> str:
    """What cloud-init is given: bare commands become a shell script, as on Lightsail; anything it knows stays as it is."""
    marks = ("#!", "#cloud-", "#include", "#part-handler", "Content-Type:", "MIME-Version:", "From ", "## template:")
    if not user_data.strip() or user_data.lstrip().startswith(marks):
        return user_data
    return "#!/bin/sh\n" + user_data


# The early half of a seed, before sshd starts. It is a part of its own, because whatever keys of cloud-config we used, the
# owner's user data may use them too, and would then replace ours. Once per instance: what the owner changes stays changed.
_BOOTHOOK = """#!/bin/sh
mark=/var/lib/skysail/seeded
[ "$(cat $mark 2>/dev/null)" = "$INSTANCE_ID" ] && exit 0
mkdir -p /var/lib/skysail /etc/ssh/sshd_config.d
cat > /etc/ssh/skysail_user_ca.pub <<'END'
%s
END
line='TrustedUserCAKeys /etc/ssh/skysail_user_ca.pub'
if grep -q '^Include /etc/ssh/sshd_config.d/' /etc/ssh/sshd_config; then
    echo "$line" > /etc/ssh/sshd_config.d/10-skysail.conf
else
    sed -i "1i $line" /etc/ssh/sshd_config
fi
# An image without a resolver of its own has nobody who would write down the servers that the network configuration names.
if [ ! -L /etc/resolv.conf ] && ! grep -qs '^nameserver' /etc/resolv.conf; then
    printf '%%b' '%s' > /etc/resolv.conf
fi
if command -v restorecon >/dev/null; then restorecon -R /etc/ssh; fi
echo "$INSTANCE_ID" > $mark
"""


def seed(guest: Guest, identity: Identity, around: Surroundings) -> dict[str, str]:
    """The files of a NoCloud seed. The owner's user data stays as it is, ours goes into vendor data, so that
    cloud-init itself merges the two.

    A guest that boots cold comes to the same state as a clone, but for its machine-id: the host can give one only to a
    disk that it writes, so an image that carries none makes its own at its first boot, as on other clouds.
    """
    person = guest.personality
    settings = {
        "ssh_keys": {"ed25519_private": identity.host_private, "ed25519_public": identity.host_public},
        "ssh_deletekeys": True, "disable_root": True, "ssh_pwauth": False,
        "growpart": {"mode": "auto", "devices": ["/"]}, "resize_rootfs": True,
        # Whatever the image calls its default user, it is named as the API says.
        "user": {"name": person.user},
    }
    vendor = MIMEMultipart()
    servers = "".join(f"nameserver {address}\\n" for address in around.resolvers)
    vendor.attach(MIMEText(_BOOTHOOK % ("\n".join(person.trusted_user_ca), servers), "cloud-boothook"))
    vendor.attach(MIMEText(json.dumps(settings), "cloud-config"))
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
        "meta-data": json.dumps({"instance-id": guest.id, "local-hostname": person.hostname,
                                 "public-keys": list(person.authorized_keys)}),
        "user-data": launch_script(person.user_data) or "#cloud-config\n{}\n",
        "vendor-data": vendor.as_string(), "network-config": json.dumps(network),
    }


def write_seed(files: dict[str, str], target: Path) -> None:
    """Burn the seed into an ISO 9660 image labelled CIDATA, atomically, and for its owner's eyes only: it holds a key."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        content, disk = Path(work) / "content", Path(work) / "seed.iso"
        content.mkdir()
        for name, text in files.items():
            (content / name).write_text(text)
        run(["xorriso", "-as", "genisoimage", "-quiet", "-V", "CIDATA", "-J", "-r", "-o", str(disk), str(content)])
        disk.chmod(0o600)
        disk.replace(target)
