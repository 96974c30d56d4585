"""What a client without the right key, or with a wrong request, is told; and key pairs and tags from the outside."""

from __future__ import annotations

import json
import time
from typing import Any

import asyncssh
import httpx
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from clouds import Cloud


def ask(cloud: Cloud, action: str = "GetRegions", body: bytes = b"{}", *, secret: str | None = None,
        key: str | None = None, service: str = "lightsail", sent: bytes | None = None, skew_seconds: int = 0,
        signed: bool = True) -> tuple[int, dict[str, Any]]:
    """One call, signed by botocore's own signer, then changed on its way as asked."""
    held = json.loads((cloud.folder / "credentials.json").read_text())
    request = AWSRequest("POST", f"http://127.0.0.1:{cloud.port}/", data=body, headers={
        "X-Amz-Target": f"Lightsail_20161128.{action}", "Content-Type": "application/x-amz-json-1.1"})
    if signed:
        signer = SigV4Auth(Credentials(key or held["access_key_id"], secret or held["secret_access_key"]), service,
                           "us-east-1")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + skew_seconds))
        request.context["timestamp"] = stamp
        request.headers["X-Amz-Date"] = stamp
        signer_body = signer.canonical_request(request)
        signature = signer.signature(signer.string_to_sign(request, signer_body), request)
        signer._inject_signature_to_request(request, signature)
    answer = httpx.post(request.url, content=body if sent is None else sent, headers=dict(request.headers.items()))
    found: dict[str, Any] = answer.json()
    return answer.status_code, found


def test_each_refusal_has_its_own_error(cloud: Cloud) -> None:
    assert ask(cloud)[0] == 200
    for expected, change in (
        ("InvalidSignatureException", {"secret": "wrong"}),
        ("InvalidSignatureException", {"sent": b'{"includeAvailabilityZones": true}'}),
        ("InvalidSignatureException", {"skew_seconds": -600}),
        ("InvalidSignatureException", {"service": "ec2"}),
        ("UnrecognizedClientException", {"key": "AKIANOBODY"}),
        ("MissingAuthenticationTokenException", {"signed": False}),
        ("UnknownOperationException", {"action": "MakeCoffee"}),
        ("SerializationException", {"body": b"{"}),
        ("SerializationException", {"body": b"[1]"}),
        ("InvalidInputException", {"action": "GetInstance"}),
        ("InvalidInputException", {"action": "GetInstance", "body": b'{"instanceName": 7}'}),
        ("RequestEntityTooLargeException", {"body": b" " * 1_100_000}),
    ):
        status, answer = ask(cloud, **change)
        assert 400 <= status < 500, (change, answer)
        assert answer["__type"] == answer["code"] == expected, (change, answer)
        assert answer["message"]


def test_key_pairs_and_tags(cloud: Cloud) -> None:
    client = cloud.client()
    made = client.create_key_pair(keyPairName="laptop")
    private = asyncssh.import_private_key(made["privateKeyBase64"])
    assert private.public_data == asyncssh.import_public_key(made["publicKeyBase64"]).public_data
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    client.import_key_pair(keyPairName="desk", publicKeyBase64=other)
    assert [found["name"] for found in client.get_key_pairs()["keyPairs"]] == ["desk", "laptop"]
    first, again = client.download_default_key_pair(), client.download_default_key_pair()
    assert first["privateKeyBase64"] == again["privateKeyBase64"]
    assert len(client.get_key_pairs(includeDefaultKeyPair=True)["keyPairs"]) == 3
    client.tag_resource(resourceName="desk", tags=[{"key": "room", "value": "7"}])
    assert client.get_key_pair(keyPairName="desk")["keyPair"]["tags"] == [{"key": "room", "value": "7"}]
    client.untag_resource(resourceName="desk", tagKeys=["room"])
    assert client.get_key_pair(keyPairName="desk")["keyPair"]["tags"] == []
    client.delete_key_pair(keyPairName="desk")
    assert "desk" not in client.get_active_names()["activeNames"]
    zones = client.get_regions(includeAvailabilityZones=True)["regions"][0]["availabilityZones"]
    assert [zone["zoneName"] for zone in zones] == ["us-east-1a", "us-east-1b"]
    assert {bundle["bundleId"] for bundle in client.get_bundles()["bundles"]} >= {"nano_3_0", "2xlarge_3_0"}
