"""What customers of instances notice while something is done with those: a page of each is asked for, steadily, and no answer
that does not come is forgotten. From this process alone, so that nothing else here takes time from it."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections.abc import Sequence

import msgspec

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import customer

# What a browser's user has long given up by; TCP has repeated what it sends some five times.
LOST_SECONDS = 30.0
# Of what went wrong so much is told.
REASONS = 5


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the questions to one instance: how many were ``answered``, how many ``lost``, and why; how long the usual
    one (the median) waited for its answer, and how long the one that waited longest."""

    instance: str
    address: str
    answered: int
    lost: int
    usual_ms: float
    longest_ms: float
    reasons: tuple[str, ...] = ()


def ask(config: Config, names: Sequence[str], region: str = "", port: int = 80, path: str = "/", every: float = 0.5,
        seconds: float = 0.0) -> list[Asked]:
    """Ask each instance for ``path``, every so many seconds, for ``seconds``, or with 0 until this process is told to end.
    Raises SkysailError for an instance that is not there, or has no public address."""
    addresses = {one["name"]: one.get("publicIpAddress") or next(iter(one.get("ipv6Addresses", ())), "")
                 for one in customer.instances(config, customer.served(config, region))}
    for name in names:
        if not addresses.get(name):
            raise SkysailError(f"there is no instance {name} with a public address")
    over = threading.Event()
    for told in (signal.SIGINT, signal.SIGTERM):
        signal.signal(told, lambda *_: over.set())
    askers = [_Asker(name, addresses[name], port, path, every, over) for name in names]
    for one in askers:
        one.start()
    over.wait(seconds or None)
    over.set()
    for one in askers:
        one.join()
    return [one.found() for one in askers]


class _Asker(threading.Thread):
    """Asks one instance, by a connection for each question."""

    def __init__(self, name: str, address: str, port: int, path: str, every: float, over: threading.Event) -> None:
        super().__init__(name=f"asks-{name}", daemon=True)
        self._instance, self._address, self._port, self._path = name, address, port, path
        self._every, self._over = every, over
        self._waited: list[float] = []
        self._lost: list[str] = []

    def run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            began = time.monotonic()
            try:
                self._question()
                self._waited.append(time.monotonic() - began)
            except (OSError, http.client.HTTPException) as failure:
                # When people look for what happened, they look by the clock.
                self._lost.append(f"{time.strftime('%H:%M:%S')}, after {time.monotonic() - began:.1f} s: {failure!r}")
            due = max(due + self._every, time.monotonic())
            self._over.wait(due - time.monotonic())

    def _question(self) -> None:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=LOST_SECONDS)
        try:
            connection.request("GET", self._path)
            answer = connection.getresponse()
            answer.read()
            if answer.status != http.HTTPStatus.OK:
                raise http.client.HTTPException(f"{answer.status} {answer.reason}")
        finally:
            connection.close()

    def found(self) -> Asked:
        waited = sorted(self._waited) or [0.0]
        return Asked(instance=self._instance, address=self._address, answered=len(self._waited), lost=len(self._lost),
                     usual_ms=round(waited[len(waited) // 2] * 1000, 1), longest_ms=round(waited[-1] * 1000, 1),
                     reasons=tuple(self._lost[:REASONS]))


def summary(one: Asked) -> dict[str, object]:
    """What came of it in the few words of a table."""
    return {"instance": one.instance, "address": one.address, "answered": one.answered, "lost": one.lost,
            "usual ms": f"{one.usual_ms:.0f}", "longest ms": f"{one.longest_ms:.0f}", "why": "; ".join(one.reasons)}
