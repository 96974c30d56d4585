"""Memory per idle clone, what of it is its own and what it shares, against the same guest started cold.

Read from the kernel's account of each QEMU process (proc(5), smaps). *Private* is what the process wrote, and what the
machine gets back when it ends: dirty private pages and swap. *Shared* is the rest of what is resident: pages of the
template's memory file and of QEMU's own program, which the page cache holds once for all. The cold guest is one of the
clones after StopInstance and StartInstance: it boots from its disk, in memory of its own.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts import Parameter

from clouds import RealCloud, ensure_image, eventually, running_real_cloud
from skysail.cli import show
from skysail.kit.errors import SkysailError
from skysail.kit.process import require_root
from skysail.serve import blueprints, processes

BLUEPRINT = "debian_12"
Parts = dict[str, float]
COLUMNS = ("private", "of it the guest's memory", "of it QEMU", "shared", "resident", "proportional")


def memory_mib(pid: int, guest_mib: int = 512) -> Parts:
    """What process ``pid`` holds, in MiB. The guest's memory is the one mapping that is as large as the guest."""
    parts = dict.fromkeys(COLUMNS, 0.0)
    size = 0.0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        amount = float(value.split()[0]) / 1024 if value.endswith(" kB") else 0.0
        if name == "Size":
            size = amount
        elif name == "Rss":
            parts["resident"] += amount
        elif name == "Pss":
            parts["proportional"] += amount
        elif name in ("Private_Dirty", "Swap"):
            parts["private"] += amount
            parts["of it the guest's memory" if size >= guest_mib else "of it QEMU"] += amount
    parts["shared"] = max(parts["resident"] - parts["private"], 0.0)
    return parts


def settle(cloud: RealCloud, name: str, seconds: float) -> None:
    """Let a guest that was logged in to come to rest."""
    cloud.ssh(name, "true", 600)
    time.sleep(seconds)


def mean(taken: list[Parts]) -> Parts:
    return {name: statistics.mean(one[name] for one in taken) for name in COLUMNS}


def bench(*, clones: int = 4, idle: float = 30.0, json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Launch CLONES, let them be IDLE for so many seconds, and read what each holds."""
    require_root()
    show.step(f"image {BLUEPRINT}: looking for the one that this tree builds")
    digest = ensure_image(BLUEPRINT, show.step)
    with running_real_cloud(show.step) as cloud:
        blueprints.prepare(cloud.config, digest, "template: made, unless it is there", show.step)
        names = [f"clone-{number}" for number in range(clones)]
        show.step(f"launching {clones} clones")
        cloud.launch(*names)
        show.step(f"one login to each, then {idle:.0f} s of rest")
        for name in names:
            settle(cloud, name, 0)
        time.sleep(idle)
        taken = [memory_mib(process.pid) for process in processes.guests(cloud.config)]
        show.step(f"starting {names[0]} cold, one login, {idle:.0f} s of rest")
        others = {process.pid for process in processes.guests(cloud.config)}
        api = cloud.client()
        for change in (api.stop_instance, api.start_instance):
            cloud.settled(change(instanceName=names[0])["operations"][0]["id"], 600)
        settle(cloud, names[0], idle)
        (started,) = eventually(lambda: [process.pid for process in processes.guests(cloud.config)
                                         if process.pid not in others], 10, "the cold guest's process")
        cold = memory_mib(started)
    show.finish()
    clone = mean(taken)
    ratio = cold["private"] / clone["private"]
    show.table([{"MiB": name, "clone": f"{clone[name]:.1f}", "cold guest": f"{cold[name]:.1f}"} for name in COLUMNS],
               ["MiB", "clone", "cold guest"])
    show.line(f"{clones} clones of 512 MiB; private memory spreads from {min(one['private'] for one in taken):.1f} to "
              f"{max(one['private'] for one in taken):.1f} MiB")
    show.line(f"ratio {ratio:.1f}: private memory of a cold guest against a clone's")
    if json:
        show.as_json({"bench": "density", "ratio": ratio, "clones": clones, "private_mib": clone["private"],
                      "shared_mib": clone["shared"], "clone": clone, "cold": cold})


if __name__ == "__main__":
    try:
        cyclopts.run(bench)
    except SkysailError as failed:
        show.failure(failed)
        sys.exit(1)
