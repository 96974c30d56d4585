"""Images that others publish: their checksum is asked for, the image is found by it, from the publisher or a mirror."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from skysail.images.published import PUBLISHED, checksums, find, resolve
from skysail.kit.errors import SkysailError
from skysail.resources import catalog

ONE, TWO, THREE = ("a" * 64, "b" * 64, "c" * 64)


class _Publisher(http.server.BaseHTTPRequestHandler):
    lists: dict[str, str] = {}

    def do_GET(self) -> None:
        if self.path.startswith("/latest/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/latest/", "/2023.7/"))
            self.end_headers()
        elif self.path in self.lists:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.lists[self.path].encode())
        else:
            self.send_error(404)

    def log_message(self, format: str, *words: Any) -> None:
        return


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Publisher, "lists", {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Publisher) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_both_forms_of_a_list_are_read() -> None:
    text = (f"# signed by somebody\n{ONE} *one.img\n{TWO.upper()}  ./two.img\nSHA256 (three.qcow2) = {THREE}\n"
            f"SHA512 (four) = {ONE}{TWO}\n{ONE[1:]} short.img\n")
    assert checksums(text) == {"one.img": ONE, "two.img": TWO, "three.qcow2": THREE}


def test_an_image_is_found_by_its_publishers_list(publisher: str) -> None:
    _Publisher.lists["/m/SHA256SUMS"] = (f"{ONE} *ubuntu-24.04-server-cloudimg-amd64.img\n"
                                         f"{TWO} *ubuntu-24.04-server-cloudimg-arm64.img\n")
    origin, made = resolve(find("ubuntu_24_04"), f"{publisher}/m")
    assert (origin.source, origin.sha256, origin.format) == (
        f"{publisher}/m/ubuntu-24.04-server-cloudimg-amd64.img", ONE, "qcow2")
    assert (made.id, made.name, made.user, made.version) == ("ubuntu_24_04", "Ubuntu", "ubuntu", "24.04")


def test_the_newest_of_several_is_taken_from_where_latest_leads(publisher: str) -> None:
    _Publisher.lists["/2023.7/kvm/SHA256SUMS"] = "".join(
        f"{digest}  al2023-kvm-2023.7.{day}.0-kernel-6.1-x86_64.xfs.gpt.qcow2\n" for digest, day in (
            (ONE, "20250512"), (THREE, "20250603"), (TWO, "20250331"))) + f"{TWO}  al2023-kvm-arm64.qcow2\n"
    origin, _ = resolve(find("amazon_linux_2023"), f"{publisher}/latest/kvm/")
    assert (origin.source, origin.sha256) == (
        f"{publisher}/2023.7/kvm/al2023-kvm-2023.7.20250603.0-kernel-6.1-x86_64.xfs.gpt.qcow2", THREE)


def test_what_cannot_be_found_explains_itself(publisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SkysailError, match=r"could not be fetched: .*404"):
        resolve(find("almalinux_9"), publisher)
    _Publisher.lists["/CHECKSUM"] = f"{ONE}  AlmaLinux-8.qcow2\n"
    with pytest.raises(SkysailError, match="names no AlmaLinux-9"):
        resolve(find("almalinux_9"), publisher)
    monkeypatch.setattr("skysail.images.published.MAX_SUMS_BYTES", 10)
    with pytest.raises(SkysailError, match="no list of checksums"):
        resolve(find("almalinux_9"), publisher)
    with pytest.raises(SkysailError, match="no http"):
        resolve(find("almalinux_9"), "/srv/mirror")
    with pytest.raises(SkysailError, match="nobody is known to publish plan_9") as failed:
        find("plan_9")
    assert "ubuntu_24_04" in failed.value.cure and "gitlab" not in failed.value.cure
    with pytest.raises(SkysailError, match="no image of GitLab CE to fetch: GitLab publishes packages"):
        find("gitlab")


def test_every_published_image_is_declared_whole() -> None:
    for image in PUBLISHED.values():
        assert re.fullmatch("[a-z0-9_]{1,63}", image.blueprint) and image.name
        assert image.blueprint not in catalog.RECIPES
        if image.why_not:
            assert not (image.folder or image.file or image.sums or image.user)
        else:
            # Over TLS from the publisher: the checksum is all that is trusted.
            assert image.folder.startswith("https://") and image.folder.endswith("/")
            assert image.file and image.sums and image.user and image.version
