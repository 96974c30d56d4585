"""Where the API answers, and what a client needs to speak to it: address, authority, access key."""

from __future__ import annotations

import json
from pathlib import Path

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError


def url(config: Config) -> str:
    """The endpoint, as a client on this machine reaches it."""
    host = "127.0.0.1" if config.listen in ("0.0.0.0", "::") else config.listen
    return f"{'https' if config.secure else 'http'}://{f'[{host}]' if ':' in host else host}:{config.port}"


def authority(config: Config) -> Path | None:
    """The certificate (PEM, for everyone to read) by which the endpoint is known; None without TLS."""
    return config.root / "ca.pem" if config.secure else None


def credentials(config: Config) -> tuple[str, str]:
    """The admin account's access key id and secret. Raises :class:`SkysailError` when there are none to read."""
    path = config.root / "credentials.json"
    try:
        values: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError as missing:
        raise SkysailError(f"{path} does not exist", cure="run: sudo ./skysail up") from missing
    except PermissionError as refused:
        raise SkysailError(f"{path} is readable by root only", cure="run with sudo") from refused
    try:
        return values["access_key_id"], values["secret_access_key"]
    except KeyError as absent:
        raise SkysailError(f"{path} holds no access key", cure="move it away and run: sudo ./skysail up") from absent


def environment(config: Config) -> dict[str, str]:
    """What points any AWS client at this cloud, and ``dig`` at its name server."""
    key, secret = credentials(config)
    told = {"AWS_ENDPOINT_URL_LIGHTSAIL": url(config), "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": config.default_region}
    if (trusted := authority(config)) is not None:
        told["AWS_CA_BUNDLE"] = str(trusted)
    if config.powerdns:
        told |= {"SKYSAIL_DNS_ADDRESS": config.dns_listen, "SKYSAIL_DNS_PORT": str(config.dns_port)}
    return told
