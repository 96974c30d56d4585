"""Images and templates that nobody needs go, whole; those that somebody needs stay, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import msgspec
import pytest

from clouds import Cloud, eventually
from skysail import doctor
from skysail.agent.stock import HIDDEN, Stock, free, recover
from skysail.cli.main import main
from skysail.contract.document import Volume
from skysail.hypervisor import personality, qemu
from skysail.hypervisor.accelerator import KVM, PROGRAM, Verdict
from skysail.hypervisor.record import Record
from skysail.hypervisor.template import Facts, Now
from skysail.images.library import Library, file_digest
from skysail.images.library import Manifest as Image
from skysail.kit.config import Config
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run
from skysail.resources import image_use
from skysail.storage import Copy, Manifest
from skysail.storage.files import FilePool

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="removing images needs root")


def nobody() -> Sequence[tuple[str, str]]:
    return ()


class House:
    """A data folder with three builds of one blueprint, and templates of the last two, one of an older QEMU."""

    def __init__(self, root: Path) -> None:
        self.config = Config(data=str(root))
        version = run([PROGRAM, "--version"]).decode().splitlines()[0]
        verdict = Verdict(accelerator="tcg", seen="not tried",
                          facts=f"{platform.release()} {version} {KVM.exists()} {qemu.cpu_model('kvm')}")
        self.config.accelerator_file.parent.mkdir(parents=True)
        self.config.accelerator_file.write_bytes(msgspec.json.encode(verdict))
        self.library = Library(self.config.images_dir)
        self.first, self.second, self.third = (self._image(number) for number in range(3))
        self.outdated = self._template(self.third, "0" * 16)
        self.superseded = self._template(self.second, Now.of(self.config).key(self.second, 2))
        self.current = self._template(self.third, Now.of(self.config).key(self.third, 2))

    def _image(self, number: int) -> str:
        with self.library.workplace() as work:
            file = work / "disk"
            run(["qemu-img", "create", "-q", "-f", "qcow2", str(file), "8M"])
            run(["qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} 0 1M", str(file)])
            digest = file_digest(file)
            self.library.add(file, Image(digest=digest, blueprint="debian_12", name="Debian", group="debian", version="12",
                                         user="admin", size_bytes=8 << 20, built=float(number), recipe="r"))
        return digest

    def _template(self, digest: str, key: str) -> str:
        folder = self.config.templates_dir / key
        folder.mkdir(parents=True)
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(self.library.path(digest)),
             str(folder / "disk.qcow2")])
        (folder / "memory").write_bytes(b"m" * 100_000)
        (folder / "template.json").write_bytes(msgspec.json.encode(Facts(disk_bytes=8 << 20, image=digest, vcpus=2)))
        return key

    def guest(self, **noted: object) -> None:
        """A guest that the agent noted."""
        folder = self.config.guests_dir / "g-1"
        folder.mkdir(parents=True, exist_ok=True)
        record = msgspec.structs.replace(Record(id="g-1", uid=1, identity=personality.make()), **noted)
        (folder / "guest.json").write_bytes(msgspec.json.encode(record))

    def disk(self, key: str) -> str:
        return str(self.config.templates_dir / key / "disk.qcow2")

    def holds(self) -> tuple[set[str], set[str]]:
        """The whole images and the templates that there are, by their names; nothing else lies there."""
        found = {one.digest for one in self.library.list()}
        assert {path.name for path in self.config.images_dir.iterdir()} == {
            f"{digest}.{kind}" for digest in found for kind in ("json", "qcow2")}
        assert all(file_digest(self.library.path(digest)) == digest for digest in found)
        for folder in self.config.templates_dir.iterdir():
            assert {path.name for path in folder.iterdir()} == {"disk.qcow2", "memory", "template.json"}
        return found, {path.name for path in self.config.templates_dir.iterdir()}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "data")


def test_what_is_old_and_needed_by_nobody_goes(house: House) -> None:
    stock = Stock(house.config, nobody)
    spare = {piece.path.stem for piece in free(stock.look())}
    assert spare == {house.first, house.second, house.outdated, house.superseded}
    gone = stock.remove(lambda piece: piece.old and not piece.needed)
    assert {piece.path.stem for piece in gone} == spare
    assert sum(piece.bytes for piece in gone) > 2 << 20
    assert house.holds() == ({house.third}, {house.current})
    assert free(stock.look()) == []


def test_an_image_goes_with_its_templates(house: House) -> None:
    Stock(house.config, nobody).remove(lambda piece: piece.path.stem == house.third)
    assert house.holds() == ({house.first, house.second}, {house.superseded})


def test_a_template_that_a_guest_stands_on_stays_with_its_image(house: House) -> None:
    house.guest(parent=house.disk(house.superseded))
    stock = Stock(house.config, nobody)
    assert {piece.path.stem for piece in free(stock.look())} == {house.first, house.outdated}
    for name in (house.second, house.superseded):
        with pytest.raises(SkysailError, match="cannot be removed: the instance g-1 stands on it"):
            stock.remove(lambda piece, name=name: piece.path.stem in (name, house.first))  # type: ignore[misc]
    assert house.holds() == ({house.first, house.second, house.third}, {house.outdated, house.superseded, house.current})


def test_a_note_from_before_the_data_folder_was_moved_counts(house: House) -> None:
    house.guest(parent=f"/elsewhere/templates/{house.superseded}/disk.qcow2")
    assert house.superseded not in {piece.path.stem for piece in free(Stock(house.config, nobody).look())}


@pytest.mark.parametrize("how", ["cold", "restored", "copying", "snapshot", "rows"])
def test_who_needs_an_image(house: House, how: str) -> None:
    path = str(house.library.path(house.first))
    manifest = Manifest(id="s-1", consistency="off", copies=(
        Copy(volume="g-1", file="g-1.qcow2", parents=("/data/snapshots/s-0/g-0.qcow2", path), virtual_bytes=1),))
    users = nobody
    if how == "cold":
        house.guest(parent=path)
    elif how == "restored":
        house.guest(parents=("/data/snapshots/s-0/g-0.qcow2", path))
    elif how == "copying":
        house.guest(copying={"s-1": manifest})
    elif how == "snapshot":
        folder = house.config.snapshots_dir / "s-1"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    else:
        def users() -> Sequence[tuple[str, str]]:
            return [(house.first, "the snapshot mine is of a server that is made of it")]
    stock = Stock(house.config, users)
    with pytest.raises(SkysailError, match=r"cannot be removed: the (instance|snapshot)"):
        stock.remove(lambda piece: piece.path.stem == house.first)
    assert house.first in house.holds()[0]
    assert house.first not in {piece.path.stem for piece in free(stock.look())}


def test_a_note_that_cannot_be_read_keeps_everything(house: House) -> None:
    house.guest()
    (house.config.guests_dir / "g-1" / "guest.json").write_text("{")
    with pytest.raises(SkysailError, match="nobody knows what is still needed"):
        Stock(house.config, nobody).remove(lambda piece: piece.old)
    assert len(house.holds()[0]) == 3


def test_a_guest_that_was_noted_meanwhile_has_its_parents_back(house: House) -> None:
    asked = []

    def users() -> Sequence[tuple[str, str]]:
        asked.append(sorted(path.name for path in house.config.images_dir.glob(f"{HIDDEN}*")))
        if len(asked) == 2:
            house.guest(parent=house.disk(house.superseded))
        return ()

    with pytest.raises(SkysailError, match="the instance g-1 stands on it"):
        Stock(house.config, users).remove(lambda piece: piece.path.stem == house.second)
    assert asked == [[], [f"{HIDDEN}{house.second}.qcow2"]]
    assert len(house.holds()[0]) == len(house.holds()[1]) == 3


def test_over_what_is_hidden_no_volume_is_made(house: House) -> None:
    """That is what the order of notes and looks stands on."""
    volume, pool = Volume(id="g-1", image=house.first, size_gib=1), FilePool(house.config.volumes_dir)
    path = house.library.path(house.first)
    path.rename(path.with_name(HIDDEN + path.name))
    with pytest.raises(ProcessFailed):
        asyncio.run(pool.ensure(volume, path, 1 << 30, 1))
    recover(house.config)
    assert asyncio.run(pool.ensure(volume, path, 1 << 30, 1)).exists()


def test_what_another_cloud_may_use_stays(house: House, tmp_path: Path) -> None:
    shutil.move(house.config.images_dir, tmp_path / "shared")
    shared = msgspec.structs.replace(house.config, images=str(tmp_path / "shared"))
    stock = Stock(shared, nobody)
    assert {piece.kind for piece in free(stock.look())} == {"template"}
    with pytest.raises(SkysailError, match="another cloud may use what lies there"):
        stock.remove(lambda piece: piece.path.stem == house.first)


DOOMED = """
import os, sys
from skysail.agent.stock import Stock
from skysail.kit.config import Config
left = int(sys.argv[2])
def step(event, args):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and "{root}" in str(args[0]) + str(args[1:2]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
stock = Stock(Config(data=sys.argv[1]), lambda: ())
sys.addaudithook(step)
stock.remove(lambda piece: piece.old and not piece.needed)
"""


def test_killed_at_any_step_a_piece_is_whole_or_gone(house: House, tmp_path: Path) -> None:
    everything = house.holds()
    seen = set()
    for steps in range(100):
        data = tmp_path / f"data-{steps}"
        shutil.copytree(house.config.root, data)
        done = subprocess.run([sys.executable, "-c", DOOMED.replace("{root}", str(tmp_path)), str(data), str(steps)],
                              check=False)
        house.config = Config(data=str(data))
        house.library = Library(house.config.images_dir)
        left = {one.digest for one in house.library.list()}
        assert house.third in left  # what stays was never touched
        recover(house.config)
        images, templates = house.holds()
        assert {house.third} <= images <= everything[0]
        assert {house.current} <= templates <= everything[1]
        seen.add((len(images), len(templates)))
        house.config = Config(data=str(tmp_path / "data"))
        shutil.rmtree(data)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert seen == {(3, 3), (3, 2), (3, 1), (2, 1), (1, 1)}


def test_the_verbs_say_what_goes(house: House, monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SKYSAIL_DATA", house.config.data)
    house.guest(parent=house.disk(house.superseded))
    assert main(["images", "list", "--json"]) == 0
    listed = {one["digest"]: one for one in json.loads(capsys.readouterr().out)}
    assert [listed[digest]["offered"] for digest in (house.first, house.second, house.third)] == [False, False, True]
    assert listed[house.first]["needed"] == ""
    assert listed[house.second]["needed"] == "the instance g-1 stands on it"
    assert main(["images", "list", "--unused", "--json"]) == 0
    spare = json.loads(capsys.readouterr().out)
    assert {piece["name"] for piece in spare} == {house.first, house.outdated}
    finding = doctor.images(house.config)
    assert (finding.verdict, finding.cure) == ("good", "sudo ./skysail images remove --unused")
    for wrong, words in (([], "not clear"), (["debian_13"], "no image debian_13"), ([house.second[:10]], "stands on it")):
        assert main(["images", "remove", *wrong]) == 1
        assert words in capsys.readouterr().err
    assert main(["images", "remove", "--unused", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sorted(spare, key=lambda piece: piece["kind"], reverse=True)
    assert main(["images", "remove", house.third[:12]]) == 0
    assert "MiB freed" in capsys.readouterr().out
    assert house.holds() == ({house.second}, {house.superseded})
    assert doctor.images(house.config).cure == ""


def test_the_rows_tell_of_instances_and_snapshots(cloud: Cloud) -> None:
    client = cloud.client()
    eventually(lambda: client.get_blueprints()["blueprints"], 30, "a blueprint is ready")
    assert image_use.known(cloud.config) == []
    client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                            bundleId="nano_3_0")
    eventually(lambda: client.get_instance(instanceName="one")["instance"]["state"]["name"] == "running")
    client.create_instance_snapshot(instanceName="one", instanceSnapshotName="kept")
    assert {words for digest, words in image_use.known(cloud.config) if digest == "0" * 64} == {
        "the instance one is made of it", "the snapshot kept is of a server that is made of it"}
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket))) as agent:
        before = agent.get("http://agent/report").json()["sequence"]
        assert agent.post("http://agent/images").status_code == 204
        assert agent.get("http://agent/report").json()["sequence"] > before
