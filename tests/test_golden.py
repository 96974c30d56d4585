"""What is handed to QEMU and to the kernel, held still: command lines, rulesets and the network plan as files to read.

``--regenerate-golden`` writes them anew; the difference is then for a human to read.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import GOLDEN
from skysail.contract.document import FirewallRule, Network, Overlay, Port
from skysail.hypervisor import qemu
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.network import frr, nftables
from skysail.network.plan import BRIDGE, UPLINK, Layout, link_local, tap_name, vet_overlay
from skysail.storage.ceph import Cluster

Golden = Callable[[str, str], None]

LAYOUT = Layout.of(Config())
TEMPLATE = qemu.Machine(
    id="template-0123", accelerator="tcg", vcpus=1, memory_mib=512, folder="/data/templates/0123/run",
    disk=("/data/templates/0123/disk.qcow2", "/data/images/aa.qcow2"), memory="template", pluggable=True,
    generation_id="11111111-2222-3333-4444-555555555555", memory_file="/data/templates/0123/memory")
CLONE = msgspec.structs.replace(
    TEMPLATE, id="g-1", folder="/data/guests/g-1/run", memory="clone", incoming=True,
    disk=("/data/volumes/g-1.qcow2", *TEMPLATE.disk))
COLD = qemu.Machine(
    id="g-1", accelerator="tcg", vcpus=1, memory_mib=1024, folder="/data/guests/g-1/run", disk=CLONE.disk,
    generation_id=TEMPLATE.generation_id)
CEPH = Cluster(pool="disks", namespace="cloud", user="skysail", conf=Path("/etc/ceph/ceph.conf"),
               keyring=Path("/etc/ceph/ceph.client.skysail.keyring"))
MACHINES = {
    "template": TEMPLATE,
    "template_kvm_2_vcpus": msgspec.structs.replace(TEMPLATE, accelerator="kvm", vcpus=2),
    "clone": CLONE,
    "clone_kvm_2_vcpus": msgspec.structs.replace(CLONE, accelerator="kvm", vcpus=2),
    "clone_in_a_cluster": msgspec.structs.replace(
        CLONE, disk=(str(CEPH.file("g-1")),), key_file="/data/guests/g-1/run/ceph.key"),
    "cold": COLD,
    "cold_kvm_2_vcpus": msgspec.structs.replace(COLD, accelerator="kvm", vcpus=2),
    "cold_with_seed": msgspec.structs.replace(
        COLD, disk=("/data/volumes/g-1.qcow2", "/data/images/foreign.qcow2"), seed="/data/guests/g-1/seed.iso"),
    # As the clone was started on the host that it comes from, but for its memory, and its disk, which stands on nothing here.
    "arriving_clone": msgspec.structs.replace(
        CLONE, id="g-2", folder="/data/guests/g-2/run", memory="private", memory_file="", disk=("/data/volumes/g-2.qcow2",)),
}


@pytest.mark.parametrize("name", MACHINES)
def test_qemus_command_line(golden: Golden, name: str) -> None:
    words = qemu.argv(MACHINES[name])
    # An option and its value are one line.
    lines = [f"{word} {value}" if not value.startswith("-") else word
             for word, value in zip(words, [*words[1:], "-"], strict=True) if word.startswith("-")]
    assert " ".join(lines).split() == words, "every argument is in the file"
    golden(f"qemu/{name}.txt", "\n".join(lines) + "\n")


def test_no_guest_carries_a_network_card_or_a_probed_format() -> None:
    for machine in MACHINES.values():
        text = " ".join(qemu.argv(machine))
        assert "virtio-net" not in text and "-netdev" not in text
        assert text.count("driver=file") == text.count("driver=qcow2") + text.count("driver=raw") + text.count(
            '"driver":"qcow2"')
        assert f"memory-backend-file,id=ram,size={machine.memory_mib}M" in text or machine.memory == "private"
        assert ("share=on" in text) == (machine.memory == "template"), "only a template writes the memory that clones share"


def rule(protocol: str, first: int, last: int, *cidrs: str) -> FirewallRule:
    """Open to everybody, or to these blocks of either version."""
    if not cidrs:
        return FirewallRule(protocol=protocol, from_port=first, to_port=last)
    return FirewallRule(protocol=protocol, from_port=first, to_port=last, cidrs=tuple(one for one in cidrs if "." in one),
                        ipv6_cidrs=tuple(one for one in cidrs if ":" in one))


def port(number: int, network: int, *rules: FirewallRule, ipv6: bool = True, ipv4: bool = True) -> Port:
    return Port(id=f"g-{number}", mac=f"52:54:00:00:00:{number:02x}", network=network, private_ipv4=f"172.26.0.{number}",
                public_ipv4=f"100.115.93.{number}" if ipv4 else "", public_ipv6=f"fd53:6b79:7361::{number:x}" if ipv6 else "",
                firewall=rules)


DEFAULTS = (rule("tcp", 22, 22), rule("tcp", 80, 80))
PLANES = {
    "no_port": (),
    "one_port": (port(10, 1, *DEFAULTS),),
    "several_tenants": (port(10, 1, *DEFAULTS), port(11, 1, *DEFAULTS), port(12, 2, *DEFAULTS, rule("tcp", 443, 443)),
                        port(13, 3), port(14, 3, *DEFAULTS, ipv6=False), port(15, 3, *DEFAULTS, ipv4=False)),
    "every_protocol": (port(10, 1, rule("tcp", 0, 65535), rule("udp", 53, 53), rule("icmp", -1, -1)),
                       port(11, 1, rule("tcp", 1000, 2000), rule("tcp", 1500, 2500), rule("tcp", 2501, 2501)),
                       port(12, 2, rule("all", 0, 65535, "192.0.2.0/24", "198.51.100.7/32")),
                       port(13, 2, rule("all", 0, 65535)),
                       port(14, 2, rule("icmp", 8, 0), rule("icmp", 3, -1, "192.0.2.0/25", "192.0.2.128/25")),
                       port(15, 2, rule("icmpv6", -1, -1), rule("udp", 0, 65535, "192.0.2.1/32", "192.0.2.0/24")),
                       port(16, 2, rule("icmpv6", 128, 0, "2001:db8::/33", "2001:db8:8000::/33"),
                            rule("tcp", 22, 22, "192.0.2.7/32", "2001:db8::7/128"))),
}
LAYOUTS = {"default": LAYOUT, "public_prefix": msgspec.structs.replace(LAYOUT, public_ipv6="2001:db8:1::/64"),
           "ipv4_only": msgspec.structs.replace(LAYOUT, public_ipv6=""),
           "segment": msgspec.structs.replace(LAYOUT, segment="eth0"),
           "storage": msgspec.structs.replace(LAYOUT, storage_networks=("10.0.8.0/24", "10.0.9.1/32", "2001:db8:8::/64")),
           "peered": msgspec.structs.replace(LAYOUT, peer_subnets=("192.0.2.0/24", "198.51.100.0/25"))}


# Users that every Debian has, so that nft finds them.
SHARED = msgspec.structs.replace(LAYOUT, single_address="203.0.113.5", ingress_user="daemon", jump_user="nobody")
SHARING = tuple(msgspec.structs.replace(one, ssh_port=22000 + number) for number, one in enumerate(PLANES["several_tenants"]))


@pytest.mark.parametrize("name", PLANES)
def test_the_data_planes_ruleset(golden: Golden, name: str) -> None:
    golden(f"nftables/{name}.nft", nftables.data_plane(LAYOUT, PLANES[name]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_machines_ruleset(golden: Golden, name: str) -> None:
    golden(f"nftables/machine_{name}.nft", nftables.machine(LAYOUTS[name]))


def test_the_rulesets_of_a_single_address(golden: Golden) -> None:
    golden("nftables/shared.nft", nftables.data_plane(SHARED, SHARING))
    golden("nftables/machine_shared.nft", nftables.machine(SHARED, SHARING))
    with pytest.raises(SkysailError, match="SSH port 22000"):
        nftables.data_plane(SHARED, [msgspec.structs.replace(one, ssh_port=22000) for one in SHARING])


def test_without_a_prefix_no_ipv6_passes(golden: Golden) -> None:
    text = nftables.data_plane(LAYOUTS["ipv4_only"], PLANES["several_tenants"])
    golden("nftables/ipv4_only.nft", text)
    assert "fd53" not in text and "fe80" not in text and "ip6 saddr @" not in text


def test_peered_networks(golden: Golden) -> None:
    joined = (Network(number=1, peers=(3,), routed=True), Network(number=3, peers=(1,), routed=True))
    text = nftables.data_plane(LAYOUTS["peered"], PLANES["several_tenants"], joined)
    golden("nftables/peered.nft", text)
    assert "@peered" not in nftables.data_plane(LAYOUT, PLANES["several_tenants"], joined), "no subnets, nothing routed"


SPANNING = msgspec.structs.replace(LAYOUT, underlay="192.0.2.1", routers=(("192.0.2.254", 64513),))
NETWORKS = (Network(number=1, peers=(3,), vni=101), Network(number=3, peers=(1,), vni=103), Network(number=4, vni=104))
OVERLAY = Overlay(hosts=("192.0.2.2", "192.0.2.3"))


def test_networks_that_span_hosts(golden: Golden) -> None:
    ports = PLANES["several_tenants"]
    text = nftables.data_plane(SPANNING, ports, NETWORKS, spans=True)
    golden("nftables/spanning.nft", text)
    golden("nftables/machine_spanning.nft", nftables.machine(SPANNING, ports, OVERLAY))
    assert "out104" not in text, "nobody here is in it, or joined with it"
    assert nftables.data_plane(SPANNING, ports, NETWORKS).count("out1") == 0, "without other hosts they are here alone"


def test_a_guest_that_comes_or_leaves_changes_where_its_public_address_leads() -> None:
    ports = PLANES["several_tenants"]
    left = [msgspec.structs.replace(one, awaited=True) if one.id == "g-10" else one for one in ports]
    held, wanted = (nftables.data_plane(SPANNING, some, NETWORKS, spans=True) for some in (ports, left))
    assert in_force(held, nftables.moved(left[0])) == in_force(wanted)
    assert in_force(wanted, nftables.moved(ports[0])) == in_force(held)


SPEAKERS = [("mesh", "192.0.2.1", ()), ("client", "192.0.2.1", ("192.0.2.2", "192.0.2.9")),
            ("reflector", "192.0.2.1", ("192.0.2.1", "192.0.2.2"))]


@pytest.mark.parametrize(("name", "here", "reflectors"), SPEAKERS)
def test_what_frr_is_told(golden: Golden, name: str, here: str, reflectors: tuple[str, ...]) -> None:
    settings = frr.Settings.of(msgspec.structs.replace(SPANNING, underlay=here),
                               msgspec.structs.replace(OVERLAY, reflectors=reflectors))
    golden(f"frr/{name}.conf", frr.zebra(settings) + frr.bgpd(settings))


def test_hosts_that_come_and_go_are_all_that_a_running_bgpd_is_told() -> None:
    held = {"192.0.2.2": "hosts", "192.0.2.3": "hosts"}
    assert frr.changes(held, held) == []
    assert frr.changes(held, {"192.0.2.3": "clients", "192.0.2.4": "hosts"}) == [
        "no neighbor 192.0.2.2", "no neighbor 192.0.2.3", "neighbor 192.0.2.3 peer-group clients",
        "neighbor 192.0.2.4 peer-group hosts"]


@pytest.mark.parametrize("wrong", [
    Overlay(hosts=("192.0.2.300",)), Overlay(hosts=("192.0.2.2; drop",)), Overlay(reflectors=("host-2",)),
    Overlay(vni=101), Overlay(autonomous_system=0)])
def test_an_overlay_that_cannot_be_is_refused(wrong: Overlay) -> None:
    with pytest.raises(SkysailError):
        vet_overlay(wrong, NETWORKS)


def test_the_order_of_ports_and_rules_does_not_change_the_ruleset() -> None:
    for ports in PLANES.values():
        turned = [msgspec.structs.replace(one, firewall=tuple(reversed(one.firewall))) for one in reversed(ports)]
        assert nftables.data_plane(LAYOUT, turned) == nftables.data_plane(LAYOUT, ports)


@pytest.mark.parametrize("wrong", [
    {"mac": "52:54:00:00:00:zz"}, {"mac": '52:54:00:00:00:01" accept'}, {"private_ipv4": "172.26.0.300"},
    {"public_ipv4": "10.0.0.1; drop"}, {"network": 0}, {"network": 2**32}, {"firewall": (rule("gre", 0, 0),)},
    {"mac": "52:54:00:00:00:0b"}, {"private_ipv4": "172.26.0.11"}, {"public_ipv4": "100.115.93.11"},
    {"public_ipv6": "100.115.93.10"}, {"public_ipv6": "fd53::1 } drop"}, {"public_ipv6": "fd53:6b79:7361::b"}])
def test_a_port_that_cannot_be_written_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SkysailError):
        nftables.data_plane(LAYOUT, [msgspec.structs.replace(port(10, 1), **wrong), port(11, 1)])


def in_force(*texts: str) -> list[str]:
    """What the kernel has when these are loaded one after the other, in no order, without its numbers."""
    script = 'for text; do printf %s "$text" | nft -f -; done; nft -j list ruleset'
    done = subprocess.run(["unshare", "--net", "sh", "-ec", script, "sh", *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def plain(item: dict[str, Any]) -> dict[str, Any]:
        (kind, value), = item.items()
        value = {key: found for key, found in value.items() if key != "handle"}
        if isinstance(value.get("elem"), list):
            value["elem"] = sorted(value["elem"], key=json.dumps)
        return {kind: value}

    return sorted(json.dumps(plain(item)) for item in json.loads(done.stdout)["nftables"])


@pytest.mark.real
@pytest.mark.parametrize("layout", [LAYOUT, LAYOUTS["ipv4_only"], SHARED], ids=["default", "ipv4_only", "shared"])
@pytest.mark.parametrize(("before", "after"), [
    ((DEFAULTS, DEFAULTS), (DEFAULTS, (*DEFAULTS, rule("tcp", 443, 443)))),
    ((DEFAULTS, (rule("tcp", 443, 443),)), (DEFAULTS, DEFAULTS)),
    ((DEFAULTS, DEFAULTS), ((), ())),
    (((), (rule("all", 0, 65535),)), ((rule("udp", 53, 53, "192.0.2.0/24", "2001:db8::/32"),), ())),
    ((DEFAULTS, (rule("icmp", 8, 0),)), ((rule("icmp", 8, 0),), (rule("icmpv6", 128, 0),))),
])
def test_a_change_of_firewalls_leads_to_what_the_whole_ruleset_says(
        layout: Layout, before: tuple[tuple[FirewallRule, ...], ...], after: tuple[tuple[FirewallRule, ...], ...]) -> None:
    former, wanted = ([port(10 + number, 1, *rules) for number, rules in enumerate((*some, DEFAULTS))]
                      for some in (before, after))
    change = nftables.firewall_changes(layout, former, wanted)
    assert change is not None
    assert in_force(nftables.data_plane(layout, former), change) == in_force(nftables.data_plane(layout, wanted))
    assert nftables.firewall_changes(layout, former, former) == ""


def test_more_than_firewalls_is_no_change_of_firewalls() -> None:
    ports = [port(10, 1, *DEFAULTS), port(11, 1)]
    for other in (ports[:1], [*ports, port(12, 1)], [], [ports[0], msgspec.structs.replace(ports[1], network=2)],
                  [ports[0], msgspec.structs.replace(ports[1], public_ipv4="100.115.93.99")]):
        assert nftables.firewall_changes(LAYOUT, ports, other) is None


@pytest.mark.real
@pytest.mark.parametrize("path", sorted((GOLDEN / "nftables").glob("*.nft")), ids=lambda path: path.stem)
def test_the_kernel_takes_the_ruleset(path: Path) -> None:
    done = subprocess.run(["unshare", "--net", "nft", "--check", "-f", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_network_plan(golden: Golden) -> None:
    layouts = {"default": LAYOUT, "small": Layout(
        namespace="test-1", link="test1", transit="192.0.2.4/30", private_network="10.1.2.0/24",
        public_pool="198.51.100.0/25")}
    derived = ("namespace", "link", "transit", "transit_prefix", "machine_address", "namespace_address", "private_network",
               "private_prefix", "gateway", "gateway_mac", "public_pool", "public_ipv6", "masquerades_ipv6")
    routed = ("namespace_ipv6", "machine_ipv6")  # of a prefix
    lines = [f"{name}.{key} = {getattr(layout, key)}" for name, layout in layouts.items()
             for key in (*derived, *(routed if layout.public_ipv6 else ()))]
    lines += [f"{name}.machine_table = {nftables.machine_table(layout)}" for name, layout in layouts.items()]
    lines += [f"bridge = {BRIDGE}", f"uplink = {UPLINK}",
              f"link_local(52:54:00:00:00:0a) = {link_local('52:54:00:00:00:0a')}"]
    lines += [f"tap_name({identifier}) = {tap_name(identifier)}" for identifier in ("g-1", "g-2", "g" * 64)]
    assert all(len(tap_name(identifier)) <= 15 for identifier in ("g", "g" * 64)), "IFNAMSIZ, with its end"
    golden("plan.txt", "\n".join(lines) + "\n")


def test_every_golden_file_is_held() -> None:
    """A file that no test compares any more is dead weight that looks like proof."""
    held = {*(f"qemu/{name}.txt" for name in MACHINES), *(f"nftables/{name}.nft" for name in PLANES),
            *(f"nftables/machine_{name}.nft" for name in LAYOUTS), "nftables/ipv4_only.nft", "nftables/peered.nft",
            "nftables/shared.nft", "nftables/machine_shared.nft", "nftables/spanning.nft", "nftables/machine_spanning.nft",
            *(f"frr/{name}.conf" for name, *_ in SPEAKERS), "plan.txt"}
    assert {str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*") if path.is_file()} == held
