"""Foreign images: what is refused, and that nothing looks at one before its checksum, with more than the least rights."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skysail.images import fetch, foreign
from skysail.images.foreign import Blueprint, Origin, take_in, virtual_size
from skysail.images.library import Library, Manifest, file_digest
from skysail.kit.errors import SkysailError
from skysail.kit.process import run

pytestmark = pytest.mark.real
UID = 2_990_000
MINE = Blueprint(id="mine", name="Mine", user="admin")


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    """An empty library, where a user without rights can reach it."""
    folder = Path("/var/tmp") / f"skysail-library-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    yield Library(folder)
    shutil.rmtree(folder)


def made(path: Path, *words: str) -> Path:
    run(["qemu-img", "create", "-q", *words[:-1], str(path), words[-1]])
    return path


def taken(library: Library, path: Path, **more: Any) -> Manifest:
    sha256 = more.pop("sha256", "") or file_digest(path)
    return take_in(Origin(source=str(path), sha256=sha256, **more), MINE, library, UID)


def test_a_raw_and_a_qcow2_image_are_taken_in(library: Library, tmp_path: Path) -> None:
    raw = tmp_path / "x.raw"
    raw.write_bytes(b"\0" * 71_680 + os.urandom(71_680) + b"\0" * (3 << 20))
    one = taken(library, raw)
    assert (one.size_bytes, one.recipe, one.origin) == (raw.stat().st_size, "", (str(raw), file_digest(raw)))
    assert library.latest("mine") == one == library.find(one.digest)
    assert file_digest(library.path(one.digest)) == one.digest
    assert library.path(one.digest).stat().st_uid == 0
    back = tmp_path / "back.raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(library.path(one.digest)), str(back)])
    assert back.read_bytes()[:raw.stat().st_size] == raw.read_bytes()
    two = taken(library, made(tmp_path / "y.qcow2", "-f", "qcow2", "8M"))
    assert two.size_bytes == 8 << 20
    assert not list(library.directory.glob(".work-*"))


def test_what_is_not_to_be_trusted_is_refused_and_leaves_nothing(library: Library, tmp_path: Path) -> None:
    secret = made(tmp_path / "secret.raw", "-f", "raw", "1M")
    child = made(tmp_path / "child.qcow2", "-f", "qcow2", "-F", "raw", "-b", str(secret), "1M")
    apart = made(tmp_path / "apart.qcow2", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", "1M")
    vast = made(tmp_path / "vast.qcow2", "-f", "qcow2", "10T")
    whole = made(tmp_path / "whole.qcow2", "-f", "qcow2", "1M")
    dirty, strange, bent = (tmp_path / name for name in ("dirty.qcow2", "strange.qcow2", "bent.qcow2"))
    for path, bits in ((dirty, 2), (strange, 1 << 40)):
        shutil.copy(whole, path)
        with path.open("r+b") as file:
            file.seek(72)
            file.write(struct.pack(">Q", bits))
    shutil.copy(whole, bent)
    with bent.open("r+b") as file:
        file.seek(40)  # the L1 table far behind the end
        file.write(struct.pack(">Q", 1 << 50))
    for path, why in ((child, "another file"), (apart, "another file"), (vast, "is not taken"), (dirty, "not clean"),
                      (strange, "not clean"), (bent, "does not take the image"),
                      (tmp_path / "none.qcow2", "could not be read")):
        with pytest.raises(SkysailError, match=why):
            taken(library, path, sha256=file_digest(path) if path.exists() else "0" * 64)
    with pytest.raises(SkysailError, match="not a qcow2"):
        taken(library, secret, format="qcow2")
    with pytest.raises(SkysailError, match="checksum"):
        taken(library, whole, sha256="0" * 64)
    with pytest.raises(SkysailError, match="64 hexadecimal"):
        taken(library, whole, sha256="f" * 63)
    with pytest.raises(SkysailError, match="not known by its ending"):
        taken(library, whole.rename(tmp_path / "whole.img"))
    assert library.list() == []
    assert [path.name for path in library.directory.iterdir()] == []


def test_a_raw_image_is_never_taken_for_a_qcow2(library: Library, tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"secret" * 200_000)
    disguised = made(tmp_path / "child.raw", "-f", "qcow2", "-F", "raw", "-b", str(secret), "1M")
    one = taken(library, disguised)
    back = tmp_path / "back.raw"
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(library.path(one.digest)), str(back)])
    assert one.size_bytes == -(-disguised.stat().st_size // 512) * 512
    assert back.read_bytes()[:disguised.stat().st_size] == disguised.read_bytes()


def test_one_digest_is_one_blueprint(library: Library, tmp_path: Path) -> None:
    path = made(tmp_path / "x.raw", "-f", "raw", "1M")
    one = taken(library, path)
    assert taken(library, path).digest == one.digest  # again is fine
    with pytest.raises(SkysailError, match="already, as the blueprint mine"):
        take_in(Origin(source=str(path), sha256=file_digest(path)), Blueprint(id="other", name="O", user="a"), library, UID)
    with pytest.raises(SkysailError, match="built from Debian packages"):
        take_in(Origin(source=str(path), sha256=file_digest(path)), Blueprint(id="debian_12", name="D", user="a"), library,
                UID)
    assert [held.blueprint for held in library.list()] == ["mine"]


def test_qemu_img_runs_without_rights(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in front of the real one writes down as whom it was started."""
    seen = Path("/var/tmp") / f"skysail-seen-{os.getpid()}"
    seen.mkdir(mode=0o777)
    seen.chmod(0o777)
    try:
        real = shutil.which("qemu-img")
        (seen / "qemu-img").write_text(f'#!/bin/sh\ncat /proc/self/status > {seen}/$1.status\n'
                                       f'readlink /proc/self/ns/net > {seen}/$1.net\nexec {real} "$@"\n')
        (seen / "qemu-img").chmod(0o755)
        path = made(tmp_path / "x.qcow2", "-f", "qcow2", "1M")
        monkeypatch.setenv("PATH", f"{seen}:{os.environ['PATH']}")
        taken(library, path)
        for verb in ("check", "convert"):
            told = dict(line.split(":\t", 1) for line in (seen / f"{verb}.status").read_text().splitlines() if ":\t" in line)
            assert set(told["Uid"].split()) == set(told["Gid"].split()) == {str(UID)}
            assert told["Groups"].split() == []
            assert {told[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
            assert told["NoNewPrivs"] == "1"
            assert (seen / f"{verb}.net").read_text().strip() != str(Path("/proc/self/ns/net").readlink())
    finally:
        shutil.rmtree(seen)


def test_a_conversion_is_bounded(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "CONVERT_SECONDS", 0.001)
    with pytest.raises(SkysailError, match="not done within"):
        taken(library, made(tmp_path / "x.qcow2", "-f", "qcow2", "1M"))
    assert [path.name for path in library.directory.iterdir()] == []


class _Site(http.server.BaseHTTPRequestHandler):
    image = b""

    def do_GET(self) -> None:
        if self.path == "/moved.qcow2":
            self.send_response(302)
            self.send_header("Location", "/x.qcow2")
            self.end_headers()
        elif self.path == "/endless.raw":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                return
        elif self.path in ("/x.qcow2", "/short.qcow2"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.image)))
            self.end_headers()
            self.wfile.write(self.image if self.path == "/x.qcow2" else self.image[:1000])
        else:
            self.send_error(404)

    def log_message(self, format: str, *words: Any) -> None:
        return


@pytest.fixture
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_image_is_fetched(library: Library, tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "x.qcow2", "-f", "qcow2", "1M")
    _Site.image = path.read_bytes()
    said: list[str] = []
    origin = Origin(source=f"{site}/moved.qcow2", sha256=file_digest(path))
    one = take_in(origin, MINE, library, UID, said.append, said.append)
    assert one.origin == (origin.source, origin.sha256)
    assert said == [f"mine: downloading {origin.source}", f"{len(_Site.image) >> 20} MiB of {len(_Site.image) >> 20}",
                    "mine: converting from qcow2"]
    monkeypatch.setattr(fetch, "MAX_BYTES", 300_000)
    for name, why in (("none.qcow2", "404"), ("short.qcow2", "could not be fetched"), ("endless.raw", "larger than")):
        with pytest.raises(SkysailError, match=why):
            take_in(Origin(source=f"{site}/{name}", sha256="0" * 64), MINE, library, UID)
    with pytest.raises(SkysailError, match="could not be fetched"):
        take_in(Origin(source="http://127.0.0.1:1/x.raw", sha256="0" * 64), MINE, library, UID)
    assert not list(library.directory.glob(".work-*"))


class _Shaky(http.server.BaseHTTPRequestHandler):
    """Lets go of each connection after a third of the image; knows ranges unless told otherwise."""

    image = b""
    ranges = True
    asked: list[str | None] = []

    def do_GET(self) -> None:
        told = self.headers.get("Range")
        self.asked.append(told)
        begin = int(told.removeprefix("bytes=").rstrip("-")) if told and self.ranges else 0
        if begin >= len(self.image):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(self.image) - begin))
        self.end_headers()
        self.wfile.write(self.image[begin:begin + len(self.image) // 3 + 1])

    def log_message(self, format: str, *words: Any) -> None:
        return


def test_a_download_goes_on_where_it_was_cut_off(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.0)
    _Shaky.image = image = made(tmp_path / "x.qcow2", "-f", "qcow2", "1M").read_bytes()
    third = len(image) // 3 + 1
    digest = hashlib.sha256(image).hexdigest()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Shaky) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/x.qcow2"
        one = take_in(Origin(source=address, sha256=digest), MINE, library, UID)
        assert one.origin == (address, digest)
        assert _Shaky.asked == [None, f"bytes={third}-", f"bytes={2 * third}-"]
        # What a process left that died: the rest is asked for, and what is not the image goes.
        for left, wanted in ((image[:third], digest), (image, digest), (b"x" * third, digest), (image, "0" * 64)):
            (library.directory / f".part-{wanted}").write_bytes(left)
            _Shaky.asked.clear()
            got = fetch.download(address, wanted, tmp_path / "got", library.directory)
            assert _Shaky.asked[0] == f"bytes={len(left)}-"
            assert (got == wanted) == (left != b"x" * third and wanted == digest)
            if got == wanted:
                assert (tmp_path / "got").read_bytes() == image
            assert not list(library.directory.glob(".part-*"))
        # A server that knows no ranges never comes to the end; what it brought once more is no progress.
        monkeypatch.setattr(_Shaky, "ranges", False)
        with pytest.raises(SkysailError, match="could not be fetched"):
            fetch.download(address, digest, tmp_path / "got", library.directory)
        (part,) = library.directory.glob(".part-*")
        assert part.read_bytes() == image[:third]
        server.shutdown()


def test_a_packed_image_is_unpacked(library: Library, tmp_path: Path) -> None:
    plain = made(tmp_path / "x.qcow2", "-f", "qcow2", "3M")
    run(["xz", "--keep", str(plain)])
    one = taken(library, tmp_path / "x.qcow2.xz")
    assert one.size_bytes == 3 << 20
    (tmp_path / "y.qcow2.xz").write_bytes(b"no xz")
    with pytest.raises(SkysailError, match="xz does not take the image"):
        taken(library, tmp_path / "y.qcow2.xz")


def test_the_work_of_a_killed_process_goes_with_the_next(library: Library, tmp_path: Path) -> None:
    left = library.directory / ".work-left"
    left.mkdir()
    (left / "disk.raw").write_bytes(b"x")
    with library.workplace() as mine:
        assert not left.exists()
        with library.workplace() as another:
            assert mine.exists() and another.exists()
    assert [path.name for path in library.directory.iterdir()] == []


def test_the_size_of_a_version_2_image(tmp_path: Path) -> None:
    assert virtual_size(made(tmp_path / "old.qcow2", "-f", "qcow2", "-o", "compat=0.10", "5M"), "qcow2") == 5 << 20
