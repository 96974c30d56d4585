"""Verbs of the database: its rows are moved."""

from __future__ import annotations

import cyclopts

from skysail import __version__
from skysail.cli import show
from skysail.cli.options import Json
from skysail.kit import config as configuration

app = cyclopts.App(name="db", version=__version__, help="The database that the cloud's rows are in.")


@app.command(name="move")
def move_rows(url: str, *, password_file: str = "", json: Json = False) -> None:
    """Move all rows from SQLite to the empty PostgreSQL database at URL (postgresql://…), and let the configuration say so.
    Refused while a controller runs."""
    from skysail.serve import moving

    copied = moving.move(configuration.load(), url, password_file, show.step)
    # People see the beginning of each checksum: a line of a table has room for no more.
    found = [{"table": one.table, "rows": str(one.rows), "sha256": one.checksum if json else one.checksum[:16]}
             for one in copied]
    show.as_json(found) if json else show.table(found, ["table", "rows", "sha256"])
    if not json:
        show.line("the rows are there; start the controller: sudo ./skysail up")
