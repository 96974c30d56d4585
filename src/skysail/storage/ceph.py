"""A Ceph cluster as its block device's own program shows it: one pool of it, or one namespace in that pool, is ours.

``rbd`` is run for each thing asked, and not librbd called: a cluster that is away keeps a call of the library waiting for as
long as it is away, and a program can be ended. What a guest's disk is, QEMU opens by itself (its driver ``rbd``).

The key of our client is in a keyring that only root reads. It is in no argument: ``rbd`` reads the file, and QEMU is given a
secret (see ``hypervisor/process.py``). Source: rbd(8); QEMU docs/system/qemu-block-drivers, "Ceph block devices"; QEMU QMP
Reference Manual, BlockdevOptionsRbd.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import msgspec

from skysail.kit.config import Config
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run, run_async

# The id of the secret in each QEMU that has disks in a cluster.
SECRET = "ceph"
# How long a cluster may take for one thing before it is said to be away; moving data takes longer.
ANSWER_SECONDS = 30.0
MOVE_SECONDS = 3600.0
# What rbd exits with (errno(3)).
ABSENT, EXISTS, BUSY, NOT_EMPTY, TIMED_OUT = 2, 17, 16, 39, 110
_NAME = re.compile(r"rbd:(?P<pool>[^/@:]+)/(?:(?P<namespace>[^/@:]+)/)?(?P<name>[^/@:]+)(?:@(?P<snapshot>[^/@:]+))?"
                   r":id=(?P<user>[^:]+):conf=(?P<conf>[^:]+)")
_KEY = re.compile(r"^\s*key\s*=\s*(\S+)\s*$", re.MULTILINE)
_AWAY = ("couldn't connect", "error connecting", "timed out", "did not finish within")


class Away(SkysailError):
    """The cluster does not answer."""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a pool, or a snapshot of it. As text it is what QEMU's programs take for a file's name."""

    pool: str
    name: str
    user: str
    conf: str
    namespace: str = ""
    snapshot: str = ""

    @classmethod
    def find(cls, file: str) -> Image | None:
        """The image that a file's name means; None for a file of this machine."""
        found = _NAME.fullmatch(file)
        return None if found is None else cls(**{key: value or "" for key, value in found.groupdict().items()})

    def __str__(self) -> str:
        return f"rbd:{self.spec}:id={self.user}:conf={self.conf}"

    @property
    def spec(self) -> str:
        """As rbd takes it."""
        place = f"{self.pool}/{self.namespace}" if self.namespace else self.pool
        return f"{place}/{self.name}" + (f"@{self.snapshot}" if self.snapshot else "")

    def node(self, name: str = "") -> dict[str, Any]:
        """How QEMU opens it, in the words of ``blockdev-add``, as the node ``name``. What it stands on is the cluster's own
        affair. A :func:`secret` goes with it."""
        named = {"node-name": name} if name else {}
        place = {"namespace": self.namespace} if self.namespace else {}
        return {"driver": "rbd", **named, "pool": self.pool, **place, "image": self.name, "conf": self.conf,
                "user": self.user, "key-secret": SECRET, "discard": "unmap"}


def secret(key: Path | str) -> str:
    """The argument of ``-object`` that has QEMU's programs read the client's key from a file."""
    return f"secret,id={SECRET},format=base64,file={key}"


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """One pool, or one ``namespace`` in it, as the client ``user`` (without ``client.``) sees it. ``conf`` says where the
    monitors are and may be read by everybody, ``keyring`` holds the client's key."""

    pool: str
    user: str
    conf: Path
    keyring: Path
    namespace: str = ""
    seconds: float = ANSWER_SECONDS

    @classmethod
    def of(cls, config: Config, seconds: float = ANSWER_SECONDS) -> Cluster:
        return cls(pool=config.ceph_pool, namespace=config.ceph_namespace, user=config.ceph_user, conf=Path(config.ceph_conf),
                   keyring=config.ceph_keyring_file, seconds=seconds)

    def image(self, name: str, snapshot: str = "") -> Image:
        return Image(pool=self.pool, namespace=self.namespace, name=name, snapshot=snapshot, user=self.user,
                     conf=str(self.conf))

    def file(self, name: str, snapshot: str = "") -> Path:
        """Its name among files."""
        return Path(str(self.image(name, snapshot)))

    def key(self) -> str:
        """The client's key, in base64; raises SkysailError when the keyring does not have it."""
        try:
            held = self.keyring.read_text()
        except OSError as unread:
            raise SkysailError(f"the keyring {self.keyring} cannot be read: {unread.strerror}",
                               "set ceph_keyring in skysail.toml to the file that holds the client's key") from unread
        _, named, mine = held.partition(f"[client.{self.user}]")
        found = _KEY.search(mine.partition("\n[")[0]) if named else None
        if found is None:
            raise SkysailError(f"the keyring {self.keyring} has no key of client.{self.user}",
                               f"write it there: ceph auth get client.{self.user}")
        return found[1]

    async def rbd(self, *words: str, seconds: float | None = None) -> bytes:
        """What ``rbd WORDS`` prints. Raises ProcessFailed with its exit code, which is an errno(3), and Away."""
        bound = seconds or self.seconds
        try:
            return await run_async(
                ["rbd", "--conf", str(self.conf), "--id", self.user, "--keyring", str(self.keyring),
                 f"--rados-mon-op-timeout={self.seconds:g}", f"--rados-osd-op-timeout={self.seconds:g}",
                 f"--client-mount-timeout={self.seconds:g}", "--rbd-default-clone-format=2", *words],
                timeout=2 * bound + 5)
        except ProcessFailed as failed:
            if failed.code == TIMED_OUT or any(word in failed.what for word in _AWAY):
                raise Away(f"the Ceph cluster of {self.conf} does not answer",
                           "look at it: ceph --status; disks wait until it is back, and lose nothing") from failed
            raise

    def home(self) -> str:
        """Which pool of which cluster this is, in the same words on every host that has its disks there. Blocks until the
        cluster has said so once; raises SkysailError when it does not."""
        fsid = _fsid(self.conf, self.user, self.keyring, self.seconds)
        return f"ceph:{fsid}/{self.pool}" + (f"/{self.namespace}" if self.namespace else "")

    def room_gib(self) -> int:
        """How much the pool can hold, replicas counted; raises SkysailError when the cluster does not say."""
        said = run(["ceph", "--conf", str(self.conf), "--id", self.user, "--keyring", str(self.keyring),
                    f"--connect-timeout={self.seconds:.0f}", "df", "--format", "json"], timeout=2 * self.seconds + 5)
        pools = {one["name"]: one["stats"] for one in msgspec.json.decode(said)["pools"]}
        held = pools.get(self.pool, {"stored": 0, "max_avail": 0})
        if not held["stored"] + held["max_avail"]:
            raise SkysailError(f"the cluster does not say how much room the pool {self.pool} has",
                               "its manager counts that: ceph mgr stat")
        return int(held["stored"] + held["max_avail"]) >> 30

    async def names(self) -> list[str]:
        """Every image there is."""
        place = f"{self.pool}/{self.namespace}" if self.namespace else self.pool
        found: list[str] = msgspec.json.decode(await self.rbd("ls", "--format", "json", place))
        return found

    async def exists(self, name: str, snapshot: str = "") -> bool:
        try:
            await self.rbd("info", self.image(name, snapshot).spec)
        except ProcessFailed as failed:
            if failed.code == ABSENT:
                return False
            raise
        return True


@functools.lru_cache
def _fsid(conf: Path, user: str, keyring: Path, seconds: float) -> str:
    """The cluster's own name, which it has for good."""
    return run(["ceph", "--conf", str(conf), "--id", user, "--keyring", str(keyring), f"--connect-timeout={seconds:.0f}",
                "fsid"], timeout=2 * seconds + 5).decode().strip()
