"""By which names controller and agents know each other in their certificates.

A host's identity is drawn when it joins: another machine that later has the host's name, or its address, has another one.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

CONTROLLER = "controller.skysail.internal"
Identity = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]


def host_name(identity: str) -> str:
    """The name in the certificate of the host of this identity."""
    return f"{identity}.host.skysail.internal"
