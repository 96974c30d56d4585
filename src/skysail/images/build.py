"""Build an image from a recipe: packages into a tree, the tree into a disk, the disk into the library. Needs root."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from skysail.images.disk import write_disk
from skysail.images.library import Library, Manifest, file_digest
from skysail.images.recipe import BASE, RECIPES, Recipe
from skysail.images.sources import derive
from skysail.kit.process import run

# What runs inside every image of ours: see guest/personalise.py.
GUEST = Path(__file__).parent / "guest"
# Two sources are named, so that cloud-init looks for a seed and stays off where there is none, as in a template.
_CLOUD = "datasource_list: [NoCloud, ConfigDrive]\nsystem_info: {default_user: {name: %s, lock_passwd: true, " \
         "sudo: ['ALL=(ALL) NOPASSWD:ALL'], shell: /bin/bash}}\ndisable_root: true\nssh_pwauth: false\n" \
         "cloud_config_modules: [ssh-import-id, set-passwords, apt-configure, ntp, timezone, runcmd]\n"


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of all that an image of ``recipe`` is made from here: an image with another one is to be built anew."""
    whole = hashlib.sha256(recipe.digest().encode() + repr(BASE).encode())
    for path in (Path(__file__), *sorted(path for path in GUEST.iterdir() if path.is_file())):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def bootstrap(recipe: Recipe, tree: Path) -> None:
    """Install the recipe's packages into ``tree``."""
    wanted = ",".join((*BASE, recipe.kernel, *recipe.packages))
    run(["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={wanted}",
         '--aptopt=APT::Install-Recommends "false"', recipe.suite, str(tree), *derive(recipe.suite)])


def furnish(recipe: Recipe, tree: Path, root_uuid: str) -> None:
    """Put the image's own files in place and take out what must differ between guests."""
    line = f"root=UUID={root_uuid} ro console=ttyS0 net.ifnames=0 memhp_default_state=online"
    files = {
        "etc/fstab": f"UUID={root_uuid} / ext4 errors=remount-ro 0 1\n",
        "etc/hostname": "localhost\n",
        "etc/machine-id": "",
        "etc/cloud/cloud.cfg.d/95_skysail.cfg": _CLOUD % recipe.user,
        "etc/ssh/sshd_config.d/10-skysail.conf": "TrustedUserCAKeys /etc/ssh/skysail_user_ca.pub\n",
        "etc/ssh/skysail_user_ca.pub": "",
        f"etc/sudoers.d/90-{recipe.user}": f"{recipe.user} ALL=(ALL) NOPASSWD:ALL\n",
        # Loaded before a template is saved: a clone's network card finds its driver in memory.
        "etc/modules-load.d/skysail.conf": "virtio_net\n",
        "etc/resolv.conf": "",
        "usr/lib/skysail/personalise.py": (GUEST / "personalise.py").read_text(),
        "usr/lib/systemd/system/skysail-personalise.service": (GUEST / "skysail-personalise.service").read_text(),
        "usr/lib/systemd/system/skysail-host-key.service": (GUEST / "skysail-host-key.service").read_text(),
        "usr/lib/udev/rules.d/60-skysail.rules": (GUEST / "60-skysail.rules").read_text(),
        "boot/grub/grub.cfg": "serial --unit=0 --speed=115200\nterminal_output serial\n"
                              f"search --no-floppy --fs-uuid --set=root {root_uuid}\n"
                              f"linux /vmlinuz {line}\ninitrd /initrd.img\nboot\n",
    }
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    for key in (tree / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (tree / f"etc/sudoers.d/90-{recipe.user}").chmod(0o440)
    if f"\n{recipe.user}:" not in (tree / "etc/passwd").read_text():
        run(["useradd", f"--root={tree}", "--create-home", "--shell=/bin/bash", "--groups=sudo,adm", recipe.user])
    units = ("systemd-networkd.service", "ssh.service", "serial-getty@ttyS0.service", "skysail-host-key.service",
             *recipe.units)
    run(["systemctl", f"--root={tree}", "enable", *units])
    # A template boots without a network card, and waiting for one would hold its boot for ever.
    run(["systemctl", f"--root={tree}", "mask", "systemd-networkd-wait-online.service"])


def packages(tree: Path) -> tuple[tuple[str, str, str], ...]:
    """Every installed package as (name, version, architecture)."""
    told = run(["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "-W", "-f", "${Package} ${Version} ${Architecture}\n"])
    rows = (line.split() for line in told.decode().splitlines())
    return tuple((row[0], row[1], row[2]) for row in rows)


def build(recipe: Recipe, library: Library, progress: Callable[[str], None] = lambda step: None,
          tree: Path | None = None) -> Manifest:
    """Build ``recipe`` into ``library``; with ``tree``, from packages already installed there."""
    library.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=library.directory) as scratch:
        work = Path(scratch)
        if tree is None:
            tree = work / "tree"
            progress("installing packages")
            bootstrap(recipe, tree)
        root_uuid = str(uuid.uuid4())
        furnish(recipe, tree, root_uuid)
        progress("writing the disk")
        write_disk(tree, work / "disk.raw", recipe.size_mib, root_uuid)
        progress("compressing")
        out = work / "disk.qcow2"
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd",
             str(work / "disk.raw"), str(out)])
        made = Manifest(digest=file_digest(out), blueprint=recipe.blueprint, name=recipe.name, group=recipe.group,
                        version=recipe.version, user=recipe.user, size_bytes=recipe.size_mib << 20, built=time.time(),
                        recipe=fingerprint(recipe), packages=packages(tree))
        library.add(out, made)
    return made


if __name__ == "__main__":
    shelf = Library(Path(sys.argv[2]))
    ready = build(RECIPES[sys.argv[1]], shelf, print, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    print(shelf.path(ready.digest))
