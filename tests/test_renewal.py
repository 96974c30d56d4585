"""Images whose guests keep their identity in a copy are found, once each, and nothing is launched from such a copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clouds import RealCloud, eventually
from crashing import running_tiny_cloud, whole
from skysail.images.disk import ROOT_AT, SECTOR
from skysail.images.library import Library, Manifest, file_digest
from skysail.images.renewal import UNIT, renews
from skysail.kit.process import run
from test_disks import ended, snapshot
from test_snapshots import tiny

pytestmark = pytest.mark.real


def image(library: Library, folder: Path, *, unit: bool, recipe: str = "f" * 64) -> Manifest:
    """An image of 8 MB in the library, whose file system has the unit or not."""
    tree, raw = folder / "tree", folder / "raw"
    (tree / UNIT.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
    (tree / "etc").mkdir(exist_ok=True)
    (tree / "etc" / "hostname").write_text(f"{unit}")
    (tree / UNIT.lstrip("/")).unlink(missing_ok=True)
    if unit:
        (tree / UNIT.lstrip("/")).write_text("[Unit]\n")
    raw.unlink(missing_ok=True)
    with raw.open("wb") as file:
        file.truncate(16 << 20)
    run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), "-E", f"offset={ROOT_AT * SECTOR}", str(raw), "8M"])
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(folder / "disk.qcow2")])
    made = Manifest(digest=file_digest(folder / "disk.qcow2"), blueprint="b", name="B", group="b", version="1", user="admin",
                    size_bytes=16 << 20, built=1.0, recipe=recipe)
    library.add(folder / "disk.qcow2", made)
    return made


@pytest.mark.parametrize("unit", [True, False])
def test_an_image_is_looked_into_once(tmp_path: Path, unit: bool) -> None:
    library = Library(tmp_path / "images")
    made = image(library, tmp_path, unit=unit)
    assert renews(library, made.digest) is unit
    told = library.find(made.digest)
    assert told is not None and told.renews is unit and told.recipe == made.recipe
    library.path(made.digest).write_bytes(b"")
    assert renews(Library(tmp_path / "images"), made.digest) is unit
    assert not list(library.directory.glob(".work-*"))


def test_foreign_images_and_unknown_ones_renew(tmp_path: Path) -> None:
    library = Library(tmp_path / "images")
    assert renews(library, "0" * 64)
    assert renews(library, image(library, tmp_path, unit=False, recipe="").digest)


def test_what_was_noted_of_an_image_elsewhere_counts(tmp_path: Path) -> None:
    library = Library(tmp_path / "images")
    note = Manifest(digest="a" * 64, blueprint="b", name="B", group="b", version="1", user="admin", size_bytes=0, built=1.0,
                    recipe="f" * 64, renews=False)
    library.note(note)
    assert library.noted(note.digest) == note and library.find(note.digest) is None and library.list() == []
    assert not renews(library, note.digest)


def test_no_server_is_made_that_would_be_its_source() -> None:
    with running_tiny_cloud() as cloud:
        client = tiny(cloud, "one")
        snapshot(client, "one", "snap")
        old(cloud)
        (failed,) = ended(client, client.create_instances_from_snapshot(
            instanceNames=["two"], bundleId="nano_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap"), "Failed")
        assert failed["errorCode"] == "InstanceLaunchFailed" and "identity of their own" in failed["errorDetails"]
        eventually(lambda: [one["name"] for one in client.get_instances()["instances"]] == ["one"])
        ended(client, client.create_disk_snapshot(instanceName="one", diskSnapshotName="system"))
        ended(client, client.create_disk_from_snapshot(diskName="saved", diskSnapshotName="system", sizeInGb=20,
                                                       availabilityZone="us-east-1a"))
        whole(cloud)


def old(cloud: RealCloud) -> None:
    """The tiny image is one of ours from long ago, as its manifest says."""
    (path,) = cloud.config.images_dir.glob("*.json")
    told = json.loads(path.read_text()) | {"recipe": "f" * 64, "renews": False}
    path.write_text(json.dumps(told))
