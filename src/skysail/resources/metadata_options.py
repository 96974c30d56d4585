"""The API's words for how an instance may read its metadata.

Source: Lightsail API reference, InstanceMetadataOptions.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import RowMapping

from skysail.hosts import desired

# Members of the API's shape, and what the contract calls them.
MEMBERS = {"httpTokens": "http_tokens", "httpEndpoint": "http_endpoint",
           "httpPutResponseHopLimit": "http_put_response_hop_limit", "httpProtocolIpv6": "http_protocol_ipv6"}


def shape(instance: RowMapping, observed: Any) -> dict[str, Any]:
    """The API's InstanceMetadataOptions; ``observed`` are those that the host goes by."""
    wanted = msgspec.to_builtins(desired.metadata_options(instance))
    return {member: wanted[name] for member, name in MEMBERS.items()} | {
        "state": "applied" if observed == wanted else "pending"}
