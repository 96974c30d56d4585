"""The memory that still comes to a guest which came by post-copy and runs already (see docs/decisions/0046).

Its process asks its source for each page that it touches and does not have; the others follow by themselves. Until all are
there it cannot do without its source. A connection that breaks is made anew, as often as need be: the guest goes on with what
it has meanwhile, and waits for what it has not. If the source never comes back, the guest ends here, and starts from its own
disk, which is whole, as after a power cut.

Source: QEMU docs/devel/migration/postcopy; QMP Reference Manual, migrate-recover, query-migrate.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable

import msgspec

from skysail.contract.migration import Pull
from skysail.contract.report import GuestReport
from skysail.hypervisor import relay
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.process import Pid
from skysail.hypervisor.qmp import Monitor, Refused
from skysail.kit.errors import SkysailError

log = logging.getLogger(__name__)
LOOK_SECONDS = 0.2
# QEMU's main loop may wait for a page of the guest, and answers nobody meanwhile.
ANSWER_SECONDS = 2.0
# A source of which nothing has come for so long never comes back: a guest that waits for its memory serves nobody.
FORSAKEN_SECONDS = 300.0
# What is on its way from a source that has just ended is there after this.
LAST_SECONDS = 3.0
RECONNECT_SECONDS = 4.0
# QEMU's words for the time in which pages come.
COMING = ("postcopy-active", "postcopy-device", "active", "device")


class Pulling:
    """Of one guest, whose lock is ``lock``, by the process that it has now, which holds the certificates ``tls``. ``news`` is
    told when it ends."""

    def __init__(self, guest: QemuGuest, lock: asyncio.Lock, tls: str, news: Callable[[GuestReport], None]) -> None:
        self._guest = guest
        self._lock = lock
        self._tls = tls
        self._news = news
        self._process: Pid | None = guest.record.process
        self._heard = time.monotonic()
        self._task: asyncio.Task[None] | None = None
        self._asked: asyncio.Task[str | None] | None = None

    @property
    def _held(self) -> Pull | None:
        arrival = self._guest.record.arrival
        return arrival.pull if arrival is not None else None

    @property
    def on(self) -> bool:
        """Whether anything still comes, as far as that is known."""
        held = self._held
        return held is not None and held.state == "coming"

    def watch(self) -> None:
        """Follow it to its end; repeatable."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._follow())

    def leave(self) -> None:
        """Follow it no more; it goes on."""
        if self._task is not None:
            self._task.cancel()

    async def _follow(self) -> None:
        while self.on:
            try:
                await self._look()
            except (SkysailError, OSError) as failure:
                log.warning("how the memory of guest %s comes along is not known: %s", self._guest.record.id, failure)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        if not self._here():
            await self._ended()
            return
        word = await self._word()
        if word == "completed":
            await self._whole()
        elif word in COMING:
            self._heard = time.monotonic()
        elif word in ("", "none", "failed"):
            await self._ended()
        elif time.monotonic() - self._heard > FORSAKEN_SECONDS:
            await self._cut(f"nothing came from its source for {FORSAKEN_SECONDS:.0f} s")

    def _here(self) -> bool:
        """Whether the process that it came to is still there."""
        return self._guest.alive() and self._guest.record.process == self._process

    async def _word(self) -> str | None:
        """QEMU's on the migration; None while it does not answer. One that has not answered is not asked again: it takes in
        eight questions, and then not even what is said aside."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.create_task(self._ask())
        done, _ = await asyncio.wait((self._asked,), timeout=ANSWER_SECONDS)
        return self._asked.result() if done else None

    async def _ask(self) -> str | None:
        try:
            return str((await (await self._guest.monitor()).execute("query-migrate")).get("status", ""))
        except SkysailError:
            return None

    async def settle(self) -> None:
        """Its source is gone for good: what is not here in a moment never comes. Raises SkysailError if that could not be
        done; say it again."""
        end = time.monotonic() + LAST_SECONDS
        while self.on and time.monotonic() < end:
            await self._look()
            if await self._word() == "postcopy-paused":
                break
            await asyncio.sleep(0.05)
        if self.on:
            await self._cut("its source ended before all of it had come")

    async def reconnect(self, listen: Callable[[], socket.socket]) -> None:
        """Wait for the rest by a new connection, at the place where all of it was awaited, which ``listen`` opens. Raises
        SkysailError when QEMU does not; say it again. It takes no lock: whoever has that may be waiting for a QEMU which
        waits for this."""
        guest, end = self._guest, time.monotonic() + RECONNECT_SECONDS
        # What is left of the former connection: QEMU does not take a new one before it knows that it is broken.
        relay.end(guest.folder)
        monitor = await guest.monitor()
        inlet = guest.folder / "run" / "move.sock"
        while True:
            try:
                await self._recover(monitor, str(inlet))
                break
            except Refused:
                if time.monotonic() > end:
                    raise
                await asyncio.sleep(0.05)
        listener = listen()
        try:
            relay.spawn(listener, str(inlet), guest.folder, uid=guest.record.uid, networked=False)
        finally:
            listener.close()

    async def _recover(self, monitor: Monitor, inlet: str) -> None:
        try:
            await monitor.execute("migrate-recover", {"uri": f"unix:{inlet}"}, aside=True)
        except Refused as refused:
            # QEMU before 9.1, which waits there already since it was told before.
            if "triggered already" not in refused.what:
                raise

    # --- the end

    async def _whole(self) -> None:
        async with self._lock:
            if self.on:
                self._note(Pull(state="whole"))
                relay.end(self._guest.folder)
                with contextlib.suppress(SkysailError):
                    await (await self._guest.monitor()).execute("object-del", {"id": self._tls})
                self._news(self._guest.report(await self._guest.look()))

    async def _ended(self) -> None:
        """Its process is gone, or is another one. Its owner may have stopped it, who needs no more of it."""
        async with self._lock:
            if self.on:
                record = self._guest.record
                over = record.stopped or record.halted
                self._note(Pull(state="whole") if over else Pull(
                    state="cut", reason="its process ended before all of it had come"))
                relay.end(self._guest.folder)
                self._news(self._guest.report(await self._guest.look()))

    async def _cut(self, reason: str) -> None:
        """Before it is noted its process ends: whoever comes after us finds no process, and knows that it is over."""
        async with self._lock:
            if self.on and self._here():
                log.warning("guest %s starts from its disk: its memory does not come: %s", self._guest.record.id, reason)
                await self._guest.kill()
                self._note(Pull(state="cut", reason=reason))
                relay.end(self._guest.folder)
                self._news(self._guest.report(await self._guest.look(), reason))

    def _note(self, pull: Pull) -> None:
        arrival = self._guest.record.arrival
        assert arrival is not None
        self._guest.save(arrival=msgspec.structs.replace(arrival, pull=pull))

