"""Which host takes a guest: facts in, choice and reasons out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert

import stores
from skysail.contract.facts import HostFacts
from skysail.hosts.placement import (
    RESERVED_MEMORY_MIB,
    SILENT_SECONDS,
    Candidate,
    Need,
    NoHost,
    choose,
    choose_several,
    judge,
)
from skysail.kit.config import Config
from skysail.resources import placing
from skysail.store.schema import accounts, guests, host_zones, hosts, images

NEED = Need(zone="us-east-1a", blueprint="debian_12", vcpus=2, memory_mib=512, disk_gib=20)


def host(name: str = "h", **more: Any) -> Candidate:
    held: dict[str, Any] = {
        "zones": frozenset({"us-east-1a"}), "vcpus": 4, "promisable_vcpus": 80, "memory_mib": 8192, "disk_gib": 400,
        "images": {"debian_12": 2}, "accelerator": "kvm", "cpu_models": frozenset({"Westmere", "Nehalem"}),
        "machine_types": frozenset({"pc-q35-7.2"})}
    return Candidate(id=name, **held | more)


@pytest.mark.parametrize(("more", "reason"), [
    ({"cordoned": True}, "is cordoned"),
    ({"refused": "too old"}, "is not spoken with (too old)"),
    ({"silent_seconds": SILENT_SECONDS + 1}, "has not answered for 301 s"),
    ({"zones": frozenset({"us-east-1b"})}, "does not serve the zone us-east-1a"),
    ({"images": {}}, "does not hold an image of debian_12"),
    ({"images": {"debian_12": 21}}, "has an image of debian_12 that needs a disk of 21 GiB"),
    ({"vcpus": 1}, "has 1 of the 2 processors"),
    ({"promised_vcpus": 79}, "may promise 1 of the 2 processors"),
    ({"promised_vcpus": 99}, "may promise 0 of the 2 processors"),
    ({"promised_mib": 8192 - RESERVED_MEMORY_MIB - 511}, "has 511 of the 512 MiB of memory free"),
    ({"promised_gib": 381}, "may promise 19 of the 20 GiB of disk"),
])
def test_what_speaks_against_a_host_is_said(more: dict[str, Any], reason: str) -> None:
    (verdict,) = judge([host(**more)], NEED)
    assert verdict.refusals == (reason,)
    with pytest.raises(NoHost) as none:
        choose([host(**more)], NEED)
    assert str(none.value) == f"h {reason}"
    assert choose([host("a", **more), host("b", memory_mib=4096)], NEED) == "b"


def test_all_of_it_is_said() -> None:
    (verdict,) = judge([host(cordoned=True, vcpus=1, images={})], NEED)
    assert verdict.refusals == ("is cordoned", "does not hold an image of debian_12", "has 1 of the 2 processors")
    with pytest.raises(NoHost, match="no host has reported yet"):
        choose([], NEED)


def test_to_the_last_byte_it_fits() -> None:
    full = host(promised_vcpus=78, promised_mib=8192 - RESERVED_MEMORY_MIB - 512, promised_gib=380)
    assert choose([full], NEED) == "h"


def test_a_guest_that_has_disks_goes_where_they_are_seen() -> None:
    pooled, filed = host("pooled", pool="ceph:a/p"), host("filed")
    assert [one.refusals for one in judge([pooled, filed], NEED)] == [(), ()], "one that has none yet goes anywhere"
    for pool, taken, words in (("ceph:a/p", "pooled", "has disks in files of its own, and these are in ceph:a/p"),
                               ("", "filed", "has disks in ceph:a/p, and these are in files of its own")):
        first, second = judge([pooled, filed], replace(NEED, pool=pool))
        assert (first.host, first.refusals, second.refusals) == (taken, (), (words,))


def test_a_pool_is_full_for_all_that_see_it() -> None:
    found = [host(name, pool=pool, promised_gib=361) for name, pool in (("a", "p"), ("b", "p"), ("c", "q"))]
    with pytest.raises(NoHost):
        choose_several(found[:2], NEED, 2)
    assert sorted(choose_several(found, NEED, 2)) == ["a", "c"]


def test_a_guest_that_runs_goes_where_its_processor_and_its_machine_are() -> None:
    moving = Need(zone="us-east-1a", blueprint="", vcpus=2, memory_mib=512, disk_gib=20, accelerator="kvm",
                  cpu_model="Westmere", machine_type="pc-q35-7.2")
    assert choose([host(images={})], moving) == "h", "its disk comes along"
    reasons = {
        "runs guests by tcg, not kvm": host(accelerator="tcg"),
        "runs guests by it is not known what, not kvm": host(accelerator=""),
        "cannot give the processor Westmere": host(cpu_models=frozenset({"Nehalem"})),
        "has a QEMU without the machine type pc-q35-7.2": host(machine_types=frozenset({"pc-q35-10.0"})),
    }
    for reason, one in reasons.items():
        (verdict,) = judge([one], moving)
        assert verdict.refusals == (reason,)
        assert choose([one], NEED) == "h", "one that starts there gets what is there"


def test_an_owners_instances_are_spread_before_memory_is() -> None:
    large = host("large", memory_mib=1 << 20, of_owner=2)
    assert choose([large, host("small", of_owner=1)], NEED) == "small"
    assert choose([large, host("small", of_owner=2)], NEED) == "large"
    assert choose([host("b"), host("a")], NEED) == "a", "the same facts give the same answer"
    assert [one.host for one in judge([large, host("away", silent_seconds=2), host("bad", cordoned=True), host("small")],
                                      NEED)] == ["small", "large", "away", "bad"]


@given(st.lists(st.builds(
    host, st.uuids().map(str), of_owner=st.integers(0, 3), promised_mib=st.integers(0, 9000), cordoned=st.booleans(),
    promised_vcpus=st.integers(0, 90), promised_gib=st.integers(0, 420), silent_seconds=st.sampled_from([0, 1, 400])),
    unique_by=lambda one: one.id, max_size=8), st.randoms())
def test_the_chosen_host_has_room_whatever_the_others_are(found: list[Candidate], random: Any) -> None:
    shuffled = [*found]
    random.shuffle(shuffled)
    assert judge(shuffled, NEED) == judge(found, NEED), "their order says nothing"
    fits = [one for one in found if not one.cordoned and one.silent_seconds <= SILENT_SECONDS and one.free_mib >= 512
            and one.promised_vcpus <= 78 and one.promised_gib <= 380]
    try:
        chosen = choose(found, NEED)
    except NoHost:
        assert not fits
    else:
        (one,) = [one for one in fits if one.id == chosen]
        answering = [other for other in fits if not other.silent_seconds] or fits
        assert one.of_owner == min(other.of_owner for other in answering)


def test_the_rows_say_what_is_promised_and_to_whom(tmp_path: Path) -> None:
    database = stores.fresh(tmp_path)
    database.migrate()
    facts = HostFacts(
        host="b", program="0", kernel="6", qemu="10", accelerator="tcg", accelerator_seen="", cpu="c", cpu_flags=(),
        cpu_models=("qemu64",), machine_types=("pc-q35-7.2",), guest_cpu="qemu64", guest_machine="pc-q35-7.2")
    config = Config(data=str(tmp_path), cpu_overcommit=3.0, disk_overcommit=2.0)
    with database.transaction() as connection:
        for account in ("1", "2"):
            connection.execute(insert(accounts).values(id=account, name=account, created_at=0.0))
        for one, more in (("a", {"cordoned": True, "away_since": 70.0}), ("b", {"facts": msgspec.to_builtins(facts)}),
                          ("c", {"refused": "too new"})):
            connection.execute(insert(hosts).values(id=one, address=one, vcpus=4, memory_mib=8192, disk_gib=100,
                                                    accelerator="tcg", **more))
            connection.execute(insert(host_zones).values(host_id=one, region="us-east-1", zone="a"))
        held = (("1", "b", "run"), ("1", "b", "gone"), ("2", "b", "stop"), ("1", "a", "run"))
        for number, (owner, on, role) in enumerate(held):
            connection.execute(insert(guests).values(
                id=f"g-{number}", instance_id=f"i-{number}", instance_name="x", account_id=owner, host_id=on, role=role,
                vcpus=2, memory_mib=512, disk_gib=20, image="", mac=str(number), private_ipv4=str(number), personality={}))
        connection.execute(insert(images).values(host_id="b", digest="0" * 64, blueprint="debian_12", name="", user="",
                                                 version="1", size_gib=2))
        a, b, c = placing.candidates(connection, config, "1", now=100.0, bound=True)
        assert (a.cordoned, a.silent_seconds, a.of_owner) == (True, 30.0, 1)
        assert (b.promised_vcpus, b.promised_mib, b.promised_gib) == (6, 1536, 60), "until a guest is gone its room is taken"
        assert (b.promisable_vcpus, b.disk_gib, b.of_owner, dict(b.images)) == (12, 200, 1, {"debian_12": 2})
        assert b.zones == {"us-east-1a"} and b.cpu_models == {"qemu64"} and not b.silent_seconds
        assert c.refused == "too new" and c.promised_mib == 0
        _, without, _ = placing.candidates(connection, config, "1", now=100.0, without=["g-0"])
        assert (without.promised_vcpus, without.of_owner, without.cpu_models) == (4, 0, frozenset())
    database.close()
