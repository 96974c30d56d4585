"""Metadata as real guests read them: by curl's means, by a program's token, and by cloud-init's own EC2 data source."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from clouds import RealCloud, eventually
from skysail.inspect.verify import verify
from skysail.metadata.process import holders

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]

# What a program in the guest does: it asks with and without a token, over IPv6, from a forged address.
PROGRAM = r"""
import json, socket, urllib.request, urllib.error
def ask(path, method="GET", host="169.254.169.254", **fields):
    request = urllib.request.Request(f"http://{host}{path}", method=method,
                                     headers={name.replace("_", "-"): value for name, value in fields.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError as failure:
        return type(failure).__name__
token = ask("/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="300")
print(json.dumps({
    "plain": ask("/latest/meta-data/local-ipv4"), "token": token,
    "sealed": ask("/latest/meta-data/local-ipv4", X_aws_ec2_metadata_token=token),
    "key": ask("/latest/meta-data/public-keys/0/openssh-key", X_aws_ec2_metadata_token=token),
    "document": ask("/latest/dynamic/instance-identity/document", X_aws_ec2_metadata_token=token),
    "data": ask("/latest/user-data", X_aws_ec2_metadata_token=token),
    "six": ask("/latest/meta-data/local-ipv4", host="[fd00:ec2::254]", X_aws_ec2_metadata_token=token)}))
"""
# The whole of the data source but the platform's look, which wants Amazon's firmware strings. It gives a token one second:
# on emulated processors that others want too it may need several goes.
CLOUD_INIT = r"""
import json, logging, time
from cloudinit import distros, helpers
from cloudinit.sources import DataSourceEc2 as source
paths = helpers.Paths({"cloud_dir": "/tmp/crawl", "run_dir": "/tmp/crawl"})
made = source.DataSourceEc2({}, distros.fetch("debian")("debian", {}, paths), paths)
made._cloud_name = source.CloudNames.AWS
until = time.time() + 300
while not made.wait_for_metadata_service():
    assert time.time() < until
found = made.crawl_metadata()
made.metadata, made.identity = found["meta-data"], found.get("dynamic", {}).get("instance-identity", {}).get("document", {})
print(json.dumps({"metadata": found["meta-data"], "zone": made.availability_zone, "region": made.region,
                  "id": made.get_instance_id(), "keys": made.get_public_ssh_keys(), "token": bool(made._api_token),
                  "user": (found["user-data"] or b"").decode()}))
"""


def run(cloud: RealCloud, name: str, program: str, interpreter: str = "python3") -> dict[str, Any]:
    """What the program prints last, as JSON."""
    said = cloud.ssh(name, f"cat > /tmp/program.py <<'END'\n{program}\nEND\nsudo {interpreter} /tmp/program.py", 600)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def answerers(cloud: RealCloud) -> list[int]:
    return list(holders(f"skysail-metadata:{cloud.config.data}"))


@pytest.mark.long
def test_a_guest_reads_its_own_metadata(own_real_cloud: RealCloud) -> None:
    cloud = own_real_cloud
    first, second = cloud.launch("first", "second", userData="#!/bin/sh\ntrue\n")
    client = cloud.client()
    told = {one["name"]: run(cloud, one["name"], PROGRAM) for one in (first, second)}
    for instance in (first, second):
        found = told[instance["name"]]
        assert found["plain"] == found["sealed"] == instance["privateIpAddress"]
        assert found["key"].startswith("ssh-") and found["data"] == "#!/bin/sh\ntrue\n" and found["six"] == 403
        document = json.loads(found["document"])
        assert document["availabilityZone"] == instance["location"]["availabilityZone"]
        assert document["instanceType"] == "nano_3_0"
    stolen = PROGRAM.replace('token = ask(', f'token = "{told["second"]["token"]}" or ask(')
    assert run(cloud, "first", stolen)["sealed"] == 401, "another instance's token"

    crawled = run(cloud, "first", CLOUD_INIT)
    assert crawled["token"] and crawled["zone"] == "us-east-1a" and crawled["region"] == "us-east-1"
    assert crawled["id"].startswith("i-") and crawled["keys"] == [told["first"]["key"].strip()]
    assert crawled["user"] == "#!/bin/sh\ntrue\n" and crawled["metadata"]["local-hostname"] == "first"
    macs = crawled["metadata"]["network"]["interfaces"]["macs"]
    (card,) = macs.values()
    assert card["local-ipv4s"] == first["privateIpAddress"] and card["public-ipv4s"] == first["publicIpAddress"]

    for name, wanted in (("httpTokens", "required"), ("httpProtocolIpv6", "enabled")):
        operation = client.update_instance_metadata_options(instanceName="first", **{name: wanted})["operation"]
        cloud.settled(operation["id"])
    found = run(cloud, "first", PROGRAM)
    assert found["plain"] == 401 and found["sealed"] == found["six"] == first["privateIpAddress"]

    # A static IP is told at once, without a restart of anything.
    client.allocate_static_ip(staticIpName="fixed")
    client.attach_static_ip(staticIpName="fixed", instanceName="second")
    address = client.get_static_ip(staticIpName="fixed")["staticIp"]["ipAddress"]
    asked = PROGRAM.replace("/latest/user-data", "/latest/meta-data/public-ipv4")
    eventually(lambda: run(cloud, "second", asked)["data"] == address, 60)

    # Whoever dies: it is back, and tokens are still good.
    (pid,) = answerers(cloud)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: answerers(cloud) not in ([], [pid]))
    kept = PROGRAM.replace("token = ask(", f'token = "{found["token"]}" or ask(')
    assert run(cloud, "first", kept)["sealed"] == first["privateIpAddress"]
    cloud.kill("agent")
    eventually(lambda: answerers(cloud) == [], what="it ends with its agent")
    cloud.start("agent")
    eventually(lambda: len(answerers(cloud)) == 1)
    assert run(cloud, "first", kept)["sealed"] == first["privateIpAddress"]
    eventually(lambda: verify(cloud.config, 0.2) == [])

    def counted() -> float:
        return sum(point["sum"] for point in client.get_instance_metric_data(
            instanceName="second", metricName="MetadataNoToken", period=300, startTime=time.time() - 3600,
            endTime=time.time() + 60, unit="Count", statistics=["Sum"])["metricData"])
    before = counted()
    run(cloud, "second", PROGRAM)
    assert eventually(lambda: counted() >= before + 1, 150, "a request without a token is counted")
    assert cloud.operator("doctor").stdout.count("it starts and answers") == 1
    cloud.stop()
    eventually(lambda: answerers(cloud) == [])
