"""What somebody beyond a guest notices while it moves: for how long its address does not answer, and whether a connection
that was open breaks.

Source: RFC 792 and RFC 4443 (echo); Linux, icmp(7): a datagram socket of IPPROTO_ICMP sends echo requests of its own
identifier.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType

from skysail.kit.errors import SkysailError

EVERY_SECONDS = 0.01
FIRST_SECONDS = 5.0
SSH_PORT = 22


class Probe:
    """Asks an address for an echo every ten milliseconds, from entering to leaving, and holds a connection to its SSH port
    where it takes one. Entering raises SkysailError where nothing answers."""

    def __init__(self, address: str) -> None:
        self._address = address
        version = 6 if ":" in address else 4
        family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if version == 6 else (socket.AF_INET, socket.IPPROTO_ICMP)
        # Raw, for it shall not depend on net.ipv4.ping_group_range; whoever moves guests is root.
        self._socket = socket.socket(family, socket.SOCK_RAW, protocol)
        self._socket.settimeout(EVERY_SECONDS)
        self._request, self._reply, self._headers = (128, 129, False) if version == 6 else (8, 0, True)
        self._identifier = id(self) & 0xFFFF
        self._sent: dict[int, float] = {}
        self._longest = 0.0
        self._heard_until = 0.0
        self._over = threading.Event()
        self._work = threading.Thread(target=self._run, daemon=True)
        self._connection: socket.socket | None = None

    def __enter__(self) -> Probe:
        self._work.start()
        end = time.monotonic() + FIRST_SECONDS
        while not self._heard_until:
            if time.monotonic() > end:
                self.__exit__(None, None, None)
                raise SkysailError(f"{self._address} does not answer this machine's echo requests",
                                   "open ICMP in its firewall, or move it without a probe")
            time.sleep(EVERY_SECONDS)
        with contextlib.suppress(OSError):
            self._connection = socket.create_connection((self._address, SSH_PORT), 5)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._work.join()
        self._socket.close()
        if self._connection is not None:
            self._connection.close()

    def longest_ms(self) -> float:
        """The longest time so far between the sending of two requests that were answered, beyond the usual one."""
        open_ = time.monotonic() - self._heard_until if self._heard_until else 0.0
        return round(max(self._longest, open_ if open_ > 1.0 else 0.0) * 1000 - EVERY_SECONDS * 1000, 1)

    def broken(self) -> bool:
        """Whether the connection broke; False where none was taken."""
        if self._connection is None:
            return False
        try:
            # Its greeting may be unread: whatever comes, an end is none of it.
            self._connection.setblocking(False)
            while data := self._connection.recv(4096):
                if not data:
                    break
            return True
        except BlockingIOError:
            pass
        except OSError:
            return True
        try:
            # A peer that forgot the connection says so to whoever sends into it.
            self._connection.settimeout(5)
            self._connection.sendall(b"SSH-2.0-probe\r\n")
            return not self._connection.recv(4096)
        except OSError:
            return True

    def _run(self) -> None:
        number, due = 0, time.monotonic()
        while not self._over.is_set():
            now = time.monotonic()
            if now >= due:
                number = (number + 1) & 0xFFFF
                self._sent[number] = now
                with contextlib.suppress(OSError):  # no route at this moment is an answer that does not come
                    self._socket.sendto(self._packet(number), (self._address, 0))
                due = max(due + EVERY_SECONDS, now - EVERY_SECONDS)
            self._hear()

    def _hear(self) -> None:
        try:
            data = self._socket.recv(2048)
        except OSError:
            return
        if self._headers:
            data = data[(data[0] & 15) * 4:]
        kind, _, _, identifier, number = struct.unpack("!BBHHH", data[:8])
        if kind == self._reply and identifier == self._identifier and (sent := self._sent.pop(number, None)) is not None:
            if self._heard_until and sent > self._heard_until:
                self._longest = max(self._longest, sent - self._heard_until)
            self._heard_until = max(self._heard_until, sent)
            for old in [one for one, at in self._sent.items() if at < sent]:
                del self._sent[old]

    def _packet(self, number: int) -> bytes:
        header = struct.pack("!BBHHH", self._request, 0, 0, self._identifier, number)
        if not self._headers:
            return header  # the kernel writes the checksum of ICMPv6
        total = sum(struct.unpack("!4H", header))
        total = (total & 0xFFFF) + (total >> 16)
        return struct.pack("!BBHHH", self._request, 0, ~total & 0xFFFF, self._identifier, number)
