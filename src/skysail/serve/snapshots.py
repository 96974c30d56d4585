"""Snapshots as the operator handles them: listed, written to a file, taken in from one.

A file is a parcel (see ``storage/parcel.py``). What is taken in is checked and laid beside the host's snapshots first, then
its row is written, and the agent, which the snapshots belong to, lets it appear: whoever dies on the way, there is a whole
snapshot or none.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, select

from skysail.contract.document import Origin, Volume
from skysail.images import renewal
from skysail.images.library import Library
from skysail.images.library import Manifest as ImageManifest
from skysail.kit import durable, process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.workplace import locked, workplace
from skysail.operations import history
from skysail.resources import accounts, snapshot_rows
from skysail.resources.request import Request
from skysail.resources.snapshot_rows import WHOLE
from skysail.serve import agent, processes
from skysail.serve.controller import HOST
from skysail.storage import Copy, Manifest, parcel
from skysail.storage.shelf import seal
from skysail.store.schema import snapshots
from skysail.store.visit import visit

WAIT_SECONDS = 60.0
KINDS = {"InstanceSnapshot": "instance", "DiskSnapshot": "disk"}


def listed(config: Config) -> list[dict[str, Any]]:
    """Every snapshot of every account, automatic ones too, by account, region and name."""
    def found(connection: Connection) -> list[dict[str, Any]]:
        rows = connection.execute(select(snapshots).where(snapshots.c.deleted.is_(False)).order_by(
            snapshots.c.account_id, snapshots.c.region, snapshots.c.name, snapshots.c.created_at)).mappings().all()
        return [{
            "name": row["name"], "of": row["source"].get("instance_name") or row["source"].get("disk_name"),
            "kind": KINDS[row["kind"]], "state": row["state"], "disks": len(row["volumes"]),
            "size_gb": sum(volume["size_gib"] for volume in row["volumes"]), "region": row["region"],
            "account": row["account_id"], "automatic": bool(row["auto_day"]),
            "created": datetime.datetime.fromtimestamp(row["created_at"], datetime.UTC).isoformat(timespec="seconds"),
        } for row in rows]

    return visit(config, found, list[dict[str, Any]])


def summary(snapshot: dict[str, Any]) -> dict[str, str]:
    """A snapshot of :func:`listed` in the few words that a table shows."""
    return {"name": snapshot["name"], "of": snapshot["of"], "kind": snapshot["kind"], "state": snapshot["state"],
            "size": f"{snapshot['size_gb']} GB", "region": snapshot["region"],
            "created (UTC)": snapshot["created"][:16].replace("T", " ")}


def export(config: Config, name: str, target: Path, region: str, account: str, progress: Callable[[str], None],
           detail: Callable[[str], None]) -> int:
    """Write the snapshot ``name`` to the file ``target``, which must not be there yet; how large it is, in bytes. Raises
    SkysailError; there is no file then."""
    _require_files(config)
    if target.exists():
        raise SkysailError(f"{target} is there already", "choose another name, or remove it")
    if not target.parent.is_dir():
        raise SkysailError(f"there is no folder {target.parent}", "make it first")
    row = visit(config, lambda connection: dict(_find(
        connection, name, region or config.default_region, _account(connection, account))), dict[str, Any])
    _, shelf = agent.storage(config)
    with workplace(config.snapshots_dir) as work:
        work.chmod(0o711)
        room = work / "disks"
        room.mkdir(mode=0o700)
        os.chown(room, config.importer_uid, config.importer_uid)
        disks, parts = [], []
        for number, volume in enumerate(row["volumes"]):
            progress(f"{name}: reading disk {number + 1} of {len(row['volumes'])} ({volume['size_gib']} GB at the most)")
            origin = Origin(snapshot=row["id"], volume=volume["id"])
            asyncio.run(shelf.verify(origin))
            disks.append(room / f"{number}.qcow2")
            chain = asyncio.run(shelf.show(origin, room, config.importer_uid))
            parts.append(parcel.flatten(chain, disks[-1], volume["size_gib"], config.importer_uid, detail))
        progress(f"{name}: writing {target}")
        parcel.write(target, _parcel(config, row, parts), disks, detail)
    return target.stat().st_size


def bring_in(config: Config, source: Path, name: str, region: str, account: str, progress: Callable[[str], None],
             detail: Callable[[str], None]) -> str:
    """Make a snapshot of the parcel ``source``, called ``name``, or as it was called; its name. Raises SkysailError; there is
    no snapshot then."""
    _require_files(config)
    region = region or config.default_region
    if region not in config.regions:
        raise SkysailError(f"the region {region} does not exist here", f"one of: {', '.join(config.regions)}")
    with workplace(config.snapshots_dir) as work:
        work.chmod(0o711)
        progress(f"reading {source}")
        found, paths = parcel.read(source, work, detail)
        name = name or found.name
        for number, (path, part) in enumerate(zip(paths, found.parts, strict=True)):
            progress(f"{name}: checking disk {number + 1} of {len(paths)}")
            path.chmod(0o444)
            parcel.check(path, part, config.importer_uid)
        volumes = _volumes(found)
        identifier, draft = snapshot_rows.new_id(), work / "snapshot"
        _lay(draft, identifier, found, paths, volumes)
        if found.server is not None:
            _note(config, found.server)
        with locked(config.snapshots_dir):
            _forget_abandoned(config)
            draft.rename(config.snapshots_dir / f".{identifier}")
            durable.sync(config.snapshots_dir)
            try:
                operation = visit(config, lambda connection: _put(
                    connection, config, found, name, identifier, volumes,
                    Request(account_id=_account(connection, account), region=region, action=f"Create{found.kind}",
                            params={})), str, write=True)
            except SkysailError:
                _forget_abandoned(config)
                raise
    _await(config, operation, name)
    return name


def _require_files(config: Config) -> None:
    process.require_root()
    if config.engines != "real":
        raise SkysailError("the snapshots of a simulated host have no files")


def _find(connection: Connection, name: str, region: str, account: str) -> RowMapping:
    row = connection.execute(select(snapshots).where(
        snapshots.c.account_id == account, snapshots.c.region == region, snapshots.c.name == name,
        snapshots.c.auto_day == "", snapshots.c.deleted.is_(False))).mappings().first()
    if row is None:
        raise SkysailError(f"there is no snapshot {name} in {region}",
                           "see: sudo ./skysail snapshots list (an automatic one is exported once CopySnapshot has kept it)")
    if row["state"] != WHOLE[row["kind"]]:
        raise SkysailError(f"the snapshot {name} is {row['state']}", "wait until it is whole")
    return row


def _account(connection: Connection, name: str) -> str:
    found = accounts.find_account(connection, name)
    if found is None:
        raise SkysailError(f"there is no account {name}")
    return found


def _parcel(config: Config, row: Mapping[str, Any], parts: list[parcel.Part]) -> parcel.Parcel:
    source = row["source"]
    kind: Literal["Instance", "Disk"] = "Disk" if "disk_name" in source else "Instance"
    server = None
    if row["kind"] == "InstanceSnapshot":
        library = Library(config.images_dir)
        image = library.find(source["image"]) or library.noted(source["image"])
        if image is None:
            raise SkysailError(f"the image {source['image'][:12]} of the snapshot is not known here", "bring its file back")
        server = parcel.Server(
            image=source["image"], recipe=image.recipe, blueprint=source["blueprint"],
            blueprint_name=source["blueprint_name"], bundle=source["bundle"], user=source["user"],
            renews=renewal.renews(library, source["image"]),
            disks=tuple(parcel.Attached(path=disk["path"], name=disk["name"]) for disk in source["disks"]))
    return parcel.Parcel(
        kind=row["kind"], name=row["name"], created_at=row["created_at"], consistency=row["consistency"], origin_type=kind,
        origin=source[f"{kind.lower()}_name"], origin_arn=source[f"{kind.lower()}_arn"], parts=tuple(parts), server=server)


def _volumes(found: parcel.Parcel) -> list[Volume]:
    """The volumes of the parcel's parts, as if they had been of guests and disks here."""
    image = found.server.image if found.server is not None else ""
    return [Volume(id=("g-" if image and not number else "d-") + secrets.token_hex(5), image="" if number else image,
                   size_gib=part.size_gib) for number, part in enumerate(found.parts)]


def _lay(draft: Path, identifier: str, found: parcel.Parcel, paths: Sequence[Path], volumes: Sequence[Volume]) -> None:
    """The folder of a whole snapshot, under a name that is not one's yet."""
    draft.mkdir()
    copies = []
    for path, part, volume in zip(paths, found.parts, volumes, strict=True):
        file = path.rename(draft / f"{volume.id}.qcow2")
        durable.sync(file)
        copies.append(Copy(volume=volume.id, file=file.name, parents=(), virtual_bytes=part.size_gib << 30,
                           sha256=part.sha256))
    seal(draft, Manifest(id=identifier, consistency=found.consistency, copies=tuple(copies)))


def _note(config: Config, server: parcel.Server) -> None:
    """How to let a guest take on an identity depends on its image, which this machine may not have."""
    library = Library(config.images_dir)
    if library.find(server.image) is None:
        library.note(ImageManifest(
            digest=server.image, blueprint=server.blueprint, name=server.blueprint_name, group=server.blueprint, version="",
            user=server.user, size_bytes=0, built=time.time(), recipe=server.recipe, renews=server.renews))


def _forget_abandoned(config: Config) -> None:
    """What an import laid here that was killed before it had written its row. Drafts of the agent always have one, which was
    there before them: so the files are looked at before the rows."""
    there = list(config.snapshots_dir.glob(".s-*"))
    known = visit(config, lambda connection: set(connection.execute(select(snapshots.c.id)).scalars()), set[str])
    for left in there:
        if left.name.removeprefix(".") not in known:
            shutil.rmtree(left)


def _put(connection: Connection, config: Config, found: parcel.Parcel, name: str, identifier: str,
         volumes: Sequence[Volume], request: Request) -> str:
    """Write the row; the id of its operation."""
    kind = found.origin_type.lower()
    source: dict[str, Any] = {f"{kind}_name": found.origin, f"{kind}_arn": found.origin_arn}
    if found.server is not None:
        server = found.server
        source |= {"blueprint": server.blueprint, "blueprint_name": server.blueprint_name, "bundle": server.bundle,
                   "user": server.user, "image": server.image, "disks": [
                       {"name": disk.name, "path": disk.path, "sizeInGb": part.size_gib, "isSystemDisk": False,
                        "resourceType": "Disk"} for disk, part in zip(server.disks, found.parts[1:], strict=True)]}
    made = snapshot_rows.put(
        connection, request, name, found.kind, identifier=identifier, now=time.time(), host=HOST, guest="", volumes=volumes,
        source=source, source_id="", size_gib=found.parts[0].size_gib, arrived=True)
    return str(made["id"])


def _await(config: Config, operation: str, name: str) -> None:
    """Wait until the agent has let it appear; raises SkysailError when it could not."""
    def settled() -> bool:
        found.update(visit(config, lambda connection: dict(history.find(connection, operation)), dict[str, Any]))
        return bool(found["done"])

    found: dict[str, Any] = {}
    if not config.agent_socket.exists():
        return  # it appears when the cloud is up
    if not processes.wait_until(settled, WAIT_SECONDS):
        raise SkysailError(f"the agent has not taken {name} in yet", "see: sudo ./skysail status")
    if found["status"] == "Failed":
        raise SkysailError(f"{name} could not be taken in: {found['error_details']}", "delete the snapshot, and try again")
