"""The collector of garbage does not look again at what a long collection left."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from skysail.kit import garbage
garbage.settle()
settled, held = gc.get_freeze_count(), []
for _ in range(20):
    held += [[number] for number in range(100_000)]
    gc.collect()
circle = []
circle.append(circle)
del circle
print(gc.get_freeze_count() - settled > 1_000_000, gc.collect() >= 1)
"""


def test_what_stays_is_looked_at_once() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "True"], said
