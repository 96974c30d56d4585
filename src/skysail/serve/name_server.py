"""The name server's process: an own PowerDNS, with its own user, configuration, database and API key.

``<data>/dns`` belongs to root; ``pdns.conf`` in it is readable by the name server's user only, ``api.key`` by root only, and
``database`` is the one place that PowerDNS can write. A PowerDNS that the machine runs for others is another process with
another configuration, and is not looked at. Source: PowerDNS documentation, "Authoritative Server Settings".
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import secrets
import sqlite3
from pathlib import Path

import httpx

from skysail.dns import NameServerAway
from skysail.dns.powerdns import SCHEMA, api_key
from skysail.kit import durable
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError

_PROGRAM = "/usr/sbin/pdns_server"


def settings(config: Config, key: str) -> str:
    """The text of ``pdns.conf``: answers for its zones and nothing else, without caches, so that a change is seen at once.

    ``resolver`` must not be named, not even empty: 4.7 ends with a segmentation fault.
    """
    folder = config.dns_dir / "database"
    values = {
        "launch": "gsqlite3", "gsqlite3-database": folder / "zones.sqlite", "gsqlite3-dnssec": "yes",
        # What a power cut takes from the end of the log is written again by the agent: the document has it.
        "gsqlite3-pragma-journal-mode": "WAL", "gsqlite3-pragma-synchronous": 1,
        "local-address": config.dns_listen, "local-port": config.dns_port,
        "api": "yes", "api-key": key, "webserver": "yes", "webserver-address": "127.0.0.1",
        "webserver-port": config.dns_api_port, "webserver-allow-from": "127.0.0.1", "webserver-loglevel": "none",
        "cache-ttl": 0, "query-cache-ttl": 0, "negquery-cache-ttl": 0, "zone-cache-refresh-interval": 0,
        "zone-metadata-cache-ttl": 0, "dnssec-key-cache-ttl": 0,
        "disable-axfr": "yes", "expand-alias": "no", "version-string": "anonymous", "server-id": "disabled",
        # It asks the makers' servers for advisories otherwise.
        "security-poll-suffix": "",
        "socket-dir": folder, "daemon": "no", "guardian": "no", "write-pid": "no", "loglevel": 4,
    }
    return "".join(f"{name}={value}\n" for name, value in values.items())


def prepare(config: Config) -> str:
    """Make what the process needs: folder, API key, database, configuration. Needs root, and the user to be there. Returns
    a digest of the configuration. Raises :class:`SkysailError` when PowerDNS is not installed."""
    if not SCHEMA.exists() or not Path(_PROGRAM).exists():
        raise SkysailError("PowerDNS with its SQLite backend is not installed",
                           "apt-get install pdns-server pdns-backend-sqlite3")
    account = pwd.getpwnam(config.dns_user)
    config.dns_dir.mkdir(parents=True, exist_ok=True)
    config.dns_dir.chmod(0o755)
    folder = config.dns_dir / "database"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    os.chown(folder, account.pw_uid, account.pw_gid)
    if not config.dns_key_file.exists():
        durable.replace(config.dns_key_file, secrets.token_urlsafe(32).encode(), owner=(0, 0))
    text = settings(config, config.dns_key_file.read_text())
    durable.replace(config.dns_dir / "pdns.conf", text.encode(), owner=(account.pw_uid, account.pw_gid))
    _ensure_database(folder / "zones.sqlite", account.pw_uid, account.pw_gid)
    return hashlib.sha256(text.encode()).hexdigest()


def _ensure_database(path: Path, uid: int, gid: int) -> None:
    if path.exists():
        return
    half = path.with_suffix(".new")
    half.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(half)) as connection:
        connection.executescript(SCHEMA.read_text())
    half.chmod(0o600)
    os.chown(half, uid, gid)
    half.replace(path)


def command(config: Config) -> list[str]:
    """The argument list: the name server's user, without capabilities but the one that a port below 1024 needs."""
    user = config.dns_user
    keep = ",+net_bind_service" if config.dns_port < 1024 else ""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", f"--inh-caps=-all{keep}",
            f"--ambient-caps=-all{keep}", f"--bounding-set=-all{keep}", "--no-new-privs", "--",
            _PROGRAM, f"--config-dir={config.dns_dir}"]


def unit(config: Config, log: Path) -> str:
    """The systemd unit, with the same privileges as :func:`command`."""
    capability = "CAP_NET_BIND_SERVICE" if config.dns_port < 1024 else ""
    return (f"[Unit]\nDescription=Skysail name server\nAfter=network.target\nStartLimitIntervalSec=0\n\n[Service]\n"
            f"User={config.dns_user}\nGroup={config.dns_user}\nNoNewPrivileges=yes\nCapabilityBoundingSet={capability}\n"
            f"AmbientCapabilities={capability}\nExecStart={_PROGRAM} --config-dir={config.dns_dir}\n"
            f"ProtectSystem=strict\nReadWritePaths={config.dns_dir / 'database'}\nPrivateTmp=yes\nRestart=always\n"
            f"RestartSec=2\nStandardOutput=append:{log}\nStandardError=append:{log}\n\n"
            f"[Install]\nWantedBy=multi-user.target\n")


def healthy(config: Config) -> bool:
    """Does the API answer, with our key?"""
    try:
        answer = httpx.get(f"http://127.0.0.1:{config.dns_api_port}/api/v1/servers/localhost", timeout=2, trust_env=False,
                           headers={"X-API-Key": api_key(config.dns_api_port, config.dns_key_file)})
    except (httpx.HTTPError, NameServerAway):
        return False
    return answer.status_code == 200
