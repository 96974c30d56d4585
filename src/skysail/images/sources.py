"""Where Debian packages come from: the machine's own apt configuration, moved to another suite."""

from __future__ import annotations

from pathlib import Path

from skysail.kit.errors import SkysailError

COMPONENTS = ("-updates", "-security", "-backports")


def _plain(suite: str) -> str:
    for tail in COMPONENTS:
        suite = suite.removesuffix(tail)
    return suite


def entries(apt: Path = Path("/etc/apt")) -> list[tuple[str, str]]:
    """Every (address, suite) of type ``deb`` this machine uses, deb822 and one-line, in file order."""
    found: list[tuple[str, str]] = []
    parts = apt / "sources.list.d"
    for path in [apt / "sources.list", *sorted(parts.glob("*.list"))]:
        for line in path.read_text().splitlines() if path.is_file() else []:
            words = line.split("#")[0].split()
            if words[:1] != ["deb"]:
                continue
            rest = words[1:]
            if rest and rest[0].startswith("["):
                while rest and not rest.pop(0).endswith("]"):
                    pass
            if len(rest) >= 2:
                found.append((rest[0], rest[1]))
    for path in sorted(parts.glob("*.sources")):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for stanza in "\n".join(lines).split("\n\n"):
            fields: dict[str, str] = {}
            for line in stanza.splitlines():
                key, colon, value = line.partition(":")
                if colon and not line[0].isspace():
                    fields[key.lower()] = value.strip()
            if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
                found += [(uri, suite) for uri in fields.get("uris", "").split()
                          for suite in fields.get("suites", "").split()]
    return found


def derive(suite: str, apt: Path = Path("/etc/apt"), release: Path = Path("/etc/os-release")) -> list[str]:
    """One-line sources for ``suite`` with updates, security and backports.

    Raises :class:`SkysailError` when the machine has no Debian archive configured.
    """
    own = next((line.partition("=")[2].strip('"') for line in release.read_text().splitlines()
                if line.startswith("VERSION_CODENAME=")), "")
    archive, security = "", ""
    for uri, named in entries(apt):
        if _plain(named) not in (own, "stable"):
            continue
        if named.endswith("-security"):
            security = security or uri
        elif named == _plain(named):
            archive = archive or uri
    if not archive:
        raise SkysailError(f"this machine's apt configuration names no Debian archive for {own}")
    made = [f"deb {archive} {suite}{tail} main" for tail in ("", "-updates", "-backports")]
    return made + ([f"deb {security} {suite}-security main"] if security else [])
