"""Skysail: a VPS cloud that you own, speaking the Lightsail API over real QEMU guests."""

__version__ = "0.1.0"
