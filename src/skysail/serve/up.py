"""Bring one machine's cloud up, take it down, say how it stands.

``up`` may be repeated: a step whose result exists is skipped, and a healthy process that runs this program with this
configuration is left alone. The program is copied into the data folder first, so that the unprivileged controller can
read it wherever the checkout lies, and so that an edited checkout does not change a running cloud.
"""

from __future__ import annotations

import asyncio
import grp
import hashlib
import json
import os
import pwd
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import skysail
from skysail.hypervisor import confinement, relay
from skysail.kit import durable, process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.network.linux import LinuxFabric
from skysail.network.plan import Layout
from skysail.serve import agent, blueprints, endpoint, name_server, processes, programs
from skysail.serve.turn import turn

Progress = Callable[[str], None]

NEEDED_FREE_GIB = 6


def up(config: Config, progress: Progress) -> None:
    """Build what is missing, start name server, agent and controller, wait until all are healthy; on a machine that joined a
    cloud, the agent alone. Needs root."""
    process.require_root()
    require_disk(config)
    with turn(config, progress):
        _up(config, progress)


def _up(config: Config, progress: Progress) -> None:
    ensure_user(config)
    ensure_folders(config)
    digest = install_program(config)
    check_configuration(config, digest)
    if "agent" in programs.names(config):
        blueprints.ensure_first(config, progress)
    for name in programs.names(config):
        # The name server goes on through an upgrade of ours: only its own configuration makes it start again.
        wanted = name_server.prepare(config) if name == "dns" else digest
        if not (programs.healthy(config, name) and programs.current(config, name, wanted)):
            if name == "controller":
                # Not before the old one is gone: it would work on a database of another version.
                programs.stop(config, name)
                initialise_store(config, progress)
            progress(f"{name}: starting")
            programs.start(config, name, wanted)
            programs.wait_healthy(config, name)
        if name == "agent":
            blueprints.ensure_first_template(config, progress)


def down(config: Config, progress: Progress, guests: bool = False) -> None:
    """Stop controller, agent and name server; with ``guests`` end the guests too (as a power cut, their disks stay)."""
    process.require_root()
    with turn(config, progress):
        _down(config, progress, guests)


def _down(config: Config, progress: Progress, guests: bool) -> None:
    for name in reversed(programs.names(config)):
        progress(f"{name}: {'stopped' if programs.stop(config, name) else 'was not running'}")
    if guests:
        progress(f"guests: {end_guests(config)} ended")
        if config.engines == "real":
            for listener in agent.ingress(config):
                asyncio.run(listener.end())
            progress("network: taken down")
            asyncio.run(LinuxFabric(Layout.of(config), agent.router(config)).teardown())


def end_guests(config: Config) -> int:
    """End every guest as a power cut would, with its cgroup; how many ran."""
    running = processes.guests(config)
    for record in running:
        processes.end(record, 0.0)
    relay.end(config.guests_dir)
    if config.guests_dir.is_dir():
        for folder in config.guests_dir.iterdir():
            confinement.release(folder.name)
    return len(running)


def status(config: Config) -> dict[str, Any]:
    """How the cloud stands: its processes, its health, its guests' number, its endpoint."""
    answer: dict[str, Any] = {"data": config.data, "endpoint": endpoint.url(config),
                              "guests": len(processes.guests(config))}
    for name in programs.names(config):
        answer[name] = {"pid": programs.pid(config, name), "healthy": programs.healthy(config, name)}
    answer["running"] = all(answer[name]["healthy"] for name in programs.names(config))
    return answer


def require_disk(config: Config) -> None:
    """Refuse to begin on a disk without room for an image, its template and a first guest."""
    config.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(config.root).free / 2**30
    if free < NEEDED_FREE_GIB and not any(config.images_dir.glob("*")):
        raise SkysailError(f"{config.root} has {free:.1f} GiB free, {NEEDED_FREE_GIB} GiB are needed",
                           cure="free some space, or set SKYSAIL_DATA to a folder on a larger disk")


def ensure_user(config: Config) -> None:
    """The unprivileged users that controller, name server and those who share a single address run as."""
    for name in (config.controller_user, *([config.dns_user] if config.powerdns else []),
                 *([config.ingress_user, config.jump_user] if config.single_address else [])):
        try:
            pwd.getpwnam(name)
        except KeyError:
            process.run(["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", config.data,
                         "--shell", "/usr/sbin/nologin", name])


def ensure_folders(config: Config) -> None:
    """The data folder's rooms, each with the owner and mode that it needs."""
    user, group = pwd.getpwnam(config.controller_user).pw_uid, grp.getgrnam(config.controller_user).gr_gid
    config.root.chmod(0o755)
    for path, owner, mode in ((config.root / "run", 0, 0o750), (processes.log_folder(config), 0, 0o750),
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
    for lock in Path(sys.prefix).glob(".requirements.lock"):  # which libraries it runs with, as the launcher notes it
        whole.update(lock.read_bytes())
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


def check_configuration(config: Config, digest: str) -> None:
    """Raises :class:`SkysailError` when this cloud cannot go on with its configuration, before anything of it is stopped.
    Looked at as the controller's user, whose database it is."""
    if not programs.current(config, "controller", digest):
        told = json.loads(process.run([*programs.command(config, "controller"), "--check"], env=programs.environment(config),
                                      timeout=300))
        if told is not None:
            raise SkysailError(*told)


def initialise_store(config: Config, progress: Progress) -> None:
    """Let the controller make its database, keys and certificates, and keep what others are given of them.

    It does so as its own user: root touches nothing in a folder that is somebody else's, where a link could lead elsewhere.
    """
    progress("store: checking")
    credentials, trusted = config.root / "credentials.json", endpoint.authority(config)
    asked = ["--prepare", *([] if credentials.exists() else ["--admin-key"])]
    told = json.loads(process.run([*programs.command(config, "controller"), *asked], env=programs.environment(config),
                                  timeout=300))
    if told["credentials"]:
        durable.replace(credentials, json.dumps(told["credentials"]).encode())
    os.chown(credentials, 0, 0, follow_symlinks=False)  # earlier versions gave it to the controller's user
    if trusted is not None:
        durable.replace(trusted, told["authority"].encode(), 0o644)
