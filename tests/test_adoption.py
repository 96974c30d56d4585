"""Guests outlive the agent; what they do by themselves is told apart; a reboot of the machine brings back what ran."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from clouds import RealCloud, eventually
from crashing import Doom, create, guest_of, leaks, pid_of, qemus, ready, rows, state, whole
from skysail.hypervisor import confinement
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.serve import processes

pytestmark = pytest.mark.real


def boot(cloud: RealCloud, name: str) -> str:
    return cloud.ssh(name, "cat /proc/sys/kernel/random/boot_id").strip()


def addresses(cloud: RealCloud) -> dict[str, tuple[str, str]]:
    return {found["name"]: (found["publicIpAddress"], found["privateIpAddress"])
            for found in cloud.client().get_instances()["instances"]}


def power_cut(cloud: RealCloud) -> None:
    """What a reboot of the machine does to this cloud: every process gone at once, no network, no sockets, no cgroups."""
    for name in ("agent", "controller"):
        cloud.kill(name)
    for pid, _ in qemus(cloud):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not processes.guests(cloud.config), what="no guest is left")
    asyncio.run(LinuxFabric(Layout.of(cloud.config)).teardown())
    shutil.rmtree(cloud.folder / "run")
    (cloud.folder / "run").mkdir()
    for sock in cloud.config.guests_dir.glob("*/run/*.sock"):
        sock.unlink()


def test_guests_outlive_agents_and_come_back_after_a_power_cut(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    cloud.launch("stays", "goes")
    cloud.ssh("stays", "echo kept > keep; sync")
    pids, boots = {name: pid_of(cloud, name) for name in ("stays", "goes")}, boot(cloud, "stays")

    cloud.kill("agent")
    assert cloud.ssh("stays", "cat keep").strip() == "kept", "a guest does not need an agent"
    cloud.start("agent")
    whole(cloud)
    assert {name: pid_of(cloud, name) for name in pids} == pids and boot(cloud, "stays") == boots

    # By itself, while no agent looks: still told from a death.
    cloud.ssh("goes", "sudo systemd-run --on-active=2 systemctl poweroff")
    cloud.kill("agent")
    record = cloud.config.guests_dir / guest_of(cloud, "goes") / "run"
    eventually(lambda: "Power down" in (record / "serial.log").read_text(errors="replace"), 600, "it powers itself off")
    cloud.start("agent")
    eventually(lambda: state(cloud, "goes") == "stopped", what="the instance follows")
    whole(cloud)
    assert [owner for _, owner in qemus(cloud)] == [guest_of(cloud, "stays")]

    os.kill(pid_of(cloud, "stays"), signal.SIGKILL)
    eventually(lambda: state(cloud, "stays") == "pending", what="its state says so")
    eventually(lambda: state(cloud, "stays") == "running", 900, "it is restarted")
    whole(cloud)
    assert cloud.ssh("stays", "cat keep").strip() == "kept" and boot(cloud, "stays") != boots

    before = addresses(cloud)
    power_cut(cloud)
    cloud.start("agent")
    cloud.start("controller")
    eventually(lambda: qemus(cloud) and state(cloud, "stays") == "running" and not leaks(cloud), 900, "what ran runs again")
    assert state(cloud, "goes") == "stopped" and addresses(cloud) == before
    assert [owner for _, owner in qemus(cloud)] == [guest_of(cloud, "stays")]
    assert cloud.ssh("stays", "cat keep").strip() == "kept"


@pytest.mark.long
def test_the_agent_dies_at_every_step_of_a_clone(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    doom = Doom(cloud, "agent")
    ready(cloud, "debian_12")
    while True:
        died = doom.during("create", lambda: create(cloud, "one", "debian_12"))
        # Once it has its identity it is somebody's server: the process that was there is there.
        guest = guest_of(cloud, "one")
        if guest in doom.survivors:
            assert pid_of(cloud, "one") == doom.survivors[guest], died
        if died is None or "ask" in died or guest in doom.survivors:
            assert cloud.ssh("one", "hostname").strip() == "one"
        cloud.client().delete_instance(instanceName="one")
        whole(cloud)
        if died is None:
            break
    assert not doom.missed(), doom.deaths
    assert {"Channel.ask a message", "QemuGuest.save made ours grown ipv6",
            "QemuGuest.save starts"} <= set(doom.deaths["create"])


def test_a_reboot_that_an_agent_did_not_live_to_see_happens_once(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    doom = Doom(cloud, "agent")
    cloud.launch("one")
    pid = pid_of(cloud, "one")

    def boots() -> int:
        return int(cloud.ssh("one", "sudo journalctl --list-boots -q --no-pager | wc -l"))

    assert boots() == 1
    doom.disarm()
    cloud.client().reboot_instance(instanceName="one")
    steps = cloud.folder / "steps"
    eventually(lambda: steps.exists() and "guest-shutdown" in steps.read_text(), 300, "the guest is asked to reboot")
    time_to_be_heard = rows(cloud, "SELECT observed_reboots FROM guests")
    doom.start()
    whole(cloud, 900)
    assert time_to_be_heard == [{"observed_reboots": 0}]
    assert boots() == 2 and pid_of(cloud, "one") == pid


def test_a_guest_waits_for_room_on_a_full_disk_and_goes_on(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    volumes = str(cloud.config.volumes_dir)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "tmpfs", volumes], check=True)
    try:
        cloud.launch("one")
        pid, boots = pid_of(cloud, "one"), boot(cloud, "one")
        cloud.ssh("one", "sudo systemd-run --unit fill dd if=/dev/urandom of=/big bs=1M count=120 oflag=direct")
        eventually(lambda: state(cloud, "one") == "pending", 120, "its state says that it does not run")
        eventually(lambda: "disk" in rows(cloud, "SELECT reason FROM guests")[0]["reason"], 60, "and why")
        subprocess.run(["mount", "-o", "remount,size=600m", volumes], check=True)
        eventually(lambda: state(cloud, "one") == "running", 120, "it goes on")
        written = cloud.ssh("one", "while systemctl is-active -q fill; do sleep 1; done; stat -c %s /big")
        assert int(written) == 120 << 20
        assert pid_of(cloud, "one") == pid and boot(cloud, "one") == boots
        cloud.client().delete_instance(instanceName="one")
        whole(cloud)
    finally:
        subprocess.run(["umount", "--lazy", volumes], check=True)


def test_a_template_that_an_agent_did_not_live_to_finish_is_swept_away(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    cloud.stop()
    # Beside the shared templates, which other clouds use at this moment, an empty folder of its own.
    own = cloud.folder / "templates"
    settings = (cloud.folder / "skysail.toml").read_text()
    (cloud.folder / "skysail.toml").write_text(settings.replace(str(cloud.config.templates_dir), str(own)))
    cloud.start("agent")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket)), timeout=300) as http:
        image = http.get("http://agent/report").json()["images"][0]["digest"]
        asking = threading.Thread(target=_prepare, args=(http, image))
        asking.start()
        eventually(lambda: list(own.glob(".*/run/qmp.sock")), 60, "a template boots")
        (work,) = own.glob(".*")
        cloud.kill("agent")
        asking.join()
    group = "template-" + work.name.split("-")[1]
    assert any(folder.exists() for folder in confinement._folders(group)), "it is worth sweeping"
    cloud.start("agent")
    assert not list(own.iterdir()) and not any(folder.exists() for folder in confinement._folders(group))
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(work).encode() in arguments(path)]


def _prepare(http: httpx.Client, image: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        http.post("http://agent/prepare", params={"image": image, "vcpus": 1})


def arguments(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""
