"""A customer's words about domains, which tests of domains say often."""

from __future__ import annotations

from typing import Any

import pytest
from botocore.exceptions import ClientError

from clouds import Cloud

ZONE = """\
$ORIGIN example.com.
$TTL 1h
@       IN SOA ns1.old.example. admin.old.example. ( 2024010101 1h 15m 2w 1h )
        IN NS  ns1.old.example.
        IN MX  10 Mail
        IN TXT "v=spf1 mx -all"
www 300 IN A   192.0.2.1
        IN A   192.0.2.2   ; two of them
*.apps  IN CNAME www
_sip._tcp SRV 0 5 5060 sip
v6      IN AAAA 2001:db8::1
"""


class Registrar:
    """boto3's client, with a few words more."""

    def __init__(self, cloud: Cloud) -> None:
        self.client: Any = cloud.client()

    def add(self, name: str, kind: str, target: str, domain: str = "example.com", **more: Any) -> dict[str, Any]:
        operation: dict[str, Any] = self.client.create_domain_entry(
            domainName=domain, domainEntry={"name": name, "type": kind, "target": target, **more})["operation"]
        return operation

    def entries(self, domain: str = "example.com") -> list[dict[str, Any]]:
        """What the customer made."""
        found = self.client.get_domain(domainName=domain)["domain"]["domainEntries"]
        return [entry for entry in found if entry["type"] != "SOA" and (entry["type"], entry["name"]) != ("NS", domain)]

    def refused(self, action: str, **params: Any) -> dict[str, Any]:
        with pytest.raises(ClientError) as caught:
            getattr(self.client, action)(**params)
        error: dict[str, Any] = caught.value.response["Error"]
        return error
