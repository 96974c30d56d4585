"""What ``up`` adds to a started cloud: a first instance, one login to it, and the next commands to try."""

from __future__ import annotations

from typing import Any

from skysail.kit.config import Config
from skysail.kit.errors import SkysailError
from skysail.serve import blueprints, customer, endpoint, membership, processes
from skysail.serve import up as machine

FIRST = "first"


def up(config: Config, progress: machine.Progress, first_instance: bool = True) -> dict[str, Any]:
    """Bring the cloud up; with ``first_instance``, launch one if there is none, and log in to it, once in its life."""
    machine.up(config, progress)
    if membership.find(config) is not None or not config.local_host:
        return machine.status(config)
    proven = config.root / "first-instance"  # once: an owner who deletes it does not want it back at every upgrade
    if first_instance and not proven.exists():
        held = [instance["name"] for instance in customer.instances(config, config.default_region)]
        if not held:
            progress("first instance: launching")
            customer.launch(config, FIRST, blueprints.FIRST_BLUEPRINT, blueprints.FIRST_BUNDLE, wait_seconds=600)
        if config.engines == "real" and (not held or FIRST in held):  # a simulated one lets nobody in
            progress("first instance: logging in")
            if not processes.wait_until(lambda: customer.ssh(config, FIRST, ["true"]) == 0, 60, pause_seconds=1):
                raise SkysailError(f"instance {FIRST} runs, but no login succeeded",
                                   cure=f"see: sudo ./skysail logs {FIRST}")
        proven.touch()
    return machine.status(config)


def directions(config: Config) -> list[str]:
    """Ready-to-paste commands for a person who has just started the cloud."""
    if (joined := membership.find(config)) is not None:
        return [f"This machine is {joined.host}. Its controller shows it: sudo ./skysail host show {joined.host}"]
    if not config.local_host:
        return ["The controller runs. Let a machine join: sudo ./skysail host token"]
    zone = f"{config.default_region}{config.zones[0]}"
    shared = [
        f"address      {config.single_address}, for all: ports 80 and 443 lead to the instance that is asked for by name"
        + (f", NAME.{config.default_region}.{config.instance_domain}" if config.instance_domain else ""),
        f"             ssh -p PORT admin@{config.single_address}   # PORT as sudo ./skysail list shows it",
        f"             ssh -J jump@{config.single_address}:{config.jump_port} admin@{FIRST}   # with a key pair of yours",
    ] if config.single_address else []
    others = [name for name in config.regions if name != config.default_region]
    return [
        f"endpoint     {endpoint.url(config)} (region {config.default_region})",
        *([f"regions      {', '.join(others)} too: aws --region {others[0]} lightsail …, or --region of launch, ssh, logs"]
          if others else []),
        f"credentials  {config.root / 'credentials.json'}",
        f"ssh          sudo ./skysail ssh {FIRST}",
        *shared,
        'aws CLI      eval "$(sudo ./skysail env)"',
        f"             aws lightsail create-instances --instance-names web --availability-zone {zone} \\",
        "                 --blueprint-id debian_12 --bundle-id nano_3_0",
        "boto3        boto3.client('lightsail').get_instances()   # in the same shell",
    ]
