"""Schema versions, oldest first. A released migration never changes; a new one is appended.

The first version is the schema itself, so that a new database needs no other migration, and a database on PostgreSQL none of
those up to ``_guests_without_public_ipv4``: what they bring up was always SQLite. Later ones run on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import Connection, inspect
from sqlalchemy.schema import CreateTable

from skysail.store.schema import (
    accounts,
    add_ons,
    alarms,
    authorities,
    contact_methods,
    controllers,
    deliveries,
    disks,
    domain_entries,
    domains,
    guests,
    host_authority,
    host_zones,
    hosts,
    images,
    instances,
    join_tokens,
    leases,
    leaving_addresses,
    measurements,
    metadata,
    meters,
    moves,
    networks,
    operations,
    outages,
    qualifications,
    remains,
    reverse_zones,
    sample_cursors,
    snapshots,
    static_ips,
    transfers,
    zone_reports,
)


def _foundation(connection: Connection) -> None:
    metadata.create_all(connection)


def _operations_by_page(connection: Connection) -> None:
    connection.exec_driver_sql("DROP INDEX IF EXISTS ix_operations_listing")
    for index in operations.indexes:
        index.create(connection, checkfirst=True)


def _guests_with_ipv6(connection: Connection) -> None:
    # A database made by this version has it from the foundation on; SQLite adds no unique column, so the index is apart.
    if "public_ipv6" not in _columns(connection, "guests"):
        connection.exec_driver_sql("ALTER TABLE guests ADD COLUMN public_ipv6 VARCHAR(39)")
    next(index for index in guests.indexes if index.unique).create(connection, checkfirst=True)


def _static_ips(connection: Connection) -> None:
    static_ips.create(connection, checkfirst=True)


def _domains(connection: Connection) -> None:
    metadata.create_all(connection, tables=[domains, domain_entries, zone_reports], checkfirst=True)


def _authorities_of_accounts(connection: Connection) -> None:
    # There was one per region, when there was one account.
    authorities.create(connection, checkfirst=True)
    if connection.exec_driver_sql("SELECT 1 FROM sqlite_master WHERE name = 'authorities'").first() is not None:
        connection.exec_driver_sql(
            "INSERT INTO account_authorities (account_id, region, public_key, private_sealed) "
            "SELECT (SELECT id FROM accounts ORDER BY tenant LIMIT 1), region, public_key, private_sealed FROM authorities")
        connection.exec_driver_sql("DROP TABLE authorities")


def _metrics(connection: Connection) -> None:
    metadata.create_all(connection, checkfirst=True, tables=[
        sample_cursors, meters, measurements, transfers, alarms, contact_methods, deliveries])
    # Documents say more of each guest from here on.
    connection.exec_driver_sql("UPDATE hosts SET generation = generation + 1")


def _disks_and_snapshots(connection: Connection) -> None:
    for table in (disks, snapshots):
        table.create(connection, checkfirst=True)
    held = _columns(connection, "guests")
    for column, words in (("origin", "JSON"), ("iops", "INTEGER DEFAULT '0' NOT NULL"),
                          ("observed_disks", "JSON DEFAULT '[]' NOT NULL")):
        if column not in held:
            connection.exec_driver_sql(f"ALTER TABLE guests ADD COLUMN {column} {words}")


def _regions(connection: Connection) -> None:
    host_zones.create(connection, checkfirst=True)
    home = ""
    if "zone" in _columns(connection, "hosts"):  # each host was in one zone of the only region
        home = connection.exec_driver_sql("SELECT region FROM hosts ORDER BY id LIMIT 1").scalar() or ""
        connection.exec_driver_sql("INSERT INTO host_zones (host_id, region, zone) SELECT id, region, zone FROM hosts")
        for column in ("region", "zone"):
            connection.exec_driver_sql(f"ALTER TABLE hosts DROP COLUMN {column}")
    for table, column in (("domain_entries", "alias_region"), ("transfers", "region")):
        if column not in _columns(connection, table):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} VARCHAR(32) DEFAULT '' NOT NULL")
    connection.exec_driver_sql("UPDATE domain_entries SET alias_region = ? WHERE alias != '' AND alias_region = ''", (home,))
    connection.exec_driver_sql("UPDATE transfers SET region = ? WHERE region = ''", (home,))


def _networks(connection: Connection) -> None:
    networks.create(connection, checkfirst=True)
    for table, column in (("guests", "network"), ("hosts", "networked_generation")):
        if column not in _columns(connection, table):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} INTEGER DEFAULT '0' NOT NULL")
    if "tenant" not in _columns(connection, "accounts"):
        return
    # An account's number was that of its only network, which guests that run are in: it stays that of the first region's.
    home = connection.exec_driver_sql("SELECT region FROM host_zones ORDER BY rowid LIMIT 1").scalar()
    if home is not None:
        connection.exec_driver_sql(
            "INSERT INTO networks (number, account_id, region, peered) SELECT tenant, id, ?, 0 FROM accounts", (home,))
        connection.exec_driver_sql(
            "INSERT INTO networks (account_id, region, peered) "
            "SELECT DISTINCT account_id, region, 0 FROM instances WHERE region != ?", (home,))
    connection.exec_driver_sql(
        "UPDATE guests SET network = COALESCE("
        "(SELECT number FROM networks JOIN instances ON instances.id = guests.instance_id "
        "WHERE networks.account_id = instances.account_id AND networks.region = instances.region), "
        "(SELECT MIN(number) FROM networks WHERE networks.account_id = guests.account_id), 0)")
    # SQLite drops no column that is unique: the table is made anew. Nothing refers to it by more than its name, and the
    # references are not looked at meanwhile (Database.migrate).
    made = str(CreateTable(accounts).compile(connection)).replace("CREATE TABLE accounts", "CREATE TABLE fresh_accounts")
    connection.exec_driver_sql(made)
    connection.exec_driver_sql("INSERT INTO fresh_accounts (id, name, created_at) SELECT id, name, created_at FROM accounts")
    connection.exec_driver_sql("DROP TABLE accounts")
    connection.exec_driver_sql("ALTER TABLE fresh_accounts RENAME TO accounts")
    connection.exec_driver_sql("UPDATE hosts SET generation = generation + 1")


def _automatic_snapshots(connection: Connection) -> None:
    add_ons.create(connection, checkfirst=True)
    held = _columns(connection, "snapshots")
    for column, words in (("source_id", "VARCHAR(64) DEFAULT '' NOT NULL"), ("auto_day", "VARCHAR(10) DEFAULT '' NOT NULL"),
                          ("from_auto", "BOOLEAN DEFAULT '0' NOT NULL"),
                          ("duplicates", "VARCHAR(64) DEFAULT '' NOT NULL"),
                          ("arrived", "BOOLEAN DEFAULT '0' NOT NULL")):
        if column not in held:
            connection.exec_driver_sql(f"ALTER TABLE snapshots ADD COLUMN {column} {words}")
    for index in snapshots.indexes:
        index.create(connection, checkfirst=True)


def _attachments_that_mount(connection: Connection) -> None:
    for table, column, words in (
            ("guests", "observed_refused", "JSON DEFAULT '{}' NOT NULL"),
            ("guests", "observed_mounts", "JSON DEFAULT '{}' NOT NULL"),
            ("disks", "auto_mount", "BOOLEAN DEFAULT '0' NOT NULL")):
        if column not in _columns(connection, table):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} {words}")


def _metadata_options(connection: Connection) -> None:
    for table, column in (("instances", "metadata_options"), ("guests", "observed_metadata")):
        if column not in _columns(connection, table):
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} JSON")
    # Documents say more of each guest from here on.
    connection.exec_driver_sql("UPDATE hosts SET generation = generation + 1")


def _guests_without_public_ipv4(connection: Connection) -> None:
    columns = {row[1]: row for row in connection.exec_driver_sql("PRAGMA table_info(guests)")}
    if columns["public_ipv4"][3]:  # NOT NULL, which SQLite takes from no column of a table that is there
        for index in guests.indexes:
            connection.exec_driver_sql(f"DROP INDEX IF EXISTS {index.name}")
        connection.exec_driver_sql("ALTER TABLE guests RENAME TO former_guests")
        guests.create(connection)
        kept = ", ".join(f'"{column.name}"' for column in guests.columns if column.name in columns)
        connection.exec_driver_sql(f"INSERT INTO guests ({kept}) SELECT {kept} FROM former_guests")
        connection.exec_driver_sql("DROP TABLE former_guests")
    elif "observed_addresses" not in columns:
        connection.exec_driver_sql("ALTER TABLE guests ADD COLUMN observed_addresses JSON")
    # Agents report more of each guest from here on: they are asked to look at each again.
    connection.exec_driver_sql("UPDATE hosts SET generation = generation + 1")


def _columns(connection: Connection, table: str) -> set[str]:
    return {column["name"] for column in inspect(connection).get_columns(table)}


def _shared_address(connection: Connection) -> None:
    _add_columns(connection, "hosts", (
        ("shared_address", "VARCHAR(15) DEFAULT '' NOT NULL"), ("instance_domain", "VARCHAR(255) DEFAULT '' NOT NULL"),
        ("entrance_state", "VARCHAR(16) DEFAULT '' NOT NULL"), ("entrance_reason", "VARCHAR DEFAULT '' NOT NULL")))
    _add_columns(connection, "instances", (("ssh_port", "INTEGER"),))
    next(index for index in instances.indexes if index.unique).create(connection, checkfirst=True)


def _reverse_zones(connection: Connection) -> None:
    reverse_zones.create(connection, checkfirst=True)


def _facts_of_hosts(connection: Connection) -> None:
    _add_columns(connection, "hosts", (
        ("facts", "JSON"), ("refused", "VARCHAR DEFAULT '' NOT NULL"), ("away_since", "FLOAT")))


def _authority_of_hosts(connection: Connection) -> None:
    host_authority.create(connection, checkfirst=True)


def _joining_of_hosts(connection: Connection) -> None:
    join_tokens.create(connection, checkfirst=True)
    _add_columns(connection, "hosts", (("cordoned", "BOOLEAN DEFAULT '0' NOT NULL"),
                                       ("name_server", "BOOLEAN DEFAULT '1' NOT NULL")))


def _add_columns(connection: Connection, table: str, columns: Iterable[tuple[str, str]]) -> None:
    """Those columns that a database made by this version does not have from its foundation on."""
    held = _columns(connection, table)
    for column, words in columns:
        if column not in held:
            connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} {words}")


def _leases(connection: Connection) -> None:
    metadata.create_all(connection, tables=[controllers, leases], checkfirst=True)


def _found_by_index(connection: Connection) -> None:
    """What a controller of many hosts looks for, it finds without reading all that there is."""
    for table in (domain_entries, disks, guests, host_zones, hosts, images, instances, snapshots):
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def _moves(connection: Connection) -> None:
    moves.create(connection, checkfirst=True)


def _pools(connection: Connection) -> None:
    _add_columns(connection, "hosts", (("pool", "VARCHAR DEFAULT '' NOT NULL"),))
    _add_columns(connection, "guests", (("volume", "VARCHAR(64) DEFAULT '' NOT NULL"),))


def _outages(connection: Connection) -> None:
    metadata.create_all(connection, tables=[outages, remains], checkfirst=True)
    for index in hosts.indexes:
        index.create(connection, checkfirst=True)
    _add_columns(connection, "guests", (("ours", "BOOLEAN"), ("heir", "BOOLEAN DEFAULT '0' NOT NULL")))


def _qualifications(connection: Connection) -> None:
    qualifications.create(connection, checkfirst=True)
    _add_columns(connection, "guests", (("observed_qemu", "VARCHAR DEFAULT '' NOT NULL"),))


def _open_operations(connection: Connection) -> None:
    connection.exec_driver_sql("DROP INDEX IF EXISTS ix_operations_open")
    for index in operations.indexes:
        index.create(connection, checkfirst=True)


def _post_copy(connection: Connection) -> None:
    _add_columns(connection, "moves", (("pull", "JSON"),))


def _leaving_addresses(connection: Connection) -> None:
    leaving_addresses.create(connection, checkfirst=True)
    if connection.dialect.name == "postgresql":  # SQLite's integers have no end
        for column in ("generation", "observed_generation", "networked_generation"):
            connection.exec_driver_sql(f"ALTER TABLE hosts ALTER COLUMN {column} TYPE BIGINT")


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (
    _foundation, _operations_by_page, _guests_with_ipv6, _static_ips, _domains, _authorities_of_accounts,
    _metrics, _disks_and_snapshots, _regions, _networks, _automatic_snapshots, _shared_address, _reverse_zones,
    _attachments_that_mount, _metadata_options, _guests_without_public_ipv4,
    _leases, _facts_of_hosts, _authority_of_hosts, _joining_of_hosts, _found_by_index, _moves, _pools, _outages,
    _qualifications, _open_operations, _post_copy, _leaving_addresses)


def upgrade(connection: Connection, version: int) -> None:
    """Bring a database of ``version``, 0 for an empty one, up to this program's, inside the caller's transaction. Refuses a
    newer one."""
    if version > len(MIGRATIONS):
        raise RuntimeError(f"the database is at version {version}, newer than this Skysail ({len(MIGRATIONS)})")
    for migration in MIGRATIONS[version:] if version else (_foundation,):
        migration(connection)
