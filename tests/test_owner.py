"""Root does not open the controller's store as root: its verbs take on the user whom the store belongs to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import skysail
import stores
from clouds import Cloud, eventually, running_cloud
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.kit.owner import as_owner
from skysail.kit.process import started_at
from skysail.store.visit import visit

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="taking on another user needs root"),
              pytest.mark.skipif(stores.POSTGRESQL, reason="PostgreSQL asks for the name of a user, which this one has not")]
# A user that this machine does not know: the store's folder alone says who.
UID, GID = 2_999_998, 2_999_997
ZONE = "$ORIGIN owner.test.\n$TTL 60\n@ IN SOA ns1.owner.test. a.owner.test. 1 60 60 60 60\nwww IN A 192.0.2.1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)
    made = tmp_path / "theirs"
    made.mkdir()
    os.chown(made, UID, GID)
    return made


def test_the_call_has_the_owners_rights_and_no_way_back(folder: Path) -> None:
    def who() -> list[str]:
        with pytest.raises(PermissionError):
            os.setuid(0)
        (folder / "file").write_text("")
        lines = Path("/proc/self/status").read_text().splitlines()
        return [line.partition("\t")[2] for line in lines if line.startswith(("Uid", "Gid", "Groups", "CapEff", "CapPrm",
                                                                              "NoNewPrivs"))]

    uid, gid, groups, permitted, effective, new_privileges = as_owner(folder, who, list[str])
    assert set(uid.split()) == {str(UID)}
    assert set(gid.split()) == {str(GID)}
    assert not groups.strip()
    assert int(permitted, 16) == int(effective, 16) == 0
    assert new_privileges == "1"
    assert (folder / "file").stat().st_uid == UID
    assert os.geteuid() == 0


def test_what_is_raised_comes_back_in_its_words(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused() -> int:
        raise SkysailError("this does not go", "do that")

    with pytest.raises(SkysailError, match="this does not go") as failed:
        as_owner(folder, refused, int)
    assert failed.value.cure == "do that"
    with pytest.raises(SkysailError, match="ZeroDivisionError"):
        as_owner(folder, lambda: 1 // 0, int)
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(SkysailError, match="ended with status -9"):
        as_owner(folder, lambda: os.kill(os.getpid(), 9), type(None))


def test_a_long_answer_is_whole_and_no_process_is_left(folder: Path) -> None:
    assert as_owner(folder, lambda: ["x" * 1000] * 5000, list[str]) == ["x" * 1000] * 5000
    pid = as_owner(folder, os.getpid, int)
    assert pid != os.getpid()
    assert started_at(pid) is None


def test_without_a_cloud_the_verb_says_so(tmp_path: Path) -> None:
    with pytest.raises(SkysailError, match="there is no cloud"):
        visit(Config(data=str(tmp_path)), lambda connection: 1, int)


@pytest.fixture
def handed_over() -> Iterator[Cloud]:
    """A cloud with an instance, whose controller was stopped and whose store is another user's."""
    with running_cloud() as cloud:
        client = cloud.client()
        eventually(lambda: client.get_blueprints()["blueprints"], 30, "a blueprint is ready")
        client.create_instances(instanceNames=["one"], availabilityZone="us-east-1a", blueprintId="debian_12",
                                bundleId="nano_3_0")
        eventually(lambda: client.get_instance(instanceName="one")["instance"]["state"]["name"] == "running")
        cloud.processes["controller"].terminate()
        cloud.processes["controller"].wait()
        cloud.folder.chmod(0o755)
        for path in (cloud.config.master_key.parent, *cloud.config.master_key.parent.rglob("*")):
            os.chown(path, UID, GID)
        cloud.config.master_key.parent.chmod(0o700)
        os.chown(cloud.config.agent_socket, -1, GID)
        yield cloud


@pytest.fixture
def verb(handed_over: Cloud, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``skysail WORDS``, from a checkout that nobody but root can read."""
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(skysail.__file__).parent, checkout / "skysail", ignore=shutil.ignore_patterns("__pycache__"))
    checkout.chmod(0o700)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "skysail.cli.main", *words], capture_output=True, text=True, cwd="/",
                              env={"PATH": os.environ["PATH"], "SKYSAIL_DATA": str(handed_over.folder),
                                   "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}, check=False)
    return run


def test_each_verb_leaves_the_store_to_its_owner(
        handed_over: Cloud, verb: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    cloud, store = handed_over, handed_over.config.master_key.parent

    def said(*words: str) -> str:
        done = verb(*words)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        assert [path for path in (store, *store.rglob("*")) if path.stat().st_uid != UID] == [], words
        return done.stdout

    (guest,) = [guest["id"] for guest in json.loads((cloud.folder / "agent" / "document.json").read_text())["guests"]]
    serial = cloud.config.guests_dir / guest / "run" / "serial.log"
    serial.parent.mkdir(parents=True)
    serial.write_text("login:")
    serial.chmod(0o600)
    (tmp_path / "zone").write_text(ZONE)
    assert said("logs", "one") == "login:"
    assert json.loads(said("search", "one", "--json"))[0]["name"] == "one"
    assert said("verify") == "rows and machine agree\n"
    assert json.loads(said("usage", "--json")) == []
    assert json.loads(said("snapshots", "list", "--json")) == []
    made = json.loads(said("keys", "create"))["accessKeyId"]
    said("keys", "revoke", made)
    assert {key["id"]: bool(key["revoked"]) for key in json.loads(said("keys", "list", "--json"))}[made]
    cloud.stop()
    cloud.config.agent_socket.unlink(missing_ok=True)  # nobody waits for a zone to be served then
    assert "owner.test: 1 entries" in said("zones", "import", str(tmp_path / "zone"), "--name", "owner.test")
    assert "192.0.2.1" in said("zones", "export", "owner.test")
    assert " DS " in said("zones", "dnssec", "owner.test")
    assert json.loads(said("zones", "list", "--json"))[0]["name"] == "owner.test"
    assert "is not signed" in said("zones", "dnssec", "owner.test", "--off")


def test_no_verb_reads_the_store_with_roots_rights(
        handed_over: Cloud, verb: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """What its owner may not read, root still may."""
    handed_over.config.sqlite_file.chmod(0)
    (tmp_path / "zone").write_text(ZONE)
    for words in (("logs", "one"), ("search", "one"), ("verify",), ("usage",), ("snapshots", "list"), ("keys", "create"),
                  ("keys", "revoke", "AKIAX"), ("keys", "list"), ("zones", "list"), ("zones", "export", "owner.test"),
                  ("zones", "dnssec", "owner.test"), ("zones", "dnssec", "owner.test", "--off"),
                  ("zones", "import", str(tmp_path / "zone"), "--name", "owner.test")):
        done = verb(*words)
        assert done.returncode == 1, words
        assert "unable to open database file" in done.stderr, (words, done.stderr)
