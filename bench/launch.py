"""From CreateInstances to an SSH login, against booting the same image cold with plain QEMU, in one run on one machine.

Three ways to a login, all with the same image, processors, memory, disk size and accelerator:

plain         ``qemu-system-x86_64`` with an overlay of the image, user networking and a NoCloud seed, as somebody without
              Skysail would start it; cloud-init makes host keys, configures the network and installs the owner's key
no cloud-init the same disk started a second time, cloud-init switched off: keys, network and user are there already
Skysail       CreateInstances, GetOperation until it succeeded, GetInstanceAccessDetails, ssh with the certificate

The host's page cache is warm for all of them: each is measured after something has read the image or the template.
"""

from __future__ import annotations

import contextlib
import json as jsons
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import httpx
from cyclopts import Parameter

from clouds import RealCloud, ensure_image, eventually, running_real_cloud
from skysail.cli import show
from skysail.hypervisor import personality
from skysail.hypervisor.accelerator import probe
from skysail.images.library import Library
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root
from skysail.resources.catalog import BUNDLES
from skysail.serve import blueprints, customer, processes

BLUEPRINT, BUNDLE = "debian_12", "nano_3_0"
BOOT_SECONDS = 600
TICKS = os.sysconf("SC_CLK_TCK")
Stages = dict[str, float]


# Plain QEMU


class Plain:
    """One guest as somebody without Skysail would run it: an overlay, a seed, a forwarded port on loopback."""

    def __init__(self, folder: Path, image: Path, accelerator: str) -> None:
        self._folder = folder
        self._accelerator = accelerator
        self._key = folder / "key"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, folder / "disk.qcow2",
                        f"{BUNDLES[BUNDLE]['diskSizeInGb']}G"], check=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._key], check=True)
        public = self._key.with_suffix(".pub").read_text().strip()
        personality.write_seed({
            "meta-data": jsons.dumps({"instance-id": "plain", "local-hostname": "plain"}),
            "user-data": "#cloud-config\n" + jsons.dumps({"ssh_authorized_keys": [public]})}, folder / "seed.iso")

    def boot(self) -> Stages:
        """Start it; the seconds until sshd answers, until a login succeeded, and of the processors until then."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = found.getsockname()[1]
        bundle = BUNDLES[BUNDLE]
        began = time.monotonic()
        self._process = subprocess.Popen([
            "qemu-system-x86_64", "-machine", "q35", "-accel", self._accelerator, "-smp", str(bundle["cpuCount"]),
            "-m", str(round(bundle["ramSizeInGb"] * 1024)), "-display", "none",
            "-serial", f"file:{self._folder / 'serial.log'}",
            "-drive", f"file={self._folder / 'disk.qcow2'},format=qcow2,if=virtio",
            "-drive", f"file={self._folder / 'seed.iso'},format=raw,if=virtio,readonly=on",
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self._port}-:22",
            "-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"])
        self._await_banner(began + BOOT_SECONDS)
        answered = time.monotonic() - began
        while self._ssh("true") != 0:
            if time.monotonic() > began + BOOT_SECONDS:
                raise SkysailError("no login to the plain guest", f"its serial log: {self._folder / 'serial.log'}")
            time.sleep(0.1)
        return {"sshd answers": answered, "login": time.monotonic() - began, "QEMU's CPU": cpu_seconds(self._process.pid)}

    def _await_banner(self, end: float) -> None:
        """Until sshd says its name. QEMU takes the connection long before the guest does, so that a new one is opened
        twice a second, and each is given three seconds."""
        waiting: dict[socket.socket, float] = {}
        try:
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    waiting[socket.create_connection(("127.0.0.1", self._port), 1)] = time.monotonic() + 3
                for one in select.select(list(waiting), [], [], 0.5)[0]:
                    with contextlib.suppress(OSError):
                        if one.recv(4) == b"SSH-":
                            return
                    del waiting[one]
                    one.close()
                for one in [one for one, until in waiting.items() if until < time.monotonic()]:
                    del waiting[one]
                    one.close()
            raise SkysailError("the plain guest's sshd does not answer", f"its serial log: {self._folder / 'serial.log'}")
        finally:
            for one in waiting:
                one.close()

    def _ssh(self, *command: str) -> int:
        return subprocess.run([
            "ssh", "-F", "none", "-p", str(self._port), "-i", self._key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
            "-o", "ConnectTimeout=30", "admin@127.0.0.1", *command], capture_output=True, check=False).returncode

    def switch_cloud_init_off(self) -> None:
        """For the boots to come; the guest is shut down in good order."""
        if self._ssh("sudo touch /etc/cloud/cloud-init.disabled && sync && sudo systemctl poweroff") not in (0, 255):
            raise SkysailError("cloud-init could not be switched off in the plain guest")
        assert self._process is not None
        self._process.wait(120)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def cold(image: Path, accelerator: str, boots: int) -> tuple[list[Stages], list[Stages]]:
    """``boots`` times each: with cloud-init and a seed, then the same disk with cloud-init switched off."""
    seeded, without = [], []
    for number in range(boots):
        with tempfile.TemporaryDirectory(prefix="sky-plain-") as folder:
            plain = Plain(Path(folder), image, accelerator)
            try:
                show.step(f"plain QEMU, cloud-init with a NoCloud seed: boot {number + 1} of {boots}")
                seeded.append(plain.boot())
                plain.switch_cloud_init_off()
                show.step(f"plain QEMU, cloud-init switched off: boot {number + 1} of {boots}")
                without.append(plain.boot())
            finally:
                plain.end()
    return seeded, without


# Skysail


def create(cloud: RealCloud, api: Any, *names: str) -> dict[str, str]:
    """CreateInstances; the operation of each."""
    made = api.create_instances(instanceNames=list(names), availabilityZone="us-east-1a", blueprintId=BLUEPRINT,
                                bundleId=BUNDLE)["operations"]
    return {operation["resourceName"]: operation["id"] for operation in made}


def follow(api: Any, name: str, operation: str, began: float) -> Stages:
    """Wait for the instance and log in to it once; the seconds since ``began`` at each stage."""
    stages: Stages = {}
    while not (found := api.get_operation(operationId=operation)["operation"])["isTerminal"]:
        time.sleep(0.05)
    if found["status"] != "Succeeded":
        raise SkysailError(f"{name} was not launched: {found.get('errorDetails')}")
    stages["operation succeeded"] = time.monotonic() - began
    access = api.get_instance_access_details(instanceName=name, protocol="ssh")["accessDetails"]
    stages["access details"] = time.monotonic() - began
    with tempfile.TemporaryDirectory(prefix="sky-login-") as folder:
        command = customer.login(access, Path(folder), ["true"])
        while subprocess.run(command, capture_output=True, check=False).returncode != 0:
            if time.monotonic() - began > BOOT_SECONDS:
                raise SkysailError(f"no login to {name}")
            time.sleep(0.05)
    stages["login"] = time.monotonic() - began
    return stages


def reported(cloud: RealCloud) -> dict[str, Stages]:
    """The stages of each guest's launch, as its host reports them: seconds since the host began with it."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(cloud.config.agent_socket)), base_url="http://agent") as http:
        return {guest["id"]: guest["stages"] for guest in http.get("/report").json()["guests"] if guest["stages"]}


def forget(cloud: RealCloud, api: Any, *names: str) -> None:
    """Delete instances, and wait until their processes and folders are gone."""
    for name in names:
        api.delete_instance(instanceName=name)
    eventually(lambda: not list(cloud.config.guests_dir.iterdir()) and not processes.guests(cloud.config), 120,
               "the guests are gone")


def launch(cloud: RealCloud, api: Any, name: str) -> tuple[Stages, Stages]:
    """One launch and its login: the stages that the customer sees, and those of the host."""
    began = time.monotonic()
    operations = create(cloud, api, name)
    answered = time.monotonic() - began
    seen = {"API answered": answered} | follow(api, name, operations[name], began)
    (inside,) = reported(cloud).values()
    forget(cloud, api, name)
    return seen, inside


class GuestAgent:
    """qemu-guest-agent of one guest, asked over its socket as soon as that is there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.answer_seconds = 0.0
        self._used_at_first = 0.0

    def first_answer(self) -> None:
        """Wait for its first answer and note how long after QEMU's spawn it came (in steps of 10 ms, as the kernel
        counts a process's start), and the processor time that the guest had used by then."""
        path = self._folder / "run" / "agent.sock"
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(OSError), self._asked(path, "guest-ping"):
                break
            time.sleep(0.002)
        answered = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.answer_seconds = answered - self._process()["started"] / TICKS
        self._used_at_first = self._used()

    def used_since(self) -> float:
        """Processor seconds that the guest's own kernel counted since the first answer."""
        return self._used() - self._used_at_first

    def qemu_cpu_seconds(self) -> float:
        """Processor seconds of the QEMU process, since its start."""
        return cpu_seconds(self._process()["pid"])

    def _process(self) -> dict[str, int]:
        found: dict[str, int] = jsons.loads((self._folder / "guest.json").read_text())["process"]
        return found

    def _used(self) -> float:
        with self._asked(self._folder / "run" / "agent.sock", "guest-get-cpustats") as answer:
            return sum(one.get(name, 0) for one in answer["return"]
                       for name in ("user", "nice", "system", "irq", "softirq")) / 1000

    @contextlib.contextmanager
    def _asked(self, path: Path, command: str) -> Iterator[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(120)
            channel.connect(str(path))
            channel.sendall(jsons.dumps({"execute": command}).encode() + b"\n")
            yield jsons.loads(channel.makefile().readline())


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def machine_busy_seconds() -> float:
    """Processor seconds that this machine has been busy since its boot, with whatever (proc(5), stat)."""
    words = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:8]]
    return (sum(words) - words[3] - words[4]) / TICKS


def watched(cloud: RealCloud, api: Any, *names: str) -> dict[str, Any]:
    """Launch in one call with every guest agent watched and every guest logged in to, then delete; the figures."""
    ours = [process.pid for process in cloud.processes.values()]
    busy, before = machine_busy_seconds(), [cpu_seconds(pid) for pid in ours]
    began = time.monotonic()
    with ThreadPoolExecutor(2 * len(names)) as pool:
        operations = create(cloud, api, *names)
        logins = [pool.submit(follow, api, name, operation, began) for name, operation in operations.items()]
        folders: list[Path] = eventually(
            lambda: found if len(found := sorted(cloud.config.guests_dir.iterdir())) == len(names) else None, 60,
            "the host holds the guests")
        agents = [GuestAgent(folder) for folder in folders]
        for asked in [pool.submit(agent.first_answer) for agent in agents]:
            asked.result()
        stages = [login.result() for login in logins]
    seconds = time.monotonic() - began
    count, processors = len(names), os.cpu_count() or 1
    busy = machine_busy_seconds() - busy
    figures = {
        "instances": count, "seconds": seconds,
        "last_running_seconds": max(one["operation succeeded"] for one in stages),
        "agent_answer_seconds": statistics.median(agent.answer_seconds for agent in agents),
        "cpu_seconds_per_launch": {
            "qemu": sum(agent.qemu_cpu_seconds() for agent in agents) / count,
            "agent and controller": sum(cpu_seconds(pid) for pid in ours) / count - sum(before) / count,
            "inside the guest": sum(agent.used_since() for agent in agents) / count,
            "whole machine": busy / count,
        },
        "processors_busy": busy / (seconds * processors),
    }
    forget(cloud, api, *names)
    return figures


def bound(figures: dict[str, Any]) -> str:
    """What kept the launches of one call from being done sooner."""
    share, used = figures["processors_busy"], figures["cpu_seconds_per_launch"]
    if share > 0.85:
        return (f"the processors: {share:.0%} busy; {used['qemu'] / used['whole machine']:.0%} of that was the guests, "
                f"{used['agent and controller'] / used['whole machine']:.0%} agent and controller")
    return f"waiting: the processors were only {share:.0%} busy"


def medians(taken: list[Stages]) -> Stages:
    return {name: statistics.median(one[name] for one in taken) for name in taken[0]}


def bench(*, launches: int = 5, boots: int = 1, together: int = 10,
          json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Compare LAUNCHES one after the other with BOOTS of plain QEMU, then launch TOGETHER instances in one call."""
    require_root()
    show.step(f"image {BLUEPRINT}: looking for the one that this tree builds")
    digest = ensure_image(BLUEPRINT, show.step)
    with running_real_cloud() as cloud:
        blueprints.prepare(cloud.config, digest, "template: made, unless it is there", show.step)
        accelerator = probe(cloud.config.accelerator_file).accelerator
        image = Library(cloud.config.images_dir).path(digest)
        seeded, without = cold(image, accelerator, boots)
        api = cloud.client()
        eventually(lambda: api.get_blueprints()["blueprints"], 30, "the blueprint is ready")
        show.step("Skysail: a first launch, not counted")
        launch(cloud, api, "first")
        taken = []
        for number in range(launches):
            show.step(f"Skysail: launch {number + 1} of {launches}")
            taken.append(launch(cloud, api, f"launch-{number}"))
        show.step("Skysail: one launch, its guest agent watched")
        alone = watched(cloud, api, "watched")
        show.step(f"Skysail: {together} instances in one call")
        crowd = watched(cloud, api, *(f"together-{number}" for number in range(together)))
    show.finish()
    plain, off = medians(seeded), medians(without)
    seen, inside = medians([one for one, _ in taken]), medians([one for _, one in taken])
    ratio, ratio_off = plain["login"] / seen["login"], off["login"] / seen["login"]
    rows = [{"way": way, "stage": stage, "seconds": f"{seconds:.2f}"}
            for way, stages in (("plain QEMU, cloud-init and seed", plain), ("plain QEMU, no cloud-init", off),
                                ("Skysail, as the customer sees it", seen), ("Skysail, on the host", inside))
            for stage, seconds in stages.items()]
    show.table(rows, ["way", "stage", "seconds"])
    show.line(f"ratio {ratio:.1f} against cloud-init with a seed, {ratio_off:.1f} against no cloud-init ({accelerator})")
    show.line(f"guest agent answers {alone['agent_answer_seconds']:.2f} s after the spawn")
    show.line(f"{together} instances in one call: all logged in after {crowd['seconds']:.1f} s, all running after "
              f"{crowd['last_running_seconds']:.1f} s; bound by {bound(crowd)}")
    show.table([{"CPU seconds per launch": name, "alone": f"{seconds:.2f}",
                 f"{together} together": f"{crowd['cpu_seconds_per_launch'][name]:.2f}"}
                for name, seconds in alone["cpu_seconds_per_launch"].items()],
               ["CPU seconds per launch", "alone", f"{together} together"])
    if json:
        show.as_json({
            "bench": "launch", "ratio": ratio, "ratio_without_cloud_init": ratio_off, "accelerator": accelerator,
            "plain_seconds": plain["login"], "plain_without_cloud_init_seconds": off["login"],
            "launch_seconds": seen["login"], "launches_seconds": [one["login"] for one, _ in taken],
            "stages": {"plain": plain, "plain_without_cloud_init": off, "launch": seen, "host": inside},
            "agent_answer_seconds": alone["agent_answer_seconds"], "alone": alone,
            "together": crowd | {"bound_by": bound(crowd)}})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
