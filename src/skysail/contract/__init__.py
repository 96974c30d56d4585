"""What controller and agent say to each other: one document down, reports up. Frozen, versioned.

A fleet is upgraded host by host, so each side also speaks the version before its own and the one behind it: what is new in a
version is added, and what it does not know a side leaves out. Sides that are further apart refuse each other.
"""

# 2: large zones come in parts. 3: hosts tell their facts.
VERSION = 3


def common(theirs: int, ours: int = VERSION) -> int | None:
    """The version that two sides speak with each other, the older of theirs; None when they are too far apart."""
    return min(ours, theirs) if abs(ours - theirs) <= 1 else None
