"""A PowerDNS for tests, and dig to ask it."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from pathlib import Path

import estates
from clouds import eventually
from skysail.dns.powerdns import PowerDns
from skysail.kit.config import Config
from skysail.serve import name_server, up


def free_port() -> int:
    """A port that neither TCP nor UDP has on the loopback address."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind(("127.0.0.1", 0))
            with contextlib.suppress(OSError):
                udp.bind(("127.0.0.1", tcp.getsockname()[1]))
                return int(tcp.getsockname()[1])


class NameServer:
    """A PowerDNS of this test's own, as ``up`` would run it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        estates.claim(Path(config.data))
        up.ensure_user(self.config)
        name_server.prepare(self.config)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (Path(self.config.data) / "dns.log").open("ab") as log:
            self.process = subprocess.Popen(name_server.command(self.config), stdout=log, stderr=log, cwd="/")
        estates.note(Path(self.config.data), "dns", self.process.pid)
        eventually(lambda: name_server.healthy(self.config), 30, "PowerDNS answers")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=20)

    def zones(self) -> PowerDns:
        return PowerDns(self.config.dns_api_port, self.config.dns_key_file)

    def dig(self, name: str, kind: str, *options: str) -> str:
        """What ``dig`` prints, +short unless told otherwise."""
        return subprocess.run(["dig", "@127.0.0.1", "-p", str(self.config.dns_port), "+tries=1", "+time=2",
                               *(options or ("+short",)), name, kind], capture_output=True, text=True, check=False).stdout
