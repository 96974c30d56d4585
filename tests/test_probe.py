"""What a probe sees of an address that is away for a moment, and of a connection that breaks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds import eventually, taken_slot
from skysail.kit.errors import SkysailError
from skysail.network.underlay import Underlay
from skysail.serve.probe import Probe

pytestmark = pytest.mark.real
SERVER = """import socket
listener = socket.create_server(("0.0.0.0", 22))
print("there", flush=True)
taken = listener.accept()[0]
taken.sendall(b"SSH-2.0-test\\r\\n")
while said := taken.recv(100):
    taken.sendall(said)
"""


class Far:
    """A place at the other end of a cable."""

    def __init__(self, underlay: Underlay) -> None:
        self.address = underlay.address(1)
        self._cable = ["ip", "-n", f"{underlay.name}-net", "link", "set", "p1"]
        self._server = subprocess.Popen([*underlay.entering(1), sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        assert self._server.stdout is not None and self._server.stdout.readline() == b"there\n"

    def unplug(self, seconds: float) -> None:
        subprocess.run([*self._cable, "down"], check=True)
        time.sleep(seconds)
        subprocess.run([*self._cable, "up"], check=True)

    def end(self) -> None:
        self._server.kill()
        self._server.wait()


@pytest.fixture
def far() -> Iterator[Far]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    with taken_slot() as slot:
        underlay = Underlay(f"skyp{slot}", f"100.115.{200 + slot}.0/24")
        underlay.ensure(1)
        made = Far(underlay)
        try:
            yield made
        finally:
            made.end()
            underlay.remove()
            # The kernel takes devices away behind the deletion of their namespaces.
            eventually(lambda: not Path(f"/sys/class/net/{underlay.name}0").exists(), 30, "its devices are gone")


def test_a_pause_is_seen_and_a_connection_that_outlives_it(far: Far) -> None:
    with Probe(far.address) as probe:
        time.sleep(0.5)
        far.unplug(1.0)
        eventually(lambda: probe.longest_ms() > 900, 30, "it answers again")
        assert not probe.broken()


def test_a_connection_that_breaks_is_seen(far: Far) -> None:
    with Probe(far.address) as probe:
        assert not probe.broken()
        far.end()
        assert probe.broken()


def test_an_address_that_never_answers_is_no_use(far: Far) -> None:
    with pytest.raises(SkysailError, match="does not answer this machine's echo requests"), Probe(far.address[:-1] + "9"):
        pass
