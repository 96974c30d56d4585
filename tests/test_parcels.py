"""Snapshots as files: what is written is taken in, and nothing else is. Then the whole way, with the operator's verbs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clouds import RealCloud, eventually, running_cloud
from crashing import Doom, running_tiny_cloud, settled_serial, whole
from skysail.inspect.verify import verify
from skysail.kit.errors import SkysailError
from skysail.kit.process import run
from skysail.serve import snapshots
from skysail.storage import parcel
from test_disks import create, disk, ended, snapshot
from test_snapshots import pattern, tiny, volume_of

pytestmark = pytest.mark.real
UID = 2_990_001
SERVER = parcel.Server(image="0" * 64, recipe="", blueprint="tiny", blueprint_name="Tiny", bundle="nano_3_0", user="admin")


def quiet(_text: str) -> None:
    """Nobody looks at how far it is."""


@pytest.fixture
def room() -> Iterator[Path]:
    """A folder that a user without rights can reach."""
    folder = Path("/var/tmp") / f"skysail-parcels-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o711)
    os.chown(folder, UID, UID)
    yield folder
    shutil.rmtree(folder)


def qcow2(path: Path, *words: str) -> Path:
    run(["qemu-img", "create", "-q", "-f", "qcow2", *words, str(path), "1G"])
    return path


def packed(room: Path, target: Path) -> parcel.Parcel:
    """A parcel of one disk of 1 GB that stands on another, with the byte 0x5a at 0 of the one and at 1M of the other."""
    parent = qcow2(room / "parent.qcow2")
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 64k", str(parent)])
    child = qcow2(room / "child.qcow2", "-F", "qcow2", "-b", str(parent))
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 0 64k", str(child)])
    out = room / "flat.qcow2"
    part = parcel.flatten((str(child), str(parent)), out, 1, UID, quiet)
    made = parcel.Parcel(kind="DiskSnapshot", name="snap", created_at=1.0, consistency="off", origin_type="Disk",
                         origin="data", origin_arn="arn:aws:lightsail:us-east-1:1:Disk/d-1", parts=(part,))
    parcel.write(target, made, [out], quiet)
    return made


def fresh(room: Path) -> Path:
    folder = room / "in"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o711)
    return folder


def read(room: Path, source: Path) -> tuple[parcel.Parcel, list[Path]]:
    found, paths = parcel.read(source, fresh(room), quiet)
    for path, part in zip(paths, found.parts, strict=True):
        path.chmod(0o444)
        parcel.check(path, part, UID)
    return found, paths


def test_what_is_written_is_read(room: Path, tmp_path: Path) -> None:
    target = tmp_path / "snap.tar"
    made = packed(room, target)
    assert target.stat().st_mode & 0o777 == 0o600 and [path.name for path in tmp_path.iterdir()] == ["snap.tar"]
    with tarfile.open(target) as tar:  # anybody's tar reads it
        assert tar.getnames() == ["manifest.json", "disk-0.qcow2"]
    found, (path,) = read(room, target)
    assert found == made
    for name in ("parent", "child"):
        (room / f"{name}.qcow2").unlink()
    for at in ("0", "1M"):
        assert b"failed" not in run(["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P 0x5a {at} 64k", str(path)])
    assert "backing-filename" not in json.loads(run(["qemu-img", "info", "-f", "qcow2", "--output=json", str(path)]))


def test_a_file_that_cannot_be_written_leaves_nothing(room: Path, tmp_path: Path) -> None:
    made = packed(room, tmp_path / "snap.tar")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SkysailError, match="cannot be written"):
        parcel.write(tmp_path / "folder", made, [room / "flat.qcow2"], quiet)
    (tmp_path / ".other.tar.half").write_bytes(b"left")
    parcel.write(tmp_path / "other.tar", made, [room / "flat.qcow2"], quiet)
    assert (tmp_path / "other.tar").read_bytes() == (tmp_path / "snap.tar").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"snap.tar", "other.tar", "folder"}


def repacked(source: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """The same tar with other members."""
    with tarfile.open(source) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(source, "w", format=tarfile.GNU_FORMAT) as tar:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content))


def manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def changed(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        told = json.loads(members[0][1])
        change(told)
        members[0] = (members[0][0], json.dumps(told).encode())
    return changed


def renamed(number: int, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Any:
    def changed(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[number][0].name, members[number][0].type, members[number][0].linkname = name, kind, link
    return changed


def flipped(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    body = bytearray(members[1][1])
    body[-1] ^= 1
    members[1] = (members[1][0], bytes(body))


HARM: dict[str, tuple[Any, str]] = {
    "a changed byte": (flipped, "checksum"),
    "a shorter disk": (lambda members: members.__setitem__(1, (members[1][0], members[1][1][:-512])), "its manifest says"),
    "no manifest": (lambda members: members.pop(0), "manifest.json is expected"),
    "no disk": (lambda members: members.pop(1), "disk-0.qcow2 is missing"),
    "one member more": (lambda members: members.append((tarfile.TarInfo("more"), b"x")), "more or less"),
    "a path upwards": (renamed(1, "../../etc/shadow"), "is expected"),
    "an absolute path": (renamed(1, "/etc/shadow"), "is expected"),
    "a link": (renamed(1, "disk-0.qcow2", tarfile.SYMTYPE, "/etc/shadow"), "is expected"),
    "a hard link": (renamed(1, "disk-0.qcow2", tarfile.LNKTYPE, "/etc/shadow"), "is expected"),
    "a pipe": (renamed(1, "disk-0.qcow2", tarfile.FIFOTYPE), "is expected"),
    "a long name": (renamed(1, "d" * 5000), "is expected"),
    "a huge manifest": (manifest(lambda told: told.update(more="x" * (1 << 21))), "too large"),
    "no JSON": (lambda members: members.__setitem__(0, (members[0][0], b"{")), "cannot be used"),
    "another version": (manifest(lambda told: told.update(version=9, parts="?")), "newer Skysail"),
    "a name that is a path": (manifest(lambda told: told["parts"][0].update(sha256="../x")), "cannot be used"),
    "more parts than it has": (manifest(lambda told: told.update(parts=told["parts"] * 2)), "cannot be used"),
    "a server without its kind": (manifest(lambda told: told.update(server=msgspec.to_builtins(SERVER))), "cannot be used"),
    "another size": (manifest(lambda told: told["parts"][0].update(size_gib=2)), "not as large"),
    "no room for it": (manifest(lambda told: told["parts"][0].update(bytes=1 << 60)), "there is room for"),
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_no_parcel_is_refused(room: Path, tmp_path: Path, harm: str) -> None:
    target = tmp_path / "snap.tar"
    packed(room, target)
    change, words = HARM[harm]
    repacked(target, change)
    with pytest.raises(SkysailError, match=words):
        read(room, target)
    assert {path.parent for path in fresh(room).parent.rglob("*.qcow2")} <= {room}


@pytest.mark.parametrize("harm", ["backing", "data", "garbage", "table", "encrypted"])
def test_a_disk_that_would_reach_beyond_itself_is_refused(room: Path, tmp_path: Path, harm: str) -> None:
    """Its checksum is right: it is the author who is not to be trusted."""
    path, target = room / "bad.qcow2", tmp_path / "snap.tar"
    if harm == "backing":
        qcow2(path)
        run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", str(path)])
    elif harm == "data":
        qcow2(path, "-o", f"data_file={tmp_path / 'data'}")
    elif harm == "encrypted":
        run(["qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=secret", "-o",
             "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", str(path), "1G"])
    else:
        qcow2(path)
        run(["qemu-io", "-f", "qcow2", "-c", "write 0 1M", str(path)])
        with path.open("r+b") as file:
            file.seek(48 if harm == "table" else 0)
            file.write((1 << 40).to_bytes(8, "big"))  # refcount_table_offset, or the magic
    made = packed(room, tmp_path / "good.tar")
    with path.open("rb") as file:
        part = parcel.Part(size_gib=1, bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
    parcel.write(target, msgspec.structs.replace(made, parts=(part,)), [path], quiet)
    with pytest.raises(SkysailError):
        read(room, target)


def test_a_file_that_is_cut_off_anywhere_is_refused(room: Path, tmp_path: Path) -> None:
    target = tmp_path / "snap.tar"
    packed(room, target)
    body = target.read_bytes()
    for length in (0, 100, 512, 700, 2048, len(body) // 2, len(body) - 10240):
        target.write_bytes(body[:length])
        with pytest.raises(SkysailError, match=r"damaged|cannot be used"):
            read(room, target)


# --- the whole way

@pytest.fixture(scope="module")
def tiny_cloud() -> Iterator[RealCloud]:
    with running_tiny_cloud() as made:
        yield made


def said(cloud: RealCloud, *words: str, well: bool = True) -> str:
    """What the operator's verb prints."""
    done = cloud.operator("snapshots", *words)
    assert (done.returncode == 0) == well, done.stdout + done.stderr
    return done.stdout + done.stderr


def off(client: Any, name: str) -> None:
    """Stop an instance at once: on a busy machine its system may not listen to the power button yet."""
    ended(client, client.stop_instance(instanceName=name, force=True))


def test_a_snapshot_goes_out_and_comes_in(tiny_cloud: RealCloud, tmp_path: Path) -> None:
    client = tiny(tiny_cloud, "one")
    create(client, "data")
    pattern(tiny_cloud, volume_of(client, "data"), 0x5A, write=True)
    ended(client, client.attach_disk(diskName="data", instanceName="one", diskPath="/dev/xvdg"))
    snapshot(client, "one", "snap")
    # A copy of a copy: what it stands on goes with it.
    ended(client, client.create_instances_from_snapshot(
        instanceNames=["two"], bundleId="micro_3_0", availabilityZone="us-east-1a", instanceSnapshotName="snap"))
    off(client, "two")
    pattern(tiny_cloud, volume_of(client, "two-data"), 0xA5, "2M", write=True)
    former = snapshot(client, "two", "again")
    out = tmp_path / "again.tar"
    assert "MiB" in said(tiny_cloud, "export", "again", "--to", str(out))
    assert "is there already" in said(tiny_cloud, "export", "again", "--to", str(out), well=False)
    assert "no snapshot none" in said(tiny_cloud, "export", "none", "--to", str(tmp_path / "none.tar"), well=False)
    assert "there is no folder" in said(tiny_cloud, "export", "again", "--to", str(tmp_path / "no" / "x.tar"), well=False)
    assert "already in use" in said(tiny_cloud, "import", str(out), well=False)

    # All that it was made of goes, and the image with it.
    for name in ("one", "two"):
        ended(client, client.delete_instance(instanceName=name))
    for name in ("data", "two-data"):
        client.delete_disk(diskName=name)
    for name in ("snap", "again"):
        client.delete_instance_snapshot(instanceSnapshotName=name)
    eventually(lambda: not list(tiny_cloud.config.snapshots_dir.iterdir()), what="nothing is left")
    images = tmp_path / "images"
    images.mkdir()
    for path in list(tiny_cloud.config.images_dir.iterdir()):
        shutil.move(path, images / path.name)
    # What imports left that were killed: one without its row, and one without its files' checks.
    (tiny_cloud.config.snapshots_dir / ".s-0123456789").mkdir()
    (tiny_cloud.config.snapshots_dir / ".work-left").mkdir()

    assert "back is there" in said(tiny_cloud, "import", str(out), "--name", "back")
    found = client.get_instance_snapshot(instanceSnapshotName="back")["instanceSnapshot"]
    assert found["state"] == "available" and found["sizeInGb"] == former["sizeInGb"] == 40
    for kept in ("fromInstanceName", "fromInstanceArn", "fromBlueprintId", "fromBundleId"):
        assert found[kept] == former[kept]
    assert [(one["path"], one["sizeInGb"]) for one in found["fromAttachedDisks"]] == [("/dev/xvdg", 8)]
    assert [path.name for path in tiny_cloud.config.snapshots_dir.iterdir()] == [found["arn"].rpartition("/")[2]]
    (row,) = json.loads(said(tiny_cloud, "list", "--json"))
    assert (row["name"], row["kind"], row["disks"], row["of"]) == ("back", "instance", 2, "two")
    assert "back" in said(tiny_cloud, "list")

    ended(client, client.create_instances_from_snapshot(
        instanceNames=["three"], bundleId="micro_3_0", availabilityZone="us-east-1b", instanceSnapshotName="back"))
    assert disk(client, "three-two-data")["path"] == "/dev/xvdg"
    off(client, "three")
    pattern(tiny_cloud, volume_of(client, "three-two-data"), 0x5A)
    pattern(tiny_cloud, volume_of(client, "three-two-data"), 0xA5, "2M")
    # And out again, from a machine that never had its image.
    snapshot(client, "three", "third")
    said(tiny_cloud, "export", "third", "--to", str(tmp_path / "third.tar"))
    eventually(lambda: verify(tiny_cloud.config, 0.2) == [], 60)
    # Without its image and its snapshots its disk has no parent at all: it boots from that one file.
    for name in ("back", "third"):
        client.delete_instance_snapshot(instanceSnapshotName=name)
    eventually(lambda: not list(tiny_cloud.config.snapshots_dir.iterdir()), 120, "all that it stood on moves into its disks")
    ended(client, client.start_instance(instanceName="three"))
    eventually(lambda: settled_serial(tiny_cloud, "three").endswith("B"), what="its system is up")
    ended(client, client.delete_instance(instanceName="three"))
    client.delete_disk(diskName="three-two-data")
    for path in list(images.iterdir()):
        shutil.move(path, tiny_cloud.config.images_dir / path.name)
    whole(tiny_cloud)


def test_a_server_from_elsewhere_comes_in_and_goes_out_again(tiny_cloud: RealCloud, room: Path, tmp_path: Path) -> None:
    """Its image was never here."""
    client, source, again = tiny_cloud.client(), tmp_path / "there.tar", tmp_path / "again.tar"
    made = packed(room, tmp_path / "disk.tar")
    server = msgspec.structs.replace(SERVER, image="ab" * 32, renews=False, recipe="cd" * 32,
                                     disks=(parcel.Attached(path="/dev/xvdh", name="data"),))
    made = msgspec.structs.replace(made, kind="InstanceSnapshot", parts=made.parts * 2, server=server, name="there",
                                   origin_type="Instance", origin="far",
                                   origin_arn="arn:aws:lightsail:eu-west-1:1:Instance/1")
    parcel.write(source, made, [room / "flat.qcow2"] * 2, quiet)
    said(tiny_cloud, "import", str(source))
    found = client.get_instance_snapshot(instanceSnapshotName="there")["instanceSnapshot"]
    assert (found["state"], found["fromInstanceName"], found["fromBlueprintId"]) == ("available", "far", "tiny")
    assert [(one["name"], one["path"]) for one in found["fromAttachedDisks"]] == [("data", "/dev/xvdh")]
    said(tiny_cloud, "export", "there", "--to", str(again))
    read_again, _ = read(room, again)
    assert (read_again.server, read_again.origin, len(read_again.parts)) == (server, "far", 2)
    client.delete_instance_snapshot(instanceSnapshotName="there")
    eventually(lambda: not list(tiny_cloud.config.snapshots_dir.iterdir()), what="it goes, whole")


def test_a_disks_snapshot_goes_out_and_comes_in(tiny_cloud: RealCloud, tmp_path: Path) -> None:
    client, out = tiny_cloud.client(), tmp_path / "copy.tar"
    create(client, "data")
    pattern(tiny_cloud, volume_of(client, "data"), 0x5A, write=True)
    ended(client, client.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
    said(tiny_cloud, "export", "copy", "--to", str(out), "--account", "admin", "--region", "us-east-1")
    client.delete_disk(diskName="data")
    client.delete_disk_snapshot(diskSnapshotName="copy")
    with out.open("r+b") as file:
        file.seek(-12_000, 2)
        byte = file.read(1)[0]
        file.seek(-12_000, 2)
        file.write(bytes([byte ^ 1]))
    assert "checksum" in said(tiny_cloud, "import", str(out), well=False)
    with out.open("r+b") as file:
        file.seek(-12_000, 2)
        file.write(bytes([byte]))
    for wrong, words in ((["--account", "none"], "no account none"), (["--region", "eu-west-1"], "does not exist here"),
                         (["--name", "x"], "is not valid")):
        assert words in said(tiny_cloud, "import", str(out), *wrong, well=False)
    assert client.get_disk_snapshots()["diskSnapshots"] == []
    said(tiny_cloud, "import", str(out))
    found = client.get_disk_snapshot(diskSnapshotName="copy")["diskSnapshot"]
    assert (found["state"], found["fromDiskName"], found["sizeInGb"]) == ("completed", "data", 8)
    ended(client, client.create_disk_from_snapshot(diskName="other", diskSnapshotName="copy", sizeInGb=9,
                                                   availabilityZone="us-east-1a"))
    pattern(tiny_cloud, volume_of(client, "other"), 0x5A)
    client.delete_disk(diskName="other")
    client.delete_disk_snapshot(diskSnapshotName="copy")
    whole(tiny_cloud)


def test_a_simulated_host_has_no_files() -> None:
    with running_cloud() as cloud, pytest.raises(SkysailError, match="simulated"):
        snapshots.export(cloud.config, "snap", Path("/nowhere"), "", "admin", quiet, quiet)


# --- a server goes to another cloud

def test_a_server_goes_out_comes_in_and_is_another_one(real_cloud: RealCloud, tmp_path: Path) -> None:
    cloud, client = real_cloud, real_cloud.client()
    cloud.launch("source")
    sums = cloud.ssh("source", "dd if=/dev/urandom of=random bs=1M count=8 status=none && sync && sha256sum random")
    snapshot(client, "source", "leaves")
    out = tmp_path / "leaves.tar"
    said(cloud, "export", "leaves", "--to", str(out))
    who = "hostname; cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub"
    former = cloud.ssh("source", who).splitlines()
    cloud.delete("source")
    client.delete_instance_snapshot(instanceSnapshotName="leaves")
    eventually(lambda: not list(cloud.config.snapshots_dir.iterdir()), what="nothing of it is left here")
    said(cloud, "import", str(out), "--name", "arrives")
    for operation in client.create_instances_from_snapshot(
            instanceNames=["copy"], bundleId="nano_3_0", availabilityZone="us-east-1a",
            instanceSnapshotName="arrives")["operations"]:
        cloud.settled(operation["id"], 400)
    assert cloud.ssh("copy", "sha256sum random", 400) == sums
    now = cloud.ssh("copy", who).splitlines()
    assert now[0] == "copy" and all(one != other for one, other in zip(now, former, strict=True))
    cloud.delete("copy")
    client.delete_instance_snapshot(instanceSnapshotName="arrives")


@pytest.mark.long
def test_an_agent_that_dies_at_any_step_lets_an_import_appear(tiny_cloud: RealCloud, tmp_path: Path) -> None:
    client, out = tiny_cloud.client(), tmp_path / "copy.tar"
    create(client, "data")
    ended(client, client.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
    said(tiny_cloud, "export", "copy", "--to", str(out))
    client.delete_disk(diskName="data")
    doom = Doom(tiny_cloud, "agent")

    def bring_in() -> None:
        tiny_cloud.operator("snapshots", "import", str(out), "--name", "back")

    while (died := doom.during("import", bring_in)) is not None:
        assert client.get_disk_snapshot(diskSnapshotName="back")["diskSnapshot"]["state"] == "completed", died
        client.delete_disk_snapshot(diskSnapshotName="back")
        whole(tiny_cloud)
    assert "os:rename" in doom.deaths["import"] and not doom.missed()
    for name in ("copy", "back"):
        client.delete_disk_snapshot(diskSnapshotName=name)
    whole(tiny_cloud)
    doom.disarm()


@pytest.mark.parametrize("at", [".work-*", ".work-*/disk-0.qcow2", ".work-*/snapshot", ".s-*"])
def test_an_import_that_is_killed_leaves_nothing_that_the_next_one_does_not_remove(tiny_cloud: RealCloud, tmp_path: Path,
                                                                                    at: str) -> None:
    client, out = tiny_cloud.client(), tmp_path / "copy.tar"
    create(client, "data")
    pattern(tiny_cloud, volume_of(client, "data"), 0x5A, write=True)
    ended(client, client.create_disk_snapshot(diskName="data", diskSnapshotName="copy"))
    said(tiny_cloud, "export", "copy", "--to", str(out))
    words = [sys.executable, "-m", "skysail.cli.main", "snapshots", "import", str(out), "--name", "killed"]
    with subprocess.Popen(words, env={**os.environ, "SKYSAIL_DATA": str(tiny_cloud.folder)}, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as victim:
        # Before the last two it may be too late: they are there for moments.
        while victim.poll() is None and not list(tiny_cloud.config.snapshots_dir.glob(at)):
            time.sleep(0.002)
        late = victim.poll() is not None
        victim.kill()
    assert not late or at in (".work-*/snapshot", ".s-*")
    said(tiny_cloud, "import", str(out), "--name", "back")
    whole(tiny_cloud)
    names = {one["name"] for one in client.get_disk_snapshots()["diskSnapshots"]}
    assert {"copy", "back"} <= names <= {"copy", "back", "killed"}
    client.delete_disk(diskName="data")
    for name in names:
        client.delete_disk_snapshot(diskSnapshotName=name)
    whole(tiny_cloud)
