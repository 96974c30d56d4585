"""What controller and agent say to each other: one document down, reports up. Frozen, versioned, no behaviour."""

# 2: large zones come in parts.
VERSION = 2
