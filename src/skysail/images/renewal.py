"""Whether guests of an image take on another identity when their disk is copied.

Foreign ones do, by cloud-init. Of ours, those that were built before there were snapshots do not: a copy would start with the
keys and the addresses of its source. An image whose manifest does not say is looked into, once.
"""

from __future__ import annotations

import logging

from skysail.images.disk import ROOT_AT, SECTOR
from skysail.images.library import Library
from skysail.kit.errors import ProcessFailed
from skysail.kit.process import run

log = logging.getLogger(__name__)
UNIT = "/usr/lib/systemd/system/skysail-identity.service"


def renews(library: Library, digest: str) -> bool:
    """The answer for the image with this digest, which is here or was noted; one that nobody knows is given the benefit of
    the doubt. Takes some seconds the first time."""
    image = library.find(digest)
    if image is None:
        image = library.noted(digest)
        return image is None or image.renews is not False
    if not image.recipe or image.renews is not None:
        return image.renews is not False
    with library.workplace() as work:
        raw = work / "raw"
        try:
            run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(library.path(digest)), str(raw)])
            found = b"Inode:" in run(["debugfs", "-R", f"stat {UNIT}", f"{raw}?offset={ROOT_AT * SECTOR}"])
        except ProcessFailed as unable:
            log.warning("the image %s could not be looked into: %s", digest[:12], unable.what)
            return True
    library.learn(image, found)
    return found
