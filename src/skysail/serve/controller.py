"""The controller process: the API, the engine of operations and the watch of its hosts, in one event loop.

Several may work on one PostgreSQL: requests go to any of them, everything else is divided among them (``store/leases.py``).

``python -m skysail.serve.controller`` runs it, unprivileged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from functools import partial
from typing import Any

import uvicorn
from sqlalchemy import Connection, func, insert, select
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette

from skysail.api.dispatch import Dispatcher
from skysail.api.gateway import application
from skysail.api.tls import Certificates
from skysail.api.wire import Wire
from skysail.hosts import entrance, reverse
from skysail.hosts.client import AgentClient
from skysail.hosts.collector import SPREAD_SECONDS, delay
from skysail.hosts.credentials import Credentials
from skysail.hosts.fleet import PARTS as HOST_PARTS
from skysail.hosts.fleet import Fleet
from skysail.hosts.intake import GATHER_SECONDS, Intake
from skysail.hosts.threads import Threads
from skysail.hosts.turns import Turns
from skysail.kit import garbage
from skysail.kit.clock import Clock, SharedClock, SystemClock
from skysail.kit.config import Config, load
from skysail.kit.errors import SkysailError
from skysail.kit.process import allow_open_files
from skysail.notices.smtp import Smtp
from skysail.notices.webhook import Webhook
from skysail.operations.engine import PARTS, Engine, part
from skysail.resources import (
    accounts,
    address_type_changes,
    addresses,
    auto_snapshots,
    disks,
    domains,
    lifecycle,
    metadata,
    metering,
    migration,
    peering,
    regions,
    rescue,
    snapshot_rows,
)
from skysail.resources import alarms as alarm_rows
from skysail.resources.access import Access
from skysail.resources.add_ons import AddOns
from skysail.resources.address_type_changes import AddressTypes
from skysail.resources.alarms import Alarms
from skysail.resources.auto_snapshots import AutoSnapshots
from skysail.resources.catalog import Catalog
from skysail.resources.contact_methods import ContactMethods
from skysail.resources.disk_snapshots import DiskSnapshots
from skysail.resources.domains import Domains
from skysail.resources.instance_snapshots import InstanceSnapshots
from skysail.resources.instances import Instances
from skysail.resources.key_pairs import KeyPairs
from skysail.resources.metadata import InstanceMetadata
from skysail.resources.metrics import Metrics
from skysail.resources.names import Names
from skysail.resources.operation_log import OperationLog
from skysail.resources.public_ports import PublicPorts
from skysail.resources.regions import Regions
from skysail.resources.request import Request
from skysail.resources.snapshot_copies import SnapshotCopies
from skysail.resources.static_ips import StaticIps
from skysail.resources.tags import Tags
from skysail.serve import confirmation, endpoint, joining, membership, prometheus
from skysail.serve.courier import COURIER, Courier
from skysail.serve.fencing import Fencer
from skysail.serve.rounds import Round
from skysail.store.database import Database
from skysail.store.leases import BEAT_SECONDS, Shares
from skysail.store.schema import hosts
from skysail.store.vault import Vault

log = logging.getLogger(__name__)
HOST = membership.FIRST_HOST
WORKFLOWS = (lifecycle.WORKFLOWS | disks.WORKFLOWS | snapshot_rows.WORKFLOWS | auto_snapshots.WORKFLOWS | peering.WORKFLOWS
             | metadata.WORKFLOWS | address_type_changes.WORKFLOWS)
ALARM_SECONDS = 5.0
# So many hosts are asked something at a time: enough for all processors, few enough that none waits for long.
ASKED_AT_ONCE = 64
# How often is looked whether an automatic snapshot is due.
DUE_SECONDS = 2.0
# How often instances are seen to follow their guests.
FOLLOW_SECONDS = 1.0
# How often is looked whether a host has failed, or is back, and what the lease of all that follows is called.
OUTAGE_SECONDS, OUTAGES = 1.0, "outages"
# How often old samples are looked for, and the rest between two portions of them.
SWEEP_SECONDS, SWEEP_PAUSE_SECONDS = 600.0, 0.2


def initialise(config: Config, clock: Clock | None = None) -> None:
    """Make the database, its keys, the endpoint's certificates and this machine's host row, which serves every zone of the
    configuration; idempotent. Touches nothing outside of the controller's own folder. Raises SkysailError, with the rows as
    they were, when the configuration no longer has a region or zone that is in use."""
    clock = clock or SystemClock()
    config.master_key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    Vault.at(config.master_key)
    if config.secure:
        Certificates(config.certificates).ensure(served_names(config), clock.now())
    database = Database.of(config)
    database.migrate()
    try:
        with database.transaction() as connection:
            if config.local_host:
                if connection.execute(select(hosts.c.id).where(hosts.c.id == HOST)).first() is None:
                    connection.execute(insert(hosts).values(id=HOST, address=f"unix:{config.agent_socket}"))
                regions.serve(connection, HOST, config.regions)
            else:
                regions.refuse_abandoning(connection, config.regions)
    finally:
        database.close()


def refused(config: Config) -> tuple[str, str] | None:
    """Why the cloud that is here cannot go on with this configuration, and the cure; None when it can. Changes nothing."""
    try:
        database = Database.of(config)
        try:
            database.check()
            if not database.exists():
                return None
            with database.transaction(write=False) as connection:
                regions.refuse_abandoning(connection, config.regions)
        finally:
            database.close()
    except SkysailError as unfit:
        return unfit.what, unfit.cure
    return None


def admin_credentials(config: Config, clock: Clock | None = None) -> dict[str, str]:
    """A fresh access key of the admin account, which is made if there is none: its id, its secret, account and region."""
    clock = clock or SystemClock()
    database = Database.of(config)
    try:
        with database.transaction() as connection:
            account = accounts.find_account(connection, "admin") or accounts.create_account(connection, "admin", clock.now())
            key, secret = accounts.create_access_key(connection, Vault.at(config.master_key), account, clock.now())
    finally:
        database.close()
    return {"access_key_id": key, "secret_access_key": secret, "account_id": account, "region": config.default_region}


def served_names(config: Config) -> list[str]:
    """The names and addresses that clients may know the endpoint by."""
    everywhere = config.listen in ("0.0.0.0", "::")
    own = [socket.gethostname()] if everywhere else [config.listen]
    return list(dict.fromkeys((*config.tls_names, *own, "localhost", "127.0.0.1", "::1")))


def action_table(config: Config, clock: Clock,
                 vault: Vault) -> dict[str, Callable[[Connection, Request], dict[str, Any]]]:
    """Every action that is offered."""
    instances = Instances(config, clock, vault)
    nouns = (Regions(config), Catalog(), Names(), KeyPairs(clock, vault), instances, disks.Disks(config, clock),
             InstanceSnapshots(config, clock, instances), DiskSnapshots(clock), SnapshotCopies(config, clock), AddOns(clock),
             InstanceMetadata(clock), AddressTypes(config, clock), AutoSnapshots(clock), PublicPorts(clock),
             StaticIps(config, clock), peering.Peering(config, clock),
             Access(clock, vault), Tags(config, clock), Domains(config, clock), Metrics(clock), Alarms(clock),
             ContactMethods(config, clock, confirmation_page(config)), OperationLog())
    return {name: action for noun in nouns for name, action in noun.actions().items()}


def confirmation_page(config: Config) -> str:
    """Where those who get notices confirm that they want them."""
    return (config.public_url.rstrip("/") or endpoint.url(config)) + confirmation.PATH


def build(config: Config, clock: Clock | None = None,
          client: Callable[[str], AgentClient] | None = None) -> Starlette:
    """The controller as an ASGI application; its lifespan runs engine and watches."""
    # How long a host has been silent is asked of whichever controller follows that: all go by one clock, the database's.
    shared = SharedClock()
    clock = clock or shared
    vault = Vault.at(config.master_key)
    database = Database.of(config)
    database.migrate()
    with database.transaction() as connection:
        shared.agree(database.now(connection))
        domains.delegate(connection, config.name_servers, clock.now())
        addresses.number_ssh_ports(connection, config)
        reverse.configure(connection, config.reverse_zones, config.name_servers, config.naming_domain, clock.now())
        if config.local_host:
            entrance.configure(connection, HOST, config.single_address, config.instance_domain)
    loop_of: list[asyncio.AbstractEventLoop] = []

    def observed(resources: Collection[str]) -> None:
        engine.wake(resources)

    def follow(connection: Connection) -> int:
        lifecycle.follow(connection, clock.now())
        migration.sweep(connection)
        snapshot_rows.sweep(connection)
        domains.follow(connection)
        reverse.follow(connection)
        return 1

    def see_alarms(connection: Connection) -> int:
        # What is not known yet is not missing: of many hosts samples come later.
        count = connection.execute(select(func.count()).select_from(hosts)).scalar_one()
        return alarm_rows.follow(connection, clock.now() - max(0.0, delay(config.sample_seconds, count) - SPREAD_SECONDS))

    def work(connection: Connection) -> Iterable[str]:
        """All that there is to do, by the names of its leases."""
        yield from (COURIER, *(round_.name for round_ in rounds), *PARTS, *HOST_PARTS)

    credentials = Credentials(database, vault, clock, config.certificate_seconds)
    shares = Shares(database, f"{socket.gethostname()}:{config.root}", work, shared.agree)
    connect = client or partial(AgentClient, credentials=credentials, turns=Turns(ASKED_AT_ONCE))
    intake = Intake(database, metering.take_in, min(GATHER_SECONDS, config.sample_seconds / 10))
    fleet = Fleet(database, clock, vault, shares.find, connect, observed, intake, config.sample_seconds)
    began = clock.now()
    moving = migration.workflow(config)
    engine = Engine(database, {**WORKFLOWS, moving.name: moving}, clock, fleet.touch,
                    lambda resource_id: shares.claim(part(resource_id)))

    def touched(resources: Collection[str] = ()) -> None:
        engine.wake(resources)
        fleet.touch()

    rounds = (
        Round("follow", FOLLOW_SECONDS, follow, database, shares, acted=fleet.touch),
        Round("days", DUE_SECONDS, lambda connection: auto_snapshots.follow(connection, clock.now()), database, shares,
              acted=touched),
        Round("alarms", ALARM_SECONDS, see_alarms, database, shares),
        Round("sweep", SWEEP_SECONDS, lambda connection: metering.sweep(connection, clock.now()), database, shares,
              again_seconds=SWEEP_PAUSE_SECONDS),
        Round(OUTAGES, OUTAGE_SECONDS, lambda connection: rescue.follow(connection, config, clock.now(), began), database,
              shares, acted=touched))
    fencer = Fencer(config, database, clock, lambda: shares.claim(OUTAGES), connect)
    courier = Courier(database, clock, Smtp(config), Webhook(), lambda: shares.claim(COURIER))

    def committed() -> None:
        """A request's transaction committed, in a worker thread: wake what acts on rows."""
        for loop in loop_of:
            loop.call_soon_threadsafe(touched)

    async def hear() -> None:
        """What acts on rows is woken by commits of other controllers too."""
        async for resources in database.heard():
            touched(resources)

    async def live() -> None:
        beat = Threads(1, "beat")  # whatever else there is to do, none of it comes before this
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                if await beat.run(shares.renew):
                    touched()
            except Exception:
                log.exception("this controller could not say that it lives; it is tried again")

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        loop_of.append(asyncio.get_running_loop())
        await asyncio.to_thread(shares.renew)
        tasks = [asyncio.create_task(work) for work in (
            live(), hear(), fleet.run(), engine.run(), courier.run(), fencer.run(), *(round_.run() for round_ in rounds),
            joining.serve(config, database, credentials, clock))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(DBAPIError):
                shares.leave()
            database.close()

    def find_secret(key_id: str) -> tuple[str, str] | None:
        with database.transaction(write=False) as connection:
            return accounts.find_secret(connection, vault, key_id)

    @contextlib.contextmanager
    def transaction(write: bool) -> Any:
        with database.transaction(write=write) as connection:
            yield connection
        if write:
            committed()

    dispatcher = Dispatcher(action_table(config, clock, vault), transaction)
    return application(dispatcher, find_secret, clock=clock, regions=tuple(config.regions), lifespan=lifespan,
                       beside=(*confirmation.routes(database), prometheus.route(config, database)))


def main() -> None:
    """Serve the cloud in ``$SKYSAIL_DATA`` until told to stop. With ``--prepare``, only make what is missing and print the
    authority's certificate as JSON; with ``--prepare --admin-key`` a new admin key, too. With ``--check``, change nothing,
    and print as JSON what keeps the configuration from being used, and its cure, or null."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    config = load()
    if "--check" in sys.argv:
        sys.stdout.write(json.dumps(refused(config)))
        return
    try:
        initialise(config)
    except SkysailError as unfit:
        sys.exit(f"{unfit.what}; cure: {unfit.cure}")
    if "--prepare" in sys.argv:
        sys.stdout.write(json.dumps({
            "authority": Certificates(config.certificates).authority.read_text() if config.secure else "",
            "credentials": admin_credentials(config) if "--admin-key" in sys.argv else None}))
        return
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per document is noise
    allow_open_files()  # two connections for each host
    made = build(config)
    # What is here now stays, the service model above all, and so does what is known of hosts.
    garbage.settle()
    certificate, key = Certificates(config.certificates).server if config.secure else (None, None)
    uvicorn.run(made, host=config.listen, port=config.port, log_level="warning", access_log=False,
                server_header=False, http=Wire, ws="none", ssl_certfile=certificate, ssl_keyfile=key)


if __name__ == "__main__":
    main()
