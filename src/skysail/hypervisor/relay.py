"""The way of a migration's memory between a guest's process, which has no network, and the other host: a process that
carries bytes (:mod:`skysail.hypervisor.ferry`), one at each end. It outlives the agent, and is found again by the guest's
folder, which is among its arguments."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from skysail.kit.process import kill, started_at

PROGRAM = Path(__file__).with_name("ferry.py")


def spawn(listener: socket.socket, target: str, folder: Path, *, uid: int, networked: bool) -> None:
    """Carry the connections to ``listener``, which is the caller's to close, to ``target``, for the guest of this folder. One
    that is not ``networked`` reaches nothing but sockets that have a path."""
    held = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
            "--inh-caps=-all", "--"]
    # By its descriptor: its user need not be able to reach the folder that the program lies in.
    with PROGRAM.open("rb") as program, (folder / "relay.log").open("wb") as out:
        process = subprocess.Popen(
            [*([] if networked else ["unshare", "--net", "--"]), *held, os.path.realpath(sys.executable), "-I", "-S", "-B",
             f"/dev/fd/{program.fileno()}", _mark(folder), str(listener.fileno()), target],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, pass_fds=(program.fileno(), listener.fileno()), cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}, start_new_session=True)
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()


def end(folder: Path) -> None:
    """Nothing is carried any more for the guest of this folder, or, for a folder of guests, for any of them."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                started = started_at(int(entry.name))
                words = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                ours = any(word == _mark(folder).encode() or word.startswith(f"{_mark(folder)}/".encode()) for word in words)
                if ours and started is not None and (
                        Path(entry.path, "exe").readlink().name.startswith(("python", "unshare", "setpriv"))):
                    kill(int(entry.name), started)


def _mark(folder: Path) -> str:
    return f"skysail-relay:{folder}"
