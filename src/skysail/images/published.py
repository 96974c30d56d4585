"""Images that others publish: where each lies, where its checksum does, and whom its instances are logged in to as.

Nothing of these is taken on trust but the publisher's own list of checksums, fetched over TLS from where the publisher keeps
it. An operator who names a mirror trusts its list instead.
"""

from __future__ import annotations

import fnmatch
import re
from urllib.parse import urljoin, urlsplit

import httpx
import msgspec

from skysail.images.foreign import Blueprint, Origin
from skysail.kit.errors import SkysailError

MAX_SUMS_BYTES = 4 << 20


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """One image: ``file``, a pattern of which the last match of the list of checksums ``sums`` is taken, in ``folder``.

    ``agent``: whether the image carries the QEMU guest agent, by which a snapshot freezes its file systems. ``why_not`` says
    of a blueprint that Lightsail has why nothing can be fetched for it.
    """

    blueprint: str
    name: str
    version: str = ""
    user: str = ""
    folder: str = ""
    file: str = ""
    sums: str = ""
    agent: bool = False
    why_not: str = ""


PUBLISHED = {one.blueprint: one for one in (
    Published(
        blueprint="ubuntu_22_04", name="Ubuntu", version="22.04", user="ubuntu", sums="SHA256SUMS",
        folder="https://cloud-images.ubuntu.com/releases/jammy/release/", file="ubuntu-22.04-server-cloudimg-amd64.img"),
    Published(
        blueprint="ubuntu_24_04", name="Ubuntu", version="24.04", user="ubuntu", sums="SHA256SUMS",
        folder="https://cloud-images.ubuntu.com/releases/noble/release/", file="ubuntu-24.04-server-cloudimg-amd64.img"),
    Published(
        blueprint="almalinux_9", name="AlmaLinux", version="9", user="almalinux", sums="CHECKSUM", agent=True,
        folder="https://repo.almalinux.org/almalinux/9/cloud/x86_64/images/",
        file="AlmaLinux-9-GenericCloud-latest.x86_64.qcow2"),
    Published(
        blueprint="centos_stream_9", name="CentOS Stream", version="9", user="cloud-user", agent=True,
        sums="CentOS-Stream-GenericCloud-9-latest.x86_64.qcow2.SHA256SUM",
        folder="https://cloud.centos.org/centos/9-stream/x86_64/images/",
        file="CentOS-Stream-GenericCloud-9-latest.x86_64.qcow2"),
    Published(
        blueprint="amazon_linux_2023", name="Amazon Linux 2023", version="2023", user="ec2-user", sums="SHA256SUMS",
        folder="https://cdn.amazonlinux.com/al2023/os-images/latest/kvm/", file="al2023-kvm-*-x86_64.xfs.gpt.qcow2"),
    Published(
        blueprint="freebsd_14", name="FreeBSD", version="14.3", user="freebsd", sums="CHECKSUM.SHA256",
        folder="https://download.freebsd.org/releases/VM-IMAGES/14.3-RELEASE/amd64/Latest/",
        file="FreeBSD-14.3-RELEASE-amd64-BASIC-CLOUDINIT-ufs.qcow2.xz"),
    Published(
        blueprint="gitlab", name="GitLab CE",
        why_not="GitLab publishes packages and no disk image; launch ubuntu_24_04 with a launch script that installs them"),
    Published(
        blueprint="magento", name="Magento",
        why_not="Adobe publishes it through Composer, behind keys of one's own, and no disk image; start from lamp"),
    Published(
        blueprint="mean", name="MEAN",
        why_not="MongoDB is not in Debian and nobody publishes a disk image of the four; start from nodejs"),
)}


def find(blueprint: str) -> Published:
    """The published image for ``blueprint``; raises :class:`SkysailError` when there is none to fetch."""
    found = PUBLISHED.get(blueprint)
    fetchable = sorted(one.blueprint for one in PUBLISHED.values() if one.file)
    if found is None:
        raise SkysailError(f"nobody is known to publish {blueprint}", f"one of: {', '.join(fetchable)}; or name a file or an "
                           "address, with --sha256 and --blueprint")
    if found.why_not:
        raise SkysailError(f"there is no image of {found.name} to fetch: {found.why_not}", f"one of: {', '.join(fetchable)}")
    return found


def resolve(image: Published, mirror: str = "") -> tuple[Origin, Blueprint]:
    """What to take in, and as what: the address of the image and the checksum that its publisher shows now.

    With ``mirror``, an http(s) address, both come from there instead of from the publisher's folder. Raises
    :class:`SkysailError` when the list cannot be fetched or does not name the image.
    """
    folder = (mirror.rstrip("/") + "/") if mirror else image.folder
    if urlsplit(folder).scheme not in ("http", "https"):
        raise SkysailError(f"{mirror} is no http(s) address")
    address = urljoin(folder, image.sums)
    try:
        with httpx.stream("GET", address, follow_redirects=True, timeout=30.0) as answer:
            answer.raise_for_status()
            if folder.startswith("https:") and answer.url.scheme != "https":
                raise SkysailError(f"{address} leads to {answer.url}, where anybody on the way could change it")
            text = b""
            for piece in answer.iter_bytes():
                text += piece
                if len(text) > MAX_SUMS_BYTES:
                    raise SkysailError(f"{address} is no list of checksums: it is larger than {MAX_SUMS_BYTES >> 20} MiB")
            # Where a folder named "latest" led to: the image must come from the same one as its checksum.
            folder = urljoin(str(answer.url), ".")
    except (httpx.HTTPError, httpx.InvalidURL) as failed:
        raise SkysailError(f"{address} could not be fetched: {failed or type(failed).__name__}",
                           "does this machine reach it? With --mirror another address is asked") from failed
    named = {name: digest for name, digest in checksums(text.decode(errors="replace")).items()
             if fnmatch.fnmatchcase(name, image.file)}
    if not named:
        raise SkysailError(f"{address} names no {image.file}", "the publisher may have moved it; take it by its address, "
                           "with --sha256 and --blueprint")
    name = max(named)
    return (Origin(source=urljoin(folder, name), sha256=named[name], format="qcow2"),
            Blueprint(id=image.blueprint, name=image.name, user=image.user, version=image.version))


def checksums(text: str) -> dict[str, str]:
    """The sha256 of each file that a list of checksums names, as coreutils or as BSD write it."""
    found = {}
    for line in text.splitlines():
        plain = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(\S+)", line.strip())
        tagged = re.fullmatch(r"SHA256 \((\S+)\) = ([0-9a-fA-F]{64})", line.strip())
        if plain:
            found[plain[2]] = plain[1].lower()
        elif tagged:
            found[tagged[1]] = tagged[2].lower()
    return found
