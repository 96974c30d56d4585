"""The operator as a customer of the signed API: the command line changes instances only this way."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import endpoint, programs


def call(config: Config, action: str, **parameters: Any) -> dict[str, Any]:
    """Call ``action`` (in snake_case) with the admin key. Raises :class:`SkysailError` with the API's words."""
    trusted = endpoint.authority(config)
    key, secret = endpoint.credentials(config)
    client = botocore.session.Session().create_client(
        "lightsail", region_name=config.default_region, endpoint_url=endpoint.url(config), aws_access_key_id=key,
        aws_secret_access_key=secret, verify=str(trusted) if trusted else None,
        config=ClientConfig(retries={"max_attempts": 0}, proxies={}, connect_timeout=5, read_timeout=60))
    try:
        answer: dict[str, Any] = getattr(client, action)(**parameters)
    except ClientError as refused:
        error = refused.response.get("Error", {})
        raise SkysailError(f"{error.get('Code')}: {error.get('Message')}") from refused
    except BotoCoreError as failed:
        raise SkysailError(str(failed), cure="see: sudo ./skysail status") from failed
    answer.pop("ResponseMetadata", None)
    return answer


def instances(config: Config) -> list[dict[str, Any]]:
    """Every instance of the admin account."""
    found: list[dict[str, Any]] = []
    token: dict[str, str] = {}
    while True:
        page = call(config, "get_instances", **token)
        found += page.get("instances", [])
        if not page.get("nextPageToken"):
            return found
        token = {"pageToken": page["nextPageToken"]}


def launch(config: Config, name: str, blueprint: str, bundle: str, wait_seconds: float = 120.0) -> dict[str, Any]:
    """Create one instance and wait until it runs; raises :class:`SkysailError` after ``wait_seconds``."""
    made = call(config, "create_instances", instanceNames=[name], blueprintId=blueprint, bundleId=bundle,
                availabilityZone=f"{config.default_region}{config.zones[0]}")["operations"][0]
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        operation = call(config, "get_operation", operationId=made["id"])["operation"]
        if operation["status"] == "Failed":
            raise SkysailError(f"{name} could not be launched: {operation.get('errorDetails', 'no reason given')}",
                               cure=f"see {programs.agent_log(config)}")
        if operation["status"] == "Succeeded":
            instance: dict[str, Any] = call(config, "get_instance", instanceName=name)["instance"]
            return instance
        time.sleep(0.1)
    raise SkysailError(f"{name} does not run after {wait_seconds:.0f} s", cure=f"see: sudo ./skysail logs {name}")


def ssh(config: Config, name: str, command: list[str]) -> int:
    """Log in to instance ``name`` with a certificate made for this login; returns ssh's exit status."""
    access = call(config, "get_instance_access_details", instanceName=name, protocol="ssh")["accessDetails"]
    with tempfile.TemporaryDirectory(prefix="skysail-ssh-") as folder:
        return subprocess.call(login(access, Path(folder), command))


def login(access: dict[str, Any], folder: Path, command: list[str]) -> list[str]:
    """The argument list that runs ``command`` with these access details; their secrets are written into ``folder``, which is
    empty and the caller's own."""
    identity, hosts = folder / "identity", folder / "known_hosts"
    _private(identity, access["privateKey"])
    _private(folder / "identity-cert.pub", access["certKey"])
    address = access.get("ipAddress") or access["ipv6Addresses"][0]
    lines = [f"{address} {key['algorithm']} {key['publicKey']}" for key in access.get("hostKeys", [])]
    _private(hosts, "\n".join(lines))
    return ["ssh", "-F", "none", "-i", str(identity), "-o", f"CertificateFile={identity}-cert.pub",
            "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", f"UserKnownHostsFile={hosts}",
            # ssh would look for an IPv6 address in its shortest form.
            "-o", f"HostKeyAlias={address}",
            "-o", f"StrictHostKeyChecking={'yes' if lines else 'accept-new'}", "-o", "LogLevel=ERROR",
            f"{access['username']}@{address}", *command]


def serial_log(config: Config, name: str) -> bytes:
    """What the serial console of instance ``name`` said. Raises :class:`SkysailError` when there is no such guest."""
    from sqlalchemy import select

    from skysail.store.database import Database
    from skysail.store.schema import guests

    database = Database(config.database)
    try:
        with database.transaction(write=False) as connection:
            wanted = (guests.c.instance_name == name) & (guests.c.role != "gone")
            found = connection.execute(select(guests.c.id).where(wanted))
            ids = [row[0] for row in found]
    finally:
        database.close()
    logs = [text for guest in ids if (text := _last_of(config.guests_dir / guest / "run" / "serial.log")) is not None]
    if not logs:
        raise SkysailError(f"no instance named {name} has a serial log here", cure="see: sudo ./skysail list")
    return b"".join(logs)


def _last_of(path: Path, limit_bytes: int = 4 << 20) -> bytes | None:
    """The end of a log that a guest's process writes into its own folder; None when there is none. What lies there may be a
    link, a pipe or a very large hole: none of it is followed, waited for or read whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        held = os.fstat(descriptor)
        if not stat.S_ISREG(held.st_mode):
            return None
        file.seek(max(held.st_size - limit_bytes, 0))
        return file.read(limit_bytes)


def _private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text.rstrip("\n") + "\n")


def address(instance: dict[str, Any]) -> str:
    """Where the instance is reached: by IPv4 if it can be."""
    return next(iter([*filter(None, [instance.get("publicIpAddress")]), *instance.get("ipv6Addresses", [])]), "no address")


def summary(instance: dict[str, Any]) -> dict[str, str]:
    """The few words of an instance that a list shows."""
    return {"name": instance["name"], "state": instance["state"]["name"], "blueprint": instance.get("blueprintId", ""),
            "address": address(instance), "bundle": instance.get("bundleId", "")}
