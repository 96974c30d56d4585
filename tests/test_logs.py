"""Logs stay small while others write them, lose nothing by it, and are found whole after kill -9 of who cuts them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from clouds import Cloud, eventually
from skysail.hypervisor import process, qemu
from skysail.kit import logs
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources import accounts
from skysail.serve import customer, processes, programs
from skysail.store.database import Database
from skysail.store.schema import guests
from skysail.store.vault import Vault

LIMIT = 256 << 10
# Numbered lines, as fast as they can be written, to a standard output that was opened by somebody else.
WRITER = "import os\nfor n in range({lines}): os.write(1, b'%09d words that fill a line of a log, as a program would\\n' % n)"
LINE = re.compile(rb"^(\d{9}) words that fill a line of a log, as a program would$", re.MULTILINE)


def written(log: Path) -> bytes:
    """All generations, the oldest first."""
    former = sorted(log.parent.glob(f"{log.name}.[0-9]*"), key=lambda path: -int(path.suffix[1:]))
    return b"".join(path.read_bytes() for path in [*former, log])


def numbers(text: bytes) -> list[int]:
    return [int(number) for number in LINE.findall(text)]


@pytest.fixture
def collapses(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(1 << 20))
    if subprocess.run(["fallocate", "-c", "-o", "0", "-l", "65536", probe], capture_output=True).returncode != 0:
        pytest.skip("the file system of the tests' folder cannot take out the beginning of a file")


def test_no_line_is_lost_while_a_process_writes(tmp_path: Path, collapses: None) -> None:
    """The process was started as ours are, and never knows of it."""
    config = Config(data=str(tmp_path), engines="sim")
    record = processes.start(config, "writer", [sys.executable, "-c", WRITER.format(lines=300_000)], env={})
    log, turns = processes.log_path(config, "writer"), 0
    while processes.find(config, "writer"):
        turns += logs.rotate(log, LIMIT, generations=300)
    assert record.pid
    assert turns > 3
    assert numbers(written(log)) == list(range(300_000))


def test_a_log_and_its_generations_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    for turn in range(12):
        with log.open("ab") as file:
            file.write(b"%d\n" % turn * 20_000)
        assert logs.rotate(log, 10_000, generations=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.log", "a.log.1", "a.log.2", "a.log.3"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4 * 70_000
    assert log.read_bytes().endswith(b"\n11\n")
    assert not logs.rotate(tmp_path / "b.log")
    assert not logs.rotate(log, 1 << 20)


def test_a_file_system_that_cannot_take_out_a_beginning(tmp_path: Path) -> None:
    """Nothing but whole blocks can be taken out in one step: what is no such number goes the other way."""
    log = tmp_path / "a.log"
    text = random.Random(1).randbytes(3_000_001)
    log.write_bytes(text)
    descriptor = os.open(log, os.O_RDWR)
    with log.open("ab") as appending:
        logs.cut(descriptor, 1_000_001)
        os.close(descriptor)
        appending.write(b"goes on at the end")
    assert log.read_bytes() == text[1_000_001:] + b"goes on at the end"


def test_killed_while_rotating_all_lines_are_there(tmp_path: Path, collapses: None) -> None:
    log, dice = tmp_path / "a.log", random.Random(2)
    rotating = (f"import sys\nfrom pathlib import Path\nfrom skysail.kit import logs\nprint('up', flush=True)\n"
                f"while True: logs.rotate(Path(sys.argv[1]), {LIMIT}, 300)")
    killed = 0
    with log.open("ab") as out:
        writer = subprocess.Popen([sys.executable, "-c", WRITER.format(lines=300_000)], stdout=out)
    while writer.poll() is None or killed < 5:
        rotator = subprocess.Popen([sys.executable, "-c", rotating, log], stdout=subprocess.PIPE)
        assert rotator.stdout is not None and rotator.stdout.readline() == b"up\n"
        time.sleep(dice.random() * 0.05)
        rotator.send_signal(signal.SIGKILL)
        rotator.wait()
        rotator.stdout.close()
        killed += 1
    # Not in order: what was copied and not yet cut stands there twice, and a line may be parted where it was.
    assert len(set(range(300_000)) - set(numbers(written(log)))) <= killed
    assert (tmp_path / "a.log.1").exists()


def test_what_was_said_since_a_moment_is_found_though_the_log_was_rotated(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(b"of another process\n" * 10_000)
    before = log.stat().st_size
    with log.open("ab") as file:
        file.write(b"listening\n" + b"." * 5000)
        file.flush()
        assert logs.since(log, before, 10_000).startswith(b"listening\n")
        assert logs.rotate(log, 10_000)
        file.write(b"!")
    assert logs.since(log, before, 10_000) == b"listening\n" + b"." * 5000 + b"!"
    assert logs.last(log, 5005) == b"ing\n" + b"." * 5000 + b"!"


def test_the_agent_keeps_logs_to_their_bound(cloud: Cloud) -> None:
    folder = processes.log_folder(cloud.config)
    folder.mkdir()
    log = processes.log_path(cloud.config, "dns")
    with log.open("ab") as file:
        file.write(b"a question\n" * (logs.LIMIT_BYTES // 10))
    eventually(lambda: log.stat().st_size < 1 << 16, 60, "the log is rotated")
    assert (folder / "dns.log.1").stat().st_size > logs.LIMIT_BYTES


def test_systemd_appends_too() -> None:
    for name in ("agent", "controller", "dns"):
        text = programs.unit(Config(), name)
        assert f"StandardOutput=append:{processes.log_path(Config(), name)}" in text
        assert f"StandardError=append:{processes.log_path(Config(), name)}" in text


def test_a_guests_own_logs_are_bounded(tmp_path: Path) -> None:
    """The serial log by its end, under the hands of who appends; QEMU's own words too."""
    folder = tmp_path / "run"
    folder.mkdir()
    machine = qemu.Machine(id="g", accelerator="tcg", vcpus=1, memory_mib=512, folder=str(folder), disk=("/d",),
                           generation_id="00000000-0000-0000-0000-000000000000")
    assert f"file,id=serial,path={folder}/serial.log,append=on" in qemu.argv(machine)
    for log in (folder / "serial.log", process.own_log(folder)):
        with log.open("ab", buffering=0) as guest:
            for _ in range(5):
                guest.write(b"\n".join(b"%09d" % number for number in range(300_000)))
                process.trim(folder)
            guest.write(b"the last words")
        assert log.stat().st_size < 3 * process.LOG_LIMIT_BYTES
        assert log.read_bytes().endswith(b"299998\n000299999the last words")


def test_a_guests_process_cannot_have_another_file_cut(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * (4 * process.LOG_LIMIT_BYTES))
    folder = tmp_path / "run"
    folder.mkdir()
    for lay in ("hardlink_to", "symlink_to"):
        getattr(folder / "serial.log", lay)(image)
        process.trim(folder)
        assert image.stat().st_size == 4 * process.LOG_LIMIT_BYTES
        (folder / "serial.log").unlink()


def test_each_account_has_the_serial_logs_of_its_own_instances(cloud: Cloud) -> None:
    database = Database.of(cloud.config)
    with database.transaction() as connection:
        other = accounts.create_account(connection, "neighbour", time.time())
        key, secret = accounts.create_access_key(connection, Vault.at(cloud.config.master_key), other, time.time())
        accounts.create_account(connection, "nobody", time.time())
    database.close()
    for client in (cloud.client(), cloud.client(key, secret)):
        eventually(lambda client=client: client.get_blueprints()["blueprints"], 30)  # type: ignore[misc]
        client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        eventually(lambda client=client: (  # type: ignore[misc]
            client.get_instance_state(instanceName="one")["state"]["name"] == "running"))
    with database.transaction(write=False) as connection:
        owners = {row.id: row.account_id for row in connection.execute(select(guests))}
    for guest, owner in owners.items():
        log = cloud.config.guests_dir / guest / "run" / "serial.log"
        log.parent.mkdir(parents=True)
        log.write_text("theirs" if owner == other else "mine")
    assert len(owners) == 2
    assert customer.serial_log(cloud.config, "one") == b"mine"
    assert customer.serial_log(cloud.config, "one", account="neighbour") == b"theirs"
    for account, words in (("nobody", "no instance named one of the account nobody"), ("stranger", "no account stranger")):
        with pytest.raises(SkysailError, match=words):
            customer.serial_log(cloud.config, "one", account=account)
