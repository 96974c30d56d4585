"""Real guests from the outside: launched by boto3, logged in to over SSH, killed, found again."""

from __future__ import annotations

import pytest

from clouds import RealCloud

pytestmark = pytest.mark.real


def test_a_guest_is_launched_logged_in_to_and_deleted(real_cloud: RealCloud) -> None:
    (made,) = real_cloud.launch("hello")
    assert real_cloud.ssh("hello", "hostname").strip() == "hello"
    assert made["privateIpAddress"] in real_cloud.ssh("hello", "ip -4 -o address show eth0")
    real_cloud.client().delete_instance(instanceName="hello")
