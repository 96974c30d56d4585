"""Every benchmark runs by the launcher's verb, small, and ends with the JSON that it promises."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# The launcher remakes an environment that is not as its lock says: none but its own is given into its hands.
pytestmark = pytest.mark.skipif("SKYSAIL_VENV" not in os.environ, reason="run by ./skysail test")


def bench(*words: str) -> dict[str, Any]:
    """The JSON in the last line of ``./skysail bench`` with these words."""
    done = subprocess.run([ROOT / "skysail", "bench", *words, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert figures["bench"] == words[0]
    assert figures["ratio"] > 0
    return figures


def test_an_unknown_benchmark_is_refused_with_the_names_of_those_there_are() -> None:
    done = subprocess.run([ROOT / "skysail", "bench", "../skysail"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "address api density dns firewall fleet launch" in done.stderr


def test_api() -> None:
    figures = bench("api", "--instances", "25", "--clients", "2", "--seconds", "1", "--rounds", "1")
    for peer in ("skysail", "moto"):
        assert figures[peer]["instances_per_request"] == 25
        assert 0 < figures[peer]["request_median_ms"] <= figures[peer]["request_p99_ms"]
        assert figures[peer]["requests_per_second"] > 0


def test_fleet() -> None:
    figures = bench("fleet", "--hosts", "2", "4", "--per-host", "3", "--seconds", "1", "--launches", "4")
    assert (figures["hosts"], figures["instances"]) == (4, 12)
    assert [size["hosts"] for size in figures["sizes"]] == [2, 4]
    for kind in ("get", "list", "launch"):
        assert 0 < figures[f"{kind}_p50_ms"] <= figures[f"{kind}_p99_ms"]
    assert figures["launches_per_s"] > 0 and figures["memory_mib"] > 0
    assert 0 < figures["restart_answers_seconds"] <= figures["restart_settled_seconds"]
    # Each of the ten launches that a killed controller left makes one document new at the most.
    assert figures["restart_documents"] <= 10


@pytest.mark.real
@pytest.mark.long
def test_launch() -> None:
    figures = bench("launch", "--launches", "1", "--boots", "1", "--together", "2")
    assert figures["ratio"] == figures["plain_seconds"] / figures["launch_seconds"]
    assert figures["ratio_without_cloud_init"] == figures["plain_without_cloud_init_seconds"] / figures["launch_seconds"]
    assert list(figures["stages"]["host"].values()) == sorted(figures["stages"]["host"].values())
    assert 0 < figures["agent_answer_seconds"] < figures["alone"]["seconds"]
    assert figures["together"]["instances"] == 2
    assert figures["together"]["bound_by"]
    assert all(seconds > 0 for seconds in figures["together"]["cpu_seconds_per_launch"].values())


@pytest.mark.long
@pytest.mark.real
def test_density() -> None:
    figures = bench("density", "--clones", "2", "--idle", "1")
    assert 0 < figures["private_mib"] < figures["cold"]["private"]
    assert figures["shared_mib"] > 0


@pytest.mark.real
def test_firewall() -> None:
    figures = bench("firewall", "--instances", "20", "--changes", "3")
    assert figures["instances"] == 20
    assert 0 < figures["skysail"]["median_ms"] <= figures["skysail"]["max_ms"]


@pytest.mark.real
def test_dns() -> None:
    figures = bench("dns", "--changes", "20", "--clients", "2", "--single", "2", "--entries", "50", "--rounds", "1")
    for peer in ("skysail", "powerdns"):
        assert figures[peer]["changes_per_second"] > 0
        assert 0 < figures[peer]["seen_median_ms"] <= figures[peer]["seen_max_ms"]
        assert figures[peer]["large_zone_ms"] > 0


@pytest.mark.real
def test_address() -> None:
    figures = bench("address", "--moves", "2", "--instances", "6", "--others", "3")
    assert figures["broken"] == 0
    assert 0 < figures["skysail"]["gap_ms_median"] <= figures["gap_ms_max"]
    assert figures["iproute2"]["asked"] > 0


@pytest.mark.real
@pytest.mark.long
def test_snapshot() -> None:
    figures = bench("snapshot", "--gib", "1", "--written", "0.2", "--snapshots", "1", "--restores", "1")
    (taken,) = figures["by_gib"].values()
    assert 0 < taken["freeze_ms"] == figures["freeze_ms_max"]
    assert 0 < taken["guest_stall_ms"] == figures["guest_stall_ms_max"]
    assert taken["freeze_ms"] < 1000 * taken["snapshot_seconds"]
    assert (taken["disk_gib"], taken["written_gib"]) == (8, 0.2)
    assert figures["ratio"] == figures["plain_seconds"] / figures["restore_seconds"]


@pytest.mark.real
@pytest.mark.long
def test_migrate() -> None:
    figures = bench("migrate", "-n", "1")
    for who in ("skysail", "plain"):
        for condition in ("idle", "dirtying", "serving"):
            assert figures[who][condition]["moves"] == 1
            assert 0 < figures[who][condition]["pause_ms_median"] <= figures[who][condition]["pause_ms_p99"]
            assert figures[who][condition]["mib_median"] > 0
        assert figures[who]["serving"]["requests"] > 0
    assert figures["lost_connections"] == 0
    assert 0 < figures["pause_ms_median"] <= figures["pause_ms_p99"]
    assert figures["outside_ms_p99"] > 0
