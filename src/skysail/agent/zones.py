"""The zones of this host: holds its name server to what the document says of them, in one task, zone by zone.

As with guests, a zone that is missing from the document is left as it is; only the role ``gone`` removes one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from skysail.contract.document import Zone
from skysail.contract.report import HeldZone, ZoneReport
from skysail.dns import NameServerAway, Zones
from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
# How often the name server is looked at without a reason, and how soon a zone that could not be written is tried again.
LOOK_SECONDS = 15.0
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0, 15.0)
# How many zones are written before their news goes out.
PASS_ZONES = 50


class ZoneKeeper:
    """Converges zones. ``changed`` is awaited after each pass that has news."""

    def __init__(self, zones: Zones, changed: Callable[[], Awaitable[None]]) -> None:
        self._zones = zones
        self._changed = changed
        self._wanted: dict[str, Zone] = {}
        self._applied: dict[str, Zone] = {}
        self._reports: dict[str, ZoneReport] = {}
        # Names of zones to look at, the latest change first: it does not wait for all that a starting agent has to see.
        self._queue: deque[str] = deque()
        self._failed: set[str] = set()
        # Those written since they were last read whole: it is done once they rest, and not while somebody waits for a change.
        self._unread: set[str] = set()
        self._reading: set[str] = set()
        self._wake = asyncio.Event()

    def take(self, zones: Iterable[Zone]) -> None:
        """The document's zones. Documents that come faster than zones are written are met by their last one."""
        named = set()
        for zone in zones:
            named.add(zone.name)
            if self._wanted.get(zone.name) != zone:
                self._wanted[zone.name] = zone
                known = self._reports.get(zone.name, ZoneReport(id="", name=zone.name, state="pending"))
                self._reports[zone.name] = msgspec.structs.replace(known, id=zone.id, state="pending", reason="")
                # Also one that is again what was applied: its next look is what says so.
                self._applied.pop(zone.name, None)
                self._queue.appendleft(zone.name)
                self._wake.set()
        for name in [name for name, report in self._reports.items() if report.state == "gone" and name not in named]:
            # The controller read that it is gone and dropped it: nothing is left to say.
            del self._reports[name], self._wanted[name]
            self._applied.pop(name, None)

    def reports(self) -> tuple[ZoneReport, ...]:
        """Each zone that a document named, as it is now."""
        return tuple(self._reports.values())

    async def inventory(self) -> tuple[HeldZone, ...]:
        """What the name server really holds; nothing when it cannot be asked."""
        try:
            return tuple(await self._zones.observe())
        except SkysailError as silent:
            log.warning("the zones could not be looked at: %s", silent)
            return ()

    async def run(self) -> None:
        """Converge until cancelled."""
        now = asyncio.get_running_loop().time
        failures, looked = 0, now()
        while True:
            self._wake.clear()
            before = dict(self._reports)
            away = await self._pass()
            if self._reports != before:
                await self._changed()
            if self._queue and not away:
                continue
            failures = failures + 1 if away or self._failed else 0
            pause = RETRY_SECONDS[min(failures, len(RETRY_SECONDS)) - 1] if failures else LOOK_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._queue.extend(self._failed)
            self._failed.clear()
            if now() - looked >= LOOK_SECONDS:
                looked = now()
                await self._look()

    async def _pass(self) -> bool:
        """Bring the next zones to what is wanted of them; says whether the name server is away."""
        for _ in range(min(len(self._queue), PASS_ZONES)):
            name = self._queue.popleft()
            zone = self._wanted.get(name)
            if zone is None or self._applied.get(name) == zone:
                continue
            report = ZoneReport(id=zone.id, name=name, state="gone")
            try:
                if zone.role == "gone":
                    await self._zones.remove(name)
                    self._unread.discard(name)
                else:
                    believing = self._reports[name].serial > 0 and name not in self._reading
                    held = await self._zones.apply(zone, believing)
                    (self._unread.add if believing else self._unread.discard)(name)
                    self._reading.discard(name)
                    report = ZoneReport(id=zone.id, name=name, state="served", serial=held.serial, ds=held.ds)
                self._applied[name] = zone
            except NameServerAway as gone:
                self._queue.appendleft(name)
                self._fail(str(gone))
                return True
            except Exception as failure:  # one zone's trouble is not another's
                log.warning("zone %s did not converge: %s", name, failure)
                self._failed.add(name)
                report = msgspec.structs.replace(self._reports[name], id=zone.id, state="failed", reason=str(failure)[:500])
            if self._wanted.get(name) == zone:  # else the document changed meanwhile, and a later look speaks
                self._reports[name] = report
        return False

    def _fail(self, reason: str) -> None:
        """No zone can be written now: each that should be says so."""
        log.warning("%s", reason)
        for name, zone in self._wanted.items():
            if self._applied.get(name) != zone:
                self._reports[name] = msgspec.structs.replace(self._reports[name], state="failed", reason=reason[:500])

    async def _look(self) -> None:
        """Write again what the name server holds otherwise than it was left: its database was lost, or put back."""
        if not self._wanted:
            return
        try:
            serials = await self._zones.serials()
        except SkysailError:
            return  # it is away; what it holds did not change
        for name in self._unread & self._applied.keys():
            del self._applied[name]
            self._queue.append(name)
            self._reading.add(name)
        for name, zone in self._wanted.items():
            left = self._reports[name].serial if zone.role == "serve" else None
            if self._applied.get(name) == zone and serials.get(name) != left:
                del self._applied[name]
                self._queue.append(name)
