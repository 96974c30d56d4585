"""The keeper: converges this machine to its document, one task per guest, and reports each change.

A guest that is missing from the document is left as it is; only the role ``gone`` removes one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import msgspec

from skysail.agent.blocks import Blocks
from skysail.agent.entrance import EntranceKeeper
from skysail.agent.ledger import Ledger
from skysail.agent.metadata import MetadataKeeper
from skysail.agent.traffic import Traffic
from skysail.agent.zones import ZoneKeeper
from skysail.contract.document import Guest, HostDocument, Network, Overlay, Port
from skysail.contract.report import GuestReport, GuestState, HostReport, ImageReport, Inventory
from skysail.dns import Zones
from skysail.hypervisor import Hypervisor
from skysail.ingress import Ingress
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread
from skysail.metadata import Responder
from skysail.network import Fabric
from skysail.storage import Pool, Shelf

log = logging.getLogger(__name__)
BACK_OFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
# A guest that ran this long before it died starts its back-off anew.
STEADY_SECONDS = 600.0
NETWORK_SECONDS = 30.0
# A launch that fails once may have met a busy machine; after this many it is said to have failed.
TRIES = 3
# The roles in which a guest runs here, unless it has gone over to another host already.
RUNNING = ("run", "send")


class StaleGeneration(Exception):
    """The document is older than the one held."""


class Keeper:
    """Holds one host. ``capacity`` carries what the machine has; its lists of guests and images are filled in here.
    ``renews`` says of an image, by digest, whether its guests take on another identity in a copy; all do unless told.

    With ``boot``, which names the machine's present boot, what an earlier one left in the ledger starts nothing: this host
    may have been taken for lost meanwhile, and its guests may run elsewhere. It waits for a document of a controller that has
    heard this very agent; one that stood still for a while may have an older one to deliver."""

    def __init__(self, capacity: HostReport, hypervisor: Hypervisor, pool: Pool, shelf: Shelf, fabric: Fabric,
                 images: Callable[[], list[ImageReport]], ledger: Ledger, traffic: Traffic, zones: Zones,
                 responder: Responder, renews: Callable[[str], Awaitable[bool]] | None = None,
                 ingress: Sequence[Ingress] = (), boot: str = "") -> None:
        self._boot = boot
        self._hypervisor = hypervisor
        self._pool = pool
        self._shelf = shelf
        self._blocks = Blocks(hypervisor, pool, shelf, self._changed, self._look)
        self._fabric = fabric
        self._images = images
        self._renews = renews
        self._ledger = ledger
        self._traffic = traffic
        self.zones = ZoneKeeper(zones, self._changed)
        self.entrance = EntranceKeeper(ingress, self._apply_network, self._changed)
        self.metadata = MetadataKeeper(responder, self._retell)
        self._report = msgspec.structs.replace(capacity, boot=str(uuid.uuid4()), sequence=0, generation=0)
        self._guests: dict[str, GuestReport] = {}
        self._wanted: dict[str, Guest] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake: dict[str, asyncio.Event] = {}
        self._work: dict[str, asyncio.Task[GuestReport]] = {}
        self._falls: dict[str, list[float]] = {}
        self._departed: set[str] = set()
        self._applied: tuple[list[Port], tuple[Network, ...], Overlay | None] | None = None
        self._networks: tuple[Network, ...] = ()
        self._overlay: Overlay | None = None
        # The networks that are joined now; None as long as we do not know.
        self._joined: tuple[Network, ...] | None = None
        self._rewired = asyncio.Event()
        self._addresses: dict[str, tuple[str, ...]] = {}
        self._news = asyncio.Condition()
        self._network = asyncio.Lock()
        self._accepting = asyncio.Lock()

    async def start(self) -> None:
        """Adopt what runs, then converge to the last document; call once, before anything else."""
        for report in await self._hypervisor.observe():
            self._hold(report)
        await self._blocks.start()
        document = self._ledger.read()
        if self._boot and not self._ledger.heard_in(self._boot):
            log.info("the machine has booted: nothing is started before a controller has spoken")
            self._report = msgspec.structs.replace(self._report, waits=True)
            if document is not None:
                self._report = msgspec.structs.replace(self._report, generation=document.generation)
                self.zones.take(document.zones)  # those it may answer for, whoever runs elsewhere
        elif document is not None:
            # One that went before we died has no port: its addresses may be another guest's by now.
            self._departed |= {guest.id for guest in document.guests
                               if guest.role == "gone" and guest.id not in self._guests}
            await self._take(document)
        await self._changed()

    async def accept(self, document: HostDocument, parts: Mapping[str, bytes] | None = None) -> None:
        """Store the document and the parts of its zones that came with it, then converge to it behind the answer; raises
        StaleGeneration for an older one, and while this host waits for one that was not written for it, MissingParts, and
        ValueError for a part that is damaged."""
        # One at a time: a controller that was killed may still have an older one under way behind its successor's.
        async with self._accepting:
            if document.generation < self._report.generation:
                raise StaleGeneration(f"generation {self._report.generation} is held, {document.generation} is older")
            if self._report.waits and document.life not in ("", self._report.boot):
                raise StaleGeneration("this host has booted since that was written")
            keep = self._ledger.write if document.generation > self._report.generation else self._ledger.again
            whole = await in_thread(keep, document, parts)
            if self._report.waits:
                await in_thread(self._ledger.hear_in, self._boot)
                self._report = msgspec.structs.replace(self._report, waits=False)
            await self._take(whole)
        await self._changed()

    async def _take(self, document: HostDocument) -> None:
        self._report = msgspec.structs.replace(self._report, generation=document.generation)
        self._blocks.take(document)
        self.zones.take(document.zones)
        self.entrance.take(document)
        if (self._networks, self._overlay) != (document.networks, document.overlay):
            self._networks, self._overlay = document.networks, document.overlay
            self._rewired.set()
        for guest in document.guests:
            known = self._wanted.get(guest.id)
            self._wanted[guest.id] = guest
            if guest.role != "gone":
                self._departed.discard(guest.id)  # it went elsewhere with its disks, and is back
            if known != guest:
                self._wake.setdefault(guest.id, asyncio.Event()).set()
                if known is not None and known.starts != guest.starts:
                    self._falls.pop(guest.id, None)  # its owner starts it: that is not made to wait
                if known is not None and (known.role != guest.role or (guest.force and not known.force)):
                    # A launch or an orderly stop that nobody wants any more is not waited for.
                    self._call_off(guest.id)
            if guest.id not in self._tasks or self._tasks[guest.id].done():
                self._tasks[guest.id] = asyncio.create_task(self._keep(guest.id))
        self.metadata.take(self._wanted.values())
        named = {guest.id for guest in document.guests}
        for identifier in [known for known, guest in self._wanted.items() if guest.role == "gone" and known not in named]:
            # The controller read that it is gone and dropped it: nothing is left to say.
            if self._guests.get(identifier, GuestReport(id="", state="gone")).state == "gone":
                self._wanted.pop(identifier)
                self._guests.pop(identifier, None)
                self._addresses.pop(identifier, None)
                self._tasks.pop(identifier).cancel()
                self._wake.pop(identifier, None)
                self._departed.discard(identifier)

    async def follow(self) -> None:
        """Wake the task of each guest that changed by itself; runs until cancelled."""
        while True:
            try:
                async for report in self._hypervisor.changes():
                    await self._notice(report)
            except Exception:
                log.exception("looking for changes of guests goes on after a failure")
                await asyncio.sleep(1.0)

    async def _notice(self, report: GuestReport) -> None:
        if report.id not in self._wake:
            return
        if report.state == "crashed":
            now = asyncio.get_running_loop().time()
            recent = [fall for fall in self._falls.get(report.id, []) if fall > now - STEADY_SECONDS]
            self._falls[report.id] = [*recent, now]
        if report.progress is None or report.progress.state != "copying" or report.state != "running":
            self._wake[report.id].set()
        await self._say(report)

    async def tend_network(self) -> None:
        """Now and then, and when networks are joined or parted: put back what another program took from the network (a reload
        of the machine's own firewall flushes ours too), and read the counters; runs until cancelled."""
        while True:
            self._rewired.clear()
            try:
                if self._wanted or self._networks or self._overlay:
                    await self._apply_network(again=True)
                elif self._joined is None:  # nobody is here who could be let through
                    self._joined = ()
                    await self._changed()
                if self._traffic.take(await self._fabric.observe()):
                    await self._retell()
            except (SkysailError, OSError) as failure:
                log.warning("the network could not be looked after: %s", failure)
            pause = NETWORK_SECONDS if self._joined == self._networks else BACK_OFF_SECONDS[1]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._rewired.wait()

    async def recount(self) -> None:
        """Report the images that are here now."""
        await self._changed()

    async def prepare(self, image: str, vcpus: int) -> None:
        """Make ready what a launch of this image needs, and report the images that are here; raises SkysailError."""
        await self.recount()
        await self._hypervisor.prepare(image, vcpus)

    def _call_off(self, identifier: str) -> None:
        work = self._work.get(identifier)
        if work is not None:
            work.cancel()

    async def _rest(self, guest: Guest) -> None:
        """Let a guest that keeps dying rest before its next start, unless its owner asks for something."""
        falls = self._falls.get(guest.id, [])
        if guest.role not in RUNNING or len(falls) < 2:
            return
        pause = falls[-1] + BACK_OFF_SECONDS[min(len(falls), len(BACK_OFF_SECONDS)) - 1] - asyncio.get_running_loop().time()
        if pause > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake[guest.id].wait()

    async def _keep(self, identifier: str) -> None:
        failures = 0
        while True:
            wake = self._wake.setdefault(identifier, asyncio.Event())
            wake.clear()
            await self._rest(self._wanted[identifier])
            wake.clear()
            guest = self._wanted[identifier]
            self._work[identifier] = work = asyncio.create_task(self._converge(guest))
            try:
                await asyncio.wait((work,))
            except asyncio.CancelledError:
                work.cancel()
                raise
            if work.cancelled():
                continue
            try:
                report = work.result()
                failures = 0
            except Exception as failure:
                self._applied = None  # perhaps it was the network: look at it again
                log.exception("guest %s did not converge", identifier)
                failures += 1
                report = await self._failed(guest, failures, str(failure)[:500])
            await self._say(report)
            pause = BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS)) - 1] if failures else None
            # Not wait_for, which before Python 3.12 loses a cancellation that comes together with the event: whoever called
            # this task off would wait for it forever.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await wake.wait()

    async def _failed(self, guest: Guest, failures: int, reason: str) -> GuestReport:
        """How a guest stands that could not be brought to its role. What runs is said to run, whatever else went wrong."""
        try:
            seen = next((one for one in await self._hypervisor.observe() if one.id == guest.id), None)
        except Exception:
            log.exception("the guests could not be looked at")
            seen = None
        if guest.role == "receive":
            # Its source is not told to send it here: the attempt is for the controller to end.
            state: GuestState = "failed" if failures >= TRIES else "preparing"
        elif guest.role not in RUNNING:
            state = "stopping" if seen is None or seen.state != "running" else "running"
        elif seen is not None and (seen.state == "running" or seen.starts == guest.starts):
            state = seen.state
        else:
            # It never ran for this start: its owner learns that it cannot, and why, after some tries.
            state = "failed" if failures >= TRIES else "preparing"
        # One that cannot be looked at holds what it held: a disk that is taken for let go would be given to another guest.
        held = seen or self._guests.get(guest.id) or GuestReport(id=guest.id, state=state)
        return msgspec.structs.replace(
            held, state=state, starts=guest.starts if state == "failed" or seen is None else seen.starts, reason=reason)

    async def _converge(self, guest: Guest) -> GuestReport:
        if guest.role in (*RUNNING, "receive"):
            await self._apply_network()
        if guest.role in RUNNING:
            for one in guest.disks:
                await self._blocks.ready(one.volume.id)
            await self._refuse_unsound(guest)
        report = await self._hypervisor.ensure(guest)
        if guest.role == "stop":
            try:
                await self._apply_network()  # its addresses may have changed
            except (SkysailError, OSError) as failure:
                log.warning("guest %s is off, and its network is not set: %s", guest.id, failure)
                return report
        self._addresses[guest.id] = guest.port.public_addresses
        if guest.role == "gone" and report.state == "gone":
            if not guest.leaves_disks:
                await self._pool.remove(guest.volume.id)
            self._departed.add(guest.id)
            await self._apply_network()
            self._traffic.forget((guest.port.id,))
            self._falls.pop(guest.id, None)
        return report

    async def _refuse_unsound(self, guest: Guest) -> None:
        """Raises SkysailError for a guest that cannot be made of what it is to begin as."""
        if guest.volume.origin is None or guest.volume.id in await self._pool.observe():
            return
        await self._blocks.sound(guest.volume)
        if self._renews is not None and not await self._renews(guest.volume.image):
            raise SkysailError(
                f"the image {guest.volume.image[:12]} was built before copies took on an identity of their own: this one "
                "would have the keys and addresses of its source; make a disk of its system disk's snapshot instead")

    async def _apply_network(self, again: bool = False) -> None:
        async with self._network:
            # A guest that is going keeps its port until its process is gone: several launches and deletions share one
            # pass of the whole network.
            ports = [guest.port for guest in self._wanted.values() if guest.id not in self._departed and not guest.stranded]
            networks, overlay = self._networks, self._overlay
            if again or (ports, networks, overlay) != self._applied:
                self._applied = None
                await self._fabric.apply(ports, networks, overlay)
                self._applied = (ports, networks, overlay)
            news, self._joined = self._joined != networks, networks
        if news:
            await self._changed()

    async def _say(self, report: GuestReport) -> None:
        if self._hold(report):
            await self._changed()

    async def _look(self, guest_id: str) -> None:
        """Tell of a guest as it stands now."""
        for report in await self._hypervisor.observe():
            if report.id == guest_id and guest_id in self._guests:
                held = self._guests[guest_id]
                await self._say(msgspec.structs.replace(held, alone=report.alone))

    async def flatten(self) -> None:
        """Move what stands on deleted snapshots off them; runs until cancelled."""
        await self._blocks.flatten()

    async def _retell(self) -> None:
        """Tell of the guests what is known of them beside their reports."""
        for report in list(self._guests.values()):
            self._hold(report)
        await self._changed()

    def _hold(self, report: GuestReport) -> bool:
        """Keep the report, with its guest's bytes, addresses and how it is told of itself; says whether it is news."""
        flow = self._traffic.total(report.id)
        report = msgspec.structs.replace(report, rx_bytes=flow.rx_bytes, tx_bytes=flow.tx_bytes,
                                         public_addresses=self._addresses.get(report.id, ()),
                                         metadata_options=self.metadata.options(report.id))
        if self._guests.get(report.id) == report:
            return False
        self._guests[report.id] = report
        return True

    async def _changed(self) -> None:
        async with self._news:
            disks, snapshots = self._blocks.reports()
            networked = self._report.generation if self._joined == self._networks else self._report.networked
            self._report = msgspec.structs.replace(
                self._report, sequence=self._report.sequence + 1, guests=tuple(self._guests.values()),
                images=tuple(self._images()), disks=disks, snapshots=snapshots, zones=self.zones.reports(),
                networked=networked, entrance=self.entrance.report())
            self._news.notify_all()

    def report(self) -> HostReport:
        """What this host observes now."""
        return self._report

    async def reports(self, keep_alive_seconds: float = 15.0) -> AsyncIterator[HostReport | None]:
        """The report now, and again at each change; None when nothing changed for ``keep_alive_seconds``, or somewhat less:
        those of thousands of hosts are not to come at once."""
        seen = -1
        while True:
            try:
                async with asyncio.timeout(keep_alive_seconds * random.uniform(0.8, 1.0)), self._news:
                    while self._report.sequence == seen:
                        await self._news.wait()
            except TimeoutError:
                yield None
                continue
            seen = self._report.sequence
            yield self._report

    async def inventory(self) -> Inventory:
        """What the machine really holds; no effects."""
        seen = await self._hypervisor.observe()
        joined = await self._fabric.joined()
        return Inventory(
            guests=tuple(sorted(report.id for report in seen)),
            running=tuple(sorted(report.id for report in seen if report.state == "running")),
            volumes=tuple(sorted(await self._pool.observe())), ports=tuple(sorted(await self._fabric.observe())),
            snapshots=tuple(await self._shelf.observe()), strays=tuple(await self._hypervisor.strays()),
            zones=await self.zones.inventory(), reached_by=joined.reached_by, routed=joined.routed,
            names=await self.entrance.inventory(), metadata=await self.metadata.inventory())

    @property
    def host(self) -> str:
        """Which host this is."""
        return self._report.host

    def wanted(self) -> dict[str, Guest]:
        """The guests that documents named, as the last one wants them."""
        return dict(self._wanted)

    def document(self) -> HostDocument | None:
        """The document that this host holds to; None before the first one."""
        return self._ledger.read()
