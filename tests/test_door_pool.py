"""The storage door: one suite for every engine, then what only files can show."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from skysail.contract.document import Volume
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.storage import Pool
from skysail.storage.files import FilePool
from skysail.storage.sim import SimPool

GIB = 1 << 30
VOLUME = Volume(id="g-1", image="0" * 64, size_gib=20)
OTHER = Volume(id="g-2", image="0" * 64, size_gib=20)


@pytest.fixture(params=["sim", "files"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Pool:
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
