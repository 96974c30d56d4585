"""Verbs of blueprints: listed, built, proved."""

from __future__ import annotations

from typing import Annotated

import cyclopts
from cyclopts import Parameter

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration
from skysail.serve import blueprints, proof

app = cyclopts.App(name="blueprints", version=__version__,
                   help="What instances start as: what is ready, what can be, and whether it works.")


@app.command(name="list")
def list_blueprints(*, json: Json = False) -> None:
    """Every blueprint: ready, can be built from Debian packages, or needs a download."""
    found = blueprints.offers(configuration.load())
    show.as_json(found) if json else show.table(found, ["blueprint", "name", "version", "type", "state", "how"])


@app.command(name="build")
def build_blueprint(*names: str, all: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Build the images of blueprints from Debian packages; --all of every one that has a recipe."""
    for one in blueprints.named(names, all):
        blueprints.build(configuration.load(), one, show.step)


@app.command(name="prove")
def prove_blueprints(*names: str, all: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> int:
    """Build, template and launch blueprints, ask for their pages, compare the secrets of two clones; exit status 1 when one
    does not hold."""
    found = [*proof.prove(configuration.load(), blueprints.named(names, all), show.step)]
    if json:
        show.as_json([{name: getattr(one, name) for name in one.__struct_fields__} for one in found])
    else:
        show.finish()
        show.table([proof.summary(one) for one in found], [
            "blueprint", "version", "image", "build s", "template s", "launch s", "first page s", "verdict"])
    return 1 if any(one.failure for one in found) else 0
