"""Clouds of one's own beside whatever else runs on this machine: real controller and agent processes over a data folder
that is thrown away, boto3 as the customer. Tests and benchmarks start them.

A cloud of real guests takes a *slot* of the machine: a namespace, addresses and user ids that no other cloud here uses. Its
images and templates are kept in ``$SKYSAIL_TEST_CACHE`` (default /var/cache/skysail-tests) from run to run.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.config import Config as BotoConfig

import estates
import stores
from estates import SLOT_LOCKS
from skysail.hypervisor.process import PROGRAM
from skysail.images.build import build, fingerprint
from skysail.images.library import Library
from skysail.images.recipe import RECIPES
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.serve import agent, controller, endpoint
from skysail.serve.up import end_guests

CACHE = Path(os.environ.get("SKYSAIL_TEST_CACHE", "/var/cache/skysail-tests"))
SLOTS = 16
# How many times as long everything may take, on a machine that is busy with something else.
PATIENCE = float(os.environ.get("SKYSAIL_TEST_PATIENCE", "1"))


def eventually(seen: Callable[[], Any], seconds: float = 120.0, what: str = "") -> Any:
    """The first true answer of ``seen`` within ``seconds``, times ``SKYSAIL_TEST_PATIENCE``."""
    end = time.monotonic() + seconds * PATIENCE
    while True:
        answer = seen()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {seconds} s: {what or seen}")
        time.sleep(0.05)


class Cloud:
    """Controller and agent as child processes over one data folder, each started by the words ``entering``."""

    entering: tuple[str, ...] = ()

    def __init__(self, folder: Path, settings: str = 'engines = "sim"\n') -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # Where its rows are, as a line of its configuration.
        self.store = "" if "database =" in settings else stores.setting()
        estates.claim(folder)
        (folder / "skysail.toml").write_text(f'port = {self.port}\n{self.store}zones = ["a", "b"]\n{settings}')
        (folder / "run").mkdir()
        self.folder = folder
        self.config: Config = load(str(folder))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, before: str = "") -> None:
        """Start ``controller`` or ``agent`` and wait until it is healthy; Python's statements ``before`` run first in it."""
        credentials = self.folder / "credentials.json"
        if name == "controller" and not credentials.exists():
            controller.initialise(self.config)
            credentials.write_text(json.dumps(controller.admin_credentials(self.config)))
        with (self.folder / f"{name}.log").open("ab") as out:
            program = ["-c", f"{before}\nfrom skysail.serve.{name} import main\nmain()"] if before else [
                "-m", f"skysail.serve.{name}"]
            self.processes[name] = subprocess.Popen(
                [*self.entering, sys.executable, *program], env={**os.environ, "SKYSAIL_DATA": str(self.folder)},
                stdout=out, stderr=out)
        estates.note(self.folder, name, self.processes[name].pid)
        eventually(lambda: self._healthy(name), 120, f"{name} is healthy: {self.log(name)}")

    def _healthy(self, name: str) -> bool:
        assert self.processes[name].poll() is None, f"{name} ended: {self.log(name)}"
        try:
            if name == "controller":
                return httpx.get(f"{endpoint.url(self.config)}/healthz", verify=self.trust or True).status_code == 200
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.config.agent_socket))) as http:
                return http.get("http://agent/healthz").status_code == 200
        except (httpx.HTTPError, FileNotFoundError):  # its certificates are made at its first start
            return False

    @property
    def trust(self) -> ssl.SSLContext | None:
        """What verifies the endpoint, when it speaks TLS."""
        return ssl.create_default_context(cafile=self.config.certificates / "authority.pem") if self.config.secure else None

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text()[-3000:] if path.exists() else ""

    def credentials(self) -> tuple[str, str]:
        """The admin's access key id and secret."""
        held = json.loads((self.folder / "credentials.json").read_text())
        return held["access_key_id"], held["secret_access_key"]

    def client(self, key: str | None = None, secret: str | None = None, region: str = "us-east-1") -> Any:
        """boto3's unmodified Lightsail client, as the admin unless told otherwise."""
        admin = self.credentials()
        return boto3.client(
            "lightsail", region_name=region, endpoint_url=endpoint.url(self.config),
            aws_access_key_id=key or admin[0], aws_secret_access_key=secret or admin[1],
            verify=str(self.config.certificates / "authority.pem") if self.config.secure else None,
            config=BotoConfig(retries={"total_max_attempts": 1}))

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


class RealCloud(Cloud):
    """A cloud whose guests are QEMU processes. :meth:`remove` ends them and takes their network down."""

    def __init__(self, folder: Path, slot: int, more: str = "", dns: str = "sim") -> None:
        super().__init__(folder, real_settings(slot, dns) + more)

    def launch(self, *names: str, blueprint: str = "debian_12", bundle: str = "nano_3_0", region: str = "us-east-1",
               **more: Any) -> list[dict[str, Any]]:
        """Create instances, wait until all run, and return them in the order of ``names``."""
        client = self.client(region=region)
        eventually(lambda: blueprint in {found["blueprintId"] for found in client.get_blueprints()["blueprints"]}, 30,
                   f"{blueprint} is ready")
        operations = client.create_instances(
            instanceNames=list(names), availabilityZone=f"{region}a", blueprintId=blueprint, bundleId=bundle,
            **more)["operations"]
        for operation in operations:
            self.settled(operation["id"], 300, region)
        return [client.get_instance(instanceName=name)["instance"] for name in names]

    def settled(self, operation: str, seconds: float = 600, region: str = "us-east-1") -> None:
        """The operation ends well."""
        def ended() -> dict[str, Any] | None:
            found: dict[str, Any] = self.client(region=region).get_operation(operationId=operation)["operation"]
            return found if found["isTerminal"] else None
        found = eventually(ended, seconds, f"operation {operation} ends")
        assert found["status"] == "Succeeded", found

    def guest(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder of the guest that runs the instance, and the record in it."""
        document = json.loads((self.folder / "agent" / "document.json").read_text())
        (identifier,) = [guest["id"] for guest in document["guests"]
                         if guest["instance"] == name and guest["role"] != "gone"]
        folder = self.config.guests_dir / identifier
        return folder, json.loads((folder / "guest.json").read_text())

    def operator(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``skysail WORDS`` on this cloud."""
        return subprocess.run([sys.executable, "-m", "skysail.cli.main", *words], capture_output=True, text=True,
                              env={**os.environ, "SKYSAIL_DATA": str(self.folder)}, check=False)

    def delete(self, *names: str) -> None:
        """Delete instances; their guests go at once behind the answer."""
        for name in names:
            for operation in self.client().delete_instance(instanceName=name)["operations"]:
                self.settled(operation["id"])

    def ssh(self, name: str, command: str, seconds: float = 600, region: str = "us-east-1") -> str:
        """What ``command`` prints in the guest, logged in to by certificate; the login is tried for ``seconds``."""
        def tried() -> str | None:
            done = subprocess.run([sys.executable, "-m", "skysail.cli.main", "ssh", "--region", region, name, "--", command],
                                  env={**os.environ, "SKYSAIL_DATA": str(self.folder)}, capture_output=True, text=True,
                                  timeout=seconds)
            # 255 is ssh's own failure; anything else is the command's. An instance may not be back yet.
            if done.returncode == 255 or "only a running one can be logged in to" in done.stderr:
                return None
            assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
            return done.stdout or "\n"
        answer: str = eventually(tried, seconds, f"a login to {name}")
        return answer

    def remove(self) -> None:
        self.stop()
        end_guests(self.config)
        for listener in agent.ingress(self.config):
            asyncio.run(listener.end())
        asyncio.run(LinuxFabric(Layout.of(self.config)).teardown())


def real_settings(slot: int, dns: str = "sim") -> str:
    """The configuration of a cloud of real guests in ``slot``, beside others on this machine; tests that need a name server
    start one."""
    return (f'engines = "real"\ndns = "{dns}"\nnamespace = "skytest{slot}"\nlink = "skytest{slot}"\n'
            f'transit = "100.115.90.{4 * slot}/30"\n'
            f'private_network = "172.26.{16 * slot}.0/20"\npublic_pool = "100.115.{100 + slot}.0/24"\n'
            f'dns_port = {5310 + 2 * slot}\ndns_api_port = {5311 + 2 * slot}\n'
            f'public_ipv6 = "fd53:6b79:7361:{0x100 + slot:x}::/64"\n'
            f'guest_uid_base = {2_000_000 + 100_000 * slot}\nimages = "{CACHE}/images"\ntemplates = "{CACHE}/templates"\n')


@contextlib.contextmanager
def taken_slot() -> Iterator[int]:
    """A slot of this machine, for as long as the context lasts: two test runs at once never share one."""
    SLOT_LOCKS.mkdir(parents=True, exist_ok=True)
    for slot in range(SLOTS):
        with (SLOT_LOCKS / f"{slot}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield slot
            return
    raise AssertionError(f"all {SLOTS} slots for test clouds are taken")


def ensure_image(blueprint: str, progress: Callable[[str], None] = lambda step: None) -> str:
    """The digest of the blueprint's image in the library of the cache, built if this tree would build another one."""
    library = Library(CACHE / "images")
    library.directory.mkdir(parents=True, exist_ok=True)
    with (CACHE / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = library.latest(blueprint)
        if held is None or held.recipe != fingerprint(RECIPES[blueprint]):
            return build(RECIPES[blueprint], library, progress).digest
        return held.digest


def older_qemu() -> str:
    """The program of QEMU 7.2, beside the one that is installed: unpacked from the package of Debian 12, which a machine that
    has backports can still fetch. Raises SkysailError when it is not to be had."""
    folder = CACHE / "qemu-7.2"
    program = folder / PROGRAM
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "qemu.lock").open("w") as lock, tempfile.TemporaryDirectory() as work:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            subprocess.run(["apt-get", "download", "-q", "qemu-system-x86/bookworm", "qemu-system-common/bookworm"], cwd=work,
                           check=False, capture_output=True)
            for package in sorted(Path(work).glob("*.deb")):
                run(["dpkg-deb", "-x", str(package), str(folder)])
            modules, = folder.glob("usr/lib/*/qemu")
            program.write_text(f"#!/bin/sh\nQEMU_MODULE_DIR={modules} exec {folder}/usr/bin/{PROGRAM} "
                               "-L /usr/share/qemu -L /usr/share/seabios \"$@\"\n")
            program.chmod(0o755)
    if not program.exists():
        raise SkysailError("QEMU 7.2 cannot be fetched", "see: apt-cache policy qemu-system-x86")
    run([str(program), "--version"])
    return str(program)


@contextlib.contextmanager
def running_cloud(settings: str = "", before: str = "") -> Iterator[Cloud]:
    """Agent and controller over a simulated host: the real agent with engines that hold no guests. ``settings`` is TOML;
    ``before`` are Python's statements that run first in the controller."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    made = Cloud(folder, f'engines = "sim"\n{settings}')
    try:
        made.start("agent")
        made.start("controller", before)
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_real_cloud(progress: Callable[[str], None] = lambda step: None, more: str = "") -> Iterator[RealCloud]:
    """Agent and controller over real engines, removed with everything that they made; ``more`` goes to skysail.toml. Needs
    root."""
    ensure_image("debian_12", progress)
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    with taken_slot() as slot:
        made = RealCloud(folder, slot, more)
        try:
            made.start("agent")
            made.start("controller")
            yield made
        finally:
            made.remove()
            shutil.rmtree(folder, ignore_errors=True)
