"""The network as real guests have it."""

from __future__ import annotations

import ipaddress
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clouds import RealCloud, eventually
from skysail.network.plan import Layout

pytestmark = pytest.mark.real
Two = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def two(real_cloud: RealCloud) -> Iterator[Two]:
    """Two instances of one account, both running."""
    first, second = real_cloud.launch("left", "right")
    yield first, second
    for name in ("left", "right"):
        real_cloud.client().delete_instance(instanceName=name)


def connects(cloud: RealCloud, name: str, address: str, port: int, seconds: int = 5) -> bool:
    """Whether a program in the guest gets a TCP connection."""
    tried = f"timeout {seconds} bash -c '</dev/tcp/{address}/{port}' 2>/dev/null && echo yes || echo no"
    return cloud.ssh(name, tried) == "yes\n"


def test_instances_of_one_account_reach_each_other_privately(real_cloud: RealCloud, two: Two) -> None:
    first, second = two
    assert connects(real_cloud, "left", second["privateIpAddress"], 22, 60)
    assert connects(real_cloud, "right", first["privateIpAddress"], 22, 60)
    # No firewall among one's own: a port that is not public.
    real_cloud.ssh("left", "sudo systemd-run --unit=private python3 -m http.server 8080")
    eventually(lambda: connects(real_cloud, "left", "127.0.0.1", 8080, 60), 120)
    assert connects(real_cloud, "right", first["privateIpAddress"], 8080, 60)
    assert not connects(real_cloud, "right", first["publicIpAddress"], 8080)


def test_a_guest_reaches_nothing_of_the_machine(real_cloud: RealCloud, two: Two) -> None:
    layout = Layout.of(real_cloud.config)
    barred = [(address, port) for port in (real_cloud.port, 22, 8700) for address in (
        str(layout.machine_address), str(layout.machine_ipv6), "169.254.169.254", str(layout.gateway))]
    tried = [*barred, (two[1]["privateIpAddress"], 22)]
    answered = real_cloud.ssh("left", "".join(
        f"timeout 15 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null && echo {address} {port} & " for address, port in tried)
        + "wait")
    assert answered == f"{two[1]['privateIpAddress']} 22\n", "one's own neighbour, and nothing else"
    assert "yes" in real_cloud.ssh("left", f"ping -c 1 -W 30 {layout.gateway} >/dev/null && echo yes")


def test_a_guest_is_logged_in_to_over_ipv6(real_cloud: RealCloud, two: Two) -> None:
    """From the machine, and from the other guest through the gateway; the address stays over what settles later."""
    first, _ = two
    access = real_cloud.client().get_instance_access_details(instanceName="left", protocol="ssh")["accessDetails"]
    (address,) = access["ipv6Addresses"]
    assert [address] == first["ipv6Addresses"]
    with tempfile.TemporaryDirectory() as folder:
        identity, hosts = Path(folder) / "identity", Path(folder) / "hosts"
        for path, text in ((identity, access["privateKey"]), (Path(f"{identity}-cert.pub"), access["certKey"]),
                           (hosts, "".join(f"{address} {key['algorithm']} {key['publicKey']}\n"
                                           for key in access["hostKeys"]))):
            path.touch(0o600)
            path.write_text(text.rstrip() + "\n")
        done = subprocess.run(
            ["ssh", "-6", "-F", "none", "-i", str(identity), "-o", "IdentitiesOnly=yes", "-o", f"UserKnownHostsFile={hosts}",
             "-o", "HostKeyAlias=" + address, "-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR",
             f"{access['username']}@{address}", "echo $SSH_CONNECTION"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(Layout.of(real_cloud.config).machine_ipv6)
    assert connects(real_cloud, "right", address, 22, 60)
    assert not connects(real_cloud, "right", address, 8080)
    eventually(lambda: "configured" in real_cloud.ssh("left", "networkctl --no-legend list eth0").split(), 120,
               "networkd takes the link over")
    shown = real_cloud.ssh("left", "ip -6 -o address show eth0 scope global")
    assert f"{ipaddress.IPv6Address(address)}/128" in shown
    routes = real_cloud.ssh("left", "ip -6 route show default")
    assert routes.count("via fe80::1") == 1
    assert "tentative" not in shown and "dadfailed" not in shown


def test_a_guest_keeps_its_network_over_a_reboot(real_cloud: RealCloud, two: Two) -> None:
    _, second = two
    client = real_cloud.client()
    (operation,) = client.reboot_instance(instanceName="right")["operations"]
    real_cloud.settled(operation["id"], 400)
    eventually(lambda: client.get_instance_state(instanceName="right")["state"]["name"] == "running", 400)
    eventually(lambda: connects(real_cloud, "left", second["ipv6Addresses"][0], 22, 20), 400, "SSH over IPv6 answers again")
    assert connects(real_cloud, "left", second["privateIpAddress"], 22, 60)
