"""What controller and agent say to each other: one document down, reports up. Frozen, versioned, no behaviour."""

VERSION = 1
