"""GetInstanceAccessDetails: a user certificate good for a minute, signed by the account's authority in the region, and the
host keys that the host witnessed. DeleteKnownHostKeys forgets them.

Source: Lightsail API reference, InstanceAccessDetails; OpenSSH PROTOCOL.certkeys.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import asyncssh
from sqlalchemy import Connection, update

from skysail.kit.clock import Clock
from skysail.kit.errors import invalid_input
from skysail.operations import history
from skysail.resources import accounts
from skysail.resources.instances import get_guest, get_row, ipv6_addresses
from skysail.resources.request import Request
from skysail.store.schema import guests
from skysail.store.vault import Vault

CERTIFICATE_SECONDS = 60
# A guest's clock may be a little behind ours.
BACKDATE_SECONDS = 300


class Access:
    """The actions about getting in."""

    def __init__(self, clock: Clock, vault: Vault) -> None:
        self._clock = clock
        self._vault = vault

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {"GetInstanceAccessDetails": self.details, "DeleteKnownHostKeys": self.forget_host_keys}

    def details(self, connection: Connection, request: Request) -> dict[str, Any]:
        """A fresh key with its certificate; nothing of it is kept here."""
        row = get_row(connection, request, request.params["instanceName"])
        if request.params.get("protocol") == "rdp":
            raise invalid_input(f"The instance {row['name']} does not speak RDP; ask for protocol ssh.")
        if row["state"] != "running":
            raise invalid_input(f"The instance {row['name']} is {row['state']}; only a running one can be logged in to.")
        guest = get_guest(connection, row)
        now = self._clock.now()
        authority = asyncssh.import_private_key(accounts.authority_private(
            connection, self._vault, request.account_id, request.region))
        key = asyncssh.generate_private_key("ssh-ed25519")
        certificate = authority.generate_user_certificate(
            key, f"skysail:{request.account_id}:{row['name']}", principals=[row["username"]],
            valid_after=int(now) - BACKDATE_SECONDS, valid_before=int(now) + CERTIFICATE_SECONDS)
        return {"accessDetails": {
            "certKey": certificate.export_certificate().decode().strip(), "privateKey": key.export_private_key().decode(),
            "expiresAt": float(int(now) + CERTIFICATE_SECONDS), "protocol": "ssh", "instanceName": row["name"],
            "ipAddress": guest["public_ipv4"], "ipv6Addresses": ipv6_addresses(guest), "username": row["username"],
            "hostKeys": [_host_key(text, guest["witnessed_at"] or now)
                         for text in guest["host_keys"]],
        }}

    def forget_host_keys(self, connection: Connection, request: Request) -> dict[str, Any]:
        """The host witnesses the keys again at its next report."""
        row = get_row(connection, request, request.params["instanceName"])
        connection.execute(update(guests).where(guests.c.instance_id == row["id"]).values(
            host_keys=[], witnessed_at=None))
        return {"operations": [history.record(
            connection, request, now=self._clock.now(), type="DeleteKnownHostKeys", resource_name=row["name"],
            resource_type="Instance", resource_id=row["id"], zone=row["zone"])]}


def _host_key(text: str, witnessed_at: float) -> dict[str, Any]:
    key = asyncssh.import_public_key(text)
    algorithm, body = text.split()[:2]
    return {"algorithm": algorithm, "publicKey": body, "witnessedAt": witnessed_at,
            "fingerprintSHA1": key.get_fingerprint("sha1"), "fingerprintSHA256": key.get_fingerprint("sha256"),
            "notValidBefore": witnessed_at,
            "notValidAfter": witnessed_at + datetime.timedelta(days=3650).total_seconds()}
