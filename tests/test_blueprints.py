"""Blueprints: each recipe becomes an image, a template, and instances that are what they are called."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from clouds import CACHE, RealCloud, ensure_image, eventually
from skysail.images import build as builder
from skysail.images.build import build, fingerprint
from skysail.images.library import Library, Manifest
from skysail.images.recipe import RECIPES, Recipe
from skysail.kit.errors import SkysailError
from skysail.serve import blueprints

pytestmark = pytest.mark.real


def page(address: str) -> str:
    """What the page says; empty while nobody answers there."""
    try:
        return httpx.get(address, verify=False, timeout=60, trust_env=False).text
    except httpx.TransportError:
        return ""


def offered(cloud: RealCloud, blueprint: str) -> dict[str, Any]:
    """The blueprint as GetBlueprints shows it, made ready to launch."""
    blueprints.prepare(cloud.config, ensure_image(blueprint), blueprint, lambda step: None)

    def seen() -> dict[str, Any] | None:
        found: dict[str, dict[str, Any]] = {one["blueprintId"]: one for one in cloud.client().get_blueprints()["blueprints"]}
        return found.get(blueprint)
    return eventually(seen, 60, "the controller has heard of it")


@pytest.mark.long
def test_an_image_built_on_a_running_cloud_is_launchable_at_once(real_cloud: RealCloud) -> None:
    done = real_cloud.operator("images", "build", "nginx")
    assert done.returncode == 0, done.stderr
    assert [line.split(" (")[0] for line in done.stderr.splitlines()] == [
        "nginx: installing Debian packages", "nginx: putting Skysail's own files in", "nginx: writing the disk",
        "nginx: compressing the disk", "making nginx ready to launch"]
    shown = {one["blueprintId"]: one for one in real_cloud.client().get_blueprints()["blueprints"]}["nginx"]
    assert {name: shown[name] for name in ("name", "group", "type", "platform", "isActive")} == {
        "name": "Nginx", "group": "nginx", "type": "app", "platform": "LINUX_UNIX", "isActive": True}
    assert shown["version"].startswith("1.")
    (made,) = real_cloud.launch("web", blueprint="nginx")
    # Nobody logs in: it starts by itself, once it has secrets of its own.
    eventually(lambda: "Welcome to nginx!" in page(f"http://{made['publicIpAddress']}/"), 300, "the first page")
    assert "Welcome to nginx!" in page(f"https://{made['publicIpAddress']}/")
    assert {(port["fromPort"], port["protocol"]) for port in made["networking"]["ports"]} == {
        (22, "tcp"), (80, "tcp"), (443, "tcp")}
    assert made["blueprintName"] == "Nginx"
    look = "hostname; systemctl is-active nginx mariadb; systemctl is-system-running --wait"
    assert real_cloud.ssh("web", look).split() == ["web", "active", "active", "running"]
    real_cloud.delete("web")


def test_images_are_listed(real_cloud: RealCloud) -> None:
    offered(real_cloud, "debian_12")
    rows = json.loads(real_cloud.operator("images", "list", "--json").stdout)
    (row,) = [row for row in rows if row["blueprint"] == "debian_12" and row["offered"]]
    assert row["version"].startswith("12.") and row["packages"] > 150 and row["file_bytes"] > 50 << 20
    assert row["disk_bytes"] == 3 << 30 and row["templated"] and 2 in row["templates"]
    table = real_cloud.operator("images", "list").stdout
    assert "debian_12" in table and "2 vCPU" in table


@pytest.mark.long
def test_debian_13_is_launched_with_a_fresh_identity(real_cloud: RealCloud) -> None:
    shown = offered(real_cloud, "debian_13")
    assert (shown["name"], shown["group"], shown["type"]) == ("Debian", "debian_13", "os")
    assert shown["version"].startswith("13.")
    real_cloud.launch("thirteen", "fourteen", blueprint="debian_13")
    seen = {}
    for name in ("thirteen", "fourteen"):
        # Strict about the host key from the first connection on: see customer.ssh.
        told = real_cloud.ssh(name, "hostname; cat /etc/machine-id; cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub; "
                                    "python3 -c 'import sys; print(sys.version_info[1])'; "
                                    "ls /usr/lib/openssh/sshd-session; systemctl is-system-running; "
                                    "sudo dmesg | grep -c 'reseeded due to virtual machine fork'").split()
        _, record = real_cloud.guest(name)
        assert told == [name, record["identity"]["machine_id"], record["identity"]["host_public"].split()[1], "13",
                        "/usr/lib/openssh/sshd-session", "running", "1"]
        seen[name] = record["identity"]
    assert seen["thirteen"]["machine_id"] != seen["fourteen"]["machine_id"]
    real_cloud.delete("thirteen", "fourteen")


@pytest.mark.long
def test_the_same_inputs_give_the_same_packages(real_cloud: RealCloud) -> None:
    """An image of nginx is one of Debian and a few packages more: what both hold was chosen twice, from the same archives."""
    def held(blueprint: str, fits: Callable[[Manifest], bool]) -> Manifest:
        library = Library(CACHE / "images")
        found = library.find(ensure_image(blueprint))
        assert found is not None
        return found if fits(found) else build(RECIPES[blueprint], library)
    web = held("nginx", lambda found: bool(found.archives))
    plain = held("debian_12", lambda found: found.archives == web.archives)
    assert plain.archives == web.archives and len(web.archives) >= 3
    assert set(plain.packages) < set(web.packages)
    assert {name for name, _, _ in set(web.packages) - set(plain.packages)} >= {"nginx"}


def test_a_failed_build_explains_itself_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(tmp_path / "images")
    wrong = Recipe(blueprint="wrong", name="W", group="w", suite="bookworm", kernel="linux-image-cloud-amd64",
                   packages=("no-such-package-anywhere",))
    with pytest.raises(SkysailError, match=r"packages of wrong could not be installed: .*no-such-package-anywhere") as failed:
        build(wrong, library)
    assert "apt-get update" in failed.value.cure
    monkeypatch.setattr(builder, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(SkysailError, match="free"):
        build(wrong, library)
    assert list(library.directory.iterdir()) == []


def test_a_build_that_is_killed_leaves_no_mount_and_no_process(tmp_path: Path) -> None:
    library = Library(tmp_path / "images")
    with subprocess.Popen([sys.executable, "-m", "skysail.images.build", "debian_12", str(library.directory)],
                          stdout=subprocess.DEVNULL) as builder_process:
        # mmdebstrap has mounted what it needs by the time that the first package is unpacked.
        (unpacked,) = eventually(lambda: list(library.directory.glob(".work-*/tree/usr/bin/dpkg")), 300, "packages")
        tree = unpacked.parent.parent.parent
        assert str(tree) not in Path("/proc/self/mountinfo").read_text()
        builder_process.kill()
    eventually(lambda: not busy(str(tree)), 60, "every process of the build is gone")
    assert tree.exists()
    with library.workplace():
        assert not tree.exists()
    assert list(library.directory.iterdir()) == []


def busy(folder: str) -> list[str]:
    """Processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if folder.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_every_recipe_has_a_name_in_the_catalogue() -> None:
    from skysail.resources import catalog
    assert set(RECIPES) == set(catalog.RECIPES)
    for recipe in RECIPES.values():
        offer = catalog.RECIPES[recipe.blueprint]
        assert (offer.name, offer.group, offer.app) == (recipe.name, recipe.group, recipe.folder is not None)
        assert len(fingerprint(recipe)) == 64
