"""Application blueprints: what an instance shows to a visitor and to its owner, and that no two share a secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clouds import RealCloud, ensure_image, eventually
from skysail.images import recipe
from skysail.images.build import fingerprint
from skysail.images.library import Library, Manifest, file_digest
from skysail.images.published import PUBLISHED
from skysail.images.recipe import APPS, RECIPES
from skysail.kit.config import load
from skysail.kit.errors import SkysailError
from skysail.serve import blueprints

READY = "test -e /var/lib/skysail/application && echo made || echo not yet"


@pytest.mark.long
@pytest.mark.real
@pytest.mark.timeout(3600)
def test_wordpress_is_proved(real_cloud: RealCloud) -> None:
    """Two clones show the page over http and https, let their owner in by the password, and share no secret: see proof.py."""
    ensure_image("wordpress")
    done = real_cloud.operator("blueprints", "prove", "wordpress", "--json")
    (seen,) = json.loads(done.stdout)
    assert done.returncode == 0 and not seen["failure"], (seen, done.stderr)
    assert seen["version"].startswith("6.")
    assert seen["build_seconds"] is None and seen["launch_seconds"] > 0 and seen["page_seconds"] > 0
    assert not [one for one in real_cloud.client().get_instances()["instances"] if one["name"].startswith("proof-")]
    shown = {one["blueprintId"]: one for one in real_cloud.client().get_blueprints()["blueprints"]}["wordpress"]
    assert (shown["type"], shown["name"], shown["group"], shown["version"], shown["minPower"]) == (
        "app", "WordPress", "wordpress", seen["version"], 0)
    assert shown["productUrl"].startswith("https://") and shown["licenseUrl"].startswith("https://")


@pytest.mark.real
@pytest.mark.timeout(3600)
@pytest.mark.long
def test_secrets_are_made_once(real_cloud: RealCloud) -> None:
    """They outlive a reboot, and go with a snapshot: what is restored from it is the same application with the same users."""
    ensure_image("wordpress")
    look = ("sudo sha256sum /etc/wordpress/config-default.php /home/admin/application_password; "
            "stat -c '%a %U %s' /home/admin/application_password; sudo stat -c '%a' /etc/wordpress/config-default.php")
    real_cloud.launch("blog", blueprint="wordpress", bundle="micro_3_0")
    eventually(lambda: real_cloud.ssh("blog", READY).strip() == "made", 600, "the secrets are made")
    first = real_cloud.ssh("blog", look)
    assert first.splitlines()[2:] == ["600 admin 24", "640"]
    client = real_cloud.client()
    boot = real_cloud.ssh("blog", "cat /proc/sys/kernel/random/boot_id")
    real_cloud.settled(client.reboot_instance(instanceName="blog")["operations"][0]["id"], 600)
    eventually(lambda: real_cloud.ssh("blog", "cat /proc/sys/kernel/random/boot_id", 600) != boot, 600, "it has rebooted")
    assert real_cloud.ssh("blog", look) == first
    # Nothing has to be started by hand.
    page = "python3 -c 'import urllib.request; print(urllib.request.urlopen(\"http://127.0.0.1/\").status)' || true"
    eventually(lambda: real_cloud.ssh("blog", page).strip() == "200", 600, "the page after a reboot")
    for operation in client.create_instance_snapshot(instanceName="blog", instanceSnapshotName="kept")["operations"]:
        real_cloud.settled(operation["id"], 600)
    eventually(lambda: client.get_instance_snapshot(instanceSnapshotName="kept")["instanceSnapshot"]["state"] == "available",
               600, "the snapshot is there")
    for operation in client.create_instances_from_snapshot(
            instanceNames=["again"], availabilityZone="us-east-1a", instanceSnapshotName="kept",
            bundleId="micro_3_0")["operations"]:
        real_cloud.settled(operation["id"], 900)
    assert real_cloud.ssh("again", look, 600) == first
    eventually(lambda: real_cloud.ssh("again", page).strip() == "200", 600, "the page of the restored instance")
    real_cloud.delete("blog", "again")
    for operation in client.delete_instance_snapshot(instanceSnapshotName="kept")["operations"]:
        real_cloud.settled(operation["id"])


def test_blueprints_are_listed_by_what_they_need(tmp_path: Path) -> None:
    config = load(str(tmp_path))
    library = Library(config.images_dir)
    for name, made_of in (("lamp", fingerprint(RECIPES["lamp"])), ("django", "that of last year"), ("ubuntu_24_04", "")):
        with library.workplace() as work:
            (work / "x").write_text(name)
            library.add(work / "x", Manifest(digest=file_digest(work / "x"), blueprint=name, name=name, group=name,
                                             version="1", user="admin", size_bytes=1, built=1.0, recipe=made_of))
    done = subprocess.run([sys.executable, "-m", "skysail.cli.main", "blueprints", "list", "--json"], capture_output=True,
                          text=True, env={**os.environ, "SKYSAIL_DATA": str(tmp_path)}, check=True)
    rows = {row.pop("blueprint"): row for row in json.loads(done.stdout)}
    assert {*RECIPES, *PUBLISHED} == set(rows)
    assert rows["lamp"] == {"type": "app", "name": "lamp", "version": "1", "state": "ready", "how": ""}
    assert rows["ubuntu_24_04"] == {"type": "os", "name": "ubuntu_24_04", "version": "1", "state": "ready", "how": ""}
    assert rows["django"]["state"] == "ready" and "recipe has changed" in rows["django"]["how"]
    assert (rows["wordpress"]["state"], rows["wordpress"]["how"]) == ("can be built", "skysail blueprints build wordpress")
    assert rows["freebsd_14"]["state"] == "needs a download"
    assert rows["freebsd_14"]["how"] == "skysail images import freebsd_14"
    assert rows["gitlab"]["state"] == "not published" and "GitLab publishes packages" in rows["gitlab"]["how"]


def test_names_that_mean_nothing_are_refused() -> None:
    assert blueprints.named((), everything=True) == sorted(RECIPES)
    with pytest.raises(SkysailError, match="no recipe for plan_9"):
        blueprints.named(("lamp", "plan_9"), everything=False)
    with pytest.raises(SkysailError, match="no blueprint is named"):
        blueprints.named((), everything=False)


def test_every_application_is_declared_whole() -> None:
    for one in RECIPES.values():
        if one.folder is None:
            assert not (one.units or one.secrets or one.pages or one.login)
            continue
        assert one.folder == APPS / one.blueprint and one.units and one.secrets and one.pages
        # A password is one only if it is tried.
        assert bool(one.login) == any(path.endswith("/application_password") for path in one.secrets)
        scripts = {path.name for path in one.folder.iterdir()} - {"recipe.toml", "tree"}
        assert "first-boot" in scripts and scripts <= {"prepare", "first-boot"}
        for name in scripts:
            subprocess.run(["sh", "-n", one.folder / name], check=True)
    subprocess.run(["sh", "-n", APPS / "application"], check=True)


def test_a_recipe_changes_with_each_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(APPS, tmp_path / "apps")
    monkeypatch.setattr(recipe, "APPS", tmp_path / "apps")
    plain = RECIPES["debian_12"].digest()
    for path in ("application", "lamp/first-boot", "lamp/tree/var/www/html/index.php"):
        before, other = RECIPES["lamp"].digest(), RECIPES["nodejs"].digest()
        with (tmp_path / "apps" / path).open("a") as file:
            file.write("# more")
        assert RECIPES["lamp"].digest() != before
        assert (RECIPES["nodejs"].digest() != other) == (path == "application")
    assert RECIPES["debian_12"].digest() == plain
