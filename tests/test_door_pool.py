"""The storage door: one suite for every engine, then what only files can show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

import pytest

from skysail.contract.document import Origin, Volume
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run
from skysail.storage import Copy, Manifest, Pool, Shelf, chains
from skysail.storage.files import FilePool
from skysail.storage.rbd import RbdPool
from skysail.storage.rbd_shelf import RbdShelf
from skysail.storage.shelf import FileShelf
from skysail.storage.sim import SimPool, SimShelf

GIB = 1 << 30
VOLUME = Volume(id="g-1", image="0" * 64, size_gib=20)
OTHER = Volume(id="g-2", image="0" * 64, size_gib=20)


@pytest.fixture(params=["sim", "files", "ceph"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
    if request.param == "ceph":
        return RbdPool(request.getfixturevalue("ceph").namespace(), tmp_path, os.getuid())
    return SimPool() if request.param == "sim" else FilePool(tmp_path / "volumes")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    path = tmp_path / "parent.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1G"])
    return path


def ensure(pool: Pool, volume: Volume, parent: Path, size_bytes: int = 20 * GIB) -> Path:
    return asyncio.run(pool.ensure(volume, parent, size_bytes, os.getuid()))


def observe(pool: Pool) -> dict[str, Path]:
    return asyncio.run(pool.observe())


def test_volumes_come_and_go(pool: Pool, parent: Path) -> None:
    assert observe(pool) == {}
    path = ensure(pool, VOLUME, parent)
    assert observe(pool) == {VOLUME.id: path}
    second = ensure(pool, OTHER, parent)
    assert second != path and observe(pool) == {VOLUME.id: path, OTHER.id: second}
    asyncio.run(pool.remove(VOLUME.id))
    assert observe(pool) == {OTHER.id: second}


def test_ensure_is_idempotent(pool: Pool, parent: Path) -> None:
    assert ensure(pool, VOLUME, parent) == ensure(pool, VOLUME, parent, 30 * GIB)
    assert list(observe(pool)) == [VOLUME.id]


def test_a_blank_volume_and_its_owner(pool: Pool) -> None:
    disk = Volume(id="d-1", image="", size_gib=8)
    path = asyncio.run(pool.ensure(disk, None, 8 * GIB, os.getuid()))
    assert asyncio.run(pool.give("d-1", os.getuid())) == path
    with pytest.raises(SkysailError):
        asyncio.run(pool.give("d-2", os.getuid()))


def test_removing_what_is_not_there_is_fine(pool: Pool, parent: Path) -> None:
    asyncio.run(pool.remove(VOLUME.id))
    ensure(pool, VOLUME, parent)
    for _ in range(2):
        asyncio.run(pool.remove(VOLUME.id))
    assert observe(pool) == {}


def test_a_healthy_machine_has_no_problems(pool: Pool) -> None:
    assert asyncio.run(pool.check()) == []


def test_a_file_is_a_child_of_its_parent(tmp_path: Path, parent: Path) -> None:
    path = ensure(FilePool(tmp_path / "volumes"), VOLUME, parent)
    told = json.loads(run(["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)]))
    assert told["virtual-size"] == 20 * GIB and told["actual-size"] < 1 << 20
    assert told["backing-filename"] == str(parent) and told["backing-filename-format"] == "qcow2"
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_existing_file_is_left_as_it_is(tmp_path: Path, parent: Path) -> None:
    pool = FilePool(tmp_path / "volumes")
    path = ensure(pool, VOLUME, parent)
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 4k", str(path)])
    held = path.read_bytes()
    assert ensure(pool, VOLUME, parent) == path and path.read_bytes() == held


def test_what_a_killed_process_left_is_not_a_volume(tmp_path: Path, parent: Path) -> None:
    pool = FilePool(tmp_path / "volumes")
    path = ensure(pool, VOLUME, parent)
    half = path.with_suffix(".new")
    path.rename(half)
    half.write_bytes(half.read_bytes()[:1000])
    assert observe(pool) == {}
    assert ensure(pool, VOLUME, parent) == path
    run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)])
    half.write_bytes(b"half")
    asyncio.run(pool.remove(VOLUME.id))
    assert list(path.parent.iterdir()) == []


def test_a_volume_without_its_parent_is_not_made(tmp_path: Path) -> None:
    pool = FilePool(tmp_path / "volumes")
    with pytest.raises(SkysailError):
        ensure(pool, VOLUME, tmp_path / "nowhere.qcow2")
    assert observe(pool) == {}


def test_observing_makes_nothing(tmp_path: Path) -> None:
    observe(FilePool(tmp_path / "volumes"))
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_qemu_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = asyncio.run(FilePool(tmp_path).check())
    assert "qemu-img" in problem and "skysail up" in problem


@pytest.mark.real
@pytest.mark.skipif(os.geteuid() != 0, reason="files are given away by root")
def test_a_volume_belongs_to_its_guests_user(tmp_path: Path, parent: Path) -> None:
    path = asyncio.run(FilePool(tmp_path / "volumes").ensure(VOLUME, parent, GIB, 2_000_123))
    assert path.stat().st_uid == 2_000_123


# --- the shelf

@pytest.fixture(params=["sim", "files", "ceph"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    if request.param == "ceph":
        cluster = request.getfixturevalue("ceph").namespace()
        asyncio.run(RbdPool(cluster, tmp_path, os.getuid()).ensure(VOLUME, None, GIB, os.getuid()))
        return RbdShelf(cluster, tmp_path, os.getuid())
    return SimShelf() if request.param == "sim" else FileShelf(tmp_path / "snapshots")


@pytest.fixture(params=["sim", "files"])
def layered(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    """A shelf whose snapshots stand on others."""
    return SimShelf() if request.param == "sim" else FileShelf(tmp_path / "snapshots")


def plan(*parents: str) -> tuple[Copy, ...]:
    return (Copy(volume="g-1", file="g-1.qcow2", parents=parents, virtual_bytes=GIB),)


def take(shelf: Shelf, name: str, *parents: str, standing: tuple[str, ...] = ()) -> Manifest:
    async def both() -> Manifest:
        await shelf.draft(name, plan(*parents), os.getuid())
        manifest = Manifest(id=name, consistency="off", copies=plan(*parents), parents=standing)
        await shelf.mark(manifest)
        return await shelf.finish(manifest, os.getuid())
    return asyncio.run(both())


def test_a_snapshot_is_there_once_it_is_whole(shelf: Shelf) -> None:
    assert asyncio.run(shelf.observe()) == [] and asyncio.run(shelf.find("s-1")) is None
    asyncio.run(shelf.draft("s-1", plan(), os.getuid()))
    assert asyncio.run(shelf.observe()) == [] and asyncio.run(shelf.find("s-1")) is None
    with pytest.raises(SkysailError):
        asyncio.run(shelf.chain(Origin(snapshot="s-1", volume="g-1")))
    made = take(shelf, "s-1")
    assert asyncio.run(shelf.observe()) == ["s-1"] and asyncio.run(shelf.find("s-1")) == made
    assert len(made.copies[0].sha256) == (64 if shelf.layered else 0)
    for _ in range(2):
        asyncio.run(shelf.remove("s-1"))
    assert asyncio.run(shelf.observe()) == []


def test_a_draft_can_be_thrown_away(shelf: Shelf) -> None:
    asyncio.run(shelf.draft("s-1", plan(), os.getuid()))
    asyncio.run(shelf.remove("s-1"))
    assert take(shelf, "s-1").id == "s-1"


def test_a_snapshot_that_another_stands_on_stays(layered: Shelf) -> None:
    shelf = layered
    take(shelf, "s-1")
    chain = asyncio.run(shelf.chain(Origin(snapshot="s-1", volume="g-1")))
    take(shelf, "s-2", *chain, standing=("s-1",))
    assert asyncio.run(shelf.chain(Origin(snapshot="s-2", volume="g-1")))[1:] == chain
    with pytest.raises(SkysailError):
        asyncio.run(shelf.remove("s-1"))
    for name in ("s-2", "s-1"):
        asyncio.run(shelf.remove(name))
    assert asyncio.run(shelf.observe()) == []


def test_a_snapshot_is_lifted_off_one_that_leaves(layered: Shelf) -> None:
    shelf = layered
    take(shelf, "s-1")
    for name, below in (("s-2", "s-1"), ("s-3", "s-2")):
        chain = asyncio.run(shelf.chain(Origin(snapshot=below, volume="g-1")))
        take(shelf, name, *chain, standing=tuple(sorted(shelf.standing(chain))))
    assert asyncio.run(shelf.lift("s-4", ["s-1"], os.getuid())) is None
    for name in ("s-3", "s-2"):
        made = asyncio.run(shelf.lift(name, ["s-1"], os.getuid()))
        assert made is not None and made == asyncio.run(shelf.find(name)) and "s-1" not in made.parents
    asyncio.run(shelf.remove("s-1"))
    chain = asyncio.run(shelf.chain(Origin(snapshot="s-3", volume="g-1")))
    assert shelf.standing(chain) == {"s-2", "s-3"} and len(chain) == 2
    assert asyncio.run(shelf.current(chain)) == chain
    with pytest.raises(SkysailError):
        asyncio.run(shelf.remove("s-2"))


def test_a_lifted_snapshot_reads_as_before_also_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = FileShelf(tmp_path / "snapshots")
    origins = [Origin(snapshot=f"s-{number}", volume="g-1") for number in range(1, 4)]
    chain: tuple[str, ...] = ()
    for number, origin in enumerate(origins, 1):
        copies = plan(*chain)
        path = asyncio.run(shelf.draft(origin.snapshot, copies, os.getuid()))["g-1"]
        # Each writes a mebibyte of its own, and hides a quarter of the one below.
        run(["qemu-io", "-c", f"write -P {number} {number}M 1M", "-c", f"write -z {number - 1}M 256k", chains.named(
            [str(path), *chain])])
        asyncio.run(shelf.finish(Manifest(id=origin.snapshot, consistency="off", copies=copies,
                                          parents=tuple(sorted(shelf.standing(chain)))), os.getuid()))
        chain = asyncio.run(shelf.chain(origin))

    def reads() -> str:
        for origin in origins[1:]:
            held = asyncio.run(shelf.find(origin.snapshot))
            assert held is not None
            path = tmp_path / "snapshots" / origin.snapshot / held.copies[0].file
            assert run(["sha256sum", str(path)]).split()[0].decode() == held.copies[0].sha256
        now = asyncio.run(shelf.chain(origins[2]))
        return run(["qemu-img", "compare", chains.named(now), str(tmp_path / "before")]).decode()

    run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "before"), "1G"])
    chains.convert(chain, tmp_path / "before", os.getuid())
    for effect in ("skysail.storage.shelf._own_copy", "skysail.storage.shelf.rebase", "skysail.storage.shelf._seal",
                   "skysail.kit.durable.replace"):
        with monkeypatch.context() as patched:
            def cut_off(*_args: object, **_more: object) -> None:
                raise KeyboardInterrupt
            patched.setattr(effect, cut_off)
            with pytest.raises(KeyboardInterrupt):
                asyncio.run(shelf.lift("s-2", ["s-1"], os.getuid()))
        assert "identical" in reads()
    for name in ("s-2", "s-3"):
        asyncio.run(shelf.lift(name, ["s-1"], os.getuid()))
        assert "identical" in reads()
    asyncio.run(shelf.remove("s-1"))
    assert "identical" in reads()
    assert sorted(path.name for path in (tmp_path / "snapshots" / "s-3").iterdir()) == ["g-1.qcow2", "manifest.json"]
    assert len(list((tmp_path / "snapshots" / "s-2").iterdir())) == 2


def test_a_volume_that_is_half_flattened_reads_as_before(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("volume", "snapshot", "image")]
    for number, file in enumerate(files):
        run(["qemu-img", "create", "-q", "-f", "qcow2", file, "1G"])
        run(["qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {number * 64}M 128M", file])
    volume, chain = Path(files[0]), files[1:]
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "before"), "1G"])
    chains.convert(files, tmp_path / "before", os.getuid())

    def reads(*now: str) -> bool:
        return b"identical" in run(["qemu-img", "compare", chains.named(now), str(tmp_path / "before")])

    async def called_off(seconds: float) -> bool:
        """Whether the work was still under way after so long."""
        work = asyncio.create_task(chains.rebase(volume, chain, chain[1:], os.getuid()))
        await asyncio.sleep(seconds)
        through = work.done()
        work.cancel()
        await asyncio.wait((work,))
        return not through

    seconds = 0.01
    while asyncio.run(called_off(seconds)):
        assert not [words for words in Path("/proc").glob("[0-9]*/cmdline") if str(volume).encode() in _read(words)]
        assert reads(*files)
        seconds *= 2
    assert seconds > 0.01 and reads(*files) and reads(files[0], files[2])
    with pytest.raises(ProcessFailed):
        reads(files[0])  # the image is needed still


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def test_a_volume_grows_from_a_snapshot(tmp_path: Path) -> None:
    shelf, pool = FileShelf(tmp_path / "snapshots"), FilePool(tmp_path / "volumes")
    files = asyncio.run(shelf.draft("s-1", plan(), os.getuid()))
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 64k", str(files["g-1"])])
    made = asyncio.run(shelf.finish(Manifest(id="s-1", consistency="frozen", copies=plan()), os.getuid()))
    origin = Origin(snapshot="s-1", volume="g-1")
    parent = Path(asyncio.run(shelf.chain(origin))[0])
    assert parent.stat().st_mode & 0o777 == 0o444
    assert made.copies[0].sha256 == run(["sha256sum", str(parent)]).split()[0].decode()
    child = Volume(id="d-1", image="", size_gib=2, origin=origin)
    path = asyncio.run(pool.ensure(child, parent, 2 * GIB, os.getuid()))
    assert b"failed" not in run(["qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 0 64k", str(path)])
    parent.unlink()
    asyncio.run(pool.remove("d-1"))
    with pytest.raises(SkysailError):
        asyncio.run(pool.ensure(child, parent, 2 * GIB, os.getuid()))


@pytest.mark.parametrize("harm", ["parent", "data", "garbage", "table"])
def test_a_file_that_is_not_what_was_asked_for_is_no_snapshot(tmp_path: Path, harm: str) -> None:
    shelf = FileShelf(tmp_path / "snapshots")
    path = asyncio.run(shelf.draft("s-1", plan(), os.getuid()))["g-1"]
    if harm == "parent":
        run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", str(path)])
    elif harm == "data":
        path.unlink()
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", str(path), "1G"])
    elif harm == "garbage":
        path.write_bytes(b"garbage")
    else:
        run(["qemu-io", "-f", "qcow2", "-c", "write 0 1M", str(path)])
        with path.open("r+b") as file:
            file.seek(48)
            file.write((1 << 40).to_bytes(8, "big"))  # refcount_table_offset
    with pytest.raises(SkysailError):
        asyncio.run(shelf.finish(Manifest(id="s-1", consistency="frozen", copies=plan()), os.getuid()))
    assert asyncio.run(shelf.observe()) == []


def test_a_duplicate_goes_on_without_its_source(shelf: Shelf) -> None:
    take(shelf, "s-1")
    asyncio.run(shelf.duplicate("s-2", "s-1"))
    one, two = asyncio.run(shelf.find("s-1")), asyncio.run(shelf.find("s-2"))
    assert one is not None and two is not None and (one.copies, one.parents) == (two.copies, two.parents)
    asyncio.run(shelf.remove("s-1"))
    asyncio.run(shelf.verify(Origin(snapshot="s-2", volume="g-1")))
    assert asyncio.run(shelf.observe()) == ["s-2"]
    with pytest.raises(SkysailError):
        asyncio.run(shelf.duplicate("s-3", "s-1"))
    with pytest.raises(SkysailError):
        asyncio.run(shelf.verify(Origin(snapshot="s-1", volume="g-1")))
    with pytest.raises(SkysailError):
        asyncio.run(shelf.arrive("s-4"))


def test_a_duplicate_that_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path / "snapshots")
    take(shelf, "s-1")
    half = tmp_path / "snapshots" / ".s-2"
    half.mkdir()
    (half / "g-1.qcow2").write_bytes(b"half")
    asyncio.run(shelf.duplicate("s-2", "s-1"))
    assert (tmp_path / "snapshots" / "s-2" / "g-1.qcow2").samefile(tmp_path / "snapshots" / "s-1" / "g-1.qcow2")
    assert not half.exists()


@pytest.mark.parametrize("harmed", ["s-1", "s-2"])
@pytest.mark.parametrize("harm", ["changed", "replaced", "gone"])
def test_a_file_that_changed_is_noticed_wherever_it_is_in_the_chain(tmp_path: Path, harmed: str, harm: str) -> None:
    shelf, folder = FileShelf(tmp_path / "snapshots"), tmp_path / "snapshots"
    take(shelf, "s-1")
    take(shelf, "s-2", *asyncio.run(shelf.chain(Origin(snapshot="s-1", volume="g-1"))), standing=("s-1",))
    top = Origin(snapshot="s-2", volume="g-1")
    for _ in range(2):
        asyncio.run(shelf.verify(top))
    path = folder / harmed / "g-1.qcow2"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if harm != "gone":
        path.write_bytes(bytes(content))
    if harm == "changed":  # at the very place, and as large as before
        os.utime(path, ns=(0, 0))
    with pytest.raises(SkysailError):
        asyncio.run(shelf.verify(top))
    with pytest.raises(SkysailError):
        asyncio.run(shelf.duplicate("s-3", "s-2"))
    assert asyncio.run(shelf.observe()) == ["s-1", "s-2"]


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """Until it is another one by what stat(2) says, its checksum is remembered."""
    shelf = FileShelf(tmp_path / "snapshots")
    take(shelf, "s-1")
    origin, path = Origin(snapshot="s-1", volume="g-1"), tmp_path / "snapshots" / "s-1" / "g-1.qcow2"
    asyncio.run(shelf.verify(origin))
    held = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    with pytest.raises(SkysailError):
        asyncio.run(shelf.verify(origin))
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))  # as no honest writer would leave it
    asyncio.run(shelf.verify(origin))
    with pytest.raises(SkysailError):
        asyncio.run(FileShelf(tmp_path / "snapshots").verify(origin))
