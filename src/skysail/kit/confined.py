"""A process of its own user, with no privilege but those that it is given, that outlives who started it.

It is known by a file that is named in its command line and that nobody else has, so that one which no record names is found
all the same: two of them would share the port, and lead to different guests.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from skysail.kit import logs, process
from skysail.kit.errors import SkysailError

# What such a process is before it is itself.
_ENTERING = ("nsenter", "setpriv")
START_SECONDS, END_SECONDS = 20.0, 5.0


class Confined:
    """The process whose command line has ``mark``, a path below ``folder``, as one of its words. ``program`` is the name of
    its executable file; it lives in the network namespace of that name, without one in that of the calling thread. It has
    these ``capabilities`` (capabilities(7), as setpriv(1) writes them), and with ``groups`` all groups of its user."""

    def __init__(self, folder: Path, program: str, namespace: str, user: str, log: Path, *,
                 capabilities: Sequence[str] = (), groups: bool = False) -> None:
        self._folder = folder
        self._program = program
        self._namespace = namespace
        self._user = user
        self._log = log
        given = "".join(f",+{name}" for name in capabilities)
        self._rights = ["--init-groups" if groups else "--clear-groups", "--no-new-privs", f"--bounding-set=-all{given}",
                        f"--inh-caps=-all{given}", *([f"--ambient-caps=-all{given}"] if given else [])]
        self._found: tuple[int, int] | None = None
        self._mark: Path | None = None
        self._heard = 0  # bytes of the log that earlier ones wrote

    def prepare(self) -> pwd.struct_passwd:
        """Its folder is there, for its user to look into; that user. Raises SkysailError when there is none."""
        try:
            account = pwd.getpwnam(self._user)
        except KeyError as missing:
            raise SkysailError(f"there is no user {self._user}", "run: sudo ./skysail up") from missing
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o755)
        return account

    def alive(self) -> bool:
        """Is the one that was last ensured still there?"""
        return self._found is not None and process.started_at(self._found[0]) == self._found[1]

    def ensure(self, argv: Sequence[str], mark: Path, ready: Callable[[], bool], env: Mapping[str, str]) -> bool:
        """One process runs ``argv``, and no other of ours; whether it was started now. Raises SkysailError with what it said
        when it does not become ``ready``."""
        if self.alive() and self._mark == mark:
            return False
        self._mark = mark
        running = self._holders()
        known = [key for key, words in running.items() if str(mark) in words]
        for pid, started in running.keys() - set(known[:1]):
            process.kill(pid, started)
        if known:
            self._found = known[0]
            return False
        self._gone()
        self._start(argv, env)
        end = time.monotonic() + START_SECONDS
        while not ready():
            if not self.alive() or time.monotonic() > end:
                self.end()
                raise SkysailError(f"{self._program} does not start: {self._said()}", f"read {self._log}")
            time.sleep(0.02)
        return True

    def said_since_start(self, words: str) -> bool:
        """Has it said these words since it was last started?"""
        return words in self._said()

    def end(self) -> None:
        """None of ours runs. Raises SkysailError when one does not end."""
        for pid, started in self._holders():
            process.kill(pid, started)
        self._gone()
        self._found = None

    def _gone(self) -> None:
        end = time.monotonic() + END_SECONDS
        while held := self._holders():
            if time.monotonic() > end:
                raise SkysailError(f"the processes {[pid for pid, _ in held]} of {self._folder} do not end")
            time.sleep(0.01)

    def _start(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._heard = self._log.stat().st_size if self._log.exists() else 0
        entering = ["nsenter", f"--net=/run/netns/{self._namespace}", "--"] if self._namespace else []
        with self._log.open("ab") as out:
            child = subprocess.Popen(
                [*entering, "setpriv", f"--reuid={self._user}", f"--regid={self._user}", *self._rights, "--", *argv],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd="/", env=dict(env))
        # Reaped by a thread of its own, or its pid would stay taken as a zombie and look alive.
        threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
        self._found = (child.pid, process.started_at(child.pid) or 0)

    def _holders(self) -> dict[tuple[int, int], list[str]]:
        """Pid and start of each process of ours, with its command line."""
        mark, found = f"{self._folder}/", {}
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                started = process.started_at(int(entry.name))
                words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
                if started is not None and any(word.startswith(mark) for word in words) and (
                        Path(entry.path, "exe").readlink().name.startswith((self._program, *_ENTERING))):
                    found[int(entry.name), started] = words
            except OSError:
                continue  # it ended
        return found

    def _said(self) -> str:
        return logs.since(self._log, self._heard, 1000).decode(errors="replace").strip()
