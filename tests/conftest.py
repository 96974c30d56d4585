"""A cloud of one's own for tests: real controller and agent processes, a data folder, boto3 as the customer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config as BotoConfig

from skysail.kit.config import Config, load


def eventually(seen: Callable[[], Any], seconds: float = 30.0, what: str = "") -> Any:
    """The first true answer of ``seen`` within ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        answer = seen()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {seconds} s: {what or seen}")
        time.sleep(0.05)


class Cloud:
    """Controller and agent as child processes over one data folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "skysail.toml").write_text(f'port = {self.port}\nengines = "sim"\nzones = ["a", "b"]\n')
        (folder / "run").mkdir()
        self.folder = folder
        self.config: Config = load(str(folder))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Start ``controller`` or ``agent`` and wait until it is healthy."""
        with (self.folder / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", f"skysail.serve.{name}"], env={**os.environ, "SKYSAIL_DATA": str(self.folder)},
                stdout=out, stderr=out)
        eventually(lambda: self._healthy(name), 30, f"{name} is healthy: {self.log(name)}")

    def _healthy(self, name: str) -> bool:
        assert self.processes[name].poll() is None, f"{name} ended: {self.log(name)}"
        transport = None if name == "controller" else httpx.HTTPTransport(uds=str(self.config.agent_socket))
        base = f"http://127.0.0.1:{self.port}" if name == "controller" else "http://agent"
        try:
            with httpx.Client(transport=transport, base_url=base) as http:
                return http.get("/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self, name: str) -> None:
        """kill -9."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text()[-3000:] if path.exists() else ""

    def client(self, key: str | None = None, secret: str | None = None) -> Any:
        """boto3's unmodified Lightsail client, as the admin unless told otherwise."""
        credentials = json.loads((self.folder / "credentials.json").read_text())
        return boto3.client(
            "lightsail", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{self.port}",
            aws_access_key_id=key or credentials["access_key_id"],
            aws_secret_access_key=secret or credentials["secret_access_key"],
            config=BotoConfig(retries={"total_max_attempts": 1}))

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile", type=int, default=300, help="how many hostile requests tests/test_hostile.py makes")


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    """A running cloud whose host is simulated: the real agent with engines that hold no guests."""
    folder = Path(tempfile.mkdtemp(prefix="sky"))
    made = Cloud(folder)
    made.start("agent")
    made.start("controller")
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)
