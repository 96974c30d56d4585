"""SetIpAddressType on a real guest that runs: from outside, and inside of it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from clouds import RealCloud, eventually
from crashing import pid_of
from skysail.inspect.verify import verify
from skysail.serve.customer import login

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]


def change(cloud: RealCloud, kind: str) -> dict[str, Any]:
    """Change the type of ``one``, to the end of the operation; the instance."""
    (operation,) = cloud.client().set_ip_address_type(
        resourceType="Instance", resourceName="one", ipAddressType=kind, acceptBundleUpdate=True)["operations"]
    cloud.settled(operation["id"])
    found: dict[str, Any] = cloud.client().get_instance(instanceName="one")["instance"]
    assert found["ipAddressType"] == kind
    return found


def inside(cloud: RealCloud, address: str, command: str) -> str:
    """What ``command`` prints in the guest, logged in to at this address; empty when nobody answers there."""
    access = cloud.client().get_instance_access_details(instanceName="one", protocol="ssh")["accessDetails"]
    with tempfile.TemporaryDirectory() as folder:
        argv = login(access | {"ipAddress": address}, Path(folder), [command])
        done = subprocess.run([*argv[:1], "-o", "ConnectTimeout=20", *argv[1:]], capture_output=True, text=True, timeout=180)
        return done.stdout if done.returncode == 0 else ""


LOOK = "ip -6 -o address show eth0 scope global; echo; ip -6 route show default; echo; ip -4 -o address show eth0"


@pytest.mark.long
def test_a_guest_that_runs_changes_its_addresses(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    (one,) = cloud.launch("one")
    process = pid_of(cloud, "one")
    first, (six,) = one["publicIpAddress"], one["ipv6Addresses"]
    assert eventually(lambda: inside(cloud, first, LOOK), 180)
    assert eventually(lambda: inside(cloud, six, LOOK), 180)

    four = change(cloud, "ipv4")
    assert four["publicIpAddress"] == first and four["ipv6Addresses"] == []
    seen = eventually(lambda: inside(cloud, first, LOOK), 180)
    assert "fd53" not in seen and "via fe80::1" not in seen, seen
    assert inside(cloud, six, "true && echo yes") == ""

    both = change(cloud, "dualstack")
    (six,) = both["ipv6Addresses"]
    assert "yes" in eventually(lambda: inside(cloud, six, "echo yes"), 180)
    seen = inside(cloud, six, LOOK)
    assert "via fe80::1" in seen and "tentative" not in seen and one["privateIpAddress"] in seen

    alone = change(cloud, "ipv6")
    assert alone["bundleId"] == "nano_ipv6_3_0" and "publicIpAddress" not in alone and alone["ipv6Addresses"] == [six]
    assert "yes" in eventually(lambda: inside(cloud, six, "echo yes"), 180)
    assert inside(cloud, first, "echo yes") == ""
    gone = inside(cloud, six, "timeout 20 bash -c '</dev/tcp/192.0.2.1/80' 2>&1; true")
    assert "unreachable" in gone.lower(), "it is told that there is no way, and need not wait"
    assert cloud.ssh("one", "curl -s http://169.254.169.254/latest/meta-data/local-ipv4 || python3 -c "
                            "'import urllib.request as r; print(r.urlopen(\"http://169.254.169.254/latest/meta-data/local-ipv4\")"
                            ".read().decode())'").strip() == one["privateIpAddress"]
    assert pid_of(cloud, "one") == process, "nothing was restarted"
    eventually(lambda: verify(cloud.config, 0.2) == [])

    # What was changed while it was off is there when it is on again.
    client = cloud.client()
    cloud.settled(client.stop_instance(instanceName="one")["operations"][0]["id"], 300)
    changed = change(cloud, "ipv4")
    cloud.settled(client.start_instance(instanceName="one")["operations"][0]["id"], 600)
    seen = eventually(lambda: inside(cloud, changed["publicIpAddress"], LOOK), 600)
    assert "fd53" not in seen
    client.reboot_instance(instanceName="one")
    eventually(lambda: client.get_instance_state(instanceName="one")["state"]["name"] == "running", 600)
    assert "fd53" not in eventually(lambda: inside(cloud, changed["publicIpAddress"], LOOK), 600)
    eventually(lambda: verify(cloud.config, 0.2) == [])


def test_a_guest_that_begins_without_a_public_ipv4_address(own_real_cloud: RealCloud) -> None:
    (one,) = own_real_cloud.launch("one", bundle="nano_ipv6_3_0")
    assert one["ipAddressType"] == "ipv6"
    assert own_real_cloud.ssh("one", "hostname") == "one\n"
    assert "yes" in own_real_cloud.operator("ssh", "one", "--", "echo", "yes").stdout
    assert one["ipv6Addresses"][0] in own_real_cloud.operator("list").stdout
