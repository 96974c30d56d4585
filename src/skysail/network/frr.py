"""FRRouting: tells the other hosts what is here, and the kernel what other hosts tell (BGP EVPN, RFC 7432, RFC 8365).

Two processes of Debian's user ``frr``. ``zebra`` works in the data plane's namespace, between the kernel's tables and the
other. ``bgpd`` speaks with other hosts, so it lives in the machine's namespace; it may take the port of BGP, no more.
Both have their settings from a file that is replaced as a whole, so that a process that died finds all when it is started
again. Hosts that come and go are told to the running ``bgpd`` beside, which keeps its sessions with the others.

Source: FRRouting User Guide, 8.4, "BGP", "Zebra"; its command line protocol is that of vtysh (lib/vty.c).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pwd
import re
import socket
import threading
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path

import msgspec

from skysail.contract.document import Overlay
from skysail.kit import durable
from skysail.kit.confined import Confined
from skysail.kit.errors import SkysailError
from skysail.network.plan import BRIDGE, Layout

log = logging.getLogger(__name__)
PROGRAMS, USER = Path("/usr/lib/frr"), "frr"
ANSWER_SECONDS = 10.0
# How often the two are looked at, and how long one that does not start is let rest, in seconds.
LOOK_SECONDS, REST_SECONDS = 0.1, 5.0
# A session is given up after this silence, in seconds, of which a third lies between two signs of life. Nothing waits for it:
# where a guest is found again after its host died, the word of its new host is the newer one.
HOLD_SECONDS = 30
# How long a new zebra leaves the routes of a former one that nobody has told it of yet.
KEPT_SECONDS = 30
_PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_NEIGHBOUR = re.compile(r"^ neighbor (\S+) peer-group (hosts|clients)$", re.MULTILINE)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All that FRR is told. ``peers`` are the hosts that this one speaks with; those that are ``clients`` are told what the
    others said, for this one is their reflector (RFC 4456)."""

    autonomous_system: int
    underlay: str
    vni: int
    peers: Mapping[str, str]
    routers: tuple[tuple[str, int], ...]
    public_pool: str
    public_ipv6: str

    @classmethod
    def of(cls, layout: Layout, overlay: Overlay) -> Settings:
        here, reflectors = layout.underlay, set(overlay.reflectors)
        peers = dict.fromkeys(overlay.hosts, "hosts")
        if here in reflectors:
            peers = {host: "hosts" if host in reflectors else "clients" for host in {*overlay.hosts, *reflectors} - {here}}
        elif reflectors:
            peers = dict.fromkeys(reflectors, "hosts")
        return cls(autonomous_system=overlay.autonomous_system, underlay=here, vni=overlay.vni,
                   peers=dict(sorted(peers.items(), key=lambda peer: IPv4Address(peer[0]))), routers=layout.routers,
                   public_pool=layout.public_pool, public_ipv6=layout.public_ipv6)


def zebra(settings: Settings) -> str:
    """The settings of zebra. It takes hosts for reachable by the default route, for it does not see the machine's routes."""
    return f"ip nht resolve-via-default\nipv6 nht resolve-via-default\nvni {settings.vni} prefix-routes-only\n"


def bgpd(settings: Settings) -> str:
    """The settings of bgpd. Of the kernel's routes it tells those of single public addresses, and to the operator's routers
    nothing but those that are here; it listens to none of theirs. An address that moves often is not suspected: who has it is
    decided by the controller."""
    system, here = settings.autonomous_system, settings.underlay
    # Before what refers to them: a map that comes later acts later.
    lines = [f"ip prefix-list public seq 5 permit {settings.public_pool} ge 32",
             "route-map public permit 10", " match ip address prefix-list public", f" match interface {BRIDGE}", "exit",
             "route-map here permit 10", " match ip address prefix-list public", "exit",
             # What other hosts are told is not for those beyond them.
             "route-map within permit 10", " set community no-export", "exit",
             "route-map nothing deny 10", "exit"]
    if settings.public_ipv6:
        lines += [f"ipv6 prefix-list public6 seq 5 permit {settings.public_ipv6} ge 128",
                  "route-map public6 permit 10", " match ipv6 address prefix-list public6", f" match interface {BRIDGE}",
                  "exit"]
    lines += [f"router bgp {system}", f" bgp router-id {here}", " no bgp default ipv4-unicast", " bgp always-compare-med",
              " no bgp ebgp-requires-policy", f" timers bgp {HOLD_SECONDS // 3} {HOLD_SECONDS}"]
    for group in ("hosts", "clients"):
        lines += [f" neighbor {group} peer-group", f" neighbor {group} remote-as {system}",
                  f" neighbor {group} update-source {here}", f" neighbor {group} timers connect 1",
                  f" neighbor {group} advertisement-interval 0"]
    lines += [f" neighbor {host} peer-group {group}" for host, group in settings.peers.items()]
    for router, its_system in settings.routers:
        lines += [f" neighbor {router} remote-as {its_system}", f" neighbor {router} update-source {here}",
                  f" neighbor {router} disable-connected-check", f" neighbor {router} timers connect 1",
                  f" neighbor {router} advertisement-interval 0"]
    lines += [" address-family ipv4 unicast", "  redistribute kernel route-map public", "  maximum-paths ibgp 1"]
    for router, _ in settings.routers:
        lines += [f"  neighbor {router} activate", f"  neighbor {router} route-map here out",
                  f"  neighbor {router} route-map nothing in"]
    lines += [" exit-address-family"]
    if settings.public_ipv6:
        lines += [" address-family ipv6 unicast", "  redistribute kernel route-map public6", "  maximum-paths ibgp 1",
                  " exit-address-family"]
    lines += [" address-family l2vpn evpn", "  neighbor hosts activate", "  neighbor clients activate",
              "  neighbor clients route-reflector-client", "  advertise-all-vni", "  no dup-addr-detection",
              "  advertise ipv4 unicast route-map within",
              *(["  advertise ipv6 unicast route-map within"] if settings.public_ipv6 else []),
              " exit-address-family", "exit"]
    return "\n".join((*lines, ""))


def changes(held: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """What a bgpd with these peers is told to have those."""
    lines = [f"no neighbor {host}" for host, group in held.items() if wanted.get(host) != group]
    return lines + [f"neighbor {host} peer-group {group}" for host, group in wanted.items() if held.get(host) != group]


class Frr:
    """The two processes, with their files in ``folder``. A process that dies is started again, by a thread that lives in the
    network namespace of the one who first wanted them: the machine's."""

    def __init__(self, folder: Path, namespace: str, log_folder: Path) -> None:
        self._folder = folder
        self._run = folder / "run"
        self._zebra = Confined(folder / "zebra", "zebra", namespace, USER, log_folder / "zebra.log", groups=True,
                               capabilities=("net_admin", "net_raw", "sys_admin"))  # it ends without all three
        self._bgpd = Confined(folder / "bgpd", "bgpd", "", USER, log_folder / "bgpd.log", capabilities=("net_bind_service",))
        self._working = threading.Lock()  # held for as long as processes are started, told or ended
        self._wanted: Settings | None = None
        self._told: Settings | None = None
        self._ended = False  # whoever started them
        self._news = threading.Event()
        self._tending: threading.Thread | None = None

    def want(self, settings: Settings | None) -> None:
        """Both run with these settings, soon; without any neither does, now. Raises SkysailError when one does not end."""
        if settings is None:
            if not self._ended:
                self.end()
            return
        self._ended = False
        if settings != self._wanted:
            self._wanted = settings
            self._news.set()
        if self._tending is None or not self._tending.is_alive():
            self._tending = threading.Thread(target=self._tend, name="frr", daemon=True)
            self._tending.start()

    def _tend(self) -> None:
        said = ""
        while self._wanted is not None:
            rest = LOOK_SECONDS
            try:
                with self._working:
                    wanted = self._wanted
                    if wanted is not None and (wanted != self._told or not self.alive()):
                        self._converge(wanted)
                        self._told = wanted
                        said = ""
            except (SkysailError, OSError) as failure:
                if str(failure) != said:
                    said = str(failure)
                    log.warning("other hosts are not told what is here: %s", failure)
                rest = REST_SECONDS
            self._news.wait(rest)
            self._news.clear()

    def _converge(self, settings: Settings) -> None:
        account = self._prepare()
        zebra_file = self._file("zebra", zebra(settings), zebra(settings), account)
        lasting = bgpd(msgspec.structs.replace(settings, peers={}))
        bgpd_file = self._file("bgpd", lasting, bgpd(settings), account)
        run = self._run
        both = ["-z", f"{run}/zserv.sock", "--vty_socket", str(run), "-P", "0", "--log", "stdout",
                "--log-level", "notifications"]
        anew = self._zebra.ensure(
            [str(PROGRAMS / "zebra"), "-f", str(zebra_file), "-i", f"{run}/zebra.pid", *both, "-u", USER, "-g", USER,
             "-K", str(KEPT_SECONDS)], zebra_file, lambda: self._answers("zebra"), _PATH)
        if anew:
            self._bgpd.end()  # it would not tell a new zebra what it told the former one
        begun = self._bgpd.ensure(
            [str(PROGRAMS / "bgpd"), "-f", str(bgpd_file), "-i", f"{run}/bgpd.pid", *both, "-S", "-l", settings.underlay],
            bgpd_file, lambda: self._answers("bgpd"), _PATH)
        if not begun and (lines := changes(self._peers(), settings.peers)):
            self.ask("bgpd", "configure terminal", f"router bgp {settings.autonomous_system}", *lines, "end")

    def _prepare(self) -> pwd.struct_passwd:
        if not (PROGRAMS / "bgpd").exists():
            raise SkysailError("FRR is not installed", "apt-get install frr")
        account = self._zebra.prepare()
        self._bgpd.prepare()
        self._folder.chmod(0o755)
        self._run.mkdir(exist_ok=True)
        self._run.chmod(0o700)
        os.chown(self._run, account.pw_uid, account.pw_gid)
        return account

    def _file(self, name: str, lasting: str, text: str, account: pwd.struct_passwd) -> Path:
        """The file with these settings. Named by what in them cannot be changed in a process that runs."""
        path = self._folder / name / f"{name}-{hashlib.sha256(lasting.encode()).hexdigest()[:16]}.conf"
        if not path.exists() or path.read_text() != text:
            for former in set(path.parent.glob(f"{name}-*.conf")) - {path}:
                former.unlink()
            durable.replace(path, text.encode(), 0o440, (0, account.pw_gid))
        return path

    def _peers(self) -> dict[str, str]:
        return {match[1]: match[2] for match in _NEIGHBOUR.finditer(self.ask("bgpd", "show running-config"))}

    def _answers(self, name: str) -> bool:
        with contextlib.suppress(SkysailError):
            return "FRRouting" in self.ask(name, "show version")
        return False

    def ask(self, name: str, *commands: str) -> str:
        """What ``zebra`` or ``bgpd`` answers to these commands, all in one session. Raises SkysailError when it does not, or
        refuses one."""
        said = ""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as vty:
                vty.settimeout(ANSWER_SECONDS)
                vty.connect(str(self._run / f"{name}.vty"))
                for command in ("enable", *commands):
                    vty.sendall(command.encode() + b"\0")
                    answer = b""
                    # Three zeros and the result end it.
                    while answer[-4:-1] != b"\0\0\0":
                        more = vty.recv(65536)
                        if not more:
                            raise SkysailError(f"{name} does not answer {command!r}")
                        answer += more
                    text = answer[:-4].decode(errors="replace")
                    if answer[-1] != 0:
                        raise SkysailError(f"{name} refuses {command!r}: {text.strip()[:200]}")
                    said += text
        except OSError as silent:
            raise SkysailError(f"{name} does not answer: {silent}", "see: sudo ./skysail doctor") from silent
        return said

    def sessions(self) -> dict[str, bool]:
        """The hosts and routers that bgpd speaks with, and whether it does. Raises SkysailError when it does not answer."""
        told = msgspec.json.decode(self.ask("bgpd", "show bgp neighbors json"))
        return {name: one.get("bgpState") == "Established" for name, one in told.items() if isinstance(one, dict)}

    def alive(self) -> bool:
        """Do both run?"""
        return self._zebra.alive() and self._bgpd.alive()

    def end(self) -> None:
        """None of ours runs, whoever started it."""
        self._wanted = None
        with self._working:
            self._told = None
            self._bgpd.end()
            self._zebra.end()
            self._ended = True


def problems() -> list[str]:
    """What keeps FRR from working here, each with its cure."""
    missing = [name for name in ("zebra", "bgpd") if not (PROGRAMS / name).exists()]
    return [f"FRR's {' and '.join(missing)} are not installed; cure: apt-get install frr"] if missing else []
