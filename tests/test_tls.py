"""The endpoint over TLS: clients that were given the cloud's authority come in, others refuse; the certificate is renewed."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import SSLError
from cryptography import x509

from clouds import running_cloud
from skysail.api.tls import RENEW_DAYS, SERVER_DAYS, Certificates
from skysail.kit.config import Config
from skysail.serve import endpoint

NOW = 1_800_000_000.0
DAY = 86400


def test_clients_that_trust_the_authority_come_in() -> None:
    with running_cloud("tls = true\n") as cloud:
        assert endpoint.url(cloud.config) == f"https://127.0.0.1:{cloud.port}"
        assert cloud.client().get_regions()["regions"][0]["name"] == "us-east-1"
        stranger = boto3.client("lightsail", region_name="us-east-1", endpoint_url=endpoint.url(cloud.config),
                                aws_access_key_id="a", aws_secret_access_key="b")
        with pytest.raises(SSLError):
            stranger.get_regions()
        # A refusal by the wire itself, before any request is whole, arrives over TLS too.
        assert cloud.trust is not None
        with (socket.create_connection(("127.0.0.1", cloud.port), 20) as plain,
              cloud.trust.wrap_socket(plain, server_hostname="localhost") as wire):
            wire.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n")
            assert wire.recv(4096).startswith(b"HTTP/1.1 431")


def test_the_server_certificate_follows_names_and_time_and_the_authority_stays(tmp_path: Path) -> None:
    held = Certificates(tmp_path / "tls")
    held.ensure(["cloud.test", "192.0.2.7"], NOW)
    authority, first = held.authority.read_bytes(), held.server[0].read_bytes()
    held.ensure(["cloud.test", "192.0.2.7"], NOW + (SERVER_DAYS - RENEW_DAYS - 1) * DAY)
    assert held.server[0].read_bytes() == first
    held.ensure(["cloud.test", "192.0.2.7"], NOW + (SERVER_DAYS - RENEW_DAYS + 1) * DAY)
    second = held.server[0].read_bytes()
    held.ensure(["other.test"], NOW)
    third = held.server[0].read_bytes()
    assert len({first, second, third}) == 3 and held.authority.read_bytes() == authority
    issuer = x509.load_pem_x509_certificate(authority)
    for content in (first, second, third):
        x509.load_pem_x509_certificate(content).verify_directly_issued_by(issuer)
    assert held.server[1].stat().st_mode & 0o777 == 0o600
    ssl.create_default_context(cafile=held.authority).load_cert_chain(*held.server)


@pytest.mark.parametrize(("listen", "tls", "secure"), [
    ("127.0.0.1", None, False), ("::1", None, False), ("localhost", None, False), ("0.0.0.0", None, True),
    ("192.0.2.7", None, True), ("192.0.2.7", False, False), ("127.0.0.1", True, True)])
def test_tls_is_on_by_itself_beyond_this_machine(listen: str, tls: bool | None, secure: bool) -> None:
    assert Config(listen=listen, tls=tls).secure is secure
