"""QEMUs other than the one that is installed: in a folder that somebody made, or out of Debian's packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from skysail.hypervisor.accelerator import Accelerator
from skysail.hypervisor.process import PROGRAM
from skysail.hypervisor.trial.matrix import Program, short
from skysail.kit.errors import ProcessFailed, SkysailError
from skysail.kit.process import run

_PACKAGES = ("qemu-system-x86", "qemu-system-common")
_DEBIAN = re.compile(r"\(Debian (.+)\)$")
_VERSION = re.compile(r"\d+(\.\d+)*")
FETCH_SECONDS = 600.0


def find(word: str, accelerator: Accelerator, folders: Iterable[str], cache: Path) -> Program:
    """The QEMU that ``word`` says: a folder with the program, a version as hosts tell it, or the beginning of one (``7.2``).
    A version is looked for among the machine's own program, those in ``folders`` and those that were fetched before into
    ``cache``, then in the packages that this machine's apt knows. Raises SkysailError."""
    if "/" in word:
        if not (Path(word) / PROGRAM).exists():
            raise SkysailError(f"there is no {PROGRAM} in {word}")
        return Program.at(str(Path(word) / PROGRAM), accelerator)
    paths = [path for path in (shutil.which(PROGRAM), *(str(Path(one) / PROGRAM) for one in folders),
                               *map(str, sorted(cache.glob(f"*/{PROGRAM}")))) if path and Path(path).exists()]
    for path in dict.fromkeys(paths):
        try:
            program = Program.at(path, accelerator)
        except SkysailError:
            continue
        if _is(program.offer.qemu, word):
            return program
    package = _package(word)
    if not package:
        raise SkysailError(f"no QEMU {word} is here, and apt knows none",
                           "name a folder that has it (--qemu /opt/qemu/bin), or add the sources of the Debian that has it")
    program = Program.at(str(_fetched(package, cache)), accelerator)
    if not _is(program.offer.qemu, word):
        raise SkysailError(f"the package {package} has QEMU {program.offer.qemu}, not {word}")
    return program


def _is(version: str, word: str) -> bool:
    return version == word or (bool(_VERSION.fullmatch(word)) and f"{short(version)}.".startswith(f"{word}."))


def _package(word: str) -> str:
    """The version of Debian's package that has it, the newest of several; '' where apt knows none."""
    exact = _DEBIAN.search(word)
    if not exact and not _VERSION.fullmatch(word):
        return ""
    told = run(["apt-cache", "madison", _PACKAGES[0]]).decode()
    known = [line.split("|")[1].strip() for line in told.splitlines() if line.count("|") >= 2 and "Sources" not in line]
    if exact:
        return next((one for one in known if one == exact[1]), "")
    fitting = [one for one in known if f"{re.split('[+-]', one.rpartition(':')[2])[0]}.".startswith(f"{word}.")]
    return fitting[0] if fitting else ""


def _fetched(package: str, cache: Path) -> Path:
    """The program of this version of Debian's package, beside the installed one. Its data, firmware above all, are the
    machine's own, and it needs the libraries of its Debian. Raises SkysailError."""
    folder = cache / re.sub(r"[^0-9A-Za-z.+~-]", "_", package)
    program = folder / PROGRAM
    if program.exists():
        return program
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sky", dir=cache) as work:
        # What apt says of its sandbox's user, which cannot write here, is no failure.
        got = subprocess.run(["apt-get", "download", "-q", *(f"{name}={package}" for name in _PACKAGES)], cwd=work,
                             capture_output=True, timeout=FETCH_SECONDS, check=False)
        archives = sorted(Path(work).glob("*.deb"))
        if len(archives) != len(_PACKAGES):
            raise SkysailError(f"QEMU {package} could not be fetched: {got.stderr.decode(errors='replace').strip()[-300:]}",
                               "see that the machine reaches its Debian mirror: apt-get update")
        made = Path(work) / "made"
        for archive in archives:
            run(["dpkg-deb", "-x", str(archive), str(made)])
        modules = next(made.glob("usr/lib/*/qemu")).relative_to(made)
        (made / PROGRAM).write_text(f"#!/bin/sh\nQEMU_MODULE_DIR={folder / modules} exec {folder}/usr/bin/{PROGRAM} "
                                    "-L /usr/share/qemu -L /usr/share/seabios \"$@\"\n")
        (made / PROGRAM).chmod(0o755)
        made.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    try:
        run([str(program), "--version"], timeout=60)
    except ProcessFailed as failed:
        raise SkysailError(f"QEMU {package} does not run on this machine: {failed.what}",
                           "try them on a machine of the Debian that it is of") from failed
    return program
