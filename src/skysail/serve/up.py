"""Bring one machine's cloud up, take it down, say how it stands.

``up`` may be repeated: a step whose result exists is skipped, and a healthy process that runs this program with this
configuration is left alone. The program is copied into the data folder first, so that the unprivileged controller can
read it wherever the checkout lies, and so that an edited checkout does not change a running cloud.
"""

from __future__ import annotations

import asyncio
import grp
import hashlib
import os
import pwd
import shutil
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

import skysail
from skysail.hypervisor import confinement
from skysail.images.build import fingerprint
from skysail.images.library import Library
from skysail.images.recipe import RECIPES
from skysail.kit import process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.resources.catalog import BUNDLES
from skysail.serve import endpoint, name_server, processes

Progress = Callable[[str], None]

FIRST_BLUEPRINT, FIRST_BUNDLE = "debian_12", "nano_3_0"
UNITS = Path("/etc/systemd/system")
NEEDED_FREE_GIB = 6


def up(config: Config, progress: Progress) -> None:
    """Build what is missing, start name server, agent and controller, wait until all are healthy. Needs root."""
    require_root()
    require_disk(config)
    ensure_user(config)
    ensure_folders(config)
    digest = install_program(config)
    initialise_store(config, progress)
    ensure_image(config, progress)
    for name in names(config):
        # The name server goes on through an upgrade of ours: only its own configuration makes it start again.
        wanted = name_server.prepare(config) if name == "dns" else digest
        if not (healthy(config, name) and _current(config, name, wanted)):
            progress(f"{name}: starting")
            _start(config, name, wanted)
            wait_healthy(config, name)
        if name == "agent":
            ensure_template(config, progress)


def names(config: Config) -> tuple[str, ...]:
    """This cloud's processes, in the order in which they start."""
    return ("dns", "agent", "controller") if config.powerdns else ("agent", "controller")


def down(config: Config, progress: Progress, guests: bool = False) -> None:
    """Stop controller, agent and name server; with ``guests`` end the guests too (as a power cut, their disks stay)."""
    require_root()
    for name in reversed(names(config)):
        if _systemd():
            unit = UNITS / f"skysail-{name}.service"
            if unit.exists():
                process.run(["systemctl", "disable", "--now", unit.name])
        progress(f"{name}: {'stopped' if processes.stop(config, name) else 'was not running'}")
    if guests:
        progress(f"guests: {end_guests(config)} ended")
        if config.engines == "real":
            progress("network: taken down")
            asyncio.run(LinuxFabric(Layout.of(config)).teardown())


def end_guests(config: Config) -> int:
    """End every guest as a power cut would, with its cgroup; how many ran."""
    running = processes.guests(config)
    for record in running:
        processes.end(record, 0.0)
    if config.guests_dir.is_dir():
        for folder in config.guests_dir.iterdir():
            confinement.release(folder.name)
    return len(running)


def status(config: Config) -> dict[str, Any]:
    """How the cloud stands: its processes, its health, its guests' number, its endpoint."""
    answer: dict[str, Any] = {"data": config.data, "endpoint": endpoint.url(config),
                              "guests": len(processes.guests(config))}
    for name in names(config):
        answer[name] = {"pid": _pid(config, name), "healthy": healthy(config, name)}
    answer["running"] = all(answer[name]["healthy"] for name in names(config))
    return answer


def agent_log(config: Config) -> Path:
    """Where this machine's agent says what it does."""
    return processes.log_path(config, "agent")


def require_root() -> None:
    """Raises :class:`SkysailError` for anyone but root."""
    if os.geteuid() != 0:
        raise SkysailError("this needs root: it makes namespaces, cgroups and guests", cure="run with sudo")


def require_disk(config: Config) -> None:
    """Refuse to begin on a disk without room for an image, its template and a first guest."""
    config.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(config.root).free / 2**30
    if free < NEEDED_FREE_GIB and not any(config.images_dir.glob("*")):
        raise SkysailError(f"{config.root} has {free:.1f} GiB free, {NEEDED_FREE_GIB} GiB are needed",
                           cure="free some space, or set SKYSAIL_DATA to a folder on a larger disk")


def ensure_user(config: Config) -> None:
    """The unprivileged users that controller and name server run as."""
    for name in (config.controller_user, *([config.dns_user] if config.powerdns else [])):
        try:
            pwd.getpwnam(name)
        except KeyError:
            process.run(["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", config.data,
                         "--shell", "/usr/sbin/nologin", name])


def ensure_folders(config: Config) -> None:
    """The data folder's rooms, each with the owner and mode that it needs."""
    user, group = pwd.getpwnam(config.controller_user).pw_uid, grp.getgrnam(config.controller_user).gr_gid
    config.root.chmod(0o755)
    for path, owner, mode in ((config.root / "run", 0, 0o750), (config.root / "logs", 0, 0o750),
                              (config.root / "controller", user, 0o700), (config.images_dir, 0, 0o755),
                              (config.templates_dir, 0, 0o755), (config.guests_dir, 0, 0o755),
                              (config.volumes_dir, 0, 0o755)):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, owner, group)
        path.chmod(mode)


def install_program(config: Config) -> str:
    """Copy this program into the data folder; the digest names its text and the configuration."""
    source = Path(skysail.__file__).parent
    target = config.root / "program"
    whole = hashlib.sha256(msgspec.json.encode(config))
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        whole.update(str(path.relative_to(source)).encode() + b"\0" + path.read_bytes())
    digest = whole.hexdigest()
    if source.is_relative_to(target):
        return digest
    stamp = target / "digest"
    if not stamp.exists() or stamp.read_text() != digest:
        fresh = config.root / "program.partial"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(source, fresh / "skysail", ignore=shutil.ignore_patterns("__pycache__"))
        (fresh / "digest").write_text(digest)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return digest


def initialise_store(config: Config, progress: Progress) -> None:
    """The controller's database, keys, certificates and admin account, then handed to the controller's user."""
    from skysail.serve.controller import initialise

    progress("store: checking")
    initialise(config)
    trusted = endpoint.authority(config)
    if trusted is not None:
        shutil.copyfile(config.certificates / "authority.pem", trusted)
        trusted.chmod(0o644)
    account = pwd.getpwnam(config.controller_user)
    for path in (config.root / "credentials.json", *(config.root / "controller").rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid)


def ensure_image(config: Config, progress: Progress) -> None:
    """Build the default blueprint's image when the library holds none that this program would build."""
    from skysail.serve import blueprints

    held = Library(config.images_dir).latest(FIRST_BLUEPRINT) if config.engines == "real" else None
    if config.engines != "real" or (held is not None and held.recipe == fingerprint(RECIPES[FIRST_BLUEPRINT])):
        return
    progress(f"images: building {FIRST_BLUEPRINT} from Debian packages (one to three minutes, once)")
    blueprints.build(config, FIRST_BLUEPRINT, progress)


def ensure_template(config: Config, progress: Progress) -> None:
    """Let the agent make the template that a first launch clones. Raises :class:`SkysailError` with the agent's words."""
    image = Library(config.images_dir).latest(FIRST_BLUEPRINT) if config.engines == "real" else None
    if image is None or not image.recipe:
        return
    prepare(config, image.digest, f"template: {FIRST_BLUEPRINT} is booted once, every launch is a clone of it", progress)


def prepare(config: Config, image: str, text: str, progress: Progress) -> None:
    """Let the agent look at its images and make the template of ``image`` for the first bundle's size.

    Raises :class:`SkysailError` with the agent's words.
    """
    progress(text)
    vcpus = BUNDLES[FIRST_BUNDLE]["cpuCount"]
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(config.agent_socket)), timeout=600) as client:
        answer = client.post("http://agent/prepare", params={"image": image, "vcpus": vcpus})
    if answer.status_code != 204:
        what, _, cure = answer.text.partition("\n")
        raise SkysailError(f"the template could not be made: {what}", cure=cure)


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
        return healthy(config, name) or (not _systemd() and processes.find(config, name) is None)

    processes.wait_until(settled, seconds)
    if not healthy(config, name):
        log = processes.log_path(config, name)
        said = log.read_text(errors="replace")[-1500:] if log.exists() else ""
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
    user = f"User={who}\nGroup={who}\nNoNewPrivileges=yes\nCapabilityBoundingSet=\n" if name == "controller" else ""
    order = "After=skysail-agent.service" if name == "controller" else "After=network.target"
    settings = "".join(f'Environment="{key}={value}"\n' for key, value in _environment(config).items())
    log = processes.log_path(config, name)
    return (f"[Unit]\nDescription=Skysail {name}\n{order}\n\n[Service]\n{settings}{user}"
            f"ExecStart={sys.executable} -m skysail.serve.{name}\nKillMode=process\nDelegate=yes\nRestart=always\n"
            f"RestartSec=1\nStandardOutput=append:{log}\nStandardError=append:{log}\n\n"
            f"[Install]\nWantedBy=multi-user.target\n")


def _start(config: Config, name: str, digest: str) -> None:
    processes.stop(config, name)
    if not _systemd():
        processes.start(config, name, command(config, name), env=_environment(config), digest=digest)
        return
    (UNITS / f"skysail-{name}.service").write_text(unit(config, name))
    process.run(["systemctl", "daemon-reload"])
    process.run(["systemctl", "enable", f"skysail-{name}.service"])
    process.run(["systemctl", "restart", f"skysail-{name}.service"])
    (config.root / "run" / f"{name}.digest").write_text(digest)


def _current(config: Config, name: str, digest: str) -> bool:
    if _systemd():
        stamp = config.root / "run" / f"{name}.digest"
        return stamp.exists() and stamp.read_text() == digest
    record = processes.find(config, name)
    return record is not None and record.digest == digest


def _pid(config: Config, name: str) -> int | None:
    if _systemd():
        said = process.run(["systemctl", "show", "--property=MainPID", "--value", f"skysail-{name}.service"]).strip()
        return int(said) or None
    record = processes.find(config, name)
    return record.pid if record else None


def _environment(config: Config) -> dict[str, str]:
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8",
            "PYTHONPATH": str(config.root / "program"), "PYTHONUNBUFFERED": "1", "SKYSAIL_DATA": config.data}


def _systemd() -> bool:
    return Path("/run/systemd/system").is_dir()
