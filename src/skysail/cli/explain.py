"""Verbs that say why things are as they are, and change nothing."""

from __future__ import annotations

import cyclopts

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration

app = cyclopts.App(name="explain", version=__version__, help="Why things are as they are.")


@app.command(name="placement")
def explain_placement(name: str, *, region: str = "", account: str = "admin", json: Json = False) -> None:
    """Which hosts could take an instance, were it to be placed now, and what speaks against the others."""
    from skysail.inspect import placement

    found = placement.explain(configuration.load(), name, region, account)
    show.as_json([{field: getattr(one, field) for field in one.__struct_fields__} for one in found]) if json else show.table(
        [placement.summary(one) for one in found], ["host", "verdict", "why"])
