"""The command line: one verb, one line; what a verb means stands in ``serve`` and ``doctor``. Here are the verbs of the whole
cloud; those of a noun are in the noun's file."""

from __future__ import annotations

import sys

import cyclopts

from skysail import __version__
from skysail import doctor as doctors
from skysail.cli import (
    blueprints,
    database,
    dev,
    explain,
    hosts,
    images,
    instances,
    keys,
    migrations,
    qualifications,
    show,
    snapshots,
    zones,
)
from skysail.cli.options import Json
from skysail.kit import config as configuration
from skysail.kit.errors import SkysailError
from skysail.serve import endpoint, membership, tour
from skysail.serve import up as machine

app = cyclopts.App(name="skysail", help="A VPS cloud that you own: the Lightsail API over real QEMU guests.",
                   version=__version__)
for noun in (images.app, blueprints.app, keys.app, snapshots.app, zones.app, hosts.app, explain.app, dev.app, database.app):
    app.command(noun)
# These are said without their noun. Each by itself: for a mistyped verb cyclopts suggests none of a flattened app.
app.command(instances.launch)
app.command(instances.list_instances, name="list")
app.command(instances.usage)
app.command(instances.ssh)
app.command(instances.logs)
app.command(instances.probe)
app.command(hosts.join)
app.command(migrations.migrate)
app.command(migrations.list_migrations, name="migrations")
app.command(qualifications.qualify)
app.command(qualifications.list_qualifications, name="qualifications")


@app.command
def up(*, first_instance: bool = True, json: Json = False) -> None:
    """Build what is missing and start the cloud; safe to repeat."""
    answer = tour.up(configuration.load(), show.step, first_instance)
    show.as_json(answer) if json else show.line("\n".join(tour.directions(configuration.load())))


@app.command
def down(*, guests: bool = False) -> None:
    """Stop controller, agent and name server; guests go on unless --guests."""
    machine.down(configuration.load(), show.step, guests)


@app.command
def status(*, json: Json = False) -> int:
    """How the cloud stands; exit status 1 when it does not run."""
    answer = machine.status(configuration.load())
    show.as_json(answer) if json else show.status(answer)
    return 0 if answer["running"] else 1


@app.command
def doctor(*, json: Json = False) -> int:
    """Look at this machine: what was seen, where, what cures it; exit status 1 when something is bad."""
    config = configuration.load()
    found = doctors.examine(config, membership.underlay(config))
    rows = [{name: getattr(finding, name) for name in finding.__struct_fields__} for finding in found]
    show.as_json(rows) if json else show.findings(rows)
    return 1 if any(finding.verdict == "bad" for finding in found) else 0


@app.command
def verify(*, json: Json = False) -> int:
    """Check the cloud's rows against each other and against the machine; exit status 1 when anything differs."""
    from skysail.inspect import verify as inspection

    found = inspection.verify(configuration.load())
    if json:
        show.as_json([{name: getattr(one, name) for name in one.__struct_fields__} for one in found])
    else:
        for one in found:
            show.line(f"{one.subject}: {one.saw}; wanted: {one.wanted}")
        show.line(f"{len(found)} differences" if found else "rows and machine agree")
    return 1 if found else 0


@app.command
def search(text: str, *, json: Json = False) -> None:
    """What has TEXT in its name, address, tags or id, in every region and account."""
    from skysail.inspect import search as finding

    found = finding.search(configuration.load(), text)
    show.as_json(found) if json else show.table(found, ["region", "type", "name", "state", "address", "account"])


@app.command
def env(*, json: Json = False) -> None:
    """Shell exports that point any AWS client at this cloud."""
    values = endpoint.environment(configuration.load())
    show.as_json(values) if json else show.exports(values)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status. What Skysail can explain is printed with its cure, without a traceback."""
    try:
        status_code = app(arguments, result_action="return_value", exit_on_error=False)
    except SkysailError as failed:
        show.failure(failed)
        return 1
    except PermissionError as refused:
        show.failure(SkysailError(f"{refused.filename} cannot be used by you: {refused.strerror}", "run with sudo"))
        return 1
    except cyclopts.CycloptsError:
        return 2
    except KeyboardInterrupt:
        show.finish(well=False)
        return 130
    finally:
        show.finish()
    return status_code if isinstance(status_code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
