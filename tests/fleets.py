"""Further hosts of a test's cloud: real agents over folders of their own, known to the cloud by mutual TLS."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Executable, insert, select

import stores
from clouds import CACHE, Cloud, taken_slot
from skysail.hosts.authority import Authority
from skysail.hypervisor.accelerator import probe
from skysail.network.underlay import Underlay
from skysail.serve import membership
from skysail.serve.dev import UIDS
from skysail.serve.membership import Membership
from skysail.serve.up import end_guests
from skysail.store.schema import host_zones, hosts
from skysail.store.vault import Vault


def write(cloud: Cloud, *statements: Executable) -> None:
    with stores.transaction(cloud.config) as connection:
        for statement in statements:
            connection.execute(statement)


def row(cloud: Cloud, host: str) -> Any:
    """The row of a host."""
    with stores.transaction(cloud.config) as connection:
        return connection.execute(select(hosts).where(hosts.c.id == host)).one()


def authority(cloud: Cloud) -> Authority:
    with stores.transaction(cloud.config) as connection:
        return Authority.ensure(connection, Vault.at(cloud.config.master_key), time.time(), cloud.config.certificate_seconds)


def printed(cloud: Cloud, *words: str) -> subprocess.CompletedProcess[str]:
    """``skysail WORDS`` on this cloud, for people."""
    return subprocess.run([sys.executable, "-m", "skysail.cli.main", *words], capture_output=True, text=True,
                          env={**os.environ, "SKYSAIL_DATA": str(cloud.folder)}, check=False)


def told(cloud: Cloud, *words: str) -> Any:
    """What ``skysail WORDS --json`` says of this cloud."""
    done = printed(cloud, *words, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


class Machine(Cloud):
    """A machine that has joined a cloud as ``host``: of a :class:`Cloud` only the agent runs. ``identity`` and ``port`` are
    those by which its controller knows it, at the address ``at``."""

    def __init__(self, folder: Path, cloud: Cloud, host: str, settings: str = 'engines = "sim"\n',
                 at: str = "127.0.0.1") -> None:
        super().__init__(folder, settings)
        self.host, self.identity, self.at, self.agent_port = host, secrets.token_hex(16), at, free_port()
        own = membership.identity(self.config)
        by = authority(cloud)
        own.begin(self.identity, by.certify_host(self.identity, own.request(), time.time()), by.pem)
        membership.keep(self.config, Membership(host=host, address=at, port=self.agent_port))

    @property
    def address(self) -> str:
        return f"https://{self.identity}@{self.at}:{self.agent_port}"

    @property
    def certificate(self) -> Path:
        """Its certificate with its key."""
        return self.folder / "agent" / "identity" / "host.pem"


@contextlib.contextmanager
def machine(cloud: Cloud, host: str = "host-2", zones: Sequence[str] = ("a",), known: bool = True) -> Iterator[Machine]:
    """A simulated machine whose agent runs; with ``known`` it is a host of the cloud, serving these zones of us-east-1."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    made = Machine(folder, cloud, host)
    try:
        made.start("agent")
        if known:
            write(cloud, insert(hosts).values(id=host, address=made.address),
                  *(insert(host_zones).values(host_id=host, region="us-east-1", zone=zone) for zone in zones))
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Station(Machine):
    """A machine of its own as far as its network goes, with real guests: the ``number``-th of an underlay."""

    def __init__(self, folder: Path, cloud: Cloud, underlay: Underlay, number: int, uids: int, stock: Path,
                 more: str, templates: Path | None = None) -> None:
        super().__init__(folder, cloud, f"host-{number}", (
            f'engines = "real"\ndns = "sim"\nimages = "{stock}"\ntemplates = "{templates or folder / "templates"}"\n'
            f'namespace = "{underlay.name}-{number}g"\nlink = "{underlay.name}g"\nguest_uid_base = {uids}\n{more}'),
            at=underlay.address(number))
        # What QEMU does here was tried once: a busy machine keeps it waiting for longer than an agent waits.
        probe(CACHE / "accelerator.json")
        shutil.copy(CACHE / "accelerator.json", self.config.accelerator_file)
        self.entering = tuple(underlay.entering(number))
        self._cable = ["ip", "-n", f"{underlay.name}-net", "link", "set", f"p{number}"]

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Nobody reaches it, and it reaches nobody."""
        subprocess.run([*self._cable, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run([*self._cable, "up"], check=True)

    def remove(self) -> None:
        """Its guests are gone, and its network."""
        self.stop()
        end_guests(self.config)
        subprocess.run([*self.entering, sys.executable, "-c", (
            "import asyncio, sys; from skysail.kit.config import load; from skysail.network.linux import LinuxFabric; "
            "from skysail.network.plan import Layout; asyncio.run(LinuxFabric(Layout.of(load(sys.argv[1]))).teardown())"),
            str(self.folder)], check=True)


@contextlib.contextmanager
def stations(cloud: Cloud, count: int, stock: Path, more: str = "",
             around: Callable[[Underlay], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
             templates: Path | None = None) -> Iterator[list[Station]]:
    """Hosts of the cloud, whose agents run, in namespaces of a slot of this machine. They have the images in ``stock``, and
    the ``templates`` that are told, else their own; ``more`` is in their configuration, and ``around`` goes on as long as
    they do."""
    with taken_slot() as slot, contextlib.ExitStack() as stack:
        underlay = Underlay(f"skyu{slot}", f"100.115.{160 + slot}.0/24")
        underlay.ensure(count)
        made = list[Station]()
        try:
            stack.enter_context(around(underlay))
            for number in range(1, count + 1):
                folder = Path(tempfile.mkdtemp(prefix="sky"))
                folder.chmod(0o755)
                made.append(Station(folder, cloud, underlay, number, 20_000_000 + 1_000_000 * slot + number * UIDS, stock,
                                    more, templates))
                made[-1].start("agent")
                write(cloud, insert(hosts).values(id=made[-1].host, address=made[-1].address),
                      *(insert(host_zones).values(host_id=made[-1].host, region="us-east-1", zone=zone) for zone in "ab"))
            yield made
        finally:
            for one in made:
                with contextlib.suppress(subprocess.CalledProcessError):
                    one.remove()
                shutil.rmtree(one.folder, ignore_errors=True)
            stack.close()
            underlay.remove()
