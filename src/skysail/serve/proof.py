"""The proof of a blueprint: built, templated, launched twice, looked at as a visitor and as its owner would, removed again.

It runs on the cloud that is up, through its own API. What it launches is called ``proof-…``; an instance of that name that is
there already is somebody's, and ends the proof.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
import msgspec

from skysail.hypervisor import template
from skysail.images.build import build, fingerprint
from skysail.images.library import Library
from skysail.images.recipe import RECIPES, Recipe
from skysail.kit import process
from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.resources.catalog import BUNDLES
from skysail.resources.catalog import RECIPES as OFFERS
from skysail.serve import blueprints, customer, programs

LAUNCH_SECONDS = 300.0
# Until the first page: under emulation an application starts a good deal slower than it will elsewhere.
PAGE_SECONDS = 900.0
LOGIN_SECONDS = 120.0
# Private keys wherever a system or its owner keeps one; what packages ship as an example lies below /usr, and what only says
# how a key begins (ImageMagick's list of file types) does not begin with it.
_SWEEP = ("sudo grep -rlsIE --exclude-dir=proc -e '^-----BEGIN ([A-Z]+ )*PRIVATE KEY( BLOCK)?-----' "
          "/etc /var /home /root /srv /opt || true")


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen. Times are seconds, None where nothing was to be done: ``launch_seconds`` until the first of two clones
    runs, ``page_seconds`` from then until it shows its first page. ``failure`` is empty when all holds."""

    blueprint: str
    version: str = ""
    image_bytes: int = 0
    build_seconds: float | None = None
    template_seconds: float | None = None
    launch_seconds: float | None = None
    page_seconds: float | None = None
    failure: str = ""


def prove(config: Config, names: list[str], progress: Callable[[str], None]) -> Iterator[Proof]:
    """Prove each of the blueprints ``names``, which have recipes, one after the other.

    Raises :class:`SkysailError` when the cloud does not run; what fails in a proof is in it.
    """
    process.require_root()
    if not programs.healthy(config, "agent"):
        raise SkysailError("the cloud does not run", cure="start it: sudo ./skysail up")
    for name in names:
        yield _Proving(config, RECIPES[name], progress).run()


def summary(proof: Proof) -> dict[str, str]:
    """A proof in the few words that a table shows."""
    def told(seconds: float | None) -> str:
        return "there" if seconds is None else f"{seconds:.1f}"
    return {"blueprint": proof.blueprint, "version": proof.version, "image": f"{proof.image_bytes >> 20} MiB",
            "build s": told(proof.build_seconds), "template s": told(proof.template_seconds),
            "launch s": "" if proof.launch_seconds is None else told(proof.launch_seconds),
            "first page s": "" if proof.page_seconds is None else told(proof.page_seconds),
            "verdict": proof.failure or "passed"}


class _Proving:
    """One proof under way."""

    def __init__(self, config: Config, recipe: Recipe, progress: Callable[[str], None]) -> None:
        self._config = config
        self._recipe = recipe
        self._progress = progress
        self._seen = Proof(blueprint=recipe.blueprint)

    def _say(self, text: str) -> None:
        self._progress(f"{self._recipe.blueprint}: {text}")

    def _note(self, **seen: object) -> None:
        self._seen = msgspec.structs.replace(self._seen, **seen)

    def run(self) -> Proof:
        try:
            self._image()
            self._template()
            self._launched()
        except SkysailError as failed:
            self._note(failure=failed.what)
        return self._seen

    def _image(self) -> None:
        library = Library(self._config.images_dir)
        held = library.latest(self._recipe.blueprint)
        if held is None or held.recipe != fingerprint(self._recipe):
            began = time.monotonic()
            held = build(self._recipe, library, self._progress)
            self._note(build_seconds=time.monotonic() - began)
        self._note(version=held.version, image_bytes=library.path(held.digest).stat().st_size)
        self._digest = held.digest

    def _template(self) -> None:
        there = self._digest in template.held(self._config.templates_dir)
        began = time.monotonic()
        blueprints.prepare(self._config, self._digest, f"{self._recipe.blueprint}: making its template", self._progress)
        if not there:
            self._note(template_seconds=time.monotonic() - began)

    def _launched(self) -> None:
        word = self._recipe.blueprint.replace("_", "-")
        names = [f"proof-{word}-1", f"proof-{word}-2"]
        fits = min((one for one in BUNDLES.values() if one["isActive"] and one["publicIpv4AddressCount"]
                    and one["power"] >= OFFERS[self._recipe.blueprint].min_power), key=lambda one: int(one["power"]))
        taken = {one["name"] for one in customer.instances(self._config, self._config.default_region)} & set(names)
        if taken:
            raise SkysailError(f"there is an instance {min(taken)} already")
        try:
            addresses = []
            for name in names:
                self._say(f"launching {name} ({fits['bundleId']})")
                began = time.monotonic()
                made = customer.launch(self._config, name, self._recipe.blueprint, str(fits["bundleId"]), LAUNCH_SECONDS)
                addresses.append(str(made["publicIpAddress"]))
                if len(addresses) == 1:
                    self._note(launch_seconds=time.monotonic() - began)
                    self._first_page(addresses[0])
            for address in addresses:
                self._visit(address)
            self._say("logging in and comparing the two")
            self._compare(names)
        finally:
            for name in names:
                with contextlib.suppress(SkysailError):
                    customer.call(self._config, "delete_instance", instanceName=name)

    def _first_page(self, address: str) -> None:
        for path, held in list(self._recipe.pages.items())[:1]:
            self._say(f"asking http://{address}{path}")
            began = time.monotonic()
            _until(f"http://{address}{path}", held)
            self._note(page_seconds=time.monotonic() - began)

    def _visit(self, address: str) -> None:
        """Every page that the recipe promises, by http and by https; raises SkysailError for one that is not there."""
        for path, held in self._recipe.pages.items():
            self._say(f"asking {address}{path}")
            for scheme in ("http", "https"):
                _until(f"{scheme}://{address}{path}", held)

    def _compare(self, names: list[str]) -> None:
        """Both log in, and share no secret; raises SkysailError otherwise."""
        told = []
        for name in names:
            self._told(name, "timeout 120 sh -c 'until test -e /var/lib/skysail/application; do sleep 1; done'"
                       if self._recipe.folder else "true")
            if self._recipe.login:
                self._told(name, self._recipe.login)
            found = self._told(name, _SWEEP).split()
            lines = self._told(name, "sudo sha256sum -- " + " ".join(sorted({*found, *self._recipe.secrets})))
            told.append({path: digest for digest, _, path in (line.partition("  ") for line in lines.splitlines())})
        same = sorted(path for path, digest in told[0].items() if digest in told[1].values())
        if same:
            raise SkysailError(f"two instances share the secret {', '.join(same)}")

    def _told(self, name: str, command: str) -> str:
        """What ``command`` prints in the instance; raises SkysailError when it fails there."""
        end = time.monotonic() + LOGIN_SECONDS
        while True:
            status, printed = customer.ask(self._config, name, command)
            if status == 0:
                return printed
            # 255 is ssh's own failure: sshd may not answer yet.
            if status != 255 or time.monotonic() > end:
                raise SkysailError(f"in {name} this ended with {status}: {command}")
            time.sleep(0.5)


def _until(address: str, held: str) -> None:
    """Ask for the page until it holds the text; raises SkysailError with the last answer after PAGE_SECONDS."""
    end = time.monotonic() + PAGE_SECONDS
    while True:
        try:
            # Its certificate is signed by itself: nobody could vouch for an address that came to be a moment ago.
            answer = httpx.get(address, follow_redirects=True, verify=False, timeout=60.0, trust_env=False)
            if answer.status_code == 200 and held in answer.text:
                return
            seen = f"{answer.status_code}, and not {held!r}"
        except httpx.HTTPError as failed:
            seen = str(failed) or type(failed).__name__
        if time.monotonic() > end:
            raise SkysailError(f"{address} answers {seen}")
        time.sleep(0.1)
