"""The commands of docs/fleet.md, as they stand there, but for the names and addresses of the machines; on simulated hosts,
and what needs guests on real ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds import CACHE, ensure_image, older_qemu, taken_slot
from fleets import free_port
from newcomer import Desk, commands
from skysail.kit.config import load
from skysail.kit.errors import SkysailError
from skysail.network.underlay import Underlay
from skysail.serve import programs

PAGE = "docs/fleet.md"
pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="hosts join as root"), pytest.mark.timeout(2400)]


@contextlib.contextmanager
def desk(settings: str = "") -> Iterator[Desk]:
    """A machine of which nothing is there but its settings; whatever was started on it goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    folder.chmod(0o755)
    if settings:
        (folder / "skysail.toml").write_text(f'engines = "sim"\ndetached = true\n{settings}')
    made = Desk(folder)
    try:
        yield made
    finally:
        for name in ("controller", "agent"):
            with contextlib.suppress(SkysailError):
                programs.stop(load(str(folder)), name)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_machine_joins_and_leaves() -> None:
    with (desk(f'port = {free_port()}\njoin_listen = "127.0.0.1"\njoin_port = {free_port()}\n') as first,
          desk("public_ipv6 = ''\n") as second):
        (first.folder / "first-instance").touch()  # nobody can log in to a simulated one
        said = first.shell(commands(PAGE, "Join"))
        url, token = re.search(r"sudo ./skysail join (https://\S+)\nand give it this token:\n(\S+)", said).groups()
        join = commands(PAGE, "Join", 1).replace("https://192.0.2.1:8702", url).strip()
        assert url in join
        second.shell(f"{join} --port {free_port()} --name web-7 <<< {token}")
        first.shell("./skysail launch web")
        second.shell("./skysail down")
        first.shell("until ./skysail host show web-7 | grep -E '^state +away'; do sleep 1; done", 120)
        said = first.shell(commands(PAGE, "When a host fails"))
        assert "is off for certain" in said and "vouched that it is off" in said, said
        second.shell("./skysail up")
        first.shell("until ./skysail host show web-7 | grep -E '^state +ready'; do sleep 1; done", 120)
        said = first.shell(commands(PAGE, "Look after hosts"))
        for words in ("web-7", "machine types", "nothing left", "is no host of this cloud any more", "would be taken"):
            assert words in said, said
        assert "web-7" not in first.shell("./skysail host list")
        first.shell("./skysail down")
        second.shell("./skysail down")


@contextlib.contextmanager
def fleet(heading: str) -> Iterator[tuple[Desk, str]]:
    """A developer at a machine, and what the page says below the heading; nothing is left of the fleet afterwards."""
    with desk() as developer, taken_slot() as slot:
        name, underlay, folder = f"skyg{slot}", f"100.115.{200 + slot}.0/24", developer.folder / "fleet"
        here = f"--name {name} --underlay {underlay} --port {free_port()} --uids {4_000_000 + 1_000_000 * slot}"
        try:
            yield developer, re.sub(r"dev fleet (\d)", rf"dev fleet \1 {here}",
                                    commands(PAGE, heading).replace("/srv/fleet", str(folder)))
            assert not list(Path("/run/netns").glob(f"{name}-*"))
        finally:
            developer.shell(f"SKYSAIL_DATA={folder} ./skysail dev stop || true")
            Underlay(name, underlay).remove()


def test_a_fleet_on_one_machine() -> None:
    with fleet("A fleet on one machine") as (developer, block):
        said = developer.shell(block, 2000)
        for words in ("host-3", "is cordoned", "web-5 runs at", "rows and machine agree", "100.115."):
            assert words in said, said


@pytest.mark.real
@pytest.mark.long
@pytest.mark.timeout(5400)
def test_a_host_is_upgraded_while_its_instances_work() -> None:
    ensure_image("debian_12")
    with fleet("Upgrade a host while its instances work") as (developer, block):
        block = block.replace("/opt/qemu-7.2", str(Path(older_qemu()).parent))
        said = developer.shell(block.replace("--engines real", f"--engines real --stock {CACHE}"), 5000)
        print(said)
        assert "rows and machine agree" in said and "nothing left" in said, said
        # Each neighbour counted, and none was in vain.
        assert len(re.findall(r"^asked [1-9]\d*, lost 0$", said, re.M)) == 6, said
        for one in json.loads((developer.folder / "desk" / "probed").read_text()):
            assert one["answered"] and not one["lost"], one
