"""Signature Version 4, the verifying side.

The canonical request is rebuilt from the headers that the *client* says it signed: Go signs content-length, JavaScript
x-amz-content-sha256. Source: AWS IAM User Guide, "Create a signed AWS API request".
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from skysail.kit.errors import ApiError

SERVICE = "lightsail"
MAX_SKEW_SECONDS = 300
_HEADER = re.compile(
    r"AWS4-HMAC-SHA256\s+Credential=([^,/\s]+)/(\d{8})/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request\s*,"
    r"\s*SignedHeaders=([a-z0-9;-]+)\s*,\s*Signature=([0-9a-f]{64})\s*")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who signed, and for which region."""

    account_id: str
    access_key_id: str
    region: str


def verify(headers: Mapping[str, str], body: bytes, *, query: bytes = b"", now: float,
           find_secret: Callable[[str], tuple[str, str] | None]) -> Caller:
    """The signer of a ``POST /``. ``headers`` have lower-case names; ``find_secret`` maps a key id to account and secret.

    Raises MissingAuthenticationTokenException, IncompleteSignatureException, UnrecognizedClientException or
    InvalidSignatureException.
    """
    if query:
        raise ApiError("IncompleteSignatureException", "A request to Lightsail has no query string.",
                       "Sign the request in its Authorization header instead of presigning its address.")
    authorization = headers.get("authorization")
    if not authorization:
        raise ApiError("MissingAuthenticationTokenException", "The request is not signed.",
                       "Point your client's access key at this cloud: eval \"$(sudo ./skysail env)\"")
    parsed = _HEADER.fullmatch(authorization)
    if parsed is None:
        raise ApiError("IncompleteSignatureException", "The Authorization header is not AWS4-HMAC-SHA256.")
    key_id, date, region, service, signed, signature = parsed.groups()
    if service != SERVICE:
        raise ApiError("InvalidSignatureException", f"Credential should be scoped to correct service: '{SERVICE}'.")
    stamp = headers.get("x-amz-date", "")
    try:
        signed_at = calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
    except ValueError:
        raise ApiError("IncompleteSignatureException", "The X-Amz-Date header is missing or malformed.") from None
    if not stamp.startswith(date):
        raise ApiError("InvalidSignatureException", "The credential's date and X-Amz-Date differ.")
    names = signed.split(";")
    if "host" not in names or "x-amz-date" not in names or "x-amz-target" not in names:
        raise ApiError("InvalidSignatureException", "host, x-amz-date and x-amz-target must be signed.")
    known = find_secret(key_id)
    if known is None:
        raise ApiError("UnrecognizedClientException", "The security token included in the request is invalid.")
    account_id, secret = known
    lines = "".join(f"{name}:{' '.join(headers.get(name, '').split())}\n" for name in names)
    canonical = f"POST\n/\n\n{lines}\n{signed}\n{hashlib.sha256(body).hexdigest()}"
    scope = f"{date}/{region}/{service}/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for part in (date, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    if not hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), signature):
        raise ApiError("InvalidSignatureException",
                       "The request signature we calculated does not match the signature you provided.")
    # After the signature, so that only a holder of the key learns our clock's verdict.
    if abs(now - signed_at) > MAX_SKEW_SECONDS:
        raise ApiError("InvalidSignatureException", f"Signature expired or not yet current: {stamp}.",
                       "Set this machine's clock.")
    return Caller(account_id, key_id, region)
