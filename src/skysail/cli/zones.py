"""Verbs of zones: listed, exported, imported, signed."""

from __future__ import annotations

import sys
from pathlib import Path

import cyclopts

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration

app = cyclopts.App(name="zones", version=__version__, help="Zones of domains: as files, and signed.")


@app.command(name="list")
def list_zones(*, json: Json = False) -> None:
    """Zones of every account, with what the name server says of each."""
    from skysail.serve import zones as operator

    found = operator.listed(configuration.load())
    show.as_json(found) if json else show.table(found, ["name", "state", "serial", "entries", "signed", "reason"])


@app.command(name="export")
def export_zone(name: str) -> None:
    """Print a zone as a master file (RFC 1035)."""
    from skysail.serve import zones as operator

    sys.stdout.write(operator.export(configuration.load(), name))


@app.command(name="import")
def import_zone(file: Path, *, name: str = "", replace: bool = False) -> None:
    """Make a domain of a master file; with --replace also of one that has entries, which go."""
    from skysail.serve import zones as operator

    for line in operator.bring_in(configuration.load(), file, name, replace):
        show.line(line)


@app.command(name="dnssec")
def sign_zone(name: str, *, off: bool = False, json: Json = False) -> None:
    """Sign a zone and show the DS record for its parent; with --off sign it no more (remove the DS record first)."""
    from skysail.serve import zones as operator

    answer = operator.unsign(configuration.load(), name) if off else operator.sign(configuration.load(), name)
    told = f"{answer['name']}. IN DS {answer['ds']}" if answer["ds"] else f"{answer['name']} is not signed"
    show.as_json(answer) if json else show.line(told)
