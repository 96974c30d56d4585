"""Hostile input to every action of the service model, made from the model itself by hypothesis.

The controller runs in this process on a real SQLite file; its host is played by :meth:`Controller.settle`, so that what
was accepted also goes through document and workflow. ``--hostile N`` sets the number of requests (CI: a few hundred).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.model import Shape
from botocore.parsers import create_parser
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

import stores
from skysail.api.protocol import TARGET, service_model
from skysail.contract.document import HostDocument
from skysail.contract.report import DiskReport, GuestReport, HostReport, ImageReport, SnapshotReport, ZoneReport
from skysail.hosts import desired
from skysail.hosts.watch import write_report
from skysail.kit.clock import SystemClock
from skysail.kit.config import load
from skysail.operations.engine import Engine
from skysail.resources import domains, lifecycle
from skysail.serve.controller import HOST, WORKFLOWS, action_table, admin_credentials, build, initialise
from skysail.store.database import Database
from skysail.store.schema import key_pairs, names, operations
from skysail.store.vault import Vault

MODEL = service_model()
PARSER = create_parser("json")
PUBLIC = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2m8aRUjlgguGgM0SKcCUSWRFEGlsgghemMG8sJNa1f desk"
REGIONS = ("us-east-1", "eu-west-2")
# What a value may be by the name of its member (the end of it, in lower case): things that exist, or could.
REAL = {"instancename": ["web-1", "web-2"], "instancenames": ["new-1", "new.2", "web-1"], "blueprintid": ["debian_12"],
        "bundleid": ["nano_3_0", "micro_1_0", "nano_ipv6_3_0"],
        "availabilityzone": ["us-east-1a", "us-east-1b", "eu-west-2a"],
        "cidrs": ["192.0.2.0/24"],
        "keypairname": ["laptop", "desk", "LightsailDefaultKeyPair"],
        "resourcename": ["web-1", "web-2", "laptop", "example.com"],
        "publickeybase64": [PUBLIC], "ipv6cidrs": ["2001:db8::/32"], "cidrlistaliases": ["lightsail-connect"],
        "domainname": ["example.com", "www.example.com"], "target": ["192.0.2.1", "web-1", "10 mail.example.com", '"text"'],
        "type": ["A", "CNAME", "MX", "TXT"], "name": ["example.com", "www.example.com", "a.example.com"],
        "tagkeys": ["stage"], "pagetoken": ["d2ViLTE=", "bGFwdG9w"], "customimagename": [""]}
KNOWN = sorted({word for words in REAL.values() for word in words} | {"us-east-1", "tcp", "host-1"})
NASTY = ["", " ", "\x00", "a\x00b", "\ufeff", "\u202e", "💣" * 40, "é", "a" * 256, "a" * 9000, "-ab", "a/b", "a.b", "..",
         "'; DROP TABLE instances; --", "%s%n", "${jndi:x}", "<script>", "\r\nX: y", "\ud7ff", "null", "0", "-1",
         "bmFtZQ==", "_w==", "2024-01-01", "9" * 400]
NUMBERS = [0, 1, -1, 22, 65535, 65536, 2**31 - 1, 2**31, -(2**31) - 1, 2**53, 2**63, 2**64, 10**40, -(10**40), 0.5, -0.0,
           1e308, 1e-320]


class Controller:
    """The real controller's application, called in this process."""

    def __init__(self, folder: Path) -> None:
        (folder / "skysail.toml").write_text(f'{stores.setting()}engines = "sim"\npublic_pool = "198.18.0.0/16"\n'
                                             'peer_subnets = ["192.0.2.0/24"]\n'
                                             '[regions]\n"us-east-1" = ["a", "b"]\n"eu-west-2" = ["a"]\n')
        self.config = load(str(folder))
        initialise(self.config)
        self.held = admin_credentials(self.config)
        self.clock = SystemClock()
        self.vault = Vault.at(self.config.master_key)
        self.database = Database.of(self.config)
        self.engine = Engine(self.database, WORKFLOWS, self.clock)
        self.loop = asyncio.Runner()
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(build(self.config), raise_app_exceptions=True),
                                      base_url="http://sky")
        key = Credentials(self.held["access_key_id"], self.held["secret_access_key"])
        self.signers = {region: SigV4Auth(key, "lightsail", region) for region in REGIONS}
        self.settle()
        self.restock()
        with self.database.transaction(write=False) as connection:
            found = [*connection.execute(select(operations.c.id).limit(3)).scalars()]
            prints = [*connection.execute(select(key_pairs.c.fingerprint)).scalars()]
            identifiers = [*connection.execute(select(names.c.resource_id).limit(3)).scalars()]
        self.known = [*KNOWN, *found, *prints, *identifiers, self.held["account_id"]]
        self.real = {**REAL, "operationid": found, "expectedfingerprint": prints}

    def ask(self, action: str, body: bytes, region: str = "us-east-1") -> httpx.Response:
        """One signed call."""
        request = AWSRequest("POST", "http://sky/", data=body, headers={
            "X-Amz-Target": TARGET + action, "Content-Type": "application/x-amz-json-1.1"})
        self.signers[region].add_auth(request)
        return self.loop.run(self.http.post("/", content=body, headers=dict(request.headers.items())))

    def must(self, action: str, **params: Any) -> None:
        answer = self.ask(action, json.dumps(params).encode())
        assert answer.status_code == 200, answer.text

    def restock(self) -> None:
        """What requests deleted is there again, running."""
        held = json.loads(self.ask("GetActiveNames", b"{}").content)["activeNames"]
        if not json.loads(self.ask("GetDomains", b"{}").content)["domains"]:
            self.must("CreateDomain", domainName="example.com")
        for gone in {"laptop"} - {*held}:
            self.must("CreateKeyPair", keyPairName=gone)
        for gone in sorted({"web-1", "web-2"} - {*held}):
            self.must("CreateInstances", instanceNames=[gone], availabilityZone="us-east-1a", blueprintId="debian_12",
                      bundleId="nano_3_0", tags=[{"key": "stage"}])
        found = json.loads(self.ask("GetInstances", b"{}").content)["instances"]
        for extra in {"new-1", "new.2"} & {instance["name"] for instance in found}:
            self.must("DeleteInstance", instanceName=extra)
        self.settle()

    def settle(self) -> None:
        """What a host does: take the document as it comes over the wire, do all of it, report; then the workflows run."""
        with self.database.transaction() as connection:
            sent = msgspec.json.encode(desired.compile(connection, HOST, self.vault))
            document = msgspec.json.decode(sent, type=HostDocument)
            state = {"run": "running", "stop": "stopped", "gone": "gone"}
            write_report(connection, HOST, HostReport(
                host=HOST, boot="b", sequence=1, generation=document.generation, networked=document.generation, vcpus=4096,
                memory_mib=2**24, disk_gib=2**20, accelerator="sim",
                images=(ImageReport(digest="0" * 64, blueprint="debian_12", name="Debian", user="admin", version="12",
                                    size_gib=2, templated=True),),
                guests=tuple(GuestReport(id=guest.id, state=state[guest.role], starts=guest.starts,
                                         reboots=guest.reboots, disks=tuple(disk.volume.id for disk in guest.disks),
                                         metadata_options=guest.metadata.options if guest.metadata else None,
                                         public_addresses=guest.port.public_addresses)
                             for guest in document.guests),
                disks=tuple(DiskReport(id=disk.id, state="gone" if disk.role == "gone" else "available")
                            for disk in document.disks),
                snapshots=tuple(SnapshotReport(id=one.id, state="gone" if one.role == "gone" else "available", progress=100,
                                               consistency="frozen") for one in document.snapshots),
                zones=tuple(ZoneReport(id=zone.id, name=zone.name, serial=zone.serial,
                                       state="gone" if zone.role == "gone" else "served") for zone in document.zones)),
                         self.clock.now())
        self.engine.drive()
        with self.database.transaction() as connection:
            lifecycle.follow(connection, self.clock.now())
            domains.follow(connection)
            assert connection.execute(select(operations.c.id).where(operations.c.done.is_(False))).all() == []

    def close(self) -> None:
        self.loop.run(self.http.aclose())
        self.loop.close()
        self.database.close()


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controller]:
    made = Controller(tmp_path_factory.mktemp("hostile"))
    yield made
    made.close()


def anything() -> st.SearchStrategy[Any]:
    """Any JSON value, deep ones too."""
    leaves = (st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(NASTY) | st.text(max_size=8)
              | st.integers(2, 200).map(nested))
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"portInfo": value}
    return value


class Maker:
    """Values for shapes. A ``tidy`` one makes what the model takes and the cloud holds; otherwise anything slips in."""

    def __init__(self, known: list[str], real: dict[str, list[str]], tidy: bool) -> None:
        self.known, self.real, self.tidy = known, real, tidy

    def good(self, shape: Shape, name: str, depth: int) -> st.SearchStrategy[Any]:
        kind = shape.type_name
        if kind == "structure":
            return self.structure(shape, depth)
        if kind == "list":
            return st.lists(self.member(shape.member, name, depth + 1), min_size=1, max_size=3, unique_by=repr)
        if kind == "map":
            return st.dictionaries(st.sampled_from([*self.known, *NASTY]), self.member(shape.value, "", depth + 1),
                                   max_size=2)
        if kind == "boolean":
            return st.booleans()
        if kind in ("integer", "long"):
            return st.sampled_from([80, 443]) if self.tidy else st.integers(-1, 100) | st.sampled_from([22, 80, 65535])
        if kind in ("timestamp", "double", "float"):
            return st.floats(0, 2e9, allow_nan=False) | st.just("2024-01-01T00:00:00Z")
        choices = getattr(shape, "enum", None) or self.real.get(name.lower()) or self.known
        return st.sampled_from(list(choices))

    def member(self, shape: Shape, name: str, depth: int) -> st.SearchStrategy[Any]:
        if self.tidy:
            return self.good(shape, name, depth)
        wrong = anything()
        if shape.type_name == "string":
            wrong |= st.sampled_from(NASTY) | st.text(max_size=300)
        elif shape.type_name in ("integer", "long", "timestamp", "double"):
            wrong |= st.sampled_from(NUMBERS)
        return st.integers(0, 7).flatmap(lambda roll: self.good(shape, name, depth) if roll else wrong)

    def structure(self, shape: Shape, depth: int) -> st.SearchStrategy[dict[str, Any]]:
        """The required members nearly always, the others sometimes, strangers now and then."""
        if depth > 6:
            return st.just({})
        fields = {name: self.member(inner, name, depth + 1) for name, inner in shape.members.items()}
        always = {name: strategy for name, strategy in fields.items()
                  if name in shape.required_members or (self.tidy and shape.name == "PortInfo" and "idr" not in name)}
        often = st.fixed_dictionaries(always, optional={n: s for n, s in fields.items() if n not in always})
        if self.tidy:
            return often
        fewer = st.fixed_dictionaries({}, optional=fields)
        stranger = st.dictionaries(st.sampled_from(["__proto__", "InstanceName", "", "x" * 5000, "💣"]), anything(),
                                   max_size=2)
        return st.integers(0, 11).flatmap(lambda roll: (often if roll > 1 else fewer) if roll else
                                          st.tuples(often, stranger).map(lambda both: {**both[1], **both[0]}))


@st.composite
def calls(draw: st.DrawFn, known: list[str], real: dict[str, list[str]], offered: list[str]) -> tuple[str, bytes]:
    """An action and a body for it; every action of the model comes, the offered ones more often."""
    action = draw(st.sampled_from(sorted(MODEL.operation_names)) | st.sampled_from(offered) | st.sampled_from(offered))
    shape = MODEL.operation_model(action).input_shape
    maker = Maker(known, real, tidy=draw(st.integers(0, 2)) == 0)
    value = draw(maker.structure(shape, 0) if maker.tidy or draw(st.integers(0, 20)) else anything())
    body = json.dumps(value, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if not maker.tidy and draw(st.integers(0, 30)) == 0:  # cut, doubled, or with a byte of its own
        place = draw(st.integers(0, len(body)))
        body = draw(st.sampled_from([body[:place], body + body, body[:place] + b"\xff" + body[place:], b"", b"\x00"]))
    return action, body


def conforms(shape: Shape, value: Any, where: str) -> None:
    """Stricter than a client: each member known to the model, of its type and, where the model lists them, its words."""
    kind = shape.type_name
    if kind == "structure":
        assert isinstance(value, dict) and value.keys() <= shape.members.keys(), (where, value)
        for name, item in value.items():
            conforms(shape.members[name], item, f"{where}.{name}")
    elif kind == "list":
        assert isinstance(value, list), (where, value)
        for item in value:
            conforms(shape.member, item, where)
    elif kind == "boolean":
        assert isinstance(value, bool), (where, value)
    elif kind in ("integer", "long"):
        assert isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63, (where, value)
    elif kind in ("timestamp", "double", "float"):
        assert isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value), (where, value)
    elif kind == "string":
        assert isinstance(value, str), (where, value)
        # What Lightsail itself answers though its model does not list it: operation types such as CreateKeyPair, "public" in
        # lower case, the region "global" (AWS CLI reference, examples of create-key-pair, get-instance and get-domain).
        choices = getattr(shape, "enum", None) if shape.name not in ("OperationType", "PortAccessType") else None
        if shape.name == "RegionName" and value == "global":
            return
        assert not choices or value in choices, (where, value)


def judge(action: str, answer: httpx.Response) -> None:
    """An answer is the model's output, or Lightsail's error envelope with a client's error."""
    assert answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/x-amz-json-1.1" and answer.headers["x-amzn-requestid"]
    content = json.loads(answer.content)
    if answer.status_code == 200:
        shape = MODEL.operation_model(action).output_shape
        conforms(shape, content, action)
        PARSER.parse({"status_code": 200, "headers": dict(answer.headers), "body": answer.content}, shape)
        return
    assert content["__type"] == content["code"] and content["code"].endswith("Exception"), content
    assert content["message"] and len(content["message"]) < 2000 and "Traceback" not in content["message"], content
    parsed = PARSER.parse({"status_code": answer.status_code, "headers": dict(answer.headers), "body": answer.content},
                          None)
    assert parsed["Error"]["Code"] == content["code"]


def test_no_input_breaks_the_controller(controller: Controller, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--hostile")
    offered = sorted(action_table(controller.config, controller.clock, Vault(bytes(32))))

    # Requests change the store, so an input found bad is not always bad alone: nothing is shrunk, it is shown as it is.
    @settings(max_examples=count, deadline=None, database=None, derandomize=count < 1000, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(calls(controller.known, controller.real, offered), st.sampled_from(["us-east-1", *REGIONS]))
    def hostile(call: tuple[str, bytes], region: str) -> None:
        action, body = call
        answer = controller.ask(action, body, region)
        judge(action, answer)
        if answer.status_code == 200 and not action.startswith("Get"):
            controller.settle()
            if action in ("CreateInstances", "DeleteInstance", "DeleteKeyPair", "DeleteDomain"):
                controller.restock()

    hostile()
    controller.must("GetInstances")
    controller.must("GetOperations")


@pytest.mark.parametrize("action", sorted(MODEL.operation_names))
def test_every_action_answers_the_same_few_bodies(controller: Controller, action: str) -> None:
    shape = MODEL.operation_model(action).input_shape
    for body in (b"", b"{}", b"null", b"[]", b"1", b'"x"', b"{", b"\xff", b'{"a":' * 3000, b"[" * 200_000,
                 json.dumps(dict.fromkeys(shape.members)).encode(), json.dumps(dict.fromkeys(shape.members, 7)).encode(),
                 json.dumps(dict.fromkeys(shape.members, "web-1\ud800")).encode(),
                 *(json.dumps(dict.fromkeys(shape.members, deep)).encode() for deep in ([[["x"]]], {"x": {"y": None}}))):
        judge(action, controller.ask(action, body))
