"""What a run of tests held is ended by the next one when it died, and only then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from pyroute2.process import ChildProcess

import estates
from clouds import eventually
from skysail.kit.process import machine_boot, started_at
from skysail.serve import processes

RUN = """
import json, signal, sys, time
from clouds import running_cloud
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is started to ignore it
with running_cloud() as cloud:
    print(json.dumps([str(cloud.folder), *[one.pid for one in cloud.processes.values()]]), flush=True)
    time.sleep(600)
"""


class Run:
    """A run of its own that holds a cloud: its process, the cloud's folder, and the pids of agent and controller."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={
            **os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])})
        assert self.process.stdout is not None
        folder, *self.pids = json.loads(self.process.stdout.readline())
        self.folder = Path(folder)

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if started_at(pid) is not None]

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=60)


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    if made.process.poll() is None:
        made.end(signal.SIGKILL)
    made.process.communicate()
    estates.settle()


def test_what_a_killed_run_left_is_ended_by_the_next_one(run: Run) -> None:
    # A stand-in for a guest: QEMUs are known by their program and by the path of their control socket.
    program = run.folder / "qemu-system-stand-in"
    shutil.copy(Path(sys.executable).resolve(), program)
    socket = run.folder / "guests" / "g-1" / "run" / "qmp.sock"
    guest = subprocess.Popen([program, "-I", "-S", "-c", "import time; time.sleep(600)", "-chardev",
                              f"socket,id=qmp,path={socket},server=on"])
    assert run.folder not in estates.settle(), "it lives"
    assert len(run.alive()) == 2 and guest.poll() is None
    run.end(signal.SIGKILL)
    assert len(run.alive()) == 2 and run.folder.exists(), "nothing ends by itself: there is something to settle"
    assert run.folder in estates.settle()
    assert run.alive() == []
    assert started_at(guest.pid) is None
    assert not run.folder.exists()
    assert run.folder not in estates.settle()
    guest.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_leaves_nothing(run: Run, number: int) -> None:
    run.end(number)
    assert run.alive() == []
    assert not run.folder.exists()


def test_a_process_that_has_the_pid_of_one_that_is_gone_is_left_alone(run: Run) -> None:
    with subprocess.Popen(["sleep", "600"]) as stranger:
        (run.folder / "started" / "other.json").write_bytes(msgspec.json.encode(
            processes.Record(pid=stranger.pid, started=1, boot=machine_boot())))
        run.end(signal.SIGKILL)
        estates.settle()
        assert run.alive() == []
        assert stranger.poll() is None
        stranger.kill()


def test_a_copy_of_a_run_that_is_told_to_end_does_not_speak_for_it(tmp_path: Path) -> None:
    """pyroute2 ends its copies of this process by SIGTERM, at times before they have ended by themselves."""
    claimed = tmp_path / "cloud"
    claimed.mkdir()
    estates.claim(claimed)  # from here on SIGTERM unwinds this process
    copy = ChildProcess(lambda: time.sleep(60), [])
    copy.run()
    time.sleep(0.5)  # until it sleeps
    copy.stop()
    assert copy.exitcode == -signal.SIGTERM
    shutil.rmtree(claimed)


def test_a_run_forgets_what_it_has_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cloud"
    folder.mkdir()
    estates.claim(folder)
    mine = [entry for _, entry, claimed in estates._claims if claimed == folder]
    estates.claim(folder)
    assert len(mine) == 1 and mine[0].read_text() == str(folder)
    shutil.rmtree(folder)
    estates.settle()
    assert not mine[0].exists()


def test_an_interrupted_pytest_leaves_no_cloud(tmp_path: Path) -> None:
    """By SIGTERM, as from timeout(1)."""
    test = Path(__file__).parent / f"test_interrupted_{os.getpid()}.py"
    said = tmp_path / "said"
    test.write_text(f"import time\nfrom pathlib import Path\n\ndef test(cloud):\n    Path({str(said)!r}).write_text("
                    "' '.join(str(one.pid) for one in cloud.processes.values()))\n    time.sleep(600)\n")
    try:
        with subprocess.Popen([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as inner:
            pids = [int(word) for word in eventually(lambda: said.exists() and said.read_text().split(), 120, "it runs")]
            inner.terminate()
            inner.wait(timeout=60)
        assert len(pids) == 2
        assert [pid for pid in pids if started_at(pid) is not None] == []
    finally:
        test.unlink()
