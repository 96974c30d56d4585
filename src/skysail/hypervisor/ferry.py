"""Carries the bytes of connections from a listening socket to somewhere else: ``ferry.py MARK DESCRIPTOR TARGET``, where
the target is ``address:port`` or the path of a Unix socket.

It runs alone, as a process of its own (see :mod:`skysail.hypervisor.relay`): of Python's library only. The kernel moves the
bytes (splice(2)); they are encrypted between two others, and this process could not read them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time

CHUNK_BYTES = 1 << 20
CONNECT_SECONDS = 10.0
# So many connections are carried at a time: one migration has four for memory, and as many as it has disks besides. Whoever
# else comes waits; each takes six open files and two threads.
MOST = 48
AGAIN_SECONDS = 0.1
# What may wait in each buffer of a connection. All that is on its way when the guest is stopped has to arrive before it runs
# again: with buffers that the kernel lets grow to megabytes, that alone took a tenth of a second. Four connections of this
# size fill 10 Gbit/s as long as a round trip takes less than half a millisecond (tcp(7), socket(7)).
BUFFER_BYTES = 128 << 10
UNSENT_BYTES = 64 << 10
_TCP_NOTSENT_LOWAT = 25
# tcp(7): a connection whose other end is away for so long is broken.
AWAY_SECONDS = 30


def reach(target: str) -> socket.socket:
    """A connection there; raises OSError."""
    if target.startswith("/"):
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.connect(target)
        return made
    address, _, port = target.rpartition(":")
    made = socket.create_connection((address.strip("[]"), int(port)), CONNECT_SECONDS)
    made.settimeout(None)
    attend(made)
    return made


def narrow(connection: socket.socket) -> None:
    """Little of what it carries is on its way at any moment; a listening socket's connections have that of it."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def attend(connection: socket.socket) -> None:
    """Send at once what there is to send, and notice when the other end goes away."""
    narrow(connection)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, AWAY_SECONDS // 3), (socket.TCP_KEEPINTVL, AWAY_SECONDS // 6),
                          (socket.TCP_KEEPCNT, 4), (socket.TCP_USER_TIMEOUT, AWAY_SECONDS * 1000)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def carry(source: socket.socket, sink: socket.socket) -> None:
    """Everything from one to the other, its end too. A connection that breaks ends the other way as well."""
    out, into = os.pipe()
    try:
        while moved := os.splice(source.fileno(), into, CHUNK_BYTES):
            while moved:
                moved -= os.splice(out, sink.fileno(), moved)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(out)
        os.close(into)


def join(near: socket.socket, target: str) -> None:
    """One connection, until both ways have ended."""
    with near:
        try:
            far = reach(target)
        except OSError as failure:
            print(f"{target}: {failure}", file=sys.stderr, flush=True)
            return
        with far:
            back = threading.Thread(target=carry, args=(far, near), daemon=True)
            back.start()
            carry(near, far)
            back.join()


def main() -> None:
    """Carry until killed."""
    listener, target = socket.socket(fileno=int(sys.argv[2])), sys.argv[3]
    free = threading.BoundedSemaphore(MOST)

    def one(near: socket.socket) -> None:
        try:
            join(near, target)
        finally:
            free.release()

    while True:
        free.acquire()
        try:
            near, _ = listener.accept()
            if near.family != socket.AF_UNIX:
                attend(near)
            threading.Thread(target=one, args=(near,), daemon=True).start()
        except (OSError, RuntimeError) as failure:  # who came is gone again, or this machine has no more to give now
            print(f"{target}: {failure}", file=sys.stderr, flush=True)
            free.release()
            time.sleep(AGAIN_SECONDS)


if __name__ == "__main__":
    main()
