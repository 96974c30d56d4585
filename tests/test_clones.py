"""Clones: what they must not share with each other and with their template, and what of it is theirs alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clouds import RealCloud, eventually, running_real_cloud
from skysail.hypervisor.template import choose_way
from skysail.kit.errors import SkysailError

LOOK = r"""sudo sh -c '
echo random=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d " \n")
echo machine_id=$(cat /etc/machine-id)
echo boot_id=$(cat /proc/sys/kernel/random/boot_id)
echo hostname=$(hostname)
echo host_key=$(cut -d" " -f2 /etc/ssh/ssh_host_ed25519_key.pub)
echo mac=$(cat /sys/class/net/eth0/address)
echo address=$(ip -4 -o address show eth0 | sed "s/.*inet \([0-9.]*\).*/\1/")
echo random_seed=$(sha256sum < /var/lib/systemd/random-seed | cut -c1-64)
echo journal=$(ls /var/log/journal 2>/dev/null | tr "\n" ,)
echo forked=$(dmesg | grep -c "crng reseeded due to virtual machine fork")
'"""
ALONE = ("random", "machine_id", "boot_id", "hostname", "host_key", "mac", "address", "random_seed", "generation_id",
         "volume", "public")


def look(cloud: RealCloud, name: str) -> dict[str, str]:
    """What a guest says of itself at its first login."""
    return dict(line.split("=", 1) for line in cloud.ssh(name, LOOK, 300).splitlines() if "=" in line)


def opened(pid: int) -> dict[int, tuple[str, int]]:
    """The files that a process has open: path and flags (open(2)) by descriptor."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        info = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().splitlines()
                    if ":" in line)
        found[int(entry.name)] = (str(entry.readlink()), int(info["flags"].strip(), 8))
    return found


def test_the_way_to_the_memory_follows_qemu() -> None:
    old, new = "QEMU emulator version 7.2.22 (Debian 1:7.2)", "QEMU emulator version 10.0.2 (Debian 1:10.0.2)"
    assert (choose_way("auto", old), choose_way("auto", new)) == ("private", "mapped")
    assert (choose_way("private", old), choose_way("private", new)) == ("private", "private")
    assert choose_way("mapped", new) == "mapped"
    with pytest.raises(SkysailError, match="cannot map"):
        choose_way("mapped", old)


@pytest.mark.real
def test_clones_share_nothing(real_cloud: RealCloud) -> None:
    names = [f"clone-{number}" for number in range(5)]
    templates = {path: digest(path) for path in real_cloud.config.templates_dir.glob("*/*") if path.is_file()}
    made = real_cloud.launch(*names)
    try:
        with ThreadPoolExecutor(5) as pool:
            seen = dict(zip(names, pool.map(lambda name: look(real_cloud, name), names), strict=True))
        for name, instance in zip(names, made, strict=True):
            _, record = real_cloud.guest(name)
            pid = record["process"]["pid"]
            arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            assert f"vmgenid,id=vmgenid,guid={record['identity']['generation_id']}" in arguments
            seen[name] |= {"generation_id": record["identity"]["generation_id"], "public": instance["publicIpAddress"]}
            seen[name]["volume"] = alone_with_its_disk(real_cloud, pid)
            assert int(seen[name]["forked"]) >= 1
            assert seen[name]["hostname"] == name
            assert seen[name]["address"] == instance["privateIpAddress"]
            assert seen[name]["machine_id"] == record["identity"]["machine_id"]
            assert seen[name]["host_key"] == record["identity"]["host_public"].split()[1]
        for what in ALONE:
            assert len({guest[what] for guest in seen.values()}) == len(names), (what, seen)
        real_cloud.ssh("clone-0", "echo mine | tee mark /dev/shm/mark; sync")
        for name in names[1:4]:
            assert real_cloud.ssh(name, "cat mark /dev/shm/mark 2>/dev/null || echo nothing").strip() == "nothing"
    finally:
        real_cloud.delete(*names)
    assert {path: digest(path) for path in templates} == templates


def alone_with_its_disk(cloud: RealCloud, pid: int) -> str:
    """The one file that this guest's process may write as its disk; nothing that clones share is writable to it."""
    mapped = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
              if str(cloud.config.templates_dir) in line]
    assert mapped, "the template's memory is not mapped"
    assert {line[1][3] for line in mapped} == {"p"}, mapped
    files = opened(pid).values()
    shared = [(path, flags) for path, flags in files
              if path.startswith((str(cloud.config.templates_dir), str(cloud.config.images_dir)))]
    assert len(shared) >= 3  # memory, the template's disk, the image
    assert all(flags & os.O_ACCMODE == os.O_RDONLY for _, flags in shared), shared
    (volume,) = {path for path, _ in files if path.startswith(str(cloud.config.volumes_dir))}
    return volume


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


USE = "python3 -c 'held = bytearray(1400 << 20); held[::4096] = b\"x\" * len(held[::4096]); print(len(held) >> 20)'"


@pytest.mark.real
def test_a_larger_bundle_has_its_memory_and_disk_and_keeps_them(real_cloud: RealCloud) -> None:
    client = real_cloud.client()
    real_cloud.launch("roomy", bundle="small_3_0")

    def holds() -> None:
        def size() -> bool:
            told = real_cloud.ssh("roomy", "grep MemTotal /proc/meminfo; df -B1 --output=size / | tail -1; nproc").split()
            # The kernel keeps some of the memory, ext4 some of the disk.
            return int(told[1]) > 1850 << 10 and int(told[3]) > 58 << 30 and told[4] == "2"
        eventually(size, 120, "2 GB of memory, 60 GB of disk, 2 processors")
        assert real_cloud.ssh("roomy", USE, 300).strip() == "1400"

    try:
        holds()
        real_cloud.settled(client.stop_instance(instanceName="roomy")["operations"][0]["id"], 300)
        real_cloud.settled(client.start_instance(instanceName="roomy")["operations"][0]["id"], 600)
        holds()
    finally:
        real_cloud.delete("roomy")


def shows_its_own_memory(cloud: RealCloud) -> None:
    """Two clones, each with a private copy of the template's memory, are told apart and logged in to."""
    cloud.launch("one", "two")
    seen = [look(cloud, name) for name in ("one", "two")]
    for what in ("random", "machine_id", "host_key", "mac", "address"):
        assert seen[0][what] != seen[1][what]
    for name in ("one", "two"):
        _, record = cloud.guest(name)
        template = Path(record["parent"]).parent
        assert not (template / "memory").exists()
        assert msgspec.json.decode((template / "template.json").read_bytes())["memory"] == "private"
        assert "/memory" not in Path(f"/proc/{record['process']['pid']}/maps").read_text()
    cloud.delete("one", "two")


@pytest.mark.real
@pytest.mark.long
def test_clones_with_private_memory() -> None:
    with running_real_cloud(more='template_memory = "private"\n') as cloud:
        shows_its_own_memory(cloud)


@pytest.fixture
def old_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The QEMU in $SKYSAIL_TEST_OLD_QEMU (its program, from a release before 10) is the one that is found."""
    program = os.environ.get("SKYSAIL_TEST_OLD_QEMU", "")
    if not program:
        pytest.skip("SKYSAIL_TEST_OLD_QEMU names no old qemu-system-x86_64")
    folder = Path("/run/skysail-old-qemu")
    folder.mkdir(mode=0o755, exist_ok=True)
    wrapper = folder / "qemu-system-x86_64"
    data = Path(program).parent.parent / "share" / "qemu"
    # Unpacked beside the machine's own, it would look for the firmware beside itself.
    wrapper.write_text(f'#!/bin/sh\nexec {program} -L {data} -L /usr/share/seabios "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield subprocess.run([str(wrapper), "--version"], capture_output=True, text=True, check=True).stdout
    shutil.rmtree(folder)


@pytest.mark.real
def test_clones_under_a_qemu_that_cannot_map_read_only(old_qemu: str) -> None:
    assert choose_way("auto", old_qemu) == "private"
    with running_real_cloud() as cloud:
        shows_its_own_memory(cloud)
        told: dict[str, Any] = msgspec.json.decode(max(
            cloud.config.templates_dir.glob("*/template.json"), key=lambda path: path.stat().st_mtime).read_bytes())
        assert told["qemu"] == old_qemu.splitlines()[0]
