"""The facts of this machine, as its agent tells them."""

from __future__ import annotations

import logging
import platform
import shutil
from pathlib import Path

from skysail import __version__
from skysail.contract.facts import HostFacts
from skysail.hypervisor import offer, qemu, userfault
from skysail.hypervisor.accelerator import Verdict, probe
from skysail.hypervisor.offer import Offer
from skysail.hypervisor.process import PROGRAM
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import membership
from skysail.storage.ceph import Cluster

log = logging.getLogger(__name__)
# A host that cannot reach its cluster is known all the same.
ANSWER_SECONDS = 10.0
CPUINFO = Path("/proc/cpuinfo")


class Facts:
    """Tells what this machine is at the moment. QEMU, which takes a while to answer, is asked again only when its program
    is another one. ``boot`` as in the facts."""

    def __init__(self, config: Config, host: str, boot: str = "") -> None:
        self._boot = boot
        self._config = config
        self._host = host
        self._asked: tuple[object, Verdict, Offer] | None = None

    def tell(self) -> HostFacts:
        """Blocks for a second at its first call. Raises SkysailError when QEMU does not say what it offers."""
        verdict, found = self._simulated() if self._config.engines == "sim" else self._real()
        cpu, flags = processor(CPUINFO.read_text())
        return HostFacts(
            host=self._host, program=__version__, kernel=platform.release(), qemu=found.qemu,
            accelerator=verdict.accelerator if self._config.engines == "real" else "sim", accelerator_seen=verdict.seen,
            cpu=cpu, cpu_flags=flags, cpu_models=found.cpu_models, machine_types=found.machine_types,
            guest_cpu=qemu.cpu_model(verdict.accelerator), guest_machine=qemu.MACHINE,
            underlay=membership.underlay(self._config), pool=self._pool(), boot=self._boot,
            no_post_copy=userfault.hindrance(found.qemu) if self._config.engines == "real" else "")

    def _pool(self) -> str:
        if self._config.storage != "ceph":
            return ""
        if self._config.engines == "sim":
            return f"sim:{self._config.ceph_pool}"
        try:
            return Cluster.of(self._config, seconds=ANSWER_SECONDS).home()
        except SkysailError as away:
            # Neither files nor a pool that any other host could be in.
            log.warning("which Ceph cluster this host's disks are in is not known yet: %s", away)
            return f"ceph:not known to {self._host} yet"

    def _simulated(self) -> tuple[Verdict, Offer]:
        verdict = Verdict(accelerator="tcg", seen="no guest is run", facts="")
        return verdict, Offer(qemu="simulated", machine_types=(qemu.MACHINE,), cpu_models=(qemu.cpu_model("tcg"),))

    def _real(self) -> tuple[Verdict, Offer]:
        program = Path(shutil.which(PROGRAM) or PROGRAM).stat()
        # An upgrade puts another file in its place.
        marks = (program.st_ino, program.st_mtime_ns, program.st_size)
        if self._asked is None or self._asked[0] != marks:
            verdict = probe(self._config.accelerator_file)
            self._asked = marks, verdict, offer.ask(verdict.accelerator)
        return self._asked[1:]


def processor(cpuinfo: str) -> tuple[str, tuple[str, ...]]:
    """Name and flags of the processor, from proc(5), /proc/cpuinfo. Of several processors the first speaks for all."""
    said = dict(reversed([(name.strip(), value.strip()) for name, colon, value in (
        line.partition(":") for line in cpuinfo.splitlines()) if colon]))
    return said.get("model name", ""), tuple(sorted(said.get("flags", "").split()))
