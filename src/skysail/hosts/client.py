"""One agent, as the watch talks to it: documents down, reports up, over its socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import msgspec

from skysail.contract.document import HostDocument
from skysail.contract.report import HostReport
from skysail.contract.samples import SamplePage
from skysail.hosts.parts import Parting


class AgentClient:
    """``address`` is ``unix:<path>`` of the agent's socket. Raises httpx.HTTPError when the agent cannot be reached."""

    def __init__(self, address: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        if transport is None:
            transport = httpx.AsyncHTTPTransport(uds=address.removeprefix("unix:"))
        self._http = httpx.AsyncClient(transport=transport, base_url="http://agent", timeout=httpx.Timeout(10.0))
        self._parting = Parting()
        # The parts of zones that the agent had with the last document that it took.
        self._held: frozenset[str] = frozenset()

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
        return await self._http.put("/document", content=msgspec.json.encode(self._parting.delivery(document, self._held)))

    async def reports(self) -> AsyncIterator[HostReport]:
        """The host's report now, and again at each change, until the stream breaks. Each is of all that the host observes:
        those that came while the caller took one in are passed over for the newest."""
        # The agent sends a keep-alive line every 15 s: a silence of 40 s is a dead agent, not a quiet one.
        async with self._http.stream("GET", "/reports", timeout=httpx.Timeout(10.0, read=40.0)) as stream:
            stream.raise_for_status()
            rest = b""
            async for chunk in stream.aiter_raw():
                *lines, rest = (rest + chunk).split(b"\n")
                if told := [line for line in lines if line.strip() not in (b"", b"{}")]:
                    yield msgspec.json.decode(told[-1], type=HostReport)

    async def samples(self, ring: str, after: int) -> SamplePage:
        """The host's next samples behind number ``after`` of ``ring``."""
        answer = await self._http.get("/samples", params={"ring": ring, "after": after})
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=SamplePage)

    async def close(self) -> None:
        await self._http.aclose()
