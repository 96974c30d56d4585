"""Our long-lived programs: how each is run, under systemd where it runs and detached from the terminal where it does not;
whether it is well, and whether it is the one that we would start now."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import httpx

from skysail.kit import logs, process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import endpoint, membership, name_server, processes

UNITS = Path("/etc/systemd/system")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def names(config: Config) -> tuple[str, ...]:
    """This machine's processes of the cloud, in the order in which they start."""
    if membership.find(config) is not None:
        return ("agent",)
    if not config.local_host:
        return ("controller",)
    return ("dns", "agent", "controller") if config.powerdns else ("agent", "controller")


def agent_log(config: Config) -> Path:
    """Where this machine's agent says what it does."""
    return processes.log_path(config, "agent")


def healthy(config: Config, name: str) -> bool:
    """Does ``name`` answer its health question?"""
    try:
        if name == "controller":
            trusted = endpoint.authority(config)
            context = ssl.create_default_context(cafile=trusted) if trusted else True
            return httpx.get(f"{endpoint.url(config)}/healthz", timeout=2, trust_env=False,
                             verify=context).status_code == 200
        if name == "dns":
            return name_server.healthy(config)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.agent_socket)), timeout=2) as client:
            return client.get("http://agent/healthz").status_code == 200
    except (httpx.HTTPError, OSError):
        return False


def wait_healthy(config: Config, name: str, seconds: float = 180.0) -> None:
    """Wait until ``name`` is healthy; a slow machine takes a minute to load the service model.

    Raises :class:`SkysailError` with the end of its log when it ends or hangs.
    """
    def settled() -> bool:
        return healthy(config, name) or (not _systemd(config) and processes.find(config, name) is None)

    processes.wait_until(settled, seconds)
    if not healthy(config, name):
        log = processes.log_path(config, name)
        said = logs.last(log, 1500).decode(errors="replace")
        raise SkysailError(f"{name} did not become healthy; it said:\n{said.strip()}", cure=f"read {log}")


def command(config: Config, name: str) -> list[str]:
    """The argument list that runs ``name``: the agent as root, the controller without any privilege."""
    program = [sys.executable, "-m", f"skysail.serve.{name}"]
    if name == "agent":
        return program
    if name == "dns":
        return name_server.command(config)
    user = config.controller_user
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--inh-caps=-all", "--bounding-set=-all",
            "--no-new-privs", "--", *program]


def unit(config: Config, name: str) -> str:
    """The systemd unit of ``name``. Guests are never in the way of a restart: only the main process is ended."""
    if name == "dns":
        return name_server.unit(config, processes.log_path(config, name))
    who = config.controller_user
    # A controller has two connections to each host.
    user = (f"User={who}\nGroup={who}\nNoNewPrivileges=yes\nCapabilityBoundingSet=\nLimitNOFILE=1048576\n"
            if name == "controller" else "")
    # The agent tells guests the machine's resolvers, which a machine on DHCP has only when it is online.
    before = "skysail-agent.service" if name == "controller" else "network-online.target"
    order = f"Wants={before}\nAfter={before}"
    settings = "".join(f'Environment="{key}={value}"\n' for key, value in environment(config).items())
    log = processes.log_path(config, name)
    return (f"[Unit]\nDescription=Skysail {name}\n{order}\nStartLimitIntervalSec=0\n\n[Service]\n{settings}{user}"
            f"ExecStart={sys.executable} -m skysail.serve.{name}\nKillMode=process\nDelegate=yes\nRestart=always\n"
            f"RestartSec=2\nStandardOutput=append:{log}\nStandardError=append:{log}\n\n"
            f"[Install]\nWantedBy=multi-user.target\n")


def start(config: Config, name: str, digest: str) -> None:
    """Start ``name`` in place of the one that runs; ``digest`` names what it is started from."""
    processes.stop(config, name)
    if not _systemd(config):
        started = processes.start(config, name, command(config, name), env=environment(config), digest=digest)
        if name == "controller":
            process.allow_open_files(started.pid)
        return
    (UNITS / f"skysail-{name}.service").write_text(unit(config, name))
    process.run(["systemctl", "daemon-reload"])
    process.run(["systemctl", "enable", f"skysail-{name}.service"])
    process.run(["systemctl", "restart", f"skysail-{name}.service"])
    (config.root / "run" / f"{name}.digest").write_text(digest)


def current(config: Config, name: str, digest: str) -> bool:
    """Whether ``name`` was last started from what ``digest`` names."""
    if _systemd(config):
        stamp = config.root / "run" / f"{name}.digest"
        return stamp.exists() and stamp.read_text() == digest
    record = processes.find(config, name)
    return record is not None and record.digest == digest


def stop(config: Config, name: str) -> bool:
    """End ``name``, also for the next boot of the machine; whether it was running."""
    unit = UNITS / f"skysail-{name}.service"
    if _systemd(config) and unit.exists():
        ran = pid(config, name) is not None
        process.run(["systemctl", "disable", "--now", unit.name])
        return ran
    return processes.stop(config, name)


def pid(config: Config, name: str) -> int | None:
    """The process of ``name``; None when there is none."""
    if _systemd(config):
        said = process.run(["systemctl", "show", "--property=MainPID", "--value", f"skysail-{name}.service"]).strip()
        return int(said) or None
    record = processes.find(config, name)
    return record.pid if record else None


def environment(config: Config) -> dict[str, str]:
    """What our programs find in their environment."""
    return {"PATH": ":".join(filter(None, (config.qemu_folder, PATH))), "LANG": "C.UTF-8",
            "PYTHONPATH": str(config.root / "program"), "PYTHONUNBUFFERED": "1", "SKYSAIL_DATA": config.data}


def _systemd(config: Config) -> bool:
    return not config.detached and Path("/run/systemd/system").is_dir()
