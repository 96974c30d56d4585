"""The sockets on which guests are told of themselves, made in the data plane's namespace: who answers need not enter it."""

from __future__ import annotations

import errno
import socket

from skysail.kit.errors import SkysailError
from skysail.network import links
from skysail.network.plan import METADATA, METADATA_IPV6, METADATA_PORT, Layout

BACKLOG = 256
# linux/in.h, linux/in6.h: the address may come and go with its bridge.
IP_FREEBIND, IPV6_FREEBIND = 15, 78


class Listeners:
    """Makes them once, and anew when the namespace is another one. Calls come one at a time."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._namespace = 0
        self._sockets: tuple[socket.socket, ...] = ()

    def get(self) -> tuple[socket.socket, ...]:
        """See :meth:`skysail.network.Fabric.listen`."""
        if not links.exists(self._layout.namespace):
            raise SkysailError(f"the namespace {self._layout.namespace} does not exist", "apply a port first")
        present = (links.NAMESPACES / self._layout.namespace).stat().st_ino
        if present != self._namespace or not self._sockets:
            self.close()
            try:
                self._sockets = links.inside(self._layout.namespace, self._listen)
            except OSError as taken:
                raise SkysailError(f"nobody can listen at {METADATA} in {self._layout.namespace}: {taken.strerror}",
                                   "a process of a former agent may still hold it" if taken.errno == errno.EADDRINUSE else ""
                                   ) from taken
            self._namespace = present
        return self._sockets

    def _listen(self) -> tuple[socket.socket, ...]:
        made = [_listener(socket.AF_INET, str(METADATA))]
        if self._layout.public_ipv6:
            try:
                made.append(_listener(socket.AF_INET6, str(METADATA_IPV6)))
            except OSError:
                made[0].close()
                raise
        return tuple(made)

    def close(self) -> None:
        """Nobody listens any more, once the process that was given them is gone too."""
        for one in self._sockets:
            one.close()
        self._sockets = ()


def _listener(family: socket.AddressFamily, address: str) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        else:
            made.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        made.bind((address, METADATA_PORT))
        made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made
