"""Who listens on a TCP port of this machine, asked of the kernel by netlink.

``/proc/net/tcp`` says it too, but to read its first line the kernel walks its table of all connections, which takes
milliseconds: that is for kernels without the diagnosis of sockets. Source: sock_diag(7), ``linux/inet_diag.h``; proc(5).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x001 | 0x300
_ERROR, _DONE = 2, 3
_LISTEN = 10
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBBI48s")  # struct inet_diag_req_v2
_ANSWER = struct.Struct("=BBBB48sIIIII")  # struct inet_diag_msg
_PORT = struct.Struct("!H")  # what its socket id begins with


def listeners(port: int) -> set[int]:
    """The user ids whose sockets listen on the TCP port, on whatever address: a listener on [::] takes what comes to the IPv4
    loopback address, too. Raises OSError."""
    try:
        return diagnosed(port)
    except OSError:
        return tabled(port)


def diagnosed(port: int) -> set[int]:
    """:func:`listeners` by netlink."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        return {uid for family in (socket.AF_INET, socket.AF_INET6) for at, uid in _listening(kernel, family) if at == port}


def tabled(port: int) -> set[int]:
    """:func:`listeners` by the tables below /proc."""
    sockets = [line.split() for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if table.exists()
               for line in table.read_text().splitlines()[1:]]
    # Local address and port in hexadecimal, state, user.
    return {int(words[7]) for words in sockets if words[3] == f"{_LISTEN:02X}" and words[1].endswith(f":{port:04X}")}


def _listening(kernel: socket.socket, family: int) -> Iterator[tuple[int, int]]:
    """Port and user of each socket that listens."""
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _LISTEN, bytes(48))
    kernel.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 0, 0) + request)
    while True:
        answer = memoryview(kernel.recv(65536))
        while answer:
            length, kind, *_ = _HEADER.unpack_from(answer)
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError(-struct.unpack_from("=i", answer, _HEADER.size)[0], "the kernel does not say who listens")
            _, _, _, _, identity, _, _, _, uid, _ = _ANSWER.unpack_from(answer, _HEADER.size)
            yield _PORT.unpack_from(identity)[0], uid
            answer = answer[length + 3 & ~3:]
