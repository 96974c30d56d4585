"""A tiny Ceph cluster for tests: one monitor, one manager, one OSD, each a child process on the loopback address.

What it holds is in one folder: configuration, keyrings, logs, and the OSD's store (memory, unless told otherwise). Only what
the Debian packages ceph-mon, ceph-mgr, ceph-osd and ceph-common bring is used, and nothing of the machine's own /etc/ceph.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import estates
from clouds import eventually
from name_servers import free_port
from skysail.storage.ceph import Cluster

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "monmaptool", "ceph-authtool")
POOL = "disks"
USER = "skysail"
# Of this machine's memory, which others need, too.
OSD_MEMORY_BYTES = 1 << 30


def missing() -> str:
    """Why there can be no cluster here; '' when there can."""
    lacking = [program for program in PROGRAMS if shutil.which(program) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (apt-get install ceph-mon ceph-mgr ceph-osd ceph-common)"
    said = subprocess.run(["qemu-img", "--help"], capture_output=True, text=True, check=False).stdout
    if "rbd" not in said.partition("formats:")[2].split():
        return "QEMU has no driver for RBD (apt-get install qemu-block-extra)"
    return ""


class CephCluster:
    """A running cluster in ``folder``. ``store`` is ``memstore``, or ``bluestore`` in a file of ``store_gib``."""

    def __init__(self, folder: Path, store: str = "memstore", store_gib: int = 6) -> None:
        self.folder = folder
        self.conf = folder / "ceph.conf"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._fsid = str(uuid.uuid4())
        self._port = free_port()
        self._numbers = itertools.count()
        estates.claim(folder)
        for name in ("mon", "mgr", "osd", "run"):
            (folder / name).mkdir()
        self.conf.write_text(f"""[global]
fsid = {self._fsid}
mon host = [v2:127.0.0.1:{self._port}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
log file =
admin socket = {folder}/run/$name.$pid.asok
pid file =
run dir = {folder}/run
crash dir = {folder}/run
[client]
admin socket =
[mon]
mon data = {folder}/mon
mon data avail warn = 1
mon data avail crit = 1
keyring = {folder}/mon/keyring
[mgr]
mgr data = {folder}/mgr
keyring = {folder}/mgr/keyring
mgr module path = /usr/share/ceph/mgr
mgr initial modules =
[osd]
osd data = {folder}/osd
keyring = {folder}/osd/keyring
osd objectstore = {store}
osd memory target = {OSD_MEMORY_BYTES}
memstore device bytes = {store_gib << 30}
bluestore block size = {store_gib << 30}
osd op num shards = 2
osd max backfills = 1
""")

    def admin(self, *words: str, program: str = "ceph") -> str:
        """What ``ceph WORDS`` prints, as its administrator."""
        done = subprocess.run([program, "--conf", str(self.conf), "--name", "client.admin", "--keyring",
                               str(self.folder / "admin.keyring"), *words], capture_output=True, text=True, check=False,
                              timeout=300)
        assert done.returncode == 0, f"{program} {' '.join(words)}: exit {done.returncode}\n{done.stderr}"
        return done.stdout

    def make(self) -> None:
        """Its keys, its maps and its empty stores."""
        mon, admin = self.folder / "mon" / "keyring", self.folder / "admin.keyring"
        _run("ceph-authtool", str(admin), "--create-keyring", "--gen-key", "-n", "client.admin", "--cap", "mon", "allow *",
             "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        first = self.folder / "first.keyring"
        _run("ceph-authtool", str(first), "--create-keyring", "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        _run("ceph-authtool", str(first), "--import-keyring", str(admin))
        monmap = self.folder / "monmap"
        _run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", f"[v2:127.0.0.1:{self._port}/0]", str(monmap))
        _run("ceph-mon", "--conf", str(self.conf), "--mkfs", "-i", "a", "--monmap", str(monmap), "--keyring", str(first))
        mon.chmod(0o600)
        self.start("mon")
        key = _run("ceph-authtool", "--gen-print-key").strip()
        identifier = str(uuid.uuid4())
        secrets = self.folder / "osd.json"
        secrets.write_text(f'{{"cephx_secret": "{key}"}}')
        assert self.admin("osd", "new", identifier, "-i", str(secrets)).strip() == "0"
        _run("ceph-authtool", str(self.folder / "osd" / "keyring"), "--create-keyring", "-n", "osd.0", "--add-key", key)
        _run("ceph-osd", "--conf", str(self.conf), "-i", "0", "--mkfs", "--osd-uuid", identifier)
        self.admin("auth", "get-or-create", "mgr.x", "mon", "allow profile mgr", "osd", "allow *", "mds", "allow *", "-o",
                   str(self.folder / "mgr" / "keyring"))
        self.start("osd")
        self.start("mgr")
        self.admin("osd", "pool", "create", POOL, "8")
        self.admin("pool", "init", POOL, program="rbd")

    def start(self, name: str) -> None:
        """Start ``mon``, ``mgr`` or ``osd``."""
        identity = {"mon": "a", "mgr": "x", "osd": "0"}[name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [f"ceph-{name}", "--conf", str(self.conf), "-i", identity, "-f", "--log-to-stderr=true",
                 "--err-to-stderr=true"], stdout=log, stderr=log, cwd=self.folder)
        estates.note(self.folder, name, self.processes[name].pid)

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def stop(self) -> None:
        for name in ("mgr", "osd", "mon"):
            process = self.processes.get(name)
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()

    def client(self, user: str = USER, bound: str = f"pool={POOL}", namespace: str = "", seconds: float = 60.0) -> Cluster:
        """The cluster as a host of ours sees it, whose client has no more rights than its pool asks for."""
        keyring = self.folder / f"client.{user}.keyring"
        if not keyring.exists():
            self.admin("auth", "get-or-create", f"client.{user}", "mon", "profile rbd", "osd", f"profile rbd {bound}",
                       "-o", str(keyring))
            keyring.chmod(0o600)
        return Cluster(pool=POOL, namespace=namespace, user=user, conf=self.conf, keyring=keyring, seconds=seconds)

    def namespace(self) -> Cluster:
        """A part of the pool that nobody has used."""
        name = f"cloud-{next(self._numbers)}"
        self.admin("namespace", "create", f"{POOL}/{name}", program="rbd")
        return self.client(namespace=name)


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def running_cluster(store: str = "memstore") -> Iterator[CephCluster]:
    """A cluster that answers, removed with everything in it."""
    folder = Path(tempfile.mkdtemp(prefix="skyceph"))
    folder.chmod(0o755)
    made = CephCluster(folder, store)
    try:
        began = time.monotonic()
        made.make()
        eventually(lambda: made.client().image("x") and True, 1)
        print(f"cluster up after {time.monotonic() - began:.1f} s, pid {os.getpid()}")
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
