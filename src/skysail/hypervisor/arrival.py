"""A guest that comes from another host: the target's half of a live migration (see docs/decisions/0040).

A process is built by the guest's passport, so that it has the same devices at the same places, and waits. It is started
with -S: only :meth:`Arriving.begin` lets it run, when its source's agent, or the document, says that the right to run has
passed. A process that did not come to that never runs: once ``never`` is written down, its source may run again.

One that comes by post-copy runs before all of its memory is here; what becomes of the rest is in
:mod:`skysail.hypervisor.pull` (see docs/decisions/0046).

A guest that is off comes by the same words. What waits for it is a process that never runs, which its disks are written by;
where they are in a pool, nothing waits but the agent itself.

Source: QEMU docs/devel/migration; QMP Reference Manual, nbd-server-start.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from skysail.contract.document import Guest, Volume
from skysail.contract.migration import STREAMS, SYSTEM_DISK, Destination, Passport, Pull
from skysail.contract.report import GuestReport, GuestState
from skysail.hypervisor import confinement, credentials, disks, ferry, line, process, qemu, relay, userfault
from skysail.hypervisor.capabilities import capabilities
from skysail.hypervisor.guest import QemuGuest
from skysail.hypervisor.personality import Identity
from skysail.hypervisor.pull import Pulling
from skysail.hypervisor.qmp import Gone, Monitor, Refused
from skysail.hypervisor.record import Arrival
from skysail.hypervisor.workshop import Workshop
from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread, run_async

log = logging.getLogger(__name__)
# QEMU's name of the certificates.
TLS = "come"
SOCKET_SECONDS = 10.0
# A source says "run" when everything has been loaded; what is left is QEMU's own last step.
LOADED_SECONDS = 10.0
# The same where its memory goes after it: then nothing has been loaded when the word comes, which is said again.
UNLOADED_SECONDS = 3.0
# QEMU's words for a process that has run nothing yet.
WAITING = ("inmigrate", "paused")


def identity(passport: Passport) -> Identity:
    """What a host knows of a guest that came: what is private of it is on the guest's own disk, where it was used."""
    return Identity(host_private="", host_public=passport.host_key, machine_id="", generation_id=passport.generation_id)


class Arriving:
    """One guest that comes. ``news`` is told when it runs, or never will. The guest's lock is ``lock``."""

    def __init__(self, shop: Workshop, guest: QemuGuest, wanted: Guest, lock: asyncio.Lock,
                 news: Callable[[GuestReport], None]) -> None:
        assert wanted.receiving is not None
        self._shop = shop
        self._guest = guest
        self._wanted = wanted
        self._passport = wanted.receiving.passport
        self._lock = lock
        self._news = news
        self._ear: line.Ear | None = None
        # Whether we know of its process that it has not run: we made it, or saw it wait, and nobody but us says "cont".
        self._watched = False
        self._resumed = 0.0
        self._pulling: Pulling | None = None

    @property
    def _folder(self) -> Path:
        return self._guest.folder / "move"

    async def ensure(self) -> GuestReport:
        """It is awaited, or has come; the guest's lock is held. Raises SkysailError when it cannot be awaited now."""
        guest = self._guest
        if guest.record.made:
            if self._off:
                await guest.kill()
            await self.linger()
            return guest.report(await guest.look())
        arrival = guest.record.arrival
        if arrival is not None and (guest.record.process is not None or arrival.bare):
            if not arrival.never:
                await self._look_after()
        else:
            await self._build()
        if guest.record.made:
            await self.linger()
            return guest.report(self._here)
        await self._listen()
        if why := self._over():
            return guest.report("failed", why)
        return guest.report("listening")

    async def linger(self) -> None:
        """It has come, and its source may not have heard so yet: it can still ask."""
        self._pull()
        try:
            await self._listen()
        except (SkysailError, OSError) as failure:
            # The documents tell it, then.
            log.warning("the source of guest %s cannot be told that it runs: %s", self._guest.record.id, failure)

    @property
    def _off(self) -> bool:
        """Whether it comes without running."""
        return self._wanted.receiving is not None and self._wanted.receiving.terms.off

    @property
    def _after(self) -> bool:
        """Whether memory may come after it."""
        return self._wanted.receiving is not None and self._wanted.receiving.terms.post_copy and not self._off

    @property
    def _here(self) -> GuestState:
        """How it is once it has come."""
        return "stopped" if self._off else "running"

    def _over(self) -> str:
        """Why nobody waits for it any more; empty while somebody does."""
        arrival = self._guest.record.arrival
        if arrival is not None and (arrival.never or arrival.bare):
            return arrival.never
        return "" if self._guest.alive() else _UNKNOWN

    async def _look_after(self) -> None:
        """What an earlier agent built is still there, or will never run."""
        if self._bare:
            return
        try:
            status = await process.status(await self._guest.monitor()) if self._guest.alive() else ""
        except Gone:
            if self._guest.alive():
                raise
            status = ""
        if status in WAITING:
            self._watched = True
        elif status:
            # It runs, or has: only our own kind says "cont", and an agent died before it could write that down.
            await self._ran()
        elif self._watched:
            await self._refuse(f"its process ended while it waited: {self._said()}")

    def _said(self) -> str:
        return process.said(process.own_log(self._guest.folder / "run"))[-500:] or "it said nothing"

    # --- building

    async def _build(self) -> None:
        guest, passport = self._guest, self._passport
        await guest.kill()
        if odd := await self._mismatch(await self._shop.pool()):
            guest.save(arrival=Arrival(destination=_NOWHERE, never=odd, shared=bool(passport.pool)))
            return
        chains = await (self._shared() if passport.pool else self._volumes())
        authority = credentials.make(self._folder, "server", self._wanted.id, guest.record.uid)
        credentials.trust(self._folder, passport.authority, guest.record.uid)
        await self._make_seed()
        ways = (*(() if self._off else ("memory",)), *(() if passport.pool else ("disks",)), "word")
        sockets = {name: _listener(self._shop.underlay) for name in ways}
        try:
            ports = {name: one.getsockname()[1] for name, one in sockets.items()}
            over = tuple(disk.name for disk in passport.disks if len(chains[disk.name]) > 1)
            # Before the process: whoever finds this record without one knows that nothing has come.
            guest.save(arrival=Arrival(destination=Destination(
                address=self._shop.underlay, memory_port=ports.get("memory", 0), disks_port=ports.get("disks", 0),
                word_port=ports["word"], authority=authority, over=over), shared=bool(passport.pool), off=self._off),
                identity=identity(passport), ours=passport.ours, parents=chains[SYSTEM_DISK][1:], parent="",
                starts=passport.starts, reboots=passport.reboots, ipv6=passport.ipv6, grown=True)
            try:
                if not self._bare:
                    await self._spawn(chains, sockets)
            except BaseException:
                await guest.kill()
                raise
            self._watched = True
            await self._listen(sockets.pop("word"))
        finally:
            for one in sockets.values():
                one.close()

    @property
    def _bare(self) -> bool:
        return self._guest.record.arrival is not None and self._guest.record.arrival.bare

    async def _mismatch(self, pool: str) -> str:
        """Why this host cannot take the guest in; empty when it can. Its own disks are in ``pool``."""
        shape = self._passport.shape
        if self._passport.pool != pool:
            return f"its disks are {_where(self._passport.pool)}, this host has {_where(pool)}"
        if shape.number != qemu.SHAPE:
            return f"its process has devices of version {shape.number}, this host builds {qemu.SHAPE}"
        if shape.accelerator != self._shop.accelerator:
            return f"it runs by {shape.accelerator}, this host by {self._shop.accelerator}"
        # They name files here; the document's own volumes say which.
        if {disk.name: disk.volume for disk in self._passport.disks if disk.name != SYSTEM_DISK} != {
                one.name: one.volume.id for one in self._wanted.disks}:
            return "its disks are not those that the document names"
        return await self._unable() if self._after else ""

    async def _unable(self) -> str:
        """Why no memory can come after a guest here; empty when it can."""
        said = (await run_async([self._shop.program, "--version"])).decode().split()
        return userfault.hindrance(said[said.index("version") + 1])

    async def _volumes(self) -> dict[str, tuple[str, ...]]:
        """New files for its disks, each with what it stands on here, by the devices' names."""
        guest, chains = self._guest, dict[str, tuple[str, ...]]()
        held = await self._shop.volumes()
        block = {one.name: one.volume for one in self._wanted.disks}
        if taken := [one.id for one in block.values() if one.id in held and one.id not in guest.record.disks]:
            raise SkysailError(f"there is a disk {taken[0]} on this host already", "look at it: it may be a former copy")
        guest.save(disks=tuple(one.id for one in block.values()))
        for disk in self._passport.disks:
            volume = block.get(disk.name) or self._wanted.volume
            if disk.size_bytes > volume.size_gib << 30:
                raise SkysailError(f"the source has {disk.size_bytes} bytes in a disk of {volume.size_gib} GiB")
            await self._shop.drop_volume(volume.id)
            base = self._base() if disk.name == SYSTEM_DISK else None
            blank = Volume(id=volume.id, image=volume.image, size_gib=volume.size_gib)
            path = await self._shop.make_volume(blank, base, disk.size_bytes, guest.record.uid)
            chains[disk.name] = (str(path), *((str(base),) if base else ()))
        return chains

    async def _shared(self) -> dict[str, tuple[str, ...]]:
        """Its disks where they are, by the devices' names."""
        volumes = {SYSTEM_DISK: self._wanted.volume, **{one.name: one.volume for one in self._wanted.disks}}
        self._guest.save(disks=tuple(one.volume.id for one in self._wanted.disks))
        return {disk.name: (str(await self._shop.give_volume(volumes[disk.name].id, self._guest.record.uid)),)
                for disk in self._passport.disks}

    def _base(self) -> Path | None:
        image = self._shop.find_image(self._passport.base) if self._passport.base else None
        return image.path if image is not None and image.path.exists() else None

    async def _make_seed(self) -> None:
        """A file of the seed's size; what is in it comes over the line."""
        if self._passport.shape.seed_serial:
            await in_thread(durable.replace, self._guest.seed, bytes(self._passport.seed_bytes))
            os.chown(self._guest.seed, self._guest.record.uid, self._guest.record.uid)

    async def _spawn(self, chains: dict[str, tuple[str, ...]], sockets: dict[str, socket.socket]) -> None:
        guest, shape = self._guest, self._passport.shape
        monitor = await guest.spawn(self._wanted, qemu.Machine(
            id=self._wanted.id, accelerator=shape.accelerator, vcpus=shape.vcpus, memory_mib=shape.memory_mib,
            folder=str(guest.folder / "run"), disk=chains[SYSTEM_DISK], generation_id=self._passport.generation_id,
            pluggable=shape.pluggable, incoming=True, seed=str(guest.seed) if shape.seed_serial else "",
            seed_serial=shape.seed_serial or "seed", type=shape.type, cpu=shape.cpu))
        guest.save(reboots=self._passport.reboots, mounts={name: "Mounted" for name in self._passport.mounted})
        if self._off:
            for disk in self._passport.disks:
                if disk.name != SYSTEM_DISK:
                    await disks.plug(monitor, disk.name, chains[disk.name])
            await self._export(monitor, sockets["disks"])
            return
        # Until it runs, its owner is not held up by what the transfer takes; and it runs the sooner.
        confinement.unbound(guest.record.id)
        confinement.ahead(guest.record.id)
        await guest.plug(self._wanted, monitor)
        if self._passport.plugged_mib:
            await process.plug_memory(monitor, self._passport.plugged_mib << 20)
        await disks.throttle(monitor, disks.SYSTEM, self._wanted.iops)
        for disk in self._passport.disks:
            if disk.name != SYSTEM_DISK:
                await disks.plug(monitor, disk.name, chains[disk.name], disk.address)
                await disks.throttle(monitor, disk.name, self._wanted.iops)
        if "disks" in sockets:
            await self._export(monitor, sockets["disks"])
        else:
            await monitor.execute("object-add", credentials.named(self._folder, "server", TLS))
        if self._after:
            # Until it has loaded what it needs of that: then it holds it open, and none of its bugs can open another one.
            userfault.admit(guest.record.uid)
        await monitor.execute("migrate-set-capabilities", capabilities(self._after))
        await monitor.execute("migrate-set-parameters", {"tls-creds": TLS, "multifd-channels": STREAMS})
        inlet = guest.folder / "run" / "move.sock"
        inlet.unlink(missing_ok=True)
        await monitor.execute("migrate-incoming", {"uri": f"unix:{inlet}"})
        # It has the rights of the guest's own process, and no network but the connections to this socket.
        relay.spawn(sockets["memory"], str(inlet), guest.folder, uid=guest.record.uid, networked=False)

    async def _export(self, monitor: Monitor, listener: socket.socket) -> None:
        await monitor.execute("object-add", credentials.named(self._folder, "server", TLS))
        await monitor.pass_descriptor("disks", listener.fileno())
        await monitor.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": "disks"}}, "tls-creds": TLS})
        for disk in self._passport.disks:
            await monitor.execute("block-export-add", {"type": "nbd", "id": f"come.{disk.name}", "node-name": disk.name,
                                                       "name": disk.name, "writable": True})

    # --- waiting

    async def _listen(self, listener: socket.socket | None = None) -> None:
        """The source's agent is heard, at the port that it was told."""
        arrival = self._guest.record.arrival
        if self._ear is None and arrival is not None and arrival.destination.address:
            listener = listener or _listener(arrival.destination.address, arrival.destination.word_port)
            self._ear = await line.Ear.open(listener, credentials.context(self._folder, "server"), self._hear)

    async def _hear(self, word: dict[str, Any]) -> dict[str, Any]:
        match word:
            case {"seed": str(content)}:
                async with self._lock:
                    await in_thread(self._write_seed, base64.b64decode(content))
                return {"seed": True}
            case {"sync": True} if self._passport.pool:
                return {"sync": True}
            case {"sync": True}:
                held = await self._shop.volumes()
                for identifier in (self._wanted.volume.id, *(one.volume.id for one in self._wanted.disks)):
                    await in_thread(durable.sync, held[identifier])
                return {"sync": True}
            case {"run": True}:
                async with self._lock:
                    await self.begin()
            case {"never": True}:
                async with self._lock:
                    await self._look_after()
                    if not self._guest.record.made and self._watched:
                        await self._refuse("its source does not send it")
            case {"recover": True} if self._waits_for_memory():
                there = self._guest.record.arrival.destination if self._guest.record.arrival is not None else _NOWHERE
                pulling = self._pulling or Pulling(self._guest, self._lock, TLS, self._news)
                await pulling.reconnect(lambda: _listener(there.address, there.memory_port))
                return {"recover": True}
            case {"lost": True} if self._pulling is not None and self._pulling.on:
                await self._pulling.settle()
            case {"recover": True} | {"lost": True}:
                pass  # it is over: the answer says how
            case _:
                return {"error": "that word is not known"}
        arrival = self._guest.record.arrival
        if self._guest.record.made:
            # An agent that came after that does not know since when.
            since = {"for_ms": (time.monotonic() - self._resumed) * 1000} if self._resumed else {}
            pull = {"pull": msgspec.to_builtins(arrival.pull)} if arrival is not None and arrival.pull is not None else {}
            return {"running": True, **since, **pull}
        return {"never": arrival.never} if arrival is not None and arrival.never else {"error": _UNKNOWN}

    def _waits_for_memory(self) -> bool:
        """Whether what is left of its memory can come: it runs, or is just being let run."""
        arrival = self._guest.record.arrival
        over = arrival is None or arrival.never or (arrival.pull is not None and arrival.pull.state != "coming")
        return self._after and not over and self._guest.alive()

    def _write_seed(self, content: bytes) -> None:
        """In place: QEMU has the file open."""
        if self._guest.record.made or not self._passport.shape.seed_serial:
            return
        with self._guest.seed.open("r+b") as file:
            file.write(content[:self._passport.seed_bytes].ljust(self._passport.seed_bytes, b"\0"))
            file.flush()
            os.fsync(file.fileno())

    # --- the right to run

    async def begin(self) -> None:
        """It has the right to run: it runs when this returns, or ``never`` is written down. The guest's lock is held. Raises
        Gone when its process does not answer; say it again. One that is off is this host's from here on."""
        guest = self._guest
        if guest.record.made or (guest.record.arrival is not None and guest.record.arrival.never):
            return
        if self._off:
            await self._have()
            return
        try:
            monitor = await guest.monitor()
            end = asyncio.get_running_loop().time() + (UNLOADED_SECONDS if self._after else LOADED_SECONDS)
            while (status := await process.status(monitor)) == "inmigrate":
                if asyncio.get_running_loop().time() > end:
                    break
                await asyncio.sleep(0.002)
            if status == "paused":
                self._watched = False
                # An export keeps its disk from being the guest's own.
                with contextlib.suppress(Refused):
                    await monitor.execute("nbd-server-stop")
                await monitor.execute("cont")
                self._resumed = time.monotonic()
                # Where its memory comes after it, QEMU may wait for a page with its main loop from here on. Whoever asks it
                # more than he has to holds up the answer to its source, which alone can help.
                status = "running" if self._after else await process.status(monitor)
        except Refused as refused:
            await self._refuse(f"QEMU does not let it run: {refused.what}")
            return
        except Gone:
            if guest.alive():
                raise
            if self._watched:
                await self._refuse(f"its process ended before it ran: {self._said()}")
            return
        if status == "inmigrate" and self._after:
            raise Gone(f"guest {guest.record.id} has not been loaded yet")
        if status in WAITING:
            await self._refuse(f"its process does not begin to run: it is {status}")
            return
        # Behind "cont", because nothing may keep the guest waiting that need not: as long as the process lives QEMU says
        # itself that it has run, and when it dies with us in here, its disk is whole.
        await self._ran()
        if self._pulling is not None:
            return  # QEMU has announced it by itself
        with contextlib.suppress(SkysailError):
            await monitor.execute("announce-self", {"initial": 50, "max": 550, "rounds": 5, "step": 100})
            await monitor.execute("object-del", {"id": TLS})

    async def _have(self) -> None:
        """It is off, and here."""
        guest = self._guest
        if not self._bare and guest.record.process is None:
            await self._refuse("its disks were not awaited")
            return
        if not self._bare:
            await self._look_after()
            if guest.record.made or (guest.record.arrival is not None and guest.record.arrival.never):
                return
            if not self._watched:
                # It died with the agent that watched it, and nothing was written since its source handed it over.
                log.warning("the process that took in the disks of guest %s is gone", guest.record.id)
        # Before its process ends: a record without one says that nothing has come, and the copies would be made anew.
        guest.save(made=True, stopped=True)
        await guest.kill()
        relay.end(guest.folder)
        self._news(guest.report("stopped"))

    async def came(self) -> None:
        """The document says that it has the right to run; the guest's lock is held. Raises SkysailError if it never will."""
        arrival = self._guest.record.arrival
        if arrival is not None and not arrival.never and self._guest.record.process is not None:
            await self._look_after()
        assert self._wanted.receiving is not None
        if not self._wanted.receiving.whole and self._off and not self._guest.record.made:
            await self._refuse("its source has failed, and nobody knows whether all of it went")
        elif self._guest.alive() or self._off:
            await self.begin()
        elif self._wanted.receiving.whole:
            await self._came_off()
        arrival = self._guest.record.arrival
        if not self._guest.record.made:
            raise SkysailError(f"the guest did not come: {arrival.never if arrival else 'nothing of it is here'}")

    async def _came_off(self) -> None:
        """Its process is gone, but its source has handed it over: its disks are whole, and it starts from them."""
        arrival = self._guest.record.arrival
        if arrival is not None and not arrival.never and self._guest.record.process is not None:
            await self._ran()

    async def _ran(self) -> None:
        guest = self._guest
        if guest.alive():
            await self._announce()
        arrival = guest.record.arrival
        if self._after and arrival is not None and guest.alive():
            arrival = msgspec.structs.replace(arrival, pull=Pull(state="coming"))
        guest.save(made=True, stopped=False, arrival=arrival)
        if guest.record.process is not None and guest.alive():
            # It was spawned without a bound on its processors.
            confinement.limit(guest.record.id, guest.record.process.pid, vcpus=self._wanted.vcpus,
                              memory_mib=self._wanted.memory_mib)
        self._resumed = self._resumed or time.monotonic()
        userfault.dismiss(guest.record.uid)
        self._pull()
        if self._pulling is None:
            relay.end(guest.folder)
        self._news(guest.report("running"))

    def _pull(self) -> None:
        """What is left of its memory comes."""
        arrival = self._guest.record.arrival
        if arrival is not None and arrival.pull is not None and arrival.pull.state == "coming":
            self._pulling = self._pulling or Pulling(self._guest, self._lock, TLS, self._news)
            self._pulling.watch()

    async def _announce(self) -> None:
        """Whoever talks to it finds it here. No controller is asked, and nothing else is waited for: until then it is not
        reached. One that cannot be announced is when its document says that it is here."""
        if self._shop.announce is not None:
            try:
                await self._shop.announce(self._wanted.port.id)
            except (SkysailError, OSError) as failure:
                log.warning("guest %s runs here, and is not announced: %s", self._guest.record.id, failure)

    async def _refuse(self, reason: str) -> None:
        """It will never run, which is on the disk when this returns: only then is it said."""
        guest = self._guest
        if guest.record.process is not None:
            await process.end(guest.record.process, guest.record.id)
        self._note(never=reason)
        userfault.dismiss(guest.record.uid)
        relay.end(guest.folder)
        log.warning("guest %s does not come: %s", guest.record.id, reason)
        self._news(guest.report("failed", reason))

    def _note(self, **changes: Any) -> None:
        arrival = self._guest.record.arrival or Arrival(destination=_NOWHERE)
        self._guest.save(arrival=msgspec.structs.replace(arrival, **changes))

    async def close(self) -> None:
        """Nobody is heard any more; what it came by is gone."""
        if self._ear is not None:
            self._ear.close()
            self._ear = None
        if self._pulling is not None:
            self._pulling.leave()
        await abandon(self._guest)


async def abandon(guest: QemuGuest) -> None:
    """What a guest came by, relay and keys, is gone."""
    if guest.record.arrival is not None:
        userfault.dismiss(guest.record.uid)
        relay.end(guest.folder)
        shutil.rmtree(guest.folder / "move", ignore_errors=True)


async def drop(shop: Workshop, guest: QemuGuest) -> None:
    """The copies of disks go that were made for a guest which never ran here."""
    if guest.record.arrival is not None and not guest.record.arrival.shared and not guest.record.made:
        for volume in (guest.record.id, *guest.record.disks):
            await shop.drop_volume(volume)


# Said of a process that died with the agent that watched it: it may have run for a moment.
_UNKNOWN = "its process ended while nobody watched it"
_NOWHERE = Destination(address="", memory_port=0, disks_port=0, word_port=0, authority="")


def _where(pool: str) -> str:
    return f"in {pool}" if pool else "files"


def _listener(address: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ferry.narrow(made)
        made.bind((address, port))
        made.listen(64)
    except OSError as taken:
        made.close()
        raise SkysailError(f"nothing can listen at {address}:{port}: {taken}") from taken
    return made
