"""The operator as a customer of the signed API: the command line changes instances only this way."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import endpoint, programs


def call(config: Config, action: str, region: str = "", **parameters: Any) -> dict[str, Any]:
    """Call ``action`` (in snake_case) with the admin key, in the default region unless told. Raises :class:`SkysailError`
    with the API's words."""
    trusted = endpoint.authority(config)
    key, secret = endpoint.credentials(config)
    client = botocore.session.Session().create_client(
        "lightsail", region_name=served(config, region), endpoint_url=endpoint.url(config), aws_access_key_id=key,
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


def served(config: Config, region: str) -> str:
    """The region, or the default one for ''. Raises :class:`SkysailError` for one that this cloud does not have."""
    if region and region not in config.regions:
        raise SkysailError(f"this cloud has no region {region}", f"it has {', '.join(config.regions)}: see docs/regions.md")
    return region or config.default_region


def instances(config: Config, region: str = "") -> list[dict[str, Any]]:
    """Every instance of the admin account in the region, '' for all of them."""
    found: list[dict[str, Any]] = []
    for one in [served(config, region)] if region else config.regions:
        token: dict[str, str] = {}
        while True:
            page = call(config, "get_instances", one, **token)
            found += page.get("instances", [])
            if not page.get("nextPageToken"):
                break
            token = {"pageToken": page["nextPageToken"]}
    return found


def launch(config: Config, name: str, blueprint: str, bundle: str, wait_seconds: float = 120.0,
           region: str = "", user_data: str = "") -> dict[str, Any]:
    """Create one instance in the region's first zone, with the launch script ``user_data``, and wait until it runs; raises
    :class:`SkysailError` after ``wait_seconds``."""
    region = served(config, region)
    made = call(config, "create_instances", region, instanceNames=[name], blueprintId=blueprint, bundleId=bundle,
                availabilityZone=f"{region}{config.regions[region][0]}",
                **({"userData": user_data} if user_data else {}))["operations"][0]
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline:
        operation = call(config, "get_operation", region, operationId=made["id"])["operation"]
        if operation["status"] == "Failed":
            raise SkysailError(f"{name} could not be launched: {operation.get('errorDetails', 'no reason given')}",
                               cure=f"see {programs.agent_log(config)}")
        if operation["status"] == "Succeeded":
            instance: dict[str, Any] = call(config, "get_instance", region, instanceName=name)["instance"]
            return instance
        time.sleep(0.1)
    raise SkysailError(f"{name} does not run after {wait_seconds:.0f} s", cure=f"see: sudo ./skysail logs {name}")


def ssh(config: Config, name: str, command: list[str], region: str = "") -> int:
    """Log in to instance ``name`` with a certificate made for this login; returns ssh's exit status. Where instances share a
    single address, by the port of it that is the instance's."""
    access = call(config, "get_instance_access_details", region, instanceName=name, protocol="ssh")["accessDetails"]
    at = [f"HostName={config.single_address}", f"Port={ssh_ports(config)[region or config.default_region, name]}",
          f"HostKeyAlias={access['ipAddress']}"] if config.single_address else []
    with tempfile.TemporaryDirectory(prefix="skysail-ssh-") as folder:
        return subprocess.call(login(access, Path(folder), command, at))


def ssh_ports(config: Config) -> dict[tuple[str, str], int]:
    """The ports of the single address that lead to the SSH of the admin account's instances, by region and name."""
    from sqlalchemy import Connection, select

    from skysail.store.schema import accounts, instances
    from skysail.store.visit import visit

    def ports(connection: Connection) -> list[tuple[str, str, int]]:
        return [(row.region, row.name, row.ssh_port) for row in connection.execute(
            select(instances.c.region, instances.c.name, instances.c.ssh_port)
            .join(accounts, accounts.c.id == instances.c.account_id)
            .where(accounts.c.name == "admin", instances.c.ssh_port.is_not(None)))]

    return {(region, name): port for region, name, port in visit(config, ports, list[tuple[str, str, int]])}


def ask(config: Config, name: str, command: str) -> tuple[int, str]:
    """ssh's exit status, and what ``command`` printed in instance ``name``."""
    access = call(config, "get_instance_access_details", instanceName=name, protocol="ssh")["accessDetails"]
    with tempfile.TemporaryDirectory(prefix="skysail-ssh-") as folder:
        done = subprocess.run(login(access, Path(folder), [command]), stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, check=False)
    return done.returncode, done.stdout


def login(access: dict[str, Any], folder: Path, command: list[str], options: Sequence[str] = ()) -> list[str]:
    """The argument list that runs ``command`` with these access details, and further ``options`` of ssh; their secrets are
    written into ``folder``, which is empty and the caller's own."""
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
            *(word for option in options for word in ("-o", option)),
            # Whoever the host says that its image is for: never an option of ssh's.
            "-l", access["username"], "--", address, *command]


def serial_log(config: Config, name: str, region: str = "", account: str = "admin") -> bytes:
    """What the serial console of the account's instance ``name`` said. Raises :class:`SkysailError` when there is no such
    guest, or no such account."""
    from sqlalchemy import Connection, select

    from skysail.resources import accounts
    from skysail.store.schema import guests, networks
    from skysail.store.visit import visit

    place = served(config, region)

    def ids(connection: Connection) -> list[str]:
        owner = accounts.find_account(connection, account)
        if owner is None:
            raise SkysailError(f"there is no account {account}")
        # A guest's region is that of its network, also where its launch failed and no instance is left.
        return list(connection.execute(select(guests.c.id).join(networks, networks.c.number == guests.c.network).where(
            guests.c.account_id == owner, guests.c.instance_name == name, guests.c.role != "gone",
            networks.c.region == place)).scalars())

    logs = [text for guest in visit(config, ids, list[str])
            if (text := _last_of(config.guests_dir / guest / "run" / "serial.log")) is not None]
    if not logs:
        raise SkysailError(f"no instance named {name} of the account {account} has a serial log in {place}",
                           cure=f"see: sudo ./skysail search {name}")
    return b"".join(logs)


def _last_of(path: Path, limit_bytes: int = 4 << 20) -> bytes | None:
    """The end of a log that a guest's process writes into its own folder; None when there is none. What lies there may be a
    link, another file's second name, a pipe or a very large hole: none of it is followed, waited for or read whole."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        held = os.fstat(descriptor)
        if not stat.S_ISREG(held.st_mode) or held.st_nlink != 1:
            return None
        file.seek(max(held.st_size - limit_bytes, 0))
        return file.read(limit_bytes)


def _private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text.rstrip("\n") + "\n")


def listed(config: Config, region: str = "") -> list[dict[str, Any]]:
    """:func:`instances`, each with its ``sshPort`` where they share a single address."""
    found = instances(config, region)
    if config.single_address:
        ports = ssh_ports(config)
        found = [{**one, "sshPort": ports.get((one["location"]["regionName"], one["name"]))} for one in found]
    return found


def address(instance: dict[str, Any]) -> str:
    """Where the instance is reached: by IPv4 if it can be."""
    return next(iter([*filter(None, [instance.get("publicIpAddress")]), *instance.get("ipv6Addresses", [])]), "no address")


def summary(instance: dict[str, Any]) -> dict[str, str]:
    """The few words of an instance that a list shows."""
    return {"name": instance["name"], "region": instance["location"]["regionName"], "state": instance["state"]["name"],
            "blueprint": instance.get("blueprintId", ""),
            "address": address(instance), "bundle": instance.get("bundleId", ""),
            "ssh port": instance.get("sshPort") or ""}
