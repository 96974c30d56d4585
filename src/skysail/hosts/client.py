"""One agent, as the watch talks to it: documents down, reports up, over its socket or by mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from skysail import contract
from skysail.contract.document import HostDocument
from skysail.contract.facts import HostFacts
from skysail.contract.identity import host_name
from skysail.contract.report import HostReport
from skysail.contract.samples import SamplePage
from skysail.hosts.credentials import Credentials
from skysail.hosts.local import Local
from skysail.hosts.parts import Parting
from skysail.hosts.turns import Turns

# The version of agents that tell no facts.
UNTOLD = 2
# An agent that has just started asks its QEMU first, which takes a while on a busy machine.
FACTS_SECONDS = 90.0
# For all else. Of a stream of reports each line: the agent sends one every 12 to 15 s that keeps it alive, and one that is
# silent for so long is dead, not quiet.
ANSWER_SECONDS, SILENT_SECONDS = 10.0, 40.0
# A connection outlives the pause between two questions, and ends before the agent ends it (serve/agent.py), which would be in
# the middle of one.
LIMITS = httpx.Limits(keepalive_expiry=30.0)
# What a host answers is bounded, and by its word alone nothing is unpacked: a report of a thousand guests has a megabyte.
PLAIN = {"accept-encoding": "identity"}
FEW_BYTES, MOST_BYTES = 1 << 20, 64 << 20
# Between two looks at whether a host's certificate is due.
RENEWAL_PAUSE_SECONDS = 1.0


class Foreign(Exception):
    """The agent speaks version ``theirs`` of the contract, which is more than one away from ours."""

    def __init__(self, theirs: int) -> None:
        older = theirs < contract.VERSION
        super().__init__(f"its agent speaks version {theirs} of the contract, this controller {contract.VERSION}: "
                         f"upgrade the {'host' if older else 'controller'} first")


class _Versioned(msgspec.Struct, frozen=True, kw_only=True):
    """As much of a host's facts as every version of the contract has."""

    contract: int


class Pinned(httpx.AsyncHTTPTransport):
    """Speaks to who has a certificate of this ``name``, wherever that is, and shows our ``credentials``."""

    def __init__(self, name: str, credentials: Credentials) -> None:
        super().__init__(verify=credentials.context(), trust_env=False, limits=LIMITS)
        self._name = name
        self._credentials = credentials

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._credentials.context()  # a connection that begins now is shown a certificate that is good
        request.extensions = {**request.extensions, "sni_hostname": self._name}
        return await super().handle_async_request(request)


class _PinnedLook(httpx.HTTPTransport):
    """:class:`Pinned`, for one look."""

    def __init__(self, name: str, context: ssl.SSLContext) -> None:
        super().__init__(verify=context, trust_env=False)
        self._name = name

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": self._name}
        return super().handle_request(request)


def look(address: str, context: ssl.SSLContext | None) -> httpx.Client:
    """For a look at the agent at ``address`` by somebody who is not its watch; ``context`` is needed for one elsewhere."""
    identity, place = _understood(address)
    transport = httpx.HTTPTransport(uds=address.removeprefix("unix:"))
    if identity and context is not None:
        transport = _PinnedLook(host_name(identity), context)
    return httpx.Client(transport=transport, base_url=place, timeout=httpx.Timeout(30.0, connect=5.0), trust_env=False,
                        headers=PLAIN)


def _understood(address: str) -> tuple[str, str]:
    """The identity in an address of an agent, '' for one on this machine, and the URL that it is asked at. Raises ValueError
    for what is none."""
    if address.startswith("unix:"):
        return "", "http://agent"
    parts = urlsplit(address)
    if parts.scheme != "https" or not parts.username:
        raise ValueError(f"{address} is no address of an agent that can be told from others")
    return parts.username, f"https://{parts.netloc.rpartition('@')[2]}"


class AgentClient:
    """``address`` is ``unix:<path>`` of the agent's socket, or ``https://<identity>@<host>:<port>``, which takes
    ``credentials``: whoever answers there without a certificate of that very host is not spoken to. Those that ask many
    agents share ``turns``. Raises httpx.HTTPError when the agent cannot be reached."""

    def __init__(self, address: str, credentials: Credentials | None = None,
                 transport: httpx.AsyncBaseTransport | None = None, turns: Turns | None = None) -> None:
        self._credentials = credentials
        self._identity, place = _understood(address)
        if self._identity and transport is None:
            if credentials is None:
                raise ValueError(f"the agent at {address} is spoken to with credentials")
            transport = Pinned(host_name(self._identity), credentials)
        self._place = str(httpx.URL(place))  # raises at once for one that nobody can call
        # Not by httpx's client: what it does beside asking, such as following redirects, is not wanted here, and takes as
        # long as all else that asking takes.
        self._transport = transport or Local(address.removeprefix("unix:"))
        self._turns = turns or Turns(8)
        self._parting = Parting()
        # The parts of zones that the agent had with the last document that it took.
        self._held: frozenset[str] = frozenset()

    async def facts(self) -> HostFacts | None:
        """What the host is; None where the agent is of version 2, which told no facts. Raises :class:`Foreign` when its
        version is too far from ours."""
        async with self._turns.turn():
            answer = await self._ask("GET", "/facts", FEW_BYTES, read_seconds=FACTS_SECONDS)
        untold = answer.status_code == 404
        if not untold:
            answer.raise_for_status()
        theirs = UNTOLD if untold else msgspec.json.decode(answer.content, type=_Versioned).contract
        if contract.common(theirs) is None:
            raise Foreign(theirs)
        return None if untold else msgspec.json.decode(answer.content, type=HostFacts)

    async def put(self, document: HostDocument) -> bool:
        """Hand the document over; False when the agent holds a newer one."""
        answer = await self._deliver(document)
        if answer.status_code == 428:  # it lost some, or is another agent than the last time
            self._held -= frozenset(msgspec.json.decode(answer.content, type=tuple[str, ...]))
            answer = await self._deliver(document)
        if answer.status_code == 409:
            return False
        answer.raise_for_status()
        self._held = self._parting.digests()
        return True

    async def _deliver(self, document: HostDocument) -> httpx.Response:
        async with self._turns.turn(goes_on=True):
            return await self._ask("PUT", "/document", MOST_BYTES,
                                   content=msgspec.json.encode(self._parting.delivery(document, self._held)))

    async def _begin(self, method: str, path: str, read_seconds: float, **about: Any) -> httpx.Response:
        """An answer of which nothing is read yet; to be closed."""
        request = httpx.Request(method, f"{self._place}{path}", headers=PLAIN, extensions={
            "timeout": httpx.Timeout(ANSWER_SECONDS, read=read_seconds).as_dict()}, **about)
        answer = await self._transport.handle_async_request(request)
        answer.request = request
        return answer

    async def _ask(self, method: str, path: str, most: int, read_seconds: float = ANSWER_SECONDS,
                   **about: Any) -> httpx.Response:
        """The whole answer, of up to ``most`` bytes. Raises httpx.RemoteProtocolError for more: a host that goes on and on
        would take the memory that all others need."""
        async with contextlib.aclosing(await self._begin(method, path, read_seconds, **about)) as answer:
            said = bytearray()
            async for chunk in answer.aiter_raw():
                said += chunk
                if len(said) > most:
                    raise httpx.RemoteProtocolError(f"the agent answers {path} with more than {most} bytes")
        return httpx.Response(answer.status_code, content=bytes(said), request=answer.request)

    async def reports(self) -> AsyncIterator[HostReport]:
        """The host's report now, and again at each change, until the stream breaks. Each is of all that the host observes:
        those that came while the caller took one in are passed over for the newest."""
        async with self._turns.turn(goes_on=True):
            begun = await self._begin("GET", "/reports", SILENT_SECONDS)
        async with contextlib.aclosing(begun) as stream:
            stream.raise_for_status()
            rest = bytearray()
            async for chunk in stream.aiter_raw():
                rest += chunk
                if b"\n" not in chunk:
                    if len(rest) > MOST_BYTES:
                        raise httpx.RemoteProtocolError(f"the agent reports more than {MOST_BYTES} bytes at once")
                    continue
                *lines, last = bytes(rest).split(b"\n")
                rest = bytearray(last)
                if told := [line for line in lines if line.strip() not in (b"", b"{}")]:
                    yield msgspec.json.decode(told[-1], type=HostReport)

    async def samples(self, ring: str, after: int) -> SamplePage:
        """The host's next samples behind number ``after`` of ``ring``."""
        async with self._turns.turn():
            answer = await self._ask("GET", "/samples", MOST_BYTES, params={"ring": ring, "after": after})
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=SamplePage)

    async def renew(self, facts: HostFacts) -> float:
        """Give the host another certificate when the time has come; seconds until it comes next."""
        if self._credentials is None or not self._identity or facts.certificate_until is None:
            return math.inf
        wait = self._credentials.due_in(facts.certificate_until)
        if wait > 0:
            return max(wait, RENEWAL_PAUSE_SECONDS)  # whatever it says, it is not asked all the time
        asked = await self._ask("POST", "/certificate", FEW_BYTES)
        asked.raise_for_status()
        certificate = await asyncio.to_thread(self._credentials.certify, self._identity, asked.content)
        (await self._ask("PUT", "/certificate", FEW_BYTES, content=certificate)).raise_for_status()
        return self._credentials.renewal_seconds

    async def close(self) -> None:
        await self._transport.aclose()
