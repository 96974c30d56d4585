"""Bytes per guest, counted on over restarts of the agent and of the machine, when the kernel's own counters begin anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from skysail.network import PortCounters


class _Count(msgspec.Struct):
    """``seen``: the kernel's counters at the last look; ``before``: what earlier counters had come to."""

    seen_rx: int = 0
    seen_tx: int = 0
    before_rx: int = 0
    before_tx: int = 0


class Traffic:
    """One file, replaced at each look; what flows between the last look and a power cut is not counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._counts = msgspec.json.decode(path.read_bytes(), type=dict[str, _Count])
        except (FileNotFoundError, msgspec.MsgspecError):
            self._counts = {}

    def take(self, counters: Mapping[str, PortCounters]) -> bool:
        """Take in the kernel's counters by port; says whether any moved."""
        moved = False
        for port, now in counters.items():
            held = self._counts.setdefault(port, _Count())
            if now.rx_bytes < held.seen_rx or now.tx_bytes < held.seen_tx:
                held.before_rx += held.seen_rx
                held.before_tx += held.seen_tx
            moved |= (now.rx_bytes, now.tx_bytes) != (held.seen_rx, held.seen_tx)
            held.seen_rx, held.seen_tx = now.rx_bytes, now.tx_bytes
        if moved:
            self._write()
        return moved

    def total(self, port: str) -> PortCounters:
        """All bytes of ``port`` so far, as its guest sees them."""
        held = self._counts.get(port, _Count())
        return PortCounters(rx_bytes=held.before_rx + held.seen_rx, tx_bytes=held.before_tx + held.seen_tx)

    def forget(self, ports: Iterable[str]) -> None:
        """These ports are gone for good."""
        for port in ports:
            self._counts.pop(port, None)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        half = self._path.with_suffix(".new")
        half.write_bytes(msgspec.json.encode(self._counts))
        half.replace(self._path)
