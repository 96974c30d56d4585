"""Verbs of instances: made, listed, entered, listened to, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from skysail.cli import show
from skysail.cli.options import Json, Region
from skysail.kit import config as configuration
from skysail.serve import customer
from skysail.serve import usage as transfers


def launch(name: str, *, blueprint: str = "debian_12", bundle: str = "nano_3_0", user_data: Path | None = None,
           region: Region = "", json: Json = False) -> None:
    """Create an instance and wait until it runs. --user-data: the file of its launch script."""
    script = user_data.read_text() if user_data is not None else ""
    instance = customer.launch(configuration.load(), name, blueprint, bundle, region=region, user_data=script)
    show.as_json(instance) if json else show.line(f"{name} runs at {customer.address(instance)}")


def list_instances(*, region: str = "", json: Json = False) -> None:
    """Every instance, of every region unless one is told."""
    config = configuration.load()
    found = customer.listed(config, region)
    show.as_json(found) if json else show.table(
        [customer.summary(instance) for instance in found],
        ["name", *(["region"] if len(config.regions) > 1 else []), "state", "address",
         *(["ssh port"] if config.single_address else []), "blueprint", "bundle"])


def usage(month: str = "", *, json: Json = False) -> None:
    """What each instance moved in a month (2026-01; this one unless told), its allowance and the price of the rest."""
    config = configuration.load()
    found = transfers.of_month(config, month)
    show.as_json([{name: getattr(one, name) for name in one.__struct_fields__} for one in found]) if json else show.table(
        [transfers.summary(one) for one in found],
        ["instance", *(["region"] if len(config.regions) > 1 else []), "in", "out", "allowance", "overage", "price"])


def ssh(name: str, *command: Annotated[str, Parameter(allow_leading_hyphen=True)], region: Region = "") -> int:
    """Log in to an instance, or run a command there; one with a --region of its own goes behind a --."""
    return customer.ssh(configuration.load(), name, list(command), region)


def logs(name: str, *, region: Region = "", account: str = "admin") -> None:
    """What an instance's serial console said."""
    show.console(customer.serial_log(configuration.load(), name, region, account))


def probe(*names: str, port: int = 80, path: str = "/", every: float = 0.5, seconds: float = 0.0, region: Region = "",
          json: Json = False) -> int:
    """Ask instances for a page by HTTP, --every so many seconds, for --seconds or until a signal ends it; exit status 1 when
    a question was lost."""
    from skysail.serve import asking

    found = asking.ask(configuration.load(), names, region, port, path, every, seconds)
    show.as_json([{field: getattr(one, field) for field in one.__struct_fields__} for one in found]) if json else show.table(
        [asking.summary(one) for one in found], ["instance", "address", "answered", "lost", "usual ms", "longest ms", "why"])
    return 1 if any(one.lost or not one.answered for one in found) else 0
