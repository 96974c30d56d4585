"""Trials: whether a guest moves from one version of QEMU to another with all that it has."""
