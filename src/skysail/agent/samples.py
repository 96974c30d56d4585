"""Samples: what each guest used, written down at regular times and kept until the controller has had them.

Each line of the log holds a sample and the *marks* that it was counted up to: processor seconds and bytes of each guest. Both
are on the disk at once, so an agent that is killed at any moment neither forgets what a guest used nor counts it twice: the
next one counts on from the last line. What a guest's process used between its last sample and its own death is not known.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from skysail.agent import burst
from skysail.agent.traffic import Traffic
from skysail.contract.document import Guest
from skysail.contract.samples import Condition, GuestSample, Sample, SamplePage
from skysail.hypervisor import Hypervisor, Usage
from skysail.kit import durable
from skysail.kit.errors import SkysailError
from skysail.kit.process import in_thread
from skysail.metadata import Tokenless
from skysail.network import Fabric, PortCounters

log = logging.getLogger(__name__)
# Two files of this size: with 100 guests some 14 hours of samples, with one guest a month.
SEGMENT_BYTES = 16 << 20
PAGE_SAMPLES = 100
# The roles in which a guest runs here, as far as it is here.
RUNNING = ("run", "send", "receive")


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """How far a guest is counted. ``process`` names the one that ``cpu_seconds`` is of; ``answered``: its agent has answered
    since. ``ran``: the owner's start that it was last seen to run for. ``balance_seconds`` is None before the first sample of
    a plan with a baseline. ``tokenless`` counts requests for metadata within ``life``."""

    at: float = 0.0
    process: str = ""
    cpu_seconds: float = 0.0
    answered: bool = False
    ran: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    balance_seconds: float | None = None
    life: str = ""
    tokenless: int = 0


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the log."""

    ring: str
    sample: Sample
    marks: dict[str, Mark]


class SampleLog:
    """Samples on disk: appended and synced, in two segments of bounded size of which the older one is thrown away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old = path.with_name(path.name + ".old")
        self.ring, self.marks = secrets.token_hex(8), dict[str, Mark]()
        self._samples: deque[Sample] = deque()
        self._old_count = 0
        for segment in (self._old, path):
            self._old_count = len(self._samples)
            for line in _lines(segment):
                if self._samples and (line.ring != self.ring or line.sample.sequence <= self.last):
                    continue  # an older numbering, or a line that stands in both segments
                self.ring, self.marks = line.ring, line.marks
                self._samples.append(line.sample)
        _cut(path)

    @property
    def last(self) -> int:
        """The number of the newest sample; 0 before the first."""
        return self._samples[-1].sequence if self._samples else 0

    def append(self, sample: Sample, marks: dict[str, Mark]) -> None:
        """On the disk when this returns; raises OSError, and then it was not taken."""
        line = msgspec.json.encode(Line(ring=self.ring, sample=sample, marks=marks)) + b"\n"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists() and self._path.stat().st_size > SEGMENT_BYTES:
            self._path.replace(self._old)
            for _ in range(self._old_count):
                self._samples.popleft()
            self._old_count = len(self._samples)
        self._write(line)
        self.marks = marks
        self._samples.append(sample)

    def _write(self, line: bytes) -> None:
        new = not self._path.exists()
        with self._path.open("ab") as file:
            end = file.tell()
            try:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), end)  # half a line would swallow the next one
                raise
        if new:
            durable.sync(self._path.parent)

    def page(self, ring: str, after: int) -> SamplePage:
        """Up to PAGE_SAMPLES samples behind number ``after`` of ``ring``; the oldest ones held when that is another ring."""
        behind = after if ring == self.ring else 0
        first = self._samples[0].sequence if self._samples else 0
        begin = max(0, behind + 1 - first)
        return SamplePage(ring=self.ring, samples=tuple(
            self._samples[number] for number in range(begin, min(begin + PAGE_SAMPLES, len(self._samples)))))


def _lines(path: Path) -> list[Line]:
    found = []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            found.append(msgspec.json.decode(text, type=Line))
        except msgspec.MsgspecError:
            log.warning("a line of %s cannot be read; it was cut off by a crash, or damaged", path)
    return found


def _cut(path: Path) -> None:
    """Remove half a line that a crash left at the end."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


class Sampler:
    """Looks at each guest of ``wanted`` every ``interval_seconds``. With ``throttles`` it holds a guest that spent its
    credits to its baseline."""

    def __init__(self, samples: SampleLog, hypervisor: Hypervisor, fabric: Fabric, traffic: Traffic,
                 wanted: Callable[[], Mapping[str, Guest]], tokenless: Callable[[], Awaitable[Tokenless]], *,
                 interval_seconds: float, throttles: bool) -> None:
        self._log = samples
        self._hypervisor = hypervisor
        self._fabric = fabric
        self._traffic = traffic
        self._wanted = wanted
        self._tokenless = tokenless
        self._interval = interval_seconds
        self._throttles = throttles
        self._held: dict[str, tuple[str, bool]] = {}

    async def run(self) -> None:
        """Take a sample at each full interval until cancelled."""
        while True:
            await asyncio.sleep(self._interval - time.time() % self._interval)
            # A wake-up that is a little early belongs to the interval that ends now, like one that is a little late.
            end = round(time.time() / self._interval) * self._interval
            try:
                await self.take(end)
            except (SkysailError, OSError) as failure:
                log.warning("no sample was taken; the next one speaks for its time too: %s", failure)
            except Exception:
                log.exception("no sample was taken")

    async def take(self, now: float) -> Sample:
        """One sample, on the disk."""
        self._traffic.take(await self._fabric.observe())
        usages, asked = await self._hypervisor.usage(), await self._tokenless()
        measured, marks = [], {}
        for identifier, guest in self._wanted().items():
            if guest.role == "gone":
                continue
            mark = self._log.marks.get(identifier) or Mark(
                balance_seconds=guest.receiving.balance_seconds if guest.receiving is not None else None)
            used = usages.get(identifier)
            one, marks[identifier] = measure(guest, mark, used, self._traffic.total(identifier), asked, now)
            if guest.role == "receive" and (used is None or used.waiting):
                # It runs elsewhere, and is counted there; what its process here takes to wait for it is nobody's.
                marks[identifier] = msgspec.structs.replace(
                    marks[identifier], process="" if used is None else used.process, balance_seconds=mark.balance_seconds)
                continue
            if one.condition != "off" or one.cpu_seconds or one.rx_bytes or one.tx_bytes or one.tokenless:
                measured.append(one)
        sample = Sample(sequence=self._log.last + 1, at=now - self._interval, guests=tuple(measured))
        await in_thread(self._log.append, sample, marks)
        await self._throttle(marks)
        return sample

    async def _throttle(self, marks: Mapping[str, Mark]) -> None:
        for identifier, mark in marks.items():
            guest = self._wanted().get(identifier)
            if guest is None or guest.role == "receive" or not mark.process or mark.balance_seconds is None:
                continue
            spent = self._throttles and burst.spent(mark.balance_seconds)
            # A process begins with its whole processors; an agent that comes later does not know how the last one left it,
            # perhaps when guests were still to be throttled.
            if self._held.get(identifier) != (mark.process, spent):
                try:
                    await self._hypervisor.bound(identifier, guest.vcpus * (guest.baseline_percent / 100 if spent else 1.0))
                except SkysailError as refused:
                    log.warning("guest %s is not bound to its plan; it is tried again: %s", identifier, refused)
                    continue
                self._held[identifier] = (mark.process, spent)

    def page(self, ring: str, after: int) -> SamplePage:
        """See :meth:`SampleLog.page`."""
        return self._log.page(ring, after)


def measure(guest: Guest, mark: Mark, usage: Usage | None, flow: PortCounters, asked: Tokenless,
            now: float) -> tuple[GuestSample, Mark]:
    """What ``guest`` did since ``mark``, and the next mark."""
    seconds = cpu = 0.0
    if usage is not None:
        same = usage.process == mark.process
        cpu = max(0.0, usage.cpu_seconds - (mark.cpu_seconds if same else 0.0))
        seconds = max(0.0, min(usage.age_seconds, now - mark.at if mark.at else usage.age_seconds))
    answered = usage is not None and (bool(usage.answers) or (usage.process == mark.process and mark.answered))
    tokenless = asked.counts.get(guest.id, 0)
    balance = burst.settle(mark.balance_seconds, guest.baseline_percent, guest.vcpus, seconds, cpu)
    sample = GuestSample(
        id=guest.id, condition=_condition(guest, usage, answered, mark.ran == guest.starts), seconds=round(seconds, 3),
        vcpus=guest.vcpus,
        cpu_seconds=round(cpu, 6), rx_bytes=max(0, flow.rx_bytes - mark.rx_bytes),
        tx_bytes=max(0, flow.tx_bytes - mark.tx_bytes), balance_seconds=round(max(balance or 0.0, 0.0), 3),
        capacity_seconds=burst.capacity(guest.baseline_percent, guest.vcpus) if balance is not None else 0.0,
        tokenless=max(0, tokenless - (mark.tokenless if mark.life == asked.life else 0)))
    # Rounded as it was told: what the rounding leaves is told next time.
    counted = sample.cpu_seconds + (mark.cpu_seconds if usage is not None and usage.process == mark.process else 0.0)
    process = usage.process if usage is not None else ""
    return sample, Mark(at=now, process=process, answered=answered, balance_seconds=balance, cpu_seconds=counted,
                        ran=guest.starts if process and guest.role in RUNNING else mark.ran,
                        rx_bytes=flow.rx_bytes, tx_bytes=flow.tx_bytes, life=asked.life, tokenless=tokenless)


def _condition(guest: Guest, usage: Usage | None, answered: bool, ran: bool) -> Condition:
    if guest.role not in RUNNING or (usage is not None and usage.busy):
        return "off"
    if usage is None and guest.role != "run":
        return "off"  # it has gone, or has not come yet, and is counted where it is
    if usage is None:
        return "down" if ran else "off"  # one that has not run since its owner's start is on its way
    return "silent" if answered and usage.answers is False else "up"
