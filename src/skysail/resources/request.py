"""What an action is asked: by whom, in which region, with which validated parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One authenticated, validated call."""

    account_id: str
    region: str
    action: str
    params: dict[str, Any]
