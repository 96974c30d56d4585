"""The command line: one verb, one line; what a verb means stands in ``serve`` and ``doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import cyclopts
from cyclopts import Parameter

from skysail import doctor as doctors
from skysail.cli import show
from skysail.images import foreign, published
from skysail.kit import config as configuration
from skysail.kit.errors import SkysailError
from skysail.serve import blueprints, customer, endpoint, proof, tour
from skysail.serve import up as machine
from skysail.serve import usage as transfers

app = cyclopts.App(name="skysail", help="A VPS cloud that you own: the Lightsail API over real QEMU guests.")
images = cyclopts.App(name="images", help="The images that instances are made of.")
catalogue = cyclopts.App(name="blueprints", help="What instances start as: what is ready, what can be, and whether it works.")
keys = cyclopts.App(name="keys", help="Access keys of the admin account.")
snapshots = cyclopts.App(name="snapshots", help="Snapshots, as files that another Skysail takes in.")
rows = cyclopts.App(name="db", help="The database that the cloud's rows are in.")
zones = cyclopts.App(name="zones", help="Zones of domains: as files, and signed.")
app.command(images)
app.command(catalogue)
app.command(keys)
app.command(snapshots)
app.command(zones)
app.command(rows)

Json = Annotated[bool, Parameter(name="--json", negative="")]
Region = Annotated[str, Parameter(help="The region; the default one unless told.")]


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
    found = doctors.examine(configuration.load())
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
def launch(name: str, *, blueprint: str = "debian_12", bundle: str = "nano_3_0", region: Region = "",
           json: Json = False) -> None:
    """Create an instance and wait until it runs."""
    instance = customer.launch(configuration.load(), name, blueprint, bundle, region=region)
    show.as_json(instance) if json else show.line(f"{name} runs at {customer.address(instance)}")


@app.command(name="list")
def list_instances(*, region: str = "", json: Json = False) -> None:
    """Every instance, of every region unless one is told."""
    config = configuration.load()
    found = customer.listed(config, region)
    show.as_json(found) if json else show.table(
        [customer.summary(instance) for instance in found],
        ["name", *(["region"] if len(config.regions) > 1 else []), "state", "address",
         *(["ssh port"] if config.single_address else []), "blueprint", "bundle"])


@app.command
def search(text: str, *, json: Json = False) -> None:
    """What has TEXT in its name, address, tags or id, in every region and account."""
    from skysail.inspect import search as finding

    found = finding.search(configuration.load(), text)
    show.as_json(found) if json else show.table(found, ["region", "type", "name", "state", "address", "account"])


@app.command
def usage(month: str = "", *, json: Json = False) -> None:
    """What each instance moved in a month (2026-01; this one unless told), its allowance and the price of the rest."""
    config = configuration.load()
    found = transfers.of_month(config, month)
    show.as_json([{name: getattr(one, name) for name in one.__struct_fields__} for one in found]) if json else show.table(
        [transfers.summary(one) for one in found],
        ["instance", *(["region"] if len(config.regions) > 1 else []), "in", "out", "allowance", "overage", "price"])


@app.command
def ssh(name: str, *command: Annotated[str, Parameter(allow_leading_hyphen=True)], region: Region = "") -> int:
    """Log in to an instance, or run a command there; one with a --region of its own goes behind a --."""
    return customer.ssh(configuration.load(), name, list(command), region)


@app.command
def logs(name: str, *, region: Region = "", account: str = "admin") -> None:
    """What an instance's serial console said."""
    show.console(customer.serial_log(configuration.load(), name, region, account))


@app.command
def env(*, json: Json = False) -> None:
    """Shell exports that point any AWS client at this cloud."""
    values = endpoint.environment(configuration.load())
    show.as_json(values) if json else show.exports(values)


@keys.command(name="list")
def list_keys(*, json: Json = False) -> None:
    """Access keys, without their secrets."""
    from skysail.serve import keys as access

    found = access.listed(configuration.load())
    show.as_json(found) if json else show.table(found, ["id", "created", "revoked"])


@keys.command(name="create")
def create_key() -> None:
    """Make an access key; its secret is shown this once."""
    from skysail.serve import keys as access

    show.as_json(access.create(configuration.load()))


@keys.command(name="revoke")
def revoke_key(key: str) -> None:
    """Revoke an access key."""
    from skysail.serve import keys as access

    access.revoke(configuration.load(), key)


@images.command(name="list")
def list_images(*, unused: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> None:
    """Images that this machine holds; with --unused the images and templates that nobody needs."""
    if unused:
        _show_pieces(blueprints.unused(configuration.load()), json)
        return
    found = blueprints.held(configuration.load())
    show.as_json(found) if json else show.table(
        [blueprints.summary(image) for image in found],
        ["blueprint", "version", "size", "packages", "built (UTC)", "template", "offered"])


@images.command(name="remove")
def remove_image(*names: str, unused: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> None:
    """Remove images, by digest or blueprint, with their templates; --unused all images and templates that nobody needs."""
    gone = blueprints.remove(configuration.load(), names, unused)
    _show_pieces(gone, json)
    if not json:
        show.line(f"{sum(piece['bytes'] for piece in gone) >> 20} MiB freed")


def _show_pieces(pieces: list[dict[str, Any]], json: bool) -> None:
    show.as_json(pieces) if json else show.table(
        [blueprints.piece_summary(piece) for piece in pieces], ["kind", "blueprint", "name", "size"])


@images.command(name="build")
def build_image(blueprint: str = "debian_12") -> None:
    """Build a blueprint's image from Debian packages."""
    blueprints.build(configuration.load(), blueprint, show.step)


@images.command(name="import")
def import_image(source: str, *, sha256: str = "", blueprint: str = "", name: str = "", user: str = "debian",
                 format: Literal["raw", "qcow2"] | None = None, mirror: str = "") -> None:
    """Make a blueprint of a qcow2 or raw cloud image: one that is known by name (ubuntu_24_04), or a file or an http(s)
    address with --sha256 and --blueprint. --mirror asks another address than the publisher's for a known one."""
    if sha256 or blueprint:
        origin, made = foreign.Origin(source=source, sha256=sha256, format=format), foreign.Blueprint(
            id=blueprint, name=name or blueprint, user=user)
    else:
        show.step(f"{source}: asking its publisher for the checksum")
        origin, made = published.resolve(published.find(source), mirror)
    blueprints.bring_in(configuration.load(), origin, made, show.step, show.detail)


@catalogue.command(name="list")
def list_blueprints(*, json: Json = False) -> None:
    """Every blueprint: ready, can be built from Debian packages, or needs a download."""
    found = blueprints.offers(configuration.load())
    show.as_json(found) if json else show.table(found, ["blueprint", "name", "version", "type", "state", "how"])


@catalogue.command(name="build")
def build_blueprint(*names: str, all: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Build the images of blueprints from Debian packages; --all of every one that has a recipe."""
    for one in blueprints.named(names, all):
        blueprints.build(configuration.load(), one, show.step)


@catalogue.command(name="prove")
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


@snapshots.command(name="list")
def list_snapshots(*, json: Json = False) -> None:
    """Snapshots of every account."""
    from skysail.serve import snapshots as operator

    found = operator.listed(configuration.load())
    show.as_json(found) if json else show.table(
        [operator.summary(one) for one in found], ["name", "of", "kind", "state", "size", "region", "created (UTC)"])


@snapshots.command(name="export")
def export_snapshot(name: str, *, to: Path, region: str = "", account: str = "admin") -> None:
    """Write a snapshot to one file, with all that its disks stand on."""
    from skysail.serve import snapshots as operator

    size = operator.export(configuration.load(), name, to, region, account, show.step, show.detail)
    show.line(f"{to}: {size >> 20} MiB")


@snapshots.command(name="import")
def import_snapshot(file: Path, *, name: str = "", region: str = "", account: str = "admin") -> None:
    """Make a snapshot of a file that was exported here or elsewhere."""
    from skysail.serve import snapshots as operator

    made = operator.bring_in(configuration.load(), file, name, region, account, show.step, show.detail)
    show.line(f"{made} is there: CreateInstancesFromSnapshot and CreateDiskFromSnapshot take it")


@rows.command(name="move")
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


@zones.command(name="list")
def list_zones(*, json: Json = False) -> None:
    """Zones of every account, with what the name server says of each."""
    from skysail.serve import zones as operator

    found = operator.listed(configuration.load())
    show.as_json(found) if json else show.table(found, ["name", "state", "serial", "entries", "signed", "reason"])


@zones.command(name="export")
def export_zone(name: str) -> None:
    """Print a zone as a master file (RFC 1035)."""
    from skysail.serve import zones as operator

    sys.stdout.write(operator.export(configuration.load(), name))


@zones.command(name="import")
def import_zone(file: Path, *, name: str = "", replace: bool = False) -> None:
    """Make a domain of a master file; with --replace also of one that has entries, which go."""
    from skysail.serve import zones as operator

    for line in operator.bring_in(configuration.load(), file, name, replace):
        show.line(line)


@zones.command(name="dnssec")
def sign_zone(name: str, *, off: bool = False, json: Json = False) -> None:
    """Sign a zone and show the DS record for its parent; with --off sign it no more (remove the DS record first)."""
    from skysail.serve import zones as operator

    answer = operator.unsign(configuration.load(), name) if off else operator.sign(configuration.load(), name)
    told = f"{answer['name']}. IN DS {answer['ds']}" if answer["ds"] else f"{answer['name']} is not signed"
    show.as_json(answer) if json else show.line(told)


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
