"""A real guest behind the one address that its machine has: visited by name, logged in to by its port and by the jump."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from clouds import RealCloud, eventually, running_real_cloud
from skysail.inspect.verify import verify
from skysail.serve import up
from stage import Place

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600),
              pytest.mark.skipif(not Path("/usr/sbin/haproxy").exists(), reason="HAProxy is not installed")]
ADDRESS, VISITOR = "198.18.77.1", "198.18.77.2"
NAMESPACE, LINK = "skyvisitor", "skyvisit"


@contextlib.contextmanager
def visitor() -> Iterator[None]:
    """Somebody outside, at the other end of a link of this machine, whose end has the shared address."""
    made = Place(NAMESPACE)
    try:
        with IPRoute() as here:
            here.link("add", ifname=LINK, kind="veth", peer={"ifname": "eth0", "net_ns_fd": NAMESPACE})
            here.addr("add", index=here.link_lookup(ifname=LINK)[0], address=ADDRESS, prefixlen=30)
            here.link("set", index=here.link_lookup(ifname=LINK)[0], state="up")
        made.address("eth0", VISITOR, 30)
        yield
    finally:
        made.remove()


def outside(*words: str) -> str:
    """What a program of the visitor's prints; '' where it fails."""
    done = subprocess.run(["nsenter", f"--net=/run/netns/{NAMESPACE}", *words], capture_output=True, text=True, check=False,
                          timeout=120)
    print(words, done.returncode, done.stderr)  # kept by pytest for the case of a failure
    return done.stdout.strip() if done.returncode == 0 else ""


@pytest.fixture
def cloud() -> Iterator[RealCloud]:
    with visitor(), running_real_cloud(
            more=f'single_address = "{ADDRESS}"\ninstance_domain = "cloud.example.net"\n') as made:
        up.ensure_user(made.config)  # rules name those who share it; nobody brought a cloud up on this machine yet
        yield made


def test_a_guest_is_visited_and_logged_in_to_by_the_shared_address(cloud: RealCloud, tmp_path: Path) -> None:
    client = cloud.client()
    key = tmp_path / "laptop.pem"
    key.write_text(client.create_key_pair(keyPairName="laptop")["privateKeyBase64"])
    key.chmod(0o600)
    for name in ("web", "other"):
        cloud.launch(name, keyPairName="laptop")
        cloud.ssh(name, f"mkdir site; echo I am {name} > site/index.html; "
                        "sudo systemd-run python3 -m http.server 80 --directory $PWD/site 2>&1")

    def page(host: str) -> str:
        return outside("curl", "-sS", "-m", "20", "--resolve", f"{host}:80:{ADDRESS}", f"http://{host}/")

    for name in ("web", "other"):
        eventually(lambda name=name: page(f"{name}.us-east-1.cloud.example.net") == f"I am {name}", 120, f"{name} answers")
    client.create_domain(domainName="example.com")
    address = client.get_instance(instanceName="other")["instance"]["publicIpAddress"]
    client.create_domain_entry(domainName="example.com", domainEntry={
        "name": "www.example.com", "type": "A", "target": address})
    eventually(lambda: page("www.example.com") == "I am other", 120, "a name of the owner's leads there")
    assert "I am" not in page("nobody.example.com")

    ports = {one["name"]: one["sshPort"] for one in json.loads(cloud.operator("list", "--json").stdout)}
    options = ["-F", "none", "-i", str(key)]
    for option in ("IdentitiesOnly=yes", "IdentityAgent=none", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null",
                   "ConnectTimeout=60", "BatchMode=yes"):
        options += ["-o", option]
    through = f"ProxyCommand=ssh {' '.join(options)} -p 2222 -W %h:%p jump@{ADDRESS}"
    for name in ("web", "other"):
        assert outside("ssh", *options, "-p", str(ports[name]), f"admin@{ADDRESS}", "hostname") == name
        assert outside("ssh", *options, "-o", through, f"admin@{name}", "hostname") == name
    seen = outside("ssh", *options, "-p", str(ports["web"]), f"admin@{ADDRESS}", "echo $SSH_CONNECTION")
    assert seen.split()[0] == VISITOR, "the guest sees who it is"

    client.put_instance_public_ports(instanceName="web", portInfos=[{"fromPort": 22, "toPort": 22, "protocol": "tcp"}])
    eventually(lambda: "I am" not in page("web.us-east-1.cloud.example.net"), 60, "a closed port is closed")
    assert page("www.example.com") == "I am other"
    eventually(lambda: verify(cloud.config, 0.1) == [], what="verify is clean")
