"""What the looks of verify tell."""

from __future__ import annotations

import msgspec


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is not as it should be: what it is about, what was seen, what should be."""

    subject: str
    saw: str
    wanted: str
