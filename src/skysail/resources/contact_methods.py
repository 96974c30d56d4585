"""Contact methods: where notices of alarms go. One for each protocol in a region, verified before it is told anything else.

Source: Lightsail API reference, CreateContactMethod. An endpoint of the protocol Email may also be an ``https://`` address
of a webhook, where the operator allows its origin: Lightsail's model has no protocol of that name.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from skysail.kit.clock import Clock
from skysail.kit.config import Config
from skysail.kit.errors import ApiError, invalid_input, not_found
from skysail.operations import history
from skysail.resources import outbox, tags
from skysail.resources.request import Request
from skysail.store.schema import contact_methods

# RFC 5321's addresses without quoted strings, address literals and domains of one's own invention.
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,180}[A-Za-z0-9])?")
_PAUSE_SECONDS = 60.0


def refuse_sms(protocols: Sequence[str]) -> None:
    """Raises InvalidInputException when one of them is SMS."""
    if "SMS" in protocols:
        raise invalid_input("SMS is not offered by this cloud: text messages need a contract with a telephone company.",
                            "Use the protocol Email.")


def is_webhook(endpoint: str) -> bool:
    """Whether the endpoint is a webhook's address, not a mail address."""
    return endpoint.startswith(("http://", "https://"))


def find_valid(connection: Connection, account_id: str, region: str, protocol: str) -> RowMapping | None:
    """The account's contact method of this protocol, if it is verified."""
    row = _find(connection, account_id, region, protocol)
    return row if row is not None and row["status"] == "Valid" else None


def verify(connection: Connection, code: str) -> str:
    """The contact method that was sent ``code`` is its owner's: its endpoint, empty for a code that is nobody's."""
    row = connection.execute(select(contact_methods).where(contact_methods.c.code_digest == _digest(code))).mappings().first()
    if row is None:
        return ""
    connection.execute(update(contact_methods).where(contact_methods.c.id == row["id"]).values(status="Valid"))
    return str(row["endpoint"])


class ContactMethods:
    """The actions on contact methods. ``page`` is where a code is verified."""

    def __init__(self, config: Config, clock: Clock, page: str) -> None:
        self._config = config
        self._clock = clock
        self._page = page

    def actions(self) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
        return {
            "CreateContactMethod": self.create, "GetContactMethods": self.list_, "DeleteContactMethod": self.delete,
            "SendContactMethodVerification": self.send_verification,
        }

    def create(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Recorded as PendingVerification; what verifies it is on its way."""
        protocol, endpoint = request.params["protocol"], request.params["contactEndpoint"].strip()
        refuse_sms([protocol])
        self._check(endpoint)
        if _find(connection, request.account_id, request.region, protocol) is not None:
            raise invalid_input(f"A contact method {protocol} is already there in this region.", "Delete it first.")
        identifier = str(uuid.uuid4())
        connection.execute(insert(contact_methods).values(
            id=identifier, account_id=request.account_id, region=request.region, protocol=protocol, endpoint=endpoint,
            status="PendingVerification", code_digest="", asked_at=0.0, created_at=self._clock.now()))
        tags.put(connection, identifier, request.params.get("tags") or [])
        row = _get(connection, request, protocol)
        self._ask(connection, row)
        return {"operations": [self._record(connection, request, row)]}

    def list_(self, connection: Connection, request: Request) -> dict[str, Any]:
        wanted = request.params.get("protocols") or ["Email", "SMS"]
        rows = connection.execute(select(contact_methods).where(
            contact_methods.c.account_id == request.account_id, contact_methods.c.region == request.region,
            contact_methods.c.protocol.in_(wanted))).mappings().all()
        return {"contactMethods": [_shape(row) for row in rows]}

    def send_verification(self, connection: Connection, request: Request) -> dict[str, Any]:
        """Another code; the one before it is good no more."""
        row = _get(connection, request, request.params["protocol"])
        if row["status"] == "Valid":
            raise invalid_input(f"The contact method {row['protocol']} is verified already.")
        if self._clock.now() < row["asked_at"] + _PAUSE_SECONDS:
            raise invalid_input("A verification was sent less than a minute ago.", "Wait for it, or try again in a minute.")
        self._ask(connection, row)
        return {"operations": [self._record(connection, request, row)]}

    def delete(self, connection: Connection, request: Request) -> dict[str, Any]:
        row = _get(connection, request, request.params["protocol"])
        outbox.forget(connection, row["id"])
        tags.forget(connection, row["id"])
        connection.execute(delete(contact_methods).where(contact_methods.c.id == row["id"]))
        return {"operations": [self._record(connection, request, row)]}

    def _check(self, endpoint: str) -> None:
        if not is_webhook(endpoint):
            if not _ADDRESS.fullmatch(endpoint) or ".." in endpoint:
                raise invalid_input(f"{endpoint[:60]!r} is no mail address.")
            if not self._config.smtp_host or not self._config.mail_from:
                raise invalid_input("This cloud sends no mail: its operator has set no relay.",
                                    "The operator sets smtp_host and mail_from in skysail.toml.")
            return
        try:
            parts = urlsplit(endpoint)
            origin = f"{parts.scheme}://{parts.netloc}"
        except ValueError:
            origin = ""
        if origin not in self._config.webhooks or any(ord(letter) <= 32 or ord(letter) > 126 for letter in endpoint):
            raise invalid_input("Webhooks of this origin are not allowed by this cloud.",
                                "The operator lists the ones that are as webhooks in skysail.toml.")

    def _ask(self, connection: Connection, row: RowMapping) -> None:
        code = secrets.token_urlsafe(24)
        connection.execute(update(contact_methods).where(contact_methods.c.id == row["id"]).values(
            code_digest=_digest(code), status="PendingVerification", asked_at=self._clock.now()))
        # A code that is not good any more need not be delivered.
        outbox.forget(connection, row["id"])
        outbox.put(connection, row, "Verify that this address is yours",
                   f"Somebody asked that notices of alarms in the account {row['account_id']} ({row['region']}) come to "
                   f"{row['endpoint']}.\n\nIf that was you, open this page and confirm it:\n\n{self._page}?code={code}\n\n"
                   "If it was not, do nothing: nothing more is sent here.\n", self._clock.now())

    def _record(self, connection: Connection, request: Request, row: RowMapping) -> dict[str, Any]:
        return history.record(connection, request, now=self._clock.now(), type=request.action, resource_name=row["protocol"],
                              resource_type="ContactMethod", resource_id=row["id"])


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode(errors="replace")).hexdigest()


def _find(connection: Connection, account_id: str, region: str, protocol: str) -> RowMapping | None:
    return connection.execute(select(contact_methods).where(
        contact_methods.c.account_id == account_id, contact_methods.c.region == region,
        contact_methods.c.protocol == protocol)).mappings().first()


def _get(connection: Connection, request: Request, protocol: str) -> RowMapping:
    row = _find(connection, request.account_id, request.region, protocol)
    if row is None:
        raise _missing(protocol)
    return row


def _missing(protocol: str) -> ApiError:
    return not_found(f"The ContactMethod does not exist: {protocol}", "CreateContactMethod makes it.")


def _shape(row: RowMapping) -> dict[str, Any]:
    return {
        "contactEndpoint": row["endpoint"], "status": row["status"], "protocol": row["protocol"], "name": row["protocol"],
        "arn": f"arn:aws:lightsail:{row['region']}:{row['account_id']}:ContactMethod/{row['id']}",
        "createdAt": row["created_at"], "location": {"availabilityZone": "all", "regionName": row["region"]},
        "resourceType": "ContactMethod", "supportCode": f"{row['account_id']}/{row['id']}",
    }
