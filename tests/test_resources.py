"""The nouns without guests: catalogue, regions, names, tags, key pairs, accounts, pages; on a real SQLite file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from cryptography.hazmat.primitives import serialization
from sqlalchemy import Connection, insert

import stores
from skysail.kit.clock import HandClock
from skysail.kit.config import Config
from skysail.kit.errors import ApiError
from skysail.resources import accounts, catalog, names, paging, regions, tags
from skysail.resources.instances import Instances
from skysail.resources.key_pairs import DEFAULT_NAME, KeyPairs, public_key
from skysail.resources.regions import Regions
from skysail.resources.request import Request
from skysail.store.schema import hosts, images
from skysail.store.schema import tags as tag_rows
from skysail.store.vault import Vault

REGION = "us-east-1"


class Shop:
    """One account in a fresh store, and every action on it."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        self.connection = connection
        self.clock = HandClock()
        self.vault = Vault.at(folder / "master.key")
        self.account = accounts.create_account(connection, "first", self.clock.now())
        self.actions = {
            **catalog.Catalog().actions(), **Regions(Config(zones=("a", "b"))).actions(), **names.Names().actions(),
            **tags.Tags(Config(), self.clock).actions(), **KeyPairs(self.clock, self.vault).actions(),
            **Instances(Config(zones=("a", "b")), self.clock, self.vault).actions()}

    def request(self, action: str = "", account: str = "", region: str = REGION, **params: Any) -> Request:
        return Request(account or self.account, region, action, params)

    def __call__(self, action: str, account: str = "", region: str = REGION, **params: Any) -> dict[str, Any]:
        return self.actions[action](self.connection, self.request(action, account, region, **params))

    def refused(self, action: str, account: str = "", **params: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self(action, account, **params)
        return caught.value


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    database = stores.fresh(tmp_path)
    database.migrate()
    with database.transaction() as connection:
        yield Shop(connection, tmp_path)
    database.close()


def test_bundles_show_old_plans_only_when_asked(shop: Shop) -> None:
    active = shop("GetBundles")["bundles"]
    everything = shop("GetBundles", includeInactive=True)["bundles"]
    assert all(bundle["isActive"] for bundle in active)
    sizes = ("nano", "micro", "small", "medium", "large", "xlarge", "2xlarge", "4xlarge")
    assert {b["bundleId"] for b in active} == {f"{size}_{kind}3_0" for size in sizes for kind in ("", "ipv6_")}
    assert {b["bundleId"] for b in everything if not b["isActive"]} == {
        *(f"{size}_2_0" for size in sizes[:7]), *(f"{size}_1_0" for size in sizes[:5])}
    assert catalog.get_bundle("small_3_0")["ramSizeInGb"] == 2.0
    with pytest.raises(ApiError):
        catalog.get_bundle("huge_9_0")


def test_blueprints_are_active_once_a_host_has_the_image(shop: Shop) -> None:
    assert shop("GetBlueprints")["blueprints"] == []
    shop.connection.execute(insert(hosts).values(id="h", address="x"))
    regions.serve(shop.connection, "h", {REGION: ["a"]})
    shop.connection.execute(insert(images).values(
        host_id="h", digest="0" * 64, blueprint="debian_12", name="Debian", user="admin", version="12.1", size_gib=2))
    [one] = shop("GetBlueprints")["blueprints"]
    assert {name: one[name] for name in ("blueprintId", "name", "group", "type", "version", "platform", "isActive")} == {
        "blueprintId": "debian_12", "name": "Debian", "group": "debian_12", "type": "os", "version": "12.1",
        "platform": "LINUX_UNIX", "isActive": True}
    found = shop("GetBlueprints", includeInactive=True)["blueprints"]
    assert {b["blueprintId"]: b["isActive"] for b in found} == {name: name == "debian_12" for name in catalog.RECIPES}
    blog = next(b for b in found if b["blueprintId"] == "wordpress")
    assert (blog["name"], blog["type"], blog["minPower"], blog["version"]) == ("WordPress", "app", 0, "")
    assert blog["productUrl"] == "https://wordpress.org/" and blog["licenseUrl"] and blog["description"]


def test_a_bundle_without_the_power_for_an_application_is_refused(shop: Shop) -> None:
    shop.connection.execute(insert(hosts).values(id="h", address="x", vcpus=4, memory_mib=8192, disk_gib=10))
    regions.serve(shop.connection, "h", {REGION: ["a"]})
    shop.connection.execute(insert(images).values(
        host_id="h", digest="0" * 64, blueprint="redmine", name="Redmine", user="admin", version="5", size_gib=4))
    asked = {"instanceNames": ["tracker"], "availabilityZone": f"{REGION}a", "blueprintId": "redmine"}
    refused = shop.refused("CreateInstances", bundleId="nano_3_0", **asked)
    assert refused.what == ("The blueprint redmine needs a bundle with a power of 500 or more, the bundle nano_3_0 has 300.")
    assert refused.cure == "Choose micro_3_0 or a larger one."
    assert shop("CreateInstances", bundleId="micro_3_0", **asked)["operations"][0]["status"] == "Started"


def test_an_image_that_does_not_fit_the_bundles_disk_is_refused(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.connection.execute(insert(hosts).values(id="h", address="x", vcpus=4, memory_mib=8192, disk_gib=10))
    regions.serve(shop.connection, "h", {REGION: ["a"]})
    shop.connection.execute(insert(images).values(
        host_id="h", digest="0" * 64, blueprint="vast", name="Vast", user="admin", version="1", size_gib=21))
    asked = {"instanceNames": ["big"], "availabilityZone": f"{REGION}a", "blueprintId": "vast"}
    assert "needs a disk of 21 GB" in shop.refused("CreateInstances", bundleId="nano_3_0", **asked).what
    assert shop("CreateInstances", bundleId="micro_3_0", **asked)["operations"][0]["status"] == "Started"
    refused = shop.refused("CreateInstances", bundleId="micro_3_0", **asked | {"instanceNames": ["more"]})
    assert refused.what == f"The bundle micro_3_0 does not fit {REGION}a now.", "how full which host is, is not a customer's"
    assert "h may promise 0 of the 40 GiB of disk" in caplog.text, "four times its 10 GiB are promised"


def test_regions_give_zones_only_when_asked(shop: Shop) -> None:
    [plain] = shop("GetRegions")["regions"]
    [zoned] = shop("GetRegions", includeAvailabilityZones=True)["regions"]
    assert plain["name"] == REGION and plain["availabilityZones"] == []
    assert [zone["zoneName"] for zone in zoned["availabilityZones"]] == ["us-east-1a", "us-east-1b"]


def test_a_name_is_claimed_once_per_account_and_region(shop: Shop) -> None:
    other = accounts.create_account(shop.connection, "second", 0.0)
    names.claim(shop.connection, shop.request(), "web", "Instance", "1")
    with pytest.raises(ApiError, match="Some names are already in use: web"):
        names.claim(shop.connection, shop.request(), "web", "KeyPair", "2")
    names.claim(shop.connection, shop.request(account=other), "web", "Instance", "3")
    names.claim(shop.connection, shop.request(region="eu-west-1"), "web", "Instance", "4")
    assert shop("GetActiveNames")["activeNames"] == ["web"]
    names.release(shop.connection, shop.account, REGION, "web")
    assert shop("GetActiveNames")["activeNames"] == []
    names.claim(shop.connection, shop.request(), "web", "Instance", "5")


@pytest.mark.parametrize("name", ["ab", "a.b", "a_b-c", "9z", "a" * 255])
def test_good_names(shop: Shop, name: str) -> None:
    names.claim(shop.connection, shop.request(), name, "Instance", "1")


@pytest.mark.parametrize("name", ["", "a", "-ab", "ab-", "a b", "ab\n", "a/b", "ä1", "a" * 256])
def test_bad_names(shop: Shop, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        names.claim(shop.connection, shop.request(), name, "Instance", "1")
    assert caught.value.code == "InvalidInputException"


def test_pages_cover_every_row_once() -> None:
    rows = sorted(f"name-{number:04}" for number in range(250))
    seen: list[str] = []
    token: str | None = None
    sizes = []
    while True:
        found, token = paging.page(rows, token, key=str)
        seen += found
        sizes.append(len(found))
        if token is None:
            break
    assert seen == rows and sizes == [100, 100, 50]
    assert paging.page(rows[:100], None, key=str)[1] is None


@pytest.mark.parametrize("token", ["x", "\ud800", "!!!", "_w==", "W10=", "WzFd", "WyJhIiwiYiJd", "bnVsbA==",
                                   "WyJcdWQ4MDAiXQ=="])
def test_a_foreign_page_token_is_refused(token: str) -> None:
    with pytest.raises(ApiError) as caught:
        paging.page(["a1"], token, key=str)
    assert caught.value.code == "InvalidInputException"


def test_a_created_key_pair_logs_in_and_is_forgotten(shop: Shop) -> None:
    made = shop("CreateKeyPair", keyPairName="laptop", tags=[{"key": "team", "value": "red"}])
    private = serialization.load_pem_private_key(made["privateKeyBase64"].encode(), None)
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    assert made["publicKeyBase64"].split()[:2] == public.decode().split()[:2]
    der = private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8,
                                serialization.NoEncryption())
    assert made["keyPair"]["fingerprint"].replace(":", "") == hashlib.sha1(der).hexdigest()
    assert made["keyPair"]["arn"].startswith(f"arn:aws:lightsail:{REGION}:{shop.account}:KeyPair/")
    assert made["keyPair"]["location"] == {"availabilityZone": "all", "regionName": REGION}
    assert made["keyPair"]["tags"] == [{"key": "team", "value": "red"}]
    assert made["operation"]["status"] == "Succeeded" and made["operation"]["isTerminal"]
    assert shop("GetKeyPair", keyPairName="laptop")["keyPair"] == made["keyPair"]
    assert "already in use" in str(shop.refused("CreateKeyPair", keyPairName="laptop"))


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("algorithm", ["ssh-rsa", "ssh-ed25519"])
def test_import_takes_text_and_base64_of_it(shop: Shop, algorithm: str, encoded: bool) -> None:
    key = asyncssh.generate_private_key(algorithm, comment="me@home")
    text = key.export_public_key().decode()
    shop("ImportKeyPair", keyPairName="mine",
         publicKeyBase64=base64.b64encode(text.encode()).decode() if encoded else text)
    assert shop("GetKeyPair", keyPairName="mine")["keyPair"]["fingerprint"]


@pytest.mark.parametrize("text", ["", "ssh-rsa", "ssh-rsa AAAA", "not a key", "/w==", "\u2603",
                                  "ssh-ed25519 \u2603", "\ud800"])
def test_import_refuses_what_is_no_key(shop: Shop, text: str) -> None:
    assert shop.refused("ImportKeyPair", keyPairName="mine", publicKeyBase64=text).code == "InvalidInputException"
    assert shop("GetActiveNames")["activeNames"] == []


def test_an_imported_key_is_one_line(shop: Shop) -> None:
    one, two = (asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode() for _ in range(2))
    shop("ImportKeyPair", keyPairName="mine", publicKeyBase64=one + two)
    text = public_key(shop.connection, shop.vault, shop.request(), "mine", 0.0)
    assert "\n" not in text


def test_the_default_key_pair_is_made_at_first_need_and_stays(shop: Shop) -> None:
    assert shop("GetKeyPairs", includeDefaultKeyPair=True)["keyPairs"] == []
    first = shop("DownloadDefaultKeyPair")
    assert shop("DownloadDefaultKeyPair") == first
    assert shop("GetKeyPairs")["keyPairs"] == []
    [shown] = shop("GetKeyPairs", includeDefaultKeyPair=True)["keyPairs"]
    assert shown["name"] == DEFAULT_NAME
    assert shop("DownloadDefaultKeyPair", region="eu-west-1") != first
    assert shop.refused("DeleteKeyPair", keyPairName=DEFAULT_NAME).code == "InvalidInputException"
    shop("DeleteKeyPair", keyPairName=DEFAULT_NAME, expectedFingerprint=shown["fingerprint"])
    assert shop("DownloadDefaultKeyPair") != first


@pytest.mark.parametrize("action", ["CreateKeyPair", "ImportKeyPair"])
def test_the_default_name_is_not_for_other_keys(shop: Shop, action: str) -> None:
    text = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    extra = {"publicKeyBase64": text} if action == "ImportKeyPair" else {}
    assert shop.refused(action, keyPairName=DEFAULT_NAME, **extra).code == "InvalidInputException"
    assert shop("DownloadDefaultKeyPair")["privateKeyBase64"].startswith("-----BEGIN")


def test_delete_wants_the_expected_fingerprint_and_frees_the_name(shop: Shop) -> None:
    shop("CreateKeyPair", keyPairName="laptop")
    assert shop.refused("DeleteKeyPair", keyPairName="laptop", expectedFingerprint="00").code == "InvalidInputException"
    shop("DeleteKeyPair", keyPairName="laptop")
    assert shop.refused("GetKeyPair", keyPairName="laptop").code == "NotFoundException"
    shop("CreateKeyPair", keyPairName="laptop")


def test_a_deleted_key_pair_leaves_no_tags(shop: Shop) -> None:
    shop("CreateKeyPair", keyPairName="laptop", tags=[{"key": "a"}])
    shop("DeleteKeyPair", keyPairName="laptop")
    assert shop.connection.execute(tag_rows.select()).all() == []


def test_key_pairs_are_the_accounts_own(shop: Shop) -> None:
    other = accounts.create_account(shop.connection, "second", 0.0)
    shop("CreateKeyPair", keyPairName="laptop")
    assert shop.refused("GetKeyPair", other, keyPairName="laptop").code == "NotFoundException"
    assert shop.refused("DeleteKeyPair", other, keyPairName="laptop").code == "NotFoundException"
    assert shop.refused("TagResource", other, resourceName="laptop", tags=[{"key": "a"}]).code == "NotFoundException"


@pytest.mark.parametrize("name", ["", "x" * 100_000])
def test_a_hostile_name_is_not_found(shop: Shop, name: str) -> None:
    assert shop.refused("GetKeyPair", keyPairName=name).code in ("NotFoundException", "InvalidInputException")


def test_tags_are_added_replaced_removed(shop: Shop) -> None:
    shop("CreateKeyPair", keyPairName="laptop")
    [operation] = shop("TagResource", resourceName="laptop", tags=[{"key": "a", "value": "1"}, {"key": "b"}])["operations"]
    assert operation["operationType"] == "TagResource" and operation["resourceType"] == "KeyPair"
    shop("TagResource", resourceName="laptop", tags=[{"key": "a", "value": "2"}])
    assert shop("GetKeyPair", keyPairName="laptop")["keyPair"]["tags"] == [{"key": "a", "value": "2"}, {"key": "b"}]
    shop("UntagResource", resourceName="laptop", tagKeys=["a", "absent"])
    assert shop("GetKeyPair", keyPairName="laptop")["keyPair"]["tags"] == [{"key": "b"}]


@pytest.mark.parametrize("wanted", [
    [{"key": ""}], [{"key": "k" * 129}], [{"key": "k", "value": "v" * 257}], [{"key": f"k{n}"} for n in range(51)]])
def test_tags_past_the_limits_are_refused(shop: Shop, wanted: list[dict[str, str]]) -> None:
    shop("CreateKeyPair", keyPairName="laptop")
    assert shop.refused("TagResource", resourceName="laptop", tags=wanted).code == "InvalidInputException"


def test_access_keys_are_sealed_and_revocable(shop: Shop) -> None:
    key, secret = accounts.create_access_key(shop.connection, shop.vault, shop.account, 1.0)
    assert accounts.find_secret(shop.connection, shop.vault, key) == (shop.account, secret)
    [listed] = accounts.list_access_keys(shop.connection)
    assert listed["id"] == key and secret not in str(listed)
    assert accounts.revoke(shop.connection, key, 2.0) and not accounts.revoke(shop.connection, key, 3.0)
    assert accounts.find_secret(shop.connection, shop.vault, key) is None
    assert accounts.find_secret(shop.connection, shop.vault, "AKIANONE") is None


def test_one_authority_per_account_and_region(shop: Shop) -> None:
    first = accounts.ensure_authority(shop.connection, shop.vault, shop.account, REGION)
    assert first.startswith("ssh-ed25519 ")
    assert accounts.ensure_authority(shop.connection, shop.vault, shop.account, REGION) == first
    assert accounts.ensure_authority(shop.connection, shop.vault, shop.account, "eu-west-1") != first
    other = accounts.create_account(shop.connection, "second", 1.0)
    assert accounts.ensure_authority(shop.connection, shop.vault, other, REGION) != first
    private = asyncssh.import_private_key(accounts.authority_private(shop.connection, shop.vault, shop.account, REGION))
    assert private.export_public_key().decode().split()[:2] == first.split()[:2]
