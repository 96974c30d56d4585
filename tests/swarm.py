"""Many simulated hosts in few processes: each the real agent with engines that hold no guests, on a unix socket of its own.

Their folders are in memory (``/dev/shm``): ten thousand machines have ten thousand disks, and this one has one to sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
import uvloop
from uvicorn.server import ServerState

from skysail.agent.app import application
from skysail.kit.config import Config
from skysail.kit.process import allow_open_files
from skysail.serve import agent, membership
from skysail.serve.facts import Facts

MEMORY = Path("/dev/shm")
# How long a process may take until its hosts listen, or answers.
PATIENCE_SECONDS = 600


class Member(NamedTuple):
    """A simulated host: its id, and where its agent listens."""

    id: str
    folder: Path

    @property
    def config(self) -> Config:
        return Config(data=str(self.folder), engines="sim", dns="sim")

    @property
    def address(self) -> str:
        """As in a row of ``hosts``."""
        return f"unix:{self.config.agent_socket}"


class Swarm:
    """``members``, and what all of them were asked for so far."""

    def __init__(self, members: list[Member], pipes: list[Connection], processes: list[Any]) -> None:
        self.members = members
        self._pipes = pipes
        self.processes = processes

    def asked(self) -> Counter[str]:
        """How often each thing was asked for of all agents, such as ``PUT /document``."""
        for pipe in self._pipes:
            pipe.send("asked")
        return sum((Counter(_received(pipe)) for pipe in self._pipes), Counter[str]())


@contextlib.contextmanager
def swarm(hosts: int, processes: int) -> Iterator[Swarm]:
    """``hosts`` simulated hosts, ``host-1`` and so on, which listen."""
    folder = Path(tempfile.mkdtemp(prefix="sky", dir=MEMORY if MEMORY.is_dir() else None))
    members = [Member(f"host-{number}", folder / f"{number}") for number in range(1, hosts + 1)]
    fresh = multiprocessing.get_context("spawn")
    pipes, started = [], []
    try:
        for number in range(processes):
            ours, theirs = fresh.Pipe()
            started.append(fresh.Process(target=_run, args=(members[number::processes], theirs), daemon=True))
            started[-1].start()
            theirs.close()
            pipes.append(ours)
        for pipe in pipes:
            _received(pipe)
        yield Swarm(members, pipes, started)
    finally:
        for process in started:
            process.kill()  # nothing of them is to be kept
            process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _received(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE_SECONDS):
        raise TimeoutError("simulated hosts do not answer")
    return pipe.recv()


def _run(members: list[Member], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us ends us
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a controller that is killed hangs up
    allow_open_files()  # each host has a socket and two connections
    os.nice(5)  # machines of their own would not take the processors from the controller
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(members, pipe))


async def _serve(members: list[Member], pipe: Connection) -> None:
    loop, asked = asyncio.get_running_loop(), Counter[str]()
    ended = asyncio.Event()

    def answer() -> None:
        try:
            pipe.recv()
            pipe.send(dict(asked))
        except (EOFError, OSError):
            ended.set()

    async with contextlib.AsyncExitStack() as living:
        for member in members:
            await living.enter_async_context(_listening(member, asked))
        pipe.send("listening")
        loop.add_reader(pipe.fileno(), answer)
        await ended.wait()


@contextlib.asynccontextmanager
async def _listening(member: Member, asked: Counter[str]) -> Any:
    """One agent. Not by uvicorn's own server, which looks ten times a second whether it is to stop: ten thousand would do
    nothing else."""
    config = member.config
    config.agent_socket.parent.mkdir(parents=True)
    membership.keep(config, membership.Membership(host=member.id, address="", port=0))
    keeper, sampler = agent.build(config)
    inner = application(keeper, sampler, config.root / "logs", Facts(config, member.id).tell)

    async def counted(scope: Any, receive: Any, send: Any) -> None:
        asked[f"{scope['method']} {scope['path']}"] += 1
        await inner(scope, receive, send)

    wire = uvicorn.Config(counted, log_config=None, access_log=False, lifespan="off", ws="none", proxy_headers=False)
    wire.load()
    async with inner.router.lifespan_context(inner):
        server = await asyncio.get_running_loop().create_unix_server(
            lambda: wire.http_protocol_class(config=wire, server_state=ServerState(), app_state={}),
            str(config.agent_socket))
        async with server:
            yield
