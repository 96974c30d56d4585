"""The fixtures: clouds of one's own (see clouds.py), and what a failed test leaves behind.

``cloud`` has a simulated host. ``real_cloud`` (one for all tests of a run) and ``own_real_cloud`` (one for one test) run
QEMU guests. A test that fails leaves its evidence in ``evidence/``: logs, serial logs, documents, rulesets, a copy of the
database.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import ceph_clusters
import stores
from ceph_clusters import CephCluster
from clouds import Cloud, RealCloud, running_cloud, running_real_cloud

EVIDENCE = Path(__file__).parent.parent / "evidence"
GOLDEN = Path(__file__).parent / "golden"
# What a busy machine makes slow is not wrong.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile", type=int, default=300, help="how many hostile requests tests/test_hostile.py makes")
    parser.addoption("--long", action="store_true", help="run the tests too that take many minutes of emulated guests each")
    parser.addoption("--regenerate-golden", action="store_true",
                     help="write the files in tests/golden anew instead of comparing with them; read the difference")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files go first, so that side by side with the others nothing waits for them at the end: those whose tests ask
    for more time than others, then those that run guests."""
    def rank(path: Path) -> int:
        return 0 if path in marked["timeout"] else 1 if path in marked["real"] else 2

    marked = {name: {item.path for item in items if item.get_closest_marker(name)} for name in ("timeout", "real")}
    items.sort(key=lambda item: rank(item.path))
    part = os.environ.get("SKYSAIL_TEST_PART", "")
    if part or stores.POSTGRESQL:
        kept = [item for item in items if not part or bool(item.get_closest_marker("real")) == (part == "real")]
        if stores.POSTGRESQL:
            # The rest does not know where rows are: it would do the very same once more. So would real guests, whose rows
            # are those of simulated ones.
            kept = [item for item in kept if _keeps_rows(item) and not item.get_closest_marker("real")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


def _keeps_rows(item: pytest.Item) -> bool:
    """Whether its module has to do with rows: it knows a cloud, or a database."""
    return bool({"Cloud", "running_cloud", "stores", "Database"} & vars(item.getparent(pytest.Module).obj).keys())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    with _nothing_collected() if call.excinfo else nullcontext():
        outcome: Any = yield
    if outcome.get_result().failed:
        for used in getattr(item, "funcargs", {}).values():
            if isinstance(used, Cloud):
                keep_evidence(used, EVIDENCE / item.name.replace("/", "_"))


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """While pytest parses a failed test's source. Python 3.11.2 (Debian 12) keeps one recursion depth for whatever it parses:
    a collection in the middle whose finalizer logs a traceback parses, too, and pytest ends the whole run with "AST
    constructor recursion depth mismatch" (https://github.com/pytest-dev/pytest/issues/10763)."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keep_evidence(cloud: Cloud, target: Path) -> None:
    """What a failed test leaves: everything of the cloud's folder that is text or rows, and the rules in force."""
    shutil.rmtree(target, ignore_errors=True)
    for path in cloud.folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix in (".log", ".json", ".sqlite", ".sqlite-wal", ".toml"):
            kept = target / path.relative_to(cloud.folder)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
    for name, argv in {"rules": ["nft", "list", "ruleset"], "links": ["ip", "-d", "address"]}.items():
        for where, inside in {"machine": [], "namespace": ["ip", "netns", "exec", cloud.config.namespace]}.items():
            done = subprocess.run([*inside, *argv], capture_output=True, check=False)
            (target / f"{name}-{where}.txt").write_bytes(done.stdout + done.stderr)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Holds a text to the file of that name in tests/golden. A change of it shows up as a difference that somebody reads."""
    def hold(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--regenerate-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} does not exist: run pytest --regenerate-golden, and read what it wrote"
        assert text.splitlines() == path.read_text().splitlines(), f"differs from {path}"
    return hold


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    """A running cloud whose host is simulated: the real agent with engines that hold no guests."""
    with running_cloud() as made:
        yield made


@pytest.fixture(scope="session")
def real_cloud() -> Iterator[RealCloud]:
    """The run's shared cloud of real guests; a test deletes what it launched."""
    yield from _real_cloud()


@pytest.fixture
def own_real_cloud() -> Iterator[RealCloud]:
    """A cloud of real guests for one test, which may break it."""
    yield from _real_cloud()


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephCluster]:
    """A tiny Ceph cluster, its store in memory; each test takes a namespace of its own."""
    reason = ceph_clusters.missing()
    if reason:
        pytest.skip(f"no Ceph cluster can be started here: {reason}")
    with ceph_clusters.running_cluster() as made:
        yield made


def _real_cloud() -> Iterator[RealCloud]:
    if os.geteuid() != 0:
        pytest.skip("real guests need root")
    with running_real_cloud() as made:
        yield made
