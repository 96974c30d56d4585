"""What a plan gives of a processor for good; the document carries it to the host.

Source: Amazon Lightsail user guide, "Baseline CPU performance of Lightsail instances" (percent of each vCPU).
"""

from __future__ import annotations

BASELINE_PERCENT = {"nano": 5.0, "micro": 10.0, "small": 20.0, "medium": 20.0, "large": 30.0, "xlarge": 40.0, "2xlarge": 40.0,
                    "4xlarge": 40.0}


def baseline_percent(bundle_id: str | None) -> float:
    """The baseline of a bundle such as ``nano_3_0``; whole processors for one that is not known, and for none."""
    return BASELINE_PERCENT.get((bundle_id or "").partition("_")[0], 100.0)
