"""Burst: the account of a guest's processor credits, in processor seconds.

A guest earns its baseline all the time that it runs, spends what it uses, and keeps at most what it earns in 24 hours.
Source: Amazon Lightsail user guide, "Viewing instance burst capacity"; EC2 user guide, "Key concepts for burstable
performance instances", also for what a new one begins with (30 minutes of each processor).
"""

from __future__ import annotations

KEPT_SECONDS = 24 * 3600.0
LAUNCH_SECONDS = 30 * 60.0
WHOLE_PERCENT = 100.0


def capacity(baseline_percent: float, vcpus: int) -> float:
    """The most that is kept."""
    return baseline_percent / 100 * vcpus * KEPT_SECONDS


def settle(balance: float | None, baseline_percent: float, vcpus: int, seconds: float, used: float) -> float | None:
    """The balance after ``seconds`` in which ``used`` processor seconds were burnt; None for a plan without a baseline.

    It goes below zero when a sample finds more burnt than there was: that is earned back before it counts as capacity again.
    """
    if baseline_percent >= WHOLE_PERCENT:
        return None
    most = capacity(baseline_percent, vcpus)
    held = min(LAUNCH_SECONDS * vcpus, most) if balance is None else balance
    return min(most, held + baseline_percent / 100 * vcpus * seconds - used)


def spent(balance: float) -> bool:
    """Whether a guest with this balance is held to its baseline."""
    return balance <= 0
