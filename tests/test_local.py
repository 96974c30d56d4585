"""HTTP to agents on this machine: a line now and then keeps a stream, silence ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpcore
import httpx
import pytest

from skysail.hosts.local import Local, _Sockets


@contextlib.asynccontextmanager
async def agent(path: Path, pauses: Sequence[float]) -> AsyncIterator[None]:
    """Answers with a stream whose lines come with these pauses before each, and then with nothing."""
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for pause in pauses:
            await asyncio.sleep(pause)
            writer.write(b"3\r\n{}\n\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(answer, path):
        yield


def test_silence_ends_a_stream_and_lines_keep_it(tmp_path: Path) -> None:
    """All lines together take longer than one may; after the last one nothing comes."""
    lines: list[bytes] = []

    async def listen() -> None:
        path = tmp_path / "socket"
        async with (agent(path, [0.3] * 6), httpx.AsyncClient(transport=Local(f"{path}"), base_url="http://agent") as client,
                    client.stream("GET", "/", timeout=httpx.Timeout(10.0, read=1.0)) as stream):
            async for line in stream.aiter_raw():
                lines.append(line)

    with pytest.raises(httpx.ReadTimeout):
        asyncio.run(listen())
    assert lines == [b"{}\n"] * 6


def test_a_shorter_wait_than_the_one_before_counts(tmp_path: Path) -> None:
    async def wait() -> float:
        loop, path = asyncio.get_running_loop(), tmp_path / "socket"
        async with agent(path, []):
            stream = await _Sockets().connect_unix_socket(f"{path}")
            await stream.write(b"GET / HTTP/1.1\r\n\r\n", 5.0)
            assert (await stream.read(1000, 600.0)).startswith(b"HTTP/1.1 200")
            began = loop.time()
            with pytest.raises(httpcore.ReadTimeout):
                await stream.read(1000, 0.2)
            await stream.aclose()
            return loop.time() - began
    assert asyncio.run(wait()) < 60
