"""The agent process of one host: names the engines and serves the agent's socket. ``python -m skysail.serve.agent``."""

from __future__ import annotations

import contextlib
import logging
import os
import socket

import uvicorn

from skysail.agent.app import application
from skysail.agent.keeper import Keeper
from skysail.agent.ledger import Ledger
from skysail.contract.report import HostReport, ImageReport
from skysail.hypervisor.sim import SimHypervisor
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.network.sim import SimFabric
from skysail.storage.sim import SimPool

# A simulated host is as large as a small cluster, so that limits come from the controller and not from it.
_SIM = HostReport(host="host-1", boot="", sequence=0, generation=0, vcpus=4, memory_mib=16 * 1024 * 1024,
                  disk_gib=1024 * 1024, accelerator="sim")
_SIM_IMAGE = ImageReport(digest="0" * 64, blueprint="debian_12", name="Debian 12", user="admin", version="12",
                         size_gib=2, templated=True)


def build(config: Config) -> Keeper:
    """The keeper with the engines that the configuration names; raises SkysailError for ones that are not there."""
    if config.engines != "sim":
        raise SkysailError("this version holds simulated hosts only", 'set engines = "sim" in skysail.toml')
    return Keeper(_SIM, SimHypervisor(), SimPool(), SimFabric(), lambda: [_SIM_IMAGE],
                  Ledger(config.root / "agent" / "document.json"))


def main() -> None:
    """Serve the host in ``$SKYSAIL_DATA`` until told to stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = load()
    keeper = build(config)
    path = config.agent_socket
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # a socket left by an agent that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mask is set before the bind: there is no moment in which others could connect.
    mask = os.umask(0o117)
    listener.bind(str(path))
    os.umask(mask)
    server = uvicorn.Server(uvicorn.Config(application(keeper), log_level="warning", access_log=False,
                                           timeout_graceful_shutdown=1))
    server.run(sockets=[listener])


if __name__ == "__main__":
    main()
