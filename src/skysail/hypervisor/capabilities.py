"""What both QEMUs of a migration have to agree upon before it begins.

Source: QEMU docs/devel/migration (late-block-activate, return-path, multifd, postcopy-ram); QMP Reference Manual,
migrate-set-capabilities.
"""

from __future__ import annotations

from typing import Any

# All of them are named, on both sides: a process that was a clone has some set since it was loaded.
_USUAL = {"events": True, "return-path": True, "multifd": True, "pause-before-switchover": True, "auto-converge": True,
          "late-block-activate": True, "x-ignore-shared": False, "postcopy-ram": False}


def capabilities(post_copy: bool) -> dict[str, Any]:
    """In QMP's words. QEMU before 10.1 has no post-copy by several connections."""
    wanted = {**_USUAL, "postcopy-ram": post_copy, "multifd": not post_copy}
    return {"capabilities": [{"capability": name, "state": state} for name, state in wanted.items()]}
