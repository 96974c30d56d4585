"""One public address for all: who comes in by name, by port and by the jump, shown with real packets on the stage."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncssh
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import stage as staged
from clouds import eventually, taken_slot
from skysail.agent.entrance import EntranceKeeper
from skysail.contract.document import (
    Entrance,
    FirewallRule,
    Guest,
    HostDocument,
    HostName,
    JumpAccount,
    Personality,
    Port,
    Volume,
)
from skysail.contract.report import EntranceReport
from skysail.ingress import Ingress
from skysail.ingress.jump import rights
from skysail.kit.config import Config
from skysail.network.plan import Layout
from skysail.serve import agent, up
from stage import Stage, socket_in

pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
              pytest.mark.skipif(not Path("/usr/sbin/haproxy").exists(), reason="HAProxy is not installed")]
ADDRESS = staged.MACHINE
ADA, BOB = 1, 2
SSHD = Path("/usr/sbin/sshd")
WEB = tuple(FirewallRule(protocol="tcp", from_port=number, to_port=number) for number in (22, 80, 443))


def guest(number: int, network: int, *rules: FirewallRule) -> Guest:
    port = Port(id=f"g-{number}", mac=f"52:54:00:00:00:{number:02x}", network=network, private_ipv4=f"172.26.0.{number}",
                public_ipv4=f"100.115.93.{number}", firewall=rules, ssh_port=22000 + number)
    return Guest(id=port.id, instance=f"web-{number}", role="run", starts=1, reboots=0, vcpus=1, memory_mib=512,
                 volume=Volume(id=port.id, image="", size_gib=1), port=port, personality=Personality(hostname="h", user="u"))


GUESTS = (guest(10, ADA, *WEB), guest(11, BOB, *WEB))
NAMES = (HostName(name="ten.example.com", guest="g-10"), HostName(name="eleven.example.com", guest="g-11"),
         HostName(name="*.wild.example.com", guest="g-11"))


def certificate(folder: Path) -> Path:
    """A key and a certificate of its own, in one file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "guest")])
    now = datetime.datetime.now(datetime.UTC)
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
            .sign(key, hashes.SHA256()))
    path = folder / "guest.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return path


class Place:
    """A stage whose machine has one address for all, its guests with a web server each, and its listeners."""

    def __init__(self, slot: int, folder: Path) -> None:
        self.folder = folder
        self.config = Config(data=str(folder), namespace=f"skystage{slot}", single_address=ADDRESS, public_ipv6="")
        up.ensure_user(self.config)
        self.stage = Stage(f"skystage{slot}", Layout.of(self.config))
        with self.stage.stranger.netlink() as ipr:
            ipr.route("add", dst="198.51.100.0/24", gateway="203.0.113.1")
        self.listeners: list[Ingress] = []
        self.guests: dict[str, Guest] = {}
        self.entrance = Entrance()
        self._ended: list[socket.socket] = []

    def begin(self) -> None:
        pem = certificate(self.folder)
        self.stage.apply(*(one.port for one in GUESTS))
        self.listeners = list(agent.ingress(self.config))
        for one in GUESTS:
            place = self.stage.guest(one.port)
            for number in (80, 443):
                self._serve(place, one.instance, number, pem)

    def _serve(self, place: staged.Guest, name: str, number: int, pem: Path) -> None:
        """Answers each request with its name and what it was asked, line by line; connections stay open."""
        listener = socket_in(place.namespace, socket.AF_INET, socket.SOCK_STREAM)
        listener.bind(("0.0.0.0", number))
        listener.listen()
        self._ended.append(listener)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)

        def one(client: socket.socket) -> None:
            with contextlib.suppress(OSError), client:
                spoken = context.wrap_socket(client, server_side=True) if number == 443 else client
                with spoken, spoken.makefile("rb") as lines:
                    asked = b""
                    for line in lines:
                        asked += line
                        if line == b"\r\n":
                            body = name.encode() + b"\n" + asked
                            spoken.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                            asked = b""

        def every() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=every, daemon=True).start()

    def apply(self, names: tuple[HostName, ...] = NAMES, guests: tuple[Guest, ...] = GUESTS,
              accounts: tuple[JumpAccount, ...] = ()) -> None:
        self.stage.apply(*(one.port for one in guests))
        self.entrance, self.guests = Entrance(names=names, accounts=accounts), {one.id: one for one in guests}
        for listener in self.listeners:
            asyncio.run(listener.apply(self.entrance, self.guests))

    def remove(self) -> None:
        for listener in self._ended:
            listener.close()
        for one in self.listeners:
            asyncio.run(one.end())
        self.stage.remove()


class Visitor:
    """Somebody with one connection to the shared address; ``asks`` again on the same one."""

    def __init__(self, place: staged.Place, port: int, name: str = "") -> None:
        plain = place.connects(ADDRESS, port)
        self._connection = plain
        if port == 443:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._connection = context.wrap_socket(plain, server_hostname=name)

    def asks(self, host: str, *headers: str) -> str:
        lines = "".join(f"{header}\r\n" for header in (f"Host: {host}", *headers))
        self._connection.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
        text, length = "", 0
        with self._connection.makefile("rb", buffering=0) as answer:
            while (line := answer.readline().decode()) not in ("", "\r\n"):
                text += line
                if line.lower().startswith("content-length:"):
                    length = int(line.split()[1])
            while length > 0 and (more := answer.read(length)):
                text += more.decode()
                length -= len(more)
        return text

    def leave(self) -> None:
        self._connection.close()


def ask(place: staged.Place, host: str, *headers: str) -> str:
    """The answer to one request on port 80."""
    visitor = Visitor(place, 80)
    try:
        return visitor.asks(host, *headers)
    finally:
        visitor.leave()


def ask_tls(place: staged.Place, name: str) -> str:
    """The answer to one request on port 443; empty when the connection is refused."""
    try:
        visitor = Visitor(place, 443, name)
    except (OSError, ssl.SSLError):
        return ""
    try:
        return visitor.asks(name)
    finally:
        visitor.leave()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("single")
    for above in (folder, *folder.parents[:-1]):
        above.chmod(above.stat().st_mode | 0o055)  # the listeners' users read their settings there
    with taken_slot() as slot:
        made = Place(slot, folder)
        try:
            made.begin()
            yield made
        finally:
            made.remove()


def pid_of(place: Place, word: str) -> int:
    """The one process of this place whose command line has ``word`` below its folder."""
    mark, found = f"{place.config.ingress_dir}/{word}".encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended
            if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    assert len(found) == 1, found
    return found[0]


def test_a_guest_is_reached_by_its_name(place: Place) -> None:
    place.apply()
    world, stranger = place.stage.world, place.stage.stranger
    for client, address in ((world, staged.WORLD), (stranger, staged.STRANGER)):
        assert "web-10\n" in ask(client, "ten.example.com")
        told = ask(client, "Eleven.Example.com.:80", "X-Forwarded-For: 9.9.9.9").lower()
        assert "web-11\n" in told and f"x-forwarded-for: {address}\r\n" in told and "9.9.9.9" not in told
        assert "web-10\n" in ask_tls(client, "ten.example.com") and "web-11\n" in ask_tls(client, "eleven.example.com")
    assert "web-11\n" in ask(world, "any.wild.example.com") and "web-11\n" in ask_tls(world, "any.wild.example.com")
    assert "web-10\n" in ask(place.stage.machine, "ten.example.com"), "the machine itself, too"


def test_a_name_that_nobody_has_is_told_so(place: Place) -> None:
    place.apply()
    for host in ("nobody.example.com", "wild.example.com", "a.b.wild.example.com", ADDRESS, ""):
        assert ask(place.stage.world, host).startswith("HTTP/1.1 421 "), host
    assert ask_tls(place.stage.world, "nobody.example.com") == ""
    with place.stage.world.connects(ADDRESS, 443) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: ten.example.com\r\n\r\n")
        assert plain.recv(100) == b"", "what is not TLS is closed"


def test_a_closed_firewall_stays_closed(place: Place) -> None:
    only_world = f"{staged.WORLD}/32"
    tight = guest(10, ADA, FirewallRule(protocol="tcp", from_port=1, to_port=100, cidrs=(only_world,)))
    place.apply(guests=(tight, GUESTS[1]))
    world, stranger = place.stage.world, place.stage.stranger
    assert "web-10\n" in ask(world, "ten.example.com")
    assert ask(stranger, "ten.example.com").startswith("HTTP/1.1 421 "), "not from there"
    assert ask_tls(world, "ten.example.com") == "", "443 is closed"
    assert "web-11\n" in ask(stranger, "eleven.example.com")
    place.apply(guests=(guest(10, ADA), GUESTS[1]))
    assert ask(world, "ten.example.com").startswith("HTTP/1.1 421 ")
    with place.stage.guests[0].serves("0.0.0.0", 22):
        assert world.cut_off(ADDRESS, 22010), "nor is SSH open"
        place.apply(guests=(tight, GUESTS[1]))
        assert world.reaches(ADDRESS, 22010) == staged.WORLD, "a login comes from where it came from"
        assert stranger.cut_off(ADDRESS, 22010)


def test_a_listener_reaches_nothing_else_of_a_guest(place: Place) -> None:
    """Also one that was taken over gets no further than to what the guests' firewalls open."""
    place.apply(guests=(guest(10, ADA, WEB[1]), GUESTS[1]))
    config = place.config

    def connects(user: str, port: int) -> bool:
        argv = ["ip", "netns", "exec", config.namespace, "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups",
                "timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/172.26.0.10/{port}"]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    with place.stage.guests[0].serves("0.0.0.0", 22), place.stage.guests[0].serves("0.0.0.0", 5432):
        for user in (config.ingress_user, config.jump_user):
            assert connects(user, 80)
            assert not connects(user, 22) and not connects(user, 443) and not connects(user, 5432)


def test_changes_act_at_once_and_break_nothing(place: Place) -> None:
    place.apply()
    kept, tls = Visitor(place.stage.world, 80), Visitor(place.stage.world, 443, "ten.example.com")
    assert "web-10\n" in kept.asks("ten.example.com") and "web-10\n" in tls.asks("ten.example.com")
    before = pid_of(place, "haproxy/haproxy-")
    for number in range(5):
        name = f"site-{number}.example.com"
        place.apply((*NAMES, HostName(name=name, guest=f"g-{10 + number % 2}")))
        assert f"web-{10 + number % 2}\n" in ask(place.stage.world, name)
        assert "web-10\n" in kept.asks("ten.example.com") and "web-10\n" in tls.asks("ten.example.com")
    place.apply((HostName(name="ten.example.com", guest="g-11"),))
    assert "web-11\n" in ask(place.stage.world, "ten.example.com")
    assert "web-10\n" in tls.asks("ten.example.com"), "what is open stays where it is"
    assert ask(place.stage.world, "site-1.example.com").startswith("HTTP/1.1 421 ")
    assert pid_of(place, "haproxy/haproxy-") == before
    kept.leave()
    tls.leave()


def test_many_names(place: Place) -> None:
    """More than fit one command of the runtime API."""
    place.apply((*NAMES, *(HostName(name=f"{'x' * 50}-{number}.example.com", guest=f"g-{10 + number % 2}")
                           for number in range(1000))))
    for number in (0, 499, 999):
        assert f"web-{10 + number % 2}\n" in ask(place.stage.world, f"{'x' * 50}-{number}.example.com")
    assert len(asyncio.run(place.listeners[0].observe())) == 1003
    place.apply()
    assert len(asyncio.run(place.listeners[0].observe())) == 3


def test_one_that_was_killed_comes_back_with_all(place: Place) -> None:
    place.apply()
    for listener, word in zip(place.listeners, ("haproxy/haproxy-", "jump/jump-"), strict=True):
        former = pid_of(place, word)
        os.kill(former, signal.SIGKILL)
        eventually(lambda listener=listener: not listener.alive(), 10)
        asyncio.run(listener.apply(place.entrance, place.guests))
        assert listener.alive() and pid_of(place, word) != former
    assert "web-10\n" in ask(place.stage.world, "ten.example.com")


def test_the_agent_starts_again_what_died_and_ends_what_is_not_wanted(place: Place) -> None:
    async def nothing() -> None:
        pass

    async def scene() -> None:
        keeper = EntranceKeeper(place.listeners, nothing, nothing)
        document = HostDocument(host="h", generation=1, guests=GUESTS, entrance=Entrance(names=NAMES))
        keeper.take(document)
        work = asyncio.create_task(keeper.run())

        async def until(true: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not true():
                    await asyncio.sleep(0.02)

        await until(lambda: keeper.report() == EntranceReport(state="served"))
        assert set(await keeper.inventory()) == {one.name for one in NAMES}
        former = pid_of(place, "haproxy/haproxy-")
        os.kill(former, signal.SIGKILL)
        await until(lambda: not place.listeners[0].alive())
        async with asyncio.timeout(30):
            while not await keeper.inventory():
                await asyncio.sleep(0.02)
        assert pid_of(place, "haproxy/haproxy-") != former
        assert "web-10\n" in await asyncio.to_thread(ask, place.stage.world, "ten.example.com")
        keeper.take(msgspec.structs.replace(document, entrance=None))
        await until(lambda: not any(one.alive() for one in place.listeners))
        assert keeper.report() is None
        work.cancel()

    asyncio.run(scene())


def test_another_agent_finds_them_again(place: Place) -> None:
    place.apply()
    before = [pid_of(place, word) for word in ("haproxy/haproxy-", "jump/jump-")]
    place.listeners = list(agent.ingress(place.config))
    place.apply((HostName(name="new.example.com", guest="g-11"),))
    assert [pid_of(place, word) for word in ("haproxy/haproxy-", "jump/jump-")] == before
    assert "web-11\n" in ask(place.stage.world, "new.example.com"), "it is told what changed meanwhile"
    status = [line for pid in before for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    assert {line.split()[1] for line in status if line.startswith(("CapEff", "CapBnd", "CapPrm"))} == {"0" * 16}
    assert not [line for line in status if line.startswith("Uid:") and "\t0" in line]


def test_guests_reach_each_other_by_the_shared_address(place: Place) -> None:
    place.apply()
    assert "web-11\n" in ask(place.stage.guests[0], "eleven.example.com")
    assert "web-10\n" in ask_tls(place.stage.guests[0], "ten.example.com"), "itself, too"
    with place.stage.machine.serves("0.0.0.0", 8700):
        assert place.stage.guests[0].cut_off(ADDRESS, 8700), "and nothing else of the machine"


def test_rights_are_an_accounts_own() -> None:
    twice = msgspec.structs.replace(guest(12, 3, *WEB), instance="WEB-10")
    made = rights(Entrance(names=NAMES, accounts=(JumpAccount(networks=(ADA, 3), keys=("k",)), JumpAccount(
        networks=(BOB,), keys=()))), {one.id: one for one in (*GUESTS, twice)})
    assert [set(one.doors) for one in made] == [
        {"ten.example.com", "172.26.0.10", "100.115.93.10", "172.26.0.12", "100.115.93.12"},
        {"web-11", "eleven.example.com", "*.wild.example.com", "172.26.0.11", "100.115.93.11"}]
    assert made[0].doors["172.26.0.12"].sources == ("0.0.0.0/0",)


@contextlib.contextmanager
def sshd(place: Place, which: staged.Guest, key: Path) -> Iterator[None]:
    """OpenSSH's server in a guest, which lets the key's holder in as root."""
    folder = place.folder / f"sshd-{which.namespace}"
    folder.mkdir(exist_ok=True)
    (folder / "host_key").unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)
    shutil.copy(key.with_suffix(".pub"), folder / "authorized_keys")
    (folder / "config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        f"PermitRootLogin prohibit-password\nPidFile none\nListenAddress 0.0.0.0\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen(["nsenter", f"--net=/run/netns/{which.namespace}", SSHD, "-D", "-e", "-f", folder / "config"],
                               stderr=(folder / "log").open("ab"))
    try:
        eventually(lambda: which.reaches("127.0.0.1", 22), 20, "sshd listens")
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(not SSHD.exists(), reason="no sshd here: apt-get install openssh-server")
def test_ssh_by_port_and_by_the_jump(place: Place) -> None:
    keys = {}
    for name in ("ada", "bob"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        keys[name] = place.folder / name
        key.write_private_key(str(keys[name]))
        keys[name].chmod(0o600)
        key.write_public_key(str(keys[name].with_suffix(".pub")))
    accounts = tuple(JumpAccount(networks=(network,), keys=(keys[name].with_suffix(".pub").read_text().strip(),))
                     for network, name in ((ADA, "ada"), (BOB, "bob")))
    place.apply(accounts=accounts)

    def ssh(client: staged.Place, key: str, *words: str, jump: bool = False) -> str:
        options = ["-F", "none", "-i", str(keys[key])]
        for option in ("IdentitiesOnly=yes", "IdentityAgent=none", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null",
                       "ConnectTimeout=10", "BatchMode=yes"):
            options += ["-o", option]
        through = ["-o", f"ProxyCommand=ssh {' '.join(options)} -p 2222 -W %h:%p jump@{ADDRESS}"] if jump else []
        done = subprocess.run(["nsenter", f"--net=/run/netns/{client.namespace}", "ssh", *options, *through, *words],
                              capture_output=True, text=True, check=False, timeout=60)
        return done.stdout.strip()

    stage = place.stage
    net = ["readlink", "/proc/self/ns/net"]

    def network(which: staged.Guest) -> str:
        return subprocess.run(["nsenter", f"--net=/run/netns/{which.namespace}", *net], capture_output=True, text=True,
                              check=True).stdout.strip()

    first, second = stage.guests[:2]
    with sshd(place, first, keys["ada"]), sshd(place, second, keys["bob"]):
        assert ssh(stage.world, "ada", "-p", "22010", f"root@{ADDRESS}", *net) == network(first)
        assert ssh(stage.stranger, "bob", "-p", "22011", f"root@{ADDRESS}", *net) == network(second)
        for target in ("web-10", "ten.example.com", "172.26.0.10", "100.115.93.10"):
            assert ssh(stage.world, "ada", f"root@{target}", *net, jump=True) == network(first), target
        assert ssh(stage.world, "bob", "root@web-11", *net, jump=True) == network(second)
        # Neither to another account's instance, nor to the jump itself, nor to what is no instance.
        assert ssh(stage.world, "ada", "root@web-11", *net, jump=True) == ""
        assert ssh(stage.world, "ada", "root@172.26.0.11", *net, jump=True) == ""
        assert ssh(stage.world, "ada", "root@127.0.0.1", *net, jump=True) == ""
        assert ssh(stage.world, "ada", "-p", "2222", f"jump@{ADDRESS}", *net) == "", "there is no shell"
        assert ssh(stage.world, "ada", "-p", "80", "root@web-10", *net, jump=True) == "", "nor another port"
        # What the firewall closes is closed by the jump, too, and a key that is taken away opens nothing more.
        tight = guest(10, ADA, FirewallRule(protocol="tcp", from_port=22, to_port=22, cidrs=(f"{staged.WORLD}/32",)))
        place.apply(guests=(tight, GUESTS[1]), accounts=accounts)
        assert ssh(stage.world, "ada", "root@web-10", *net, jump=True) == network(first)
        assert ssh(stage.stranger, "ada", "root@web-10", *net, jump=True) == ""
        place.apply(accounts=(msgspec.structs.replace(accounts[0], keys=()), accounts[1]))
        assert ssh(stage.world, "ada", "root@web-10", *net, jump=True) == ""
