"""Build an image from a recipe: packages into a tree, the tree into a disk, the disk into the library. Needs root."""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from skysail.images import disk
from skysail.images.library import Library, Manifest, file_digest
from skysail.images.recipe import APPS, BASE, RECIPES, Recipe
from skysail.images.sources import derive
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run

# mmdebstrap mounts /dev/shm, /sys and more of this machine below the tree. Alone with its mounts and its processes, it takes
# them with it however it ends: whoever removes the tree of a build that was cut off must not reach through them.
_ALONE = ("setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--pid", "--mount-proc", "--fork",
          "--kill-child=KILL", "--")
# A tree, its sparse disk and the image, with room to spare.
NEEDED_BYTES = 3 << 30
PREPARE_SECONDS = 900.0
# Inside the tree, with a kernel's file systems and a /run of its own, without a network: what is made there follows from the
# packages alone, and ends with the script.
_INSIDE = ("unshare", "--net", "--", "sh", "-c",
           'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount -t tmpfs tmpfs "$1/run" && '
           'mount -t tmpfs tmpfs "$1/tmp" && exec chroot "$1" /usr/lib/skysail/app/prepare', "sh")
# What runs inside every image of ours: see guest/personalise.py.
GUEST = Path(__file__).parent / "guest"
# Two sources are named, so that cloud-init looks for a seed and stays off where there is none, as in a template.
_CLOUD = "datasource_list: [NoCloud, ConfigDrive]\nsystem_info: {default_user: {name: %s, lock_passwd: true, " \
         "sudo: ['ALL=(ALL) NOPASSWD:ALL'], shell: /bin/bash}}\ndisable_root: true\nssh_pwauth: false\n" \
         "cloud_config_modules: [ssh-import-id, set-passwords, apt-configure, ntp, timezone, runcmd]\n"


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of all that an image of ``recipe`` is made from here: an image with another one is to be built anew."""
    whole = hashlib.sha256(recipe.digest().encode() + repr(BASE).encode())
    for path in (Path(__file__), Path(disk.__file__), *sorted(path for path in GUEST.iterdir() if path.is_file())):
        whole.update(path.read_bytes())
    return whole.hexdigest()


def bootstrap(recipe: Recipe, tree: Path) -> None:
    """Install the recipe's packages into ``tree``, with the archives' lists that they were chosen by left in it.

    Raises :class:`SkysailError` with what apt said.
    """
    wanted = ",".join((*BASE, recipe.kernel, *recipe.packages))
    try:
        run([*_ALONE, "mmdebstrap", "--mode=root", "--variant=minbase", "--skip=cleanup/apt/lists", f"--include={wanted}",
             '--aptopt=APT::Install-Recommends "false"', recipe.suite, str(tree), *derive(recipe.suite)])
    except ProcessFailed as failed:
        said = [line for line in failed.stderr.splitlines() if line.startswith(("E:", "Err:", "dpkg: error"))]
        raise SkysailError(f"the packages of {recipe.blueprint} could not be installed: {'; '.join(said[:4]) or failed.what}",
                           "see whether this machine's own apt works: sudo apt-get update") from failed


def archives(tree: Path) -> tuple[tuple[str, str], ...]:
    """The archives' signed indexes as (file name, sha256), taken out of ``tree``.

    They and the recipe decide which packages are installed: two builds from the same ones give the same list.
    """
    lists = tree / "var/lib/apt/lists"
    found = tuple((path.name, file_digest(path)) for path in sorted(lists.glob("*Release")))
    for path in lists.iterdir():
        if path.is_file():
            path.unlink()
    return found


def furnish(recipe: Recipe, tree: Path, root_uuid: str) -> None:
    """Put the image's own files in place and take out what must differ between guests."""
    # A machine that can grow beyond 4 GiB sets 64 MiB aside for devices that cannot reach so far; a guest has no such device.
    line = f"root=UUID={root_uuid} ro console=ttyS0 net.ifnames=0 memhp_default_state=online swiotlb=noforce"
    files = {
        "etc/fstab": f"UUID={root_uuid} / ext4 errors=remount-ro 0 1\n",
        "etc/hostname": "localhost\n",
        "etc/machine-id": "",
        "etc/cloud/cloud.cfg.d/95_skysail.cfg": _CLOUD % recipe.user,
        "etc/ssh/sshd_config.d/10-skysail.conf": "TrustedUserCAKeys /etc/ssh/skysail_user_ca.pub\n",
        "etc/ssh/skysail_user_ca.pub": "",
        f"etc/sudoers.d/90-{recipe.user}": f"{recipe.user} ALL=(ALL) NOPASSWD:ALL\n",
        # Loaded before a template is saved: a clone's network card finds its driver in memory.
        "etc/modules-load.d/skysail.conf": "virtio_net\nvirtio_scsi\nsd_mod\n",
        "etc/resolv.conf": "",
        "usr/lib/skysail/personalise.py": (GUEST / "personalise.py").read_text(),
        "usr/lib/systemd/system/skysail-personalise.service": (GUEST / "skysail-personalise.service").read_text(),
        "usr/lib/systemd/system/skysail-host-key.service": (GUEST / "skysail-host-key.service").read_text(),
        "usr/lib/systemd/system/skysail-identity.service": (GUEST / "skysail-identity.service").read_text(),
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
    # They start some programs at each login, to say what `uname` says.
    for script in (tree / "etc/update-motd.d").glob("*"):
        script.chmod(0o644)
    (tree / f"etc/sudoers.d/90-{recipe.user}").chmod(0o440)
    if f"\n{recipe.user}:" not in (tree / "etc/passwd").read_text():
        run(["useradd", f"--root={tree}", "--create-home", "--shell=/bin/bash", "--groups=sudo,adm", recipe.user])
    units = ("systemd-networkd.service", "ssh.service", "serial-getty@ttyS0.service", "skysail-host-key.service",
             "skysail-identity.service")
    run(["systemctl", f"--root={tree}", "enable", *units])
    # A template boots without a network card, and waiting for one would hold its boot for ever.
    run(["systemctl", f"--root={tree}", "mask", "systemd-networkd-wait-online.service"])


def furnish_app(recipe: Recipe, tree: Path) -> None:
    """Put an application's files in place, prepare it, and take out what each instance makes for itself.

    Nothing of it starts with the system: see apps/application. Raises :class:`SkysailError` with what its script said.
    """
    if recipe.folder is None:
        return
    secrets = (*recipe.secrets, "/etc/ssl/certs/ssl-cert-snakeoil.pem")
    files = {path.relative_to(recipe.folder / "tree"): path for path in (recipe.folder / "tree").rglob("*") if path.is_file()}
    part = Path("usr/lib/skysail/app")
    files |= {part / name: recipe.folder / name for name in ("prepare", "first-boot") if (recipe.folder / name).is_file()}
    files |= {Path("usr/lib/skysail/application"): APPS / "application",
              Path("usr/lib/systemd/system/skysail-application.service"): APPS / "skysail-application.service"}
    files |= {Path(f"etc/systemd/system/{unit}.d/skysail.conf"): APPS / "unit.conf" for unit in recipe.units}
    for name, source in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tree / name)
        (tree / name).chmod(0o755 if source.read_bytes().startswith(b"#!") else 0o644)
    for told, lines in (("units", recipe.units), ("secrets", secrets), ("pages", tuple(recipe.pages))):
        (tree / part / told).write_text("".join(f"{line}\n" for line in lines))
    run(["systemctl", f"--root={tree}", "enable", "skysail-application.service", *recipe.units])
    if (tree / part / "prepare").is_file():
        try:
            run([*_ALONE, *_INSIDE, str(tree)], timeout=PREPARE_SECONDS)
        except ProcessFailed as failed:
            raise SkysailError(f"{recipe.blueprint} could not be prepared: "
                               f"{failed.stderr.strip() or failed.what}") from failed
        (tree / part / "prepare").unlink()
    for secret in secrets:
        (tree / secret.lstrip("/")).unlink(missing_ok=True)


def packages(tree: Path) -> tuple[tuple[str, str, str], ...]:
    """Every installed package as (name, version, architecture)."""
    told = run(["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "-W", "-f", "${Package} ${Version} ${Architecture}\n"])
    rows = (line.split() for line in told.decode().splitlines())
    return tuple((row[0], row[1], row[2]) for row in rows)


def release(recipe: Recipe, tree: Path, installed: tuple[tuple[str, str, str], ...]) -> str:
    """The version that a blueprint shows, such as "12.12", or "1.22.1" of an application's package."""
    if not recipe.versioned_by:
        return (tree / "etc/debian_version").read_text().strip()
    whole = next(version for name, version, _ in installed if name == recipe.versioned_by)
    return (whole.rpartition(":")[2].rpartition("-")[0] or whole).partition("+")[0]


def build(recipe: Recipe, library: Library, progress: Callable[[str], None] = lambda step: None,
          tree: Path | None = None) -> Manifest:
    """Build ``recipe`` into ``library``; with ``tree``, from packages already installed there.

    A build that fails or is killed leaves no image, and its scratch goes at the latest with the next one. Raises
    :class:`SkysailError`.
    """
    said = f"{recipe.blueprint}: {{}}".format
    with library.workplace() as work:
        if shutil.disk_usage(work).free < NEEDED_BYTES:
            raise SkysailError(f"{library.directory} has less than {NEEDED_BYTES >> 30} GiB free", "free some space there")
        if tree is None:
            tree = work / "tree"
            progress(said(f"installing Debian packages ({recipe.suite})"))
            bootstrap(recipe, tree)
        progress(said("putting Skysail's own files in"))
        indexes, installed, root_uuid = archives(tree), packages(tree), str(uuid.uuid4())
        furnish(recipe, tree, root_uuid)
        furnish_app(recipe, tree)
        progress(said("writing the disk"))
        disk.write_disk(tree, work / "disk.raw", recipe.size_mib, root_uuid)
        progress(said("compressing the disk"))
        out = work / "disk.qcow2"
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd",
             str(work / "disk.raw"), str(out)])
        made = Manifest(digest=file_digest(out), blueprint=recipe.blueprint, name=recipe.name, group=recipe.group,
                        version=release(recipe, tree, installed), user=recipe.user, size_bytes=recipe.size_mib << 20,
                        built=time.time(), recipe=fingerprint(recipe), packages=installed, archives=indexes)
        library.add(out, made)
    return made


if __name__ == "__main__":
    shelf = Library(Path(sys.argv[2]))
    ready = build(RECIPES[sys.argv[1]], shelf, print, Path(sys.argv[3]) if len(sys.argv) > 3 else None)
    print(shelf.path(ready.digest))
