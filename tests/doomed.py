"""A controller or an agent that ends itself with kill -9 between two of its steps.

``python doomed.py agent|controller`` runs the real program. It is harmless until a test writes names of steps, one a line,
into ``<data>/doom`` and sends SIGUSR1: before the first step that is not among them it kills itself. So a test that adds what
it died before, and does the same again, comes to every step, whatever order they take. ``<data>/steps`` names the steps in
their order; the last one is the one that did not happen any more. The second of a name is ``name #2``, and so on.

The steps of the controller are its commits (before and after each that changes rows). Those of the agent are the calls of
EFFECTS. That this list misses none is not left to care: every change to files and every child process that the agent makes
outside of them is a line of ``<data>/steps.missed`` (by Python's audit events), and a test holds that file to be absent.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

DATA = Path(os.environ["SKYSAIL_DATA"])
# In this order: a function is wrapped before other modules take its name.
EFFECTS = (
    "skysail.kit.process:run", "skysail.kit.process:run_while_wanted", "skysail.kit.process:kill",
    "shutil:rmtree", "os:chown", "os:chmod", 
    "os:unlink", "os:rename", "os:replace", "os:mkdir",
    "os:link",
    "skysail.kit.durable:replace",
    "skysail.agent.ledger:Ledger.write", "skysail.agent.traffic:Traffic._write",
    "skysail.agent.samples:SampleLog.append", "skysail.agent.keeper:Keeper._say",
    "skysail.storage.files:_finish", "skysail.storage.files:FilePool.remove",
    "skysail.network.linux:LinuxFabric.apply", "skysail.network.taps:ensure", "skysail.network.taps:open_tap",
    "skysail.hypervisor.confinement:spawn", "skysail.hypervisor.confinement:limit", "skysail.hypervisor.confinement:bound",
    "skysail.hypervisor.confinement:release",
    "skysail.metadata.process:spawn", "skysail.metadata.process:Answerer._tell",
    "skysail.hypervisor.confinement:unbound", "skysail.hypervisor.confinement:rebind",
    "skysail.hypervisor.process:prepare", "skysail.hypervisor.process:trim",
    "skysail.kit.logs:rotate",
    "skysail.hypervisor.personality:write_seed", "skysail.hypervisor.qmp:Monitor.execute",
    "skysail.hypervisor.qmp:Channel.ask", "skysail.hypervisor.qmp:Channel.ask_all",
    "skysail.hypervisor.guest:QemuGuest.save",
)
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
           "os.utime", "os.kill", "subprocess.Popen", "shutil.rmtree", "shutil.copyfile"}

_survived: set[str] | None = None
_seen: dict[str, int] = {}
_lock = threading.Lock()
# Inside of a step: what it is made of is part of it.
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("inside", default=False)


def _arm(_signal: int, _frame: FrameType | None) -> None:
    global _survived
    _survived = None
    _seen.clear()
    survived = set((DATA / "doom").read_text().splitlines())
    (DATA / "steps").unlink(missing_ok=True)
    (DATA / "doom").unlink()
    _survived = survived


def step(name: str) -> None:
    """The next step is ``name``."""
    with _lock:
        if _survived is None:
            return
        _seen[name] = _seen.get(name, 0) + 1
        counted = name if _seen[name] == 1 else f"{name} #{_seen[name]}"
        with (DATA / "steps").open("a") as steps:
            steps.write(f"{counted}\n")
        if counted not in _survived and "everything" not in _survived:
            os.kill(os.getpid(), signal.SIGKILL)


def _named(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The step's name, the same in each run; None for a call without effects."""
    if function.endswith(("Monitor.execute", "Channel.ask")):
        command = args[1] if isinstance(args[1], str) else args[1].get("execute", "a message")
        return None if command.startswith("query-") or command == "guest-ping" else f"{function} {command}"
    if function.endswith("Channel.ask_all"):
        return " ".join([function, *(request["execute"] for request in args[1:])])
    if function.endswith(("process:run", "process:run_while_wanted")):
        return f"{function} {args[0][0]}"
    # A record is named by what changes in it.
    return " ".join([function, *kwargs]) if function.endswith("save") else function


def wrap(effect: str) -> None:
    """Make each call of ``module:function`` a step."""
    module, _, path = effect.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, last = path.split(".")
    for name in classes:
        owner = getattr(owner, name)
    function: Callable[..., Any] = getattr(owner, last)

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> contextvars.Token[bool]:
        name = _named(effect.rpartition(".")[2] if not classes else path, args, kwargs)
        if name is not None and not _inside.get():
            step(name)
        return _inside.set(True)

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        token = enter(args, kwargs)
        try:
            return function(*args, **kwargs)
        finally:
            _inside.reset(token)

    @functools.wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        token = enter(args, kwargs)
        try:
            return await function(*args, **kwargs)
        finally:
            _inside.reset(token)

    setattr(owner, last, awaited if inspect.iscoroutinefunction(function) else plain)


def _witness(event: str, args: tuple[Any, ...]) -> None:
    if event == "open":
        flags = args[2] if isinstance(args[2], int) else 0
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or str(args[0]).startswith(("/dev/", str(DATA / "steps"))):
            return
    elif event not in CHANGES or (event == "os.mkdir" and os.path.exists(args[0])):  # noqa: PTH110
        return
    if sys._getframe(1).f_code.co_filename == __file__:
        return  # our own: the end
    # The data plane works in threads of its own, as parts of LinuxFabric.apply.
    if _survived is None or _inside.get() or threading.current_thread().name.startswith("in-"):
        return
    places = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if "/skysail/" in frame.f_code.co_filename:
            places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}:{frame.f_code.co_name}")
        frame = frame.f_back
    if places:
        with _lock, (DATA / "steps.missed").open("a") as missed:
            missed.write(f"{event} {args[:2]} at {places[0]}\n")


def _doom_commits() -> None:
    from sqlalchemy import Connection

    plain = Connection.exec_driver_sql
    seen: dict[int, int] = {}

    def exec_driver_sql(self: Connection, statement: str, *args: Any, **kwargs: Any) -> Any:
        if statement != "COMMIT":
            return plain(self, statement, *args, **kwargs)
        raw: Any = self.connection.dbapi_connection
        if self.dialect.name == "sqlite":
            changes = raw.total_changes
            changed = changes != seen.get(id(raw), 0)
            seen[id(raw)] = changes
        else:
            changed = plain(self, "SELECT pg_current_xact_id_if_assigned() IS NOT NULL").scalar_one()
        if changed:
            step("before a commit")
        done = plain(self, statement, *args, **kwargs)
        if changed:
            step("after a commit")
        return done

    Connection.exec_driver_sql = exec_driver_sql  # type: ignore[method-assign]


def main() -> None:
    name = sys.argv[1]
    signal.signal(signal.SIGUSR1, _arm)
    if name == "agent":
        for effect in EFFECTS:
            wrap(effect)
        sys.addaudithook(_witness)
    else:
        _doom_commits()
        # That it lives is said once, and holds: no commit comes of itself. Its successor takes over in its place.
        leases = importlib.import_module("skysail.store.leases")
        leases.BEAT_SECONDS = leases.LIFE_SECONDS = 1e9  # type: ignore[attr-defined]
    importlib.import_module(f"skysail.serve.{name}").main()


if __name__ == "__main__":
    main()
