"""HAProxy: ports 80 and 443 of a single address, by host name.

TLS is passed on as it is, by the name that the client asks for in the clear (SNI, RFC 6066, 3): the key is the guest's, and
HAProxy has none. What leads where stands in two maps, which are replaced as a whole, in files first and then by the runtime
API, so that a change drops no connection and a HAProxy that was killed finds all when it is started again. ``names`` leads
from a host name to a guest. ``open`` has the networks that each guest's firewall lets in: to look up guest, port and client
at once, the three are written as one IPv6 address with the client at its end, of which HAProxy finds the longest prefix.
Source: HAProxy Configuration Manual and Management Guide, 2.6.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from pathlib import Path

from skysail.contract.document import Entrance, Guest, Port
from skysail.kit import durable
from skysail.kit.confined import Confined
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread

PROGRAM = "/usr/sbin/haproxy"
# A command of the runtime API fits HAProxy's buffer, which has 16 KiB.
COMMAND_BYTES = 8_000
ANSWER_SECONDS = 10.0


class HaProxy:
    """The HAProxy with its files in ``folder``, which listens on ``address`` in the data plane's ``namespace``."""

    def __init__(self, folder: Path, *, namespace: str, address: str, ports: tuple[int, int], user: str, log: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._listener = Confined(folder, "haproxy", namespace, user, log)
        self._text = settings(folder, address, *ports)
        # Named by its content: a HAProxy that runs with other settings is not taken for this one.
        self._settings = folder / f"haproxy-{hashlib.sha256(self._text.encode()).hexdigest()[:16]}.cfg"
        self._served: dict[str, list[str]] = {}

    async def apply(self, entrance: Entrance, guests: Mapping[str, Guest]) -> None:
        """See :class:`skysail.ingress.Ingress`."""
        await in_thread(self._apply, entrance, {guest.id: guest.port for guest in guests.values()})

    def _apply(self, entrance: Entrance, ports: Mapping[str, Port]) -> None:
        # What is let in is known before the names that lead there.
        maps = {"open": opened(entrance, ports), "names": named(entrance, ports)}
        with self._lock:
            self._prepare()
            for name, lines in maps.items():
                text = "".join(f"{line}\n" for line in lines).encode()
                path = self._map(name)
                if not path.exists() or path.read_bytes() != text:
                    durable.replace(path, text, 0o644)
            if self._listener.ensure([PROGRAM, "-db", "-f", str(self._settings)], self._settings, self._answers, _PATH):
                self._served = dict(maps)  # it has read the files
            for name, lines in maps.items():
                if self._served.get(name) != lines:
                    self._replace(name, lines)
                    self._served[name] = lines

    def _prepare(self) -> None:
        account = self._listener.prepare()
        if not Path(PROGRAM).exists():
            raise SkysailError("HAProxy is not installed", "apt-get install haproxy")
        # The one place that it can write: for the socket of its runtime API.
        run = self._folder / "run"
        run.mkdir(exist_ok=True)
        run.chmod(0o700)
        os.chown(run, account.pw_uid, account.pw_gid)
        if not self._settings.exists():
            for former in self._folder.glob("haproxy-*.cfg"):
                former.unlink()
            durable.replace(self._settings, self._text.encode(), 0o644)

    def _replace(self, name: str, lines: list[str]) -> None:
        """Another content of a map, all at once."""
        path = self._map(name)
        made = self._ask(f"prepare map {path}").strip()
        version = made.rpartition(" ")[2]
        if not made.startswith("New version created") or not version.isdigit():
            raise SkysailError(f"HAProxy does not take the map {name}: {made[:200]}")
        for portion in _portions(lines):
            said = self._ask(f"add map @{version} {path} <<\n{portion}")  # an empty line ends it
            if said.strip():
                raise SkysailError(f"HAProxy does not take the map {name}: {said.strip()[:200]}")
        self._ask(f"commit map @{version} {path}")

    def alive(self) -> bool:
        return self._listener.alive()

    async def observe(self) -> dict[str, str]:
        said = await in_thread(self._ask, f"show map {self._map('names')}")
        words = [line.split() for line in said.splitlines() if line.strip()]
        return {word[1]: word[2].partition("/")[0] for word in words if len(word) == 3}

    async def end(self) -> None:
        await in_thread(self._listener.end)
        self._served = {}

    async def check(self) -> list[str]:
        missing = shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin") is None
        return ["HAProxy is not installed; cure: sudo ./skysail up"] if missing else []

    def _map(self, name: str) -> Path:
        return self._folder / f"{name}.map"

    def _answers(self) -> bool:
        with contextlib.suppress(SkysailError):
            return "Version" in self._ask("show info")
        return False

    def _ask(self, command: str) -> str:
        """What the runtime API answers; raises SkysailError when it does not."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(ANSWER_SECONDS)
                client.connect(str(self._folder / "run" / "admin.sock"))
                client.sendall(command.encode() + b"\n")
                client.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: client.recv(65536), b"")).decode(errors="replace")
        except OSError as silent:
            raise SkysailError(f"HAProxy does not answer: {silent}", "see: sudo ./skysail status") from silent


_PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


def named(entrance: Entrance, ports: Mapping[str, Port]) -> list[str]:
    """The lines of the map ``names``: host name, and the guest's address with the first part of its keys in ``open``."""
    return [f"{one.name} {ports[one.guest].private_ipv4}/{_key(ports[one.guest])}" for one in entrance.names
            if one.guest in ports]


def opened(entrance: Entrance, ports: Mapping[str, Port]) -> list[str]:
    """The lines of the map ``open``."""
    wanted = sorted({one.guest for one in entrance.names} & ports.keys())
    return [f"{_key(ports[guest])}{number:x}:{network.network_address}/{96 + network.prefixlen} 1"
            for guest in wanted for number in (80, 443)
            for network in collapse_addresses(IPv4Network(text, strict=False) for text in ports[guest].sources(number))]


def _key(port: Port) -> str:
    octets = IPv4Address(port.private_ipv4).packed
    return f"fc00:0:0:{octets[0] << 8 | octets[1]:x}:{octets[2] << 8 | octets[3]:x}:"


def _portions(lines: Iterable[str]) -> Iterable[str]:
    held = ""
    for line in lines:
        if len(held) + len(line) > COMMAND_BYTES:
            yield held
            held = ""
        held += f"{line}\n"
    if held:
        yield held


def settings(folder: Path, address: str, http_port: int, tls_port: int) -> str:
    """The text of the configuration, which says nothing of guests. A name that is in no map is tried once more with ``*`` in
    the place of its first label."""
    names, open_ = folder / "names.map", folder / "open.map"

    def lead(layer: str, name: str, number: int) -> str:
        wild = f"var(txn.name),regsub(^[^.]*,*),map({names})"
        return "\n    ".join((
            f"{layer} set-var(txn.name) {name},lower,regsub(\\.$,)",
            f"{layer} set-var(txn.guest) var(txn.name),map({names})",
            f"{layer} set-var(txn.guest) {wild} if !{{ var(txn.guest) -m found }}",
            f"{layer} set-var(txn.address) var(txn.guest),word(1,/)",
            f"{layer} set-var(txn.client) src",
            f"{layer} set-var(txn.key) var(txn.guest),word(2,/),concat({number:x}:,txn.client)"))

    return f"""\
global
    stats socket {folder}/run/admin.sock mode 600 level admin
    fd-hard-limit 65536
    log stderr format raw daemon notice

defaults
    timeout connect 10s
    timeout client 60s
    timeout server 300s
    timeout http-request 30s
    timeout tunnel 4h

frontend http
    mode http
    bind {address}:{http_port}
    {lead("http-request", "req.hdr(host),host_only", 80)}
    acl open var(txn.key),map_ip({open_}) -m found
    http-request return status 421 content-type "text/plain; charset=utf-8" \
string "There is no site of this name here, or it is not open to you.\\n" unless open
    # Who asks is said by this machine alone: what a client says of itself goes.
    http-request set-header X-Forwarded-For %[src]
    http-request set-dst var(txn.address)
    default_backend http

backend http
    mode http
    http-reuse never
    http-request set-dst-port int(80)
    server guest 0.0.0.0:0

frontend tls
    mode tcp
    bind {address}:{tls_port}
    timeout client 4h
    tcp-request inspect-delay 10s
    {lead("tcp-request content", "req.ssl_sni", 443)}
    tcp-request content reject if {{ req.ssl_hello_type 1 }} !{{ var(txn.key),map_ip({open_}) -m found }}
    tcp-request content set-dst var(txn.address) if {{ req.ssl_hello_type 1 }}
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    tcp-request content reject
    default_backend tls

backend tls
    mode tcp
    timeout server 4h
    tcp-request content set-dst-port int(443)
    server guest 0.0.0.0:0
"""
