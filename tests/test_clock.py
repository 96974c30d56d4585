"""The clock that controllers on several machines have in common."""

from __future__ import annotations

import time

import pytest

from skysail.kit.clock import SharedClock


def test_it_goes_by_what_was_read_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    clock = SharedClock()
    clock.agree(time.time() + 0.1)
    assert abs(clock.now() - time.time()) < 0.05, "a small difference is left alone"
    clock.agree(time.time() - 300.0)
    assert abs(clock.now() - (time.time() - 300.0)) < 5.0
    assert "300.0 s away" in caplog.text
    clock.agree(time.time())
    assert abs(clock.now() - time.time()) < 0.5
