"""Which host of which cloud this machine is. The machine that ``up`` made a cloud of is that cloud's first host."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec

from skysail.agent.identity import Identity
from skysail.kit import durable
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError

FIRST_HOST = "host-1"


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine keeps of its joining: the name that it has in the cloud, where its agent answers controllers, the id of
    the token that let it in, and the identity that it was given, which its certificate is to be for. Both are '' where it
    joined by an earlier version."""

    host: str
    address: str
    port: int
    token: str = ""
    identity: str = ""


def path(config: Config) -> Path:
    """Where it is kept."""
    return config.root / "agent" / "membership.json"


def find(config: Config) -> Membership | None:
    """None where this machine joined no cloud. Raises SkysailError when the file cannot be read."""
    try:
        return msgspec.json.decode(path(config).read_bytes(), type=Membership)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as damaged:
        raise SkysailError(f"{path(config)} cannot be used: {damaged}", "join the cloud again") from damaged


def keep(config: Config, membership: Membership) -> None:
    """From its next start on the agent is this host."""
    path(config).parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path(config), msgspec.json.encode(membership))


def identity(config: Config) -> Identity:
    """The certificate of this machine, if it joined a cloud."""
    return Identity(config.root / "agent" / "identity")


def underlay(config: Config) -> str:
    """The address of this machine in the network between the hosts: the one that the configuration names, else where it is
    called at, or where others join; '' for a machine that is alone, or that is called by a name."""
    found = find(config)
    address = config.underlay_address or (found.address if found else config.join_listen)
    try:
        return "" if ipaddress.ip_address(address).is_unspecified else address
    except ValueError:
        return ""


def host(config: Config) -> str:
    """The name of this machine among the hosts of its cloud."""
    found = find(config)
    return found.host if found else FIRST_HOST
