"""What only a Ceph cluster shows of the storage door's engine: a real one, with its store in memory. See test_door_pool.py
for what every engine promises, and test_ceph_guests.py for QEMU."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ceph_clusters import POOL, CephCluster
from name_servers import free_port
from skysail import doctor
from skysail.contract.document import Origin, Volume
from skysail.kit.config import Config
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run
from skysail.storage import Copy, Manifest, ceph, chains, rbd, rbd_shelf
from skysail.storage.ceph import Away, Cluster
from skysail.storage.rbd import RbdPool
from skysail.storage.rbd_shelf import RbdShelf
from skysail.storage.shelf import FileShelf

GIB = 1 << 30
DISK = Volume(id="d-1", image="", size_gib=1)
ORIGIN = Origin(snapshot="s-1", volume="d-1")


class Store:
    """A namespace of the cluster, and both engines over it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.pool = RbdPool(cluster, folder, os.getuid())
        self.shelf = RbdShelf(cluster, folder, os.getuid())
        self._key = folder / "key"
        self._key.write_text(cluster.key())

    def ensure(self, volume: Volume, parent: Path | None = None, size_bytes: int = GIB) -> Path:
        return asyncio.run(self.pool.ensure(volume, parent, size_bytes, os.getuid()))

    def names(self) -> list[str]:
        return sorted(asyncio.run(self.cluster.names()))

    def ask(self, *words: str) -> Any:
        return json.loads(asyncio.run(self.cluster.rbd(*words, "--format", "json")))

    def pattern(self, file: Path | str, byte: int, at: str = "1M", *, write: bool = False) -> None:
        """Write, or else find, 64 KiB of ``byte`` in an image that nobody has open."""
        image = ceph.Image.find(str(file))
        assert image is not None
        node = {key: value for key, value in image.node("").items() if key != "node-name"}
        said = run(["qemu-io", *(["--read-only"] if not write else []), "--object",
                    f"secret,id={ceph.SECRET},format=base64,file={self._key}", "-c",
                    f"{'write' if write else 'read'} -P {byte:#x} {at} 64k", f"json:{json.dumps(node)}"]).decode()
        assert "Pattern verification failed" not in said, said

    def take(self, name: str, *volumes: str) -> Manifest:
        copies = tuple(Copy(volume=volume, file=f"{volume}.qcow2", parents=(), virtual_bytes=GIB) for volume in volumes)

        async def both() -> Manifest:
            await self.shelf.draft(name, copies, os.getuid())
            held = Manifest(id=name, consistency="off", copies=copies)
            await self.shelf.mark(held)
            return await self.shelf.finish(held, os.getuid())
        return asyncio.run(both())

    def chain(self, origin: Origin) -> Path:
        return Path(asyncio.run(self.shelf.chain(origin))[0])


@pytest.fixture
def store(ceph: CephCluster, tmp_path: Path) -> Store:
    return Store(ceph.namespace(), tmp_path)


def qcow2(path: Path, byte: int, parent: Path | None = None) -> Path:
    over = ["-F", "qcow2", "-b", str(parent)] if parent else []
    run(["qemu-img", "create", "-q", "-f", "qcow2", *over, str(path), "64M"])
    run(["qemu-io", "-f", "qcow2", "-c", f"write -P {byte:#x} {byte}M 64k", str(path)])
    return path


def test_hosts_write_a_file_into_the_pool_once(store: Store, tmp_path: Path) -> None:
    image = qcow2(tmp_path / "image.qcow2", 1)
    template = qcow2(tmp_path / "template.qcow2", 2, image)
    one, two = Volume(id="g-1", image="0" * 64, size_gib=1), Volume(id="g-2", image="0" * 64, size_gib=1)
    first = store.ensure(one, template)
    for byte in (1, 2):
        store.pattern(first, byte, f"{byte}M")
    store.pattern(first, 9, "1M", write=True)
    again = RbdPool(store.cluster, tmp_path, os.getuid())  # another host's, or this one's after a restart
    second = asyncio.run(again.ensure(two, template, GIB, os.getuid()))
    store.pattern(second, 1, "1M")
    (base,) = [name for name in store.names() if name.startswith("_")]
    assert store.ask("info", store.cluster.image("g-2").spec)["size"] == GIB
    assert store.ask("info", store.cluster.image("g-2").spec)["parent"]["image"] == base
    (held,) = store.ask("snap", "ls", store.cluster.image(base).spec)
    assert (held["name"], held["protected"]) == (rbd.WHOLE, "true")
    for volume in ("g-1", "g-2"):
        asyncio.run(store.pool.remove(volume))
    assert store.names() == [base]
    with pytest.raises(SkysailError):
        store.ensure(one, tmp_path / "nowhere.qcow2")
    assert store.names() == [base]


def test_what_a_killed_process_left_is_not_a_volume(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = qcow2(tmp_path / "image.qcow2", 3)

    def cut_off(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt
    for effect in ("_grow", "rename"):
        with monkeypatch.context() as patched:
            patched.setattr(rbd, effect, cut_off)
            with pytest.raises(KeyboardInterrupt):
                store.ensure(DISK, image)
        assert asyncio.run(store.pool.observe()) == {}
    store.pattern(store.ensure(DISK, image), 3, "3M")
    assert [name for name in store.names() if name.startswith("_new.")] == []


def test_a_snapshot_goes_on_without_its_volume_and_a_volume_without_its_snapshot(store: Store) -> None:
    path = store.ensure(DISK)
    store.pattern(path, 1, write=True)
    made = store.take("s-1", "d-1")
    assert "s-1.d-1" in store.names() and made == asyncio.run(store.shelf.find("s-1"))
    store.pattern(path, 2, write=True)
    asyncio.run(store.pool.remove("d-1"))
    store.pattern(store.chain(ORIGIN), 1)
    child = Volume(id="d-2", image="", size_gib=2, origin=ORIGIN)
    grown = store.ensure(child, store.chain(ORIGIN), 2 * GIB)
    store.pattern(grown, 1)
    store.pattern(grown, 3, "1500M", write=True)
    asyncio.run(store.shelf.remove("s-1"))
    assert asyncio.run(store.shelf.observe()) == [] and asyncio.run(store.shelf.parents(child)) == ()
    with pytest.raises(SkysailError):
        store.chain(ORIGIN)
    store.pattern(grown, 1)
    store.pattern(grown, 3, "1500M")
    asyncio.run(store.pool.remove("d-2"))
    assert store.names() == [rbd_shelf.INDEX]
    assert store.ask("trash", "ls", f"{POOL}/{store.cluster.namespace}") == [], "nothing is kept that nobody needs"


def test_all_disks_of_a_snapshot_or_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("d-1", "d-2"), 1):
        store.pattern(store.ensure(Volume(id=name, image="", size_gib=1)), number, write=True)

    def cut_off(*_args: object, **_more: object) -> None:
        raise KeyboardInterrupt
    for owner, effect in ((rbd_shelf, "keep"), (rbd, "rename"), (RbdShelf, "_unmark"), (RbdShelf, "_note"),
                          (RbdShelf, "_forget")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, effect, cut_off)
            with pytest.raises(KeyboardInterrupt):
                store.take("s-1", "d-1", "d-2")
        assert asyncio.run(store.shelf.observe()) == (["s-1"] if effect == "_forget" else [])
    # What was cut off is gone on with, of the moment that it was of.
    held = Manifest(id="s-2", consistency="off", copies=tuple(
        Copy(volume=name, file="", parents=(), virtual_bytes=GIB) for name in ("d-1", "d-2")))
    asyncio.run(store.shelf.draft("s-2", held.copies, os.getuid()))
    asyncio.run(store.shelf.mark(held))
    with monkeypatch.context() as patched:
        patched.setattr(RbdShelf, "_note", cut_off)
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(store.shelf.finish(held, os.getuid()))
    for number, name in enumerate(("d-1", "d-2"), 3):
        store.pattern(store.cluster.file(name), number, write=True)
    asyncio.run(store.shelf.finish(held, os.getuid()))
    for number, name in enumerate(("d-1", "d-2"), 1):
        store.pattern(store.chain(Origin(snapshot="s-2", volume=name)), number)
    for name in ("s-1", "s-2"):
        asyncio.run(store.shelf.remove(name))
    assert store.names() == ["_snapshots", "d-1", "d-2"]
    for name in ("d-1", "d-2"):
        assert store.ask("snap", "ls", store.cluster.image(name).spec) == []


def test_what_is_overwritten_until_the_cluster_has_kept_the_rest_is_of_the_snapshot(store: Store) -> None:
    path = store.ensure(DISK)
    for number in range(1, 5):
        store.pattern(path, number, f"{number}M", write=True)
    held = Manifest(id="s-1", consistency="frozen", copies=(Copy(volume="d-1", file="", parents=(), virtual_bytes=GIB),))
    file = asyncio.run(store.shelf.draft("s-1", held.copies, os.getuid()))["d-1"]
    # What QEMU does for a guest that writes after the snapshot's moment: first before the cluster was asked, then after.
    for number in (2, 5):
        run(["qemu-io", "-f", "qcow2", "-c", f"write -P {0 if number == 5 else number} {number}M 64k", str(file)])
        store.pattern(path, 0xEE, f"{number}M", write=True)
    asyncio.run(store.shelf.mark(held))
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 3M 64k", str(file)])
    store.pattern(path, 0xEE, "3M", write=True)
    asyncio.run(store.shelf.finish(held, os.getuid()))
    for number in range(1, 6):
        store.pattern(store.chain(ORIGIN), 0 if number == 5 else number, f"{number}M")
    store.pattern(path, 0xEE, "2M")
    # A file that is not what was asked for is written over nothing.
    file = asyncio.run(store.shelf.draft("s-2", held.copies, os.getuid()))["d-1"]
    asyncio.run(store.shelf.mark(msgspec.structs.replace(held, id="s-2")))
    run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", str(file)])
    with pytest.raises(SkysailError):
        asyncio.run(store.shelf.finish(msgspec.structs.replace(held, id="s-2"), os.getuid()))
    assert asyncio.run(store.shelf.observe()) == ["s-1"]


def test_a_moment_that_was_not_kept_is_no_snapshot(store: Store) -> None:
    store.ensure(DISK)
    held = Manifest(id="s-1", consistency="frozen", copies=(
        Copy(volume="d-1", file="", parents=(), virtual_bytes=GIB),))
    asyncio.run(store.shelf.draft("s-1", held.copies, os.getuid()))
    with pytest.raises(SkysailError):
        asyncio.run(store.shelf.finish(held, os.getuid()))
    assert asyncio.run(store.shelf.observe()) == []


def test_snapshots_of_snapshots_do_not_make_reads_ever_longer(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rbd_shelf, "MAX_DEPTH", 2)
    store.pattern(store.ensure(DISK), 1, write=True)
    name = "d-1"
    depths = []
    for number in range(2, 5):
        store.take(f"s-{number}", name)
        origin = Origin(snapshot=f"s-{number}", volume=name)
        name = f"d-{number}"
        path = store.ensure(Volume(id=name, image="", size_gib=1, origin=origin), store.chain(origin))
        depths.append(asyncio.run(store.shelf._depth(name)))
        store.pattern(path, 1)
    assert depths == [2, 1, 3] and max(depths) <= 3, depths


def test_a_snapshot_leaves_the_cluster_and_comes_back(store: Store, tmp_path: Path) -> None:
    """What ``snapshots export`` and ``import`` do with the shelf: files of this host in between."""
    store.pattern(store.ensure(DISK), 7, write=True)
    store.take("s-1", "d-1")
    room = tmp_path / "room"
    room.mkdir()
    (shown,) = asyncio.run(store.shelf.show(ORIGIN, room, os.getuid()))
    assert b"failed" not in run(["qemu-io", "-f", "qcow2", "-c", "read -P 7 1M 64k", shown])
    assert [path.name for path in room.iterdir()] == [Path(shown).name]
    # Laid as an import lays it: by a shelf of files, and not whole for it yet.
    files = FileShelf(tmp_path)
    copies = (Copy(volume="d-9", file="d-9.qcow2", parents=(), virtual_bytes=GIB),)
    target = asyncio.run(files.draft("s-9", copies, os.getuid()))["d-9"]
    chains.convert((shown,), target, os.getuid())
    asyncio.run(files.finish(Manifest(id="s-9", consistency="off", copies=copies), os.getuid()))
    (tmp_path / "s-9").rename(tmp_path / ".s-9")
    asyncio.run(store.shelf.arrive("s-9"))
    assert asyncio.run(store.shelf.observe()) == ["s-1", "s-9"] and not (tmp_path / ".s-9").exists()
    store.pattern(store.chain(Origin(snapshot="s-9", volume="d-9")), 7)


def test_a_hosts_client_reaches_what_is_its_own_and_nothing_else(ceph: CephCluster, tmp_path: Path) -> None:
    other = Store(ceph.namespace(), tmp_path)
    other.ensure(DISK)
    name = ceph.namespace().namespace
    mine = ceph.client(user="narrow", bound=f"pool={POOL} namespace={name}", namespace=name)
    assert asyncio.run(mine.names()) == []
    with pytest.raises(ProcessFailed) as refused:
        asyncio.run(msgspec.structs.replace(mine, namespace=other.cluster.namespace).names())
    assert refused.value.code == 1, "EPERM"


def test_a_cluster_that_is_away_is_said_to_be(ceph: CephCluster, tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text(f"[global]\nmon host = [v2:127.0.0.1:{free_port()}/0]\n")
    away = msgspec.structs.replace(ceph.client(seconds=1.0), conf=conf)
    pool, shelf = RbdPool(away, tmp_path, os.getuid()), RbdShelf(away, tmp_path, os.getuid())
    for call in (pool.observe, lambda: pool.ensure(DISK, None, GIB, 0), lambda: pool.give("d-1", 0),
                 lambda: pool.remove("d-1"), shelf.observe, lambda: shelf.find("s-1"), lambda: shelf.remove("s-1")):
        with pytest.raises(Away) as said:
            asyncio.run(call())  # type: ignore[arg-type]
        assert str(conf) in said.value.what and "ceph --status" in said.value.cure
    (problem,) = asyncio.run(pool.check())
    assert "does not answer" in problem


def test_disks_are_there_again_when_their_osd_is(ceph: CephCluster, tmp_path: Path) -> None:
    store = Store(ceph.namespace(), tmp_path)
    store.pattern(store.ensure(DISK), 5, write=True)
    hasty = msgspec.structs.replace(store.cluster, seconds=2.0)
    ceph.processes["osd"].send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(Away):
            asyncio.run(RbdPool(hasty, tmp_path, os.getuid()).ensure(Volume(id="d-2", image="", size_gib=1), None, GIB, 0))
    finally:
        ceph.processes["osd"].send_signal(signal.SIGCONT)
    assert list(asyncio.run(store.pool.observe())) == ["d-1"]
    store.ensure(Volume(id="d-2", image="", size_gib=1))
    store.pattern(store.cluster.file("d-1"), 5)


def test_the_doctor_says_what_a_cluster_lacks(ceph: CephCluster, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("root reads keyrings")
    cluster = ceph.client()
    keyring = tmp_path / "keyring"
    keyring.write_bytes(cluster.keyring.read_bytes())
    keyring.chmod(0o600)
    config = Config(data=str(tmp_path), storage="ceph", ceph_pool=POOL, ceph_conf=str(cluster.conf), ceph_user=cluster.user,
                    ceph_keyring=str(keyring), ceph_networks=("127.0.0.0/8",))
    good = doctor.storage(config)
    assert good.verdict == "good" and "answers" in good.saw, good
    keyring.chmod(0o644)
    for changes, words in (({}, "chmod 600"), ({"ceph_user": "nobody"}, "has no key of client.nobody"),
                           ({"ceph_keyring": "/nowhere"}, "cannot be read"), ({"ceph_conf": "/nowhere"}, "ceph_conf")):
        found = doctor.storage(msgspec.structs.replace(config, **changes))
        assert found.verdict == "bad" and words in found.saw + found.cure, found
    keyring.chmod(0o600)
    found = doctor.storage(msgspec.structs.replace(config, ceph_pool="nopool"))
    assert found.verdict == "bad" and "nopool" in found.saw, found


@pytest.mark.parametrize("wrong", [
    {"ceph_networks": ()}, {"ceph_networks": ("everywhere",)}, {"ceph_pool": "a/b"}, {"ceph_conf": "ceph.conf"},
    {"ceph_keyring": "/etc/ceph/a:b"}, {"ceph_user": "a b"}])
def test_a_configuration_that_cannot_be(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {"storage": "ceph", "ceph_networks": ("10.0.8.0/24",)}
    assert Config(**good).ceph_keyring_file == Path("/etc/ceph/ceph.client.skysail.keyring")
    with pytest.raises(ValueError):
        Config(**good | wrong)


def test_an_images_name_is_read_as_it_was_written() -> None:
    for namespace in ("", "cloud"):
        image = Cluster(pool="disks", namespace=namespace, user="skysail", conf=Path("/etc/ceph/ceph.conf"),
                        keyring=Path("/k")).image("s-1.d-1", "whole")
        assert ceph.Image.find(str(image)) == image and ceph.Image.find(str(Path(str(image)))) == image
    for file in ("/var/lib/skysail/volumes/g-1.qcow2", "rbd:disks/g-1", "g-1.qcow2"):
        assert ceph.Image.find(file) is None
