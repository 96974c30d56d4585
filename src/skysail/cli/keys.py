"""Verbs of access keys: listed, made, revoked."""

from __future__ import annotations

import cyclopts

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration

app = cyclopts.App(name="keys", version=__version__, help="Access keys of the admin account.")


@app.command(name="list")
def list_keys(*, json: Json = False) -> None:
    """Access keys, without their secrets."""
    from skysail.serve import keys as access

    found = access.listed(configuration.load())
    show.as_json(found) if json else show.table(found, ["id", "created", "revoked"])


@app.command(name="create")
def create_key() -> None:
    """Make an access key; its secret is shown this once."""
    from skysail.serve import keys as access

    show.as_json(access.create(configuration.load()))


@app.command(name="revoke")
def revoke_key(key: str) -> None:
    """Revoke an access key."""
    from skysail.serve import keys as access

    access.revoke(configuration.load(), key)
