"""Every table of the controller. Times are seconds since the epoch; sizes carry their unit in the name.

An *instance* is what the customer owns; a *guest* is the QEMU process that runs it on a host. A name is unique per
account and region over all resource types, which the table ``names`` guarantees by its primary key.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData(naming_convention={
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
})

# What may grow beyond 31 bits: bytes, serials, moments. SQLite's integers all may.
_Large = BigInteger().with_variant(Integer, "sqlite")

accounts = Table(
    "accounts", metadata,
    Column("id", String(12), primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
)

access_keys = Table(
    "access_keys", metadata,
    Column("id", String(32), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("secret_sealed", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

# One certificate authority per account and region: the account's guests trust its user certificates, with which
# GetInstanceAccessDetails lets in.
authorities = Table(
    "account_authorities", metadata,
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("region", String(32), primary_key=True),
    Column("public_key", String, nullable=False),
    Column("private_sealed", LargeBinary, nullable=False),
)

# The private network of an account in a region. ``peered`` ones are joined with the peer subnets and with each other.
networks = Table(
    "networks", metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("peered", Boolean, nullable=False, default=False),
    UniqueConstraint("account_id", "region"),
)

names = Table(
    "names", metadata,
    Column("account_id", ForeignKey("accounts.id"), primary_key=True),
    Column("region", String(32), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("resource_type", String(32), nullable=False),
    Column("resource_id", String(64), nullable=False),
)

tags = Table(
    "tags", metadata,
    Column("resource_id", String(64), primary_key=True),
    Column("key", String(128), primary_key=True),
    Column("value", String(256)),
)

key_pairs = Table(
    "key_pairs", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("name", String(255), nullable=False),
    Column("public_key", String, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    # Only the region's default key pair keeps its private half; every other one is shown once and forgotten.
    Column("private_sealed", LargeBinary),
    Column("is_default", Boolean, nullable=False, default=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("account_id", "region", "name"),
)

hosts = Table(
    "hosts", metadata,
    Column("id", String(64), primary_key=True),
    Column("address", String, nullable=False),
    Column("generation", Integer, nullable=False, default=1),
    Column("observed_generation", Integer, nullable=False, default=0),
    Column("networked_generation", Integer, nullable=False, default=0, server_default="0"),
    Column("vcpus", Integer, nullable=False, default=0),
    Column("memory_mib", Integer, nullable=False, default=0),
    Column("disk_gib", Integer, nullable=False, default=0),
    Column("accelerator", String(16), nullable=False, default=""),
    Column("seen_at", Float),
    # The one public address that its guests share, and the domain that their names are below; '' where there is none.
    Column("shared_address", String(15), nullable=False, default="", server_default=""),
    Column("instance_domain", String(255), nullable=False, default="", server_default=""),
    Column("entrance_state", String(16), nullable=False, default="", server_default=""),
    Column("entrance_reason", String, nullable=False, default="", server_default=""),
)

# The controllers that work on this database, each in a ``place`` of its own; one is gone once the database's clock is past
# ``until``. What only one of them does at a time has a lease, whose number grows when it changes hands.
controllers = Table(
    "controllers", metadata,
    Column("id", String(64), primary_key=True),
    Column("place", String, nullable=False),
    Column("until", Float, nullable=False),
)

leases = Table(
    "leases", metadata,
    Column("name", String(128), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("number", _Large, nullable=False),
)

# The availability zones that a host serves: one machine may serve all of a cloud's, and many machines one.
host_zones = Table(
    "host_zones", metadata,
    Column("host_id", ForeignKey("hosts.id"), primary_key=True),
    Column("region", String(32), primary_key=True),
    Column("zone", String(4), primary_key=True),
)

images = Table(
    "images", metadata,
    Column("host_id", ForeignKey("hosts.id"), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("blueprint", String(64), nullable=False),
    Column("name", String(128), nullable=False),
    Column("user", String(32), nullable=False),
    Column("version", String(64), nullable=False),
    Column("size_gib", Integer, nullable=False),
)

instances = Table(
    "instances", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("zone", String(4), nullable=False),
    Column("name", String(255), nullable=False),
    Column("blueprint_id", String(64), nullable=False),
    Column("blueprint_name", String(128), nullable=False),
    Column("bundle_id", String(64), nullable=False),
    Column("username", String(32), nullable=False),
    Column("key_pair_name", String(255), nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    # The port of a shared address that leads to its SSH.
    Column("ssh_port", Integer),
    # contract.document.MetadataOptions; the defaults where there are none.
    Column("metadata_options", JSON),
    Index("ix_instances_listing", "account_id", "region", "name"),
    Index("uq_instances_ssh_port", "ssh_port", unique=True),
)

guests = Table(
    "guests", metadata,
    Column("id", String(64), primary_key=True),
    Column("instance_id", String(64), nullable=False, index=True),
    Column("instance_name", String(255), nullable=False),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("host_id", ForeignKey("hosts.id"), nullable=False, index=True),
    Column("role", String(8), nullable=False),
    Column("starts", Integer, nullable=False, default=1),
    Column("reboots", Integer, nullable=False, default=0),
    Column("force", Boolean, nullable=False, default=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_gib", Integer, nullable=False),
    Column("image", String(64), nullable=False),
    Column("mac", String(17), nullable=False, unique=True),
    Column("private_ipv4", String(15), nullable=False, unique=True),
    Column("public_ipv4", String(15), unique=True),
    Column("public_ipv6", String(39)),
    Column("personality", JSON, nullable=False),
    Column("observed_state", String(16), nullable=False, default=""),
    Column("observed_starts", Integer, nullable=False, default=0),
    Column("observed_reboots", Integer, nullable=False, default=0),
    Column("reason", String, nullable=False, default=""),
    Column("host_keys", JSON, nullable=False, default=list),
    Column("witnessed_at", Float),
    Column("rx_bytes", _Large, nullable=False, default=0),
    Column("tx_bytes", _Large, nullable=False, default=0),
    # The copy in a snapshot that its system disk was made of (contract.document.Origin).
    Column("origin", JSON),
    Column("iops", Integer, nullable=False, default=0, server_default="0"),
    Column("observed_disks", JSON, nullable=False, default=list, server_default="[]"),
    Column("observed_refused", JSON, nullable=False, default=dict, server_default="{}"),
    Column("observed_mounts", JSON, nullable=False, default=dict, server_default="{}"),
    # The number of its private network, which it keeps while it goes.
    Column("network", Integer, nullable=False, default=0, server_default="0"),
    Column("observed_metadata", JSON),
    Column("observed_addresses", JSON),
    Index("uq_guests_public_ipv6", "public_ipv6", unique=True),
)

ports = Table(
    "ports", metadata,
    Column("instance_id", ForeignKey("instances.id"), primary_key=True),
    Column("protocol", String(8), primary_key=True),
    Column("from_port", Integer, primary_key=True),
    Column("to_port", Integer, primary_key=True),
    Column("cidrs", JSON, nullable=False),
    Column("ipv6_cidrs", JSON, nullable=False),
    Column("cidr_aliases", JSON, nullable=False),
)

static_ips = Table(
    "static_ips", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("name", String(255), nullable=False),
    Column("ipv4", String(15), nullable=False, unique=True),
    # Whose guest has the address now.
    Column("instance_id", ForeignKey("instances.id"), unique=True),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("account_id", "region", "name"),
)

# Block storage. ``made``: its host has had it once. ``attachment``: '', attaching, attached or detaching.
disks = Table(
    "disks", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("zone", String(4), nullable=False),
    Column("name", String(255), nullable=False),
    Column("host_id", ForeignKey("hosts.id"), nullable=False),
    Column("size_gib", Integer, nullable=False),
    Column("origin", JSON),
    Column("role", String(8), nullable=False, default="keep"),
    Column("made", Boolean, nullable=False, default=False),
    Column("state", String(16), nullable=False),
    Column("instance_id", ForeignKey("instances.id"), index=True),
    Column("path", String(16), nullable=False, default=""),
    Column("attachment", String(16), nullable=False, default=""),
    Column("auto_mount", Boolean, nullable=False, default=False, server_default="0"),
    Column("created_at", Float, nullable=False),
    Column("observed_state", String(16), nullable=False, default=""),
    Column("reason", String, nullable=False, default=""),
    Index("ix_disks_listing", "account_id", "region", "name"),
)

# Copies of volumes, of an instance or of one disk. ``deleted``: gone for its owner; its files stay while others stand on them
# (``parents``). ``source`` is what its owner is shown of where it came from, ``volumes`` what its host copies. An automatic
# one has the day (UTC, as 2026-01-31) that it is of in ``auto_day``, and no name of its own; ``source_id`` is the instance or
# disk that it is of. ``from_auto``: it was copied from an automatic one. One with ``duplicates`` shares that one's files, one
# that ``arrived`` was imported.
snapshots = Table(
    "snapshots", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("name", String(255), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("host_id", ForeignKey("hosts.id"), nullable=False),
    Column("guest_id", String(64), nullable=False, default=""),
    Column("volumes", JSON, nullable=False),
    Column("source", JSON, nullable=False),
    Column("size_gib", Integer, nullable=False),
    Column("role", String(8), nullable=False, default="keep"),
    Column("deleted", Boolean, nullable=False, default=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("observed_state", String(16), nullable=False, default=""),
    Column("progress", Integer, nullable=False, default=0),
    Column("consistency", String(8), nullable=False, default=""),
    Column("frozen_ms", Float, nullable=False, default=0.0),
    Column("parents", JSON, nullable=False, default=list),
    Column("reason", String, nullable=False, default=""),
    Column("source_id", String(64), nullable=False, default="", server_default=""),
    Column("auto_day", String(10), nullable=False, default="", server_default=""),
    Column("from_auto", Boolean, nullable=False, default=False, server_default="0"),
    Column("duplicates", String(64), nullable=False, default="", server_default=""),
    Column("arrived", Boolean, nullable=False, default=False, server_default="0"),
    Index("ix_snapshots_listing", "account_id", "region", "kind", "name"),
    Index("ix_snapshots_source_id", "source_id"),
)

# Automatic snapshots of an instance or a disk, each day at ``hour`` (UTC); on ``held_day`` still at ``held_hour``, as it was
# before its owner chose another. ``last_day`` is the last day that needs none any more. Disabling keeps the row.
add_ons = Table(
    "add_ons", metadata,
    Column("resource_id", String(64), primary_key=True),
    Column("resource_type", String(32), nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("hour", Integer, nullable=False),
    Column("held_hour", Integer, nullable=False, default=0),
    Column("held_day", String(10), nullable=False, default=""),
    Column("last_day", String(10), nullable=False),
)

# A domain is what the customer owns, and the zone that name servers answer for. A deleted one keeps its row, with the role
# ``gone``, until its hosts let go of the zone. Names are absolute without the final dot. ``ds`` belongs to the sealed key.
domains = Table(
    "domains", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("name", String(255), nullable=False, unique=True),
    Column("role", String(8), nullable=False, default="serve"),
    Column("serial", _Large, nullable=False),
    Column("name_servers", JSON, nullable=False),
    Column("signing_sealed", LargeBinary),
    Column("ds", String, nullable=False, default=""),
    Column("created_at", Float, nullable=False),
    Index("ix_domains_listing", "account_id", "role", "name"),
)

# ``target`` is what the customer wrote, ``record`` what it means to a name server; an alias has the name of a resource
# in ``alias``, its region in ``alias_region``, and no record of its own.
domain_entries = Table(
    "domain_entries", metadata,
    Column("id", String(64), primary_key=True),
    Column("domain_id", ForeignKey("domains.id"), nullable=False),
    Column("name", String(255), nullable=False),
    Column("type", String(8), nullable=False),
    Column("target", String, nullable=False),
    Column("record", String, nullable=False, default=""),
    Column("alias", String(255), nullable=False, default=""),
    Column("alias_region", String(32), nullable=False, default="", server_default=""),
    Column("ttl", Integer, nullable=False),
    Index("ix_domain_entries_listing", "domain_id", "name", "type"),
)

# Zones with the names of addresses, as the operator's configuration has them. ``domain``: what is above the name of an
# address that no domain leads to.
reverse_zones = Table(
    "reverse_zones", metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(255), nullable=False, unique=True),
    Column("role", String(8), nullable=False),
    Column("serial", _Large, nullable=False),
    Column("name_servers", JSON, nullable=False),
    Column("domain", String(255), nullable=False),
)

zone_reports = Table(
    "zone_reports", metadata,
    Column("host_id", ForeignKey("hosts.id"), primary_key=True),
    Column("domain_id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("serial", _Large, nullable=False),
    Column("ds", JSON, nullable=False),
    Column("reason", String, nullable=False, default=""),
)

# How far each host's samples were taken in: all up to ``sequence`` of ``ring``.
sample_cursors = Table(
    "sample_cursors", metadata,
    Column("host_id", ForeignKey("hosts.id"), primary_key=True),
    Column("ring", String(32), nullable=False),
    Column("sequence", _Large, nullable=False),
)

# What an instance has used in all; it goes when the last measurement of an instance that is gone has been deleted.
meters = Table(
    "meters", metadata,
    Column("instance_id", String(64), primary_key=True),
    Column("cpu_seconds", Float, nullable=False, default=0.0),
    Column("rx_bytes", _Large, nullable=False, default=0),
    Column("tx_bytes", _Large, nullable=False, default=0),
    Column("sampled_at", Float, nullable=False),
)

# One instance's samples of the ``seconds`` (60 or 300) from ``at`` on, rolled up: metric to count, sum, minimum, maximum.
measurements = Table(
    "measurements", metadata,
    Column("instance_id", String(64), primary_key=True),
    Column("seconds", Integer, primary_key=True),
    Column("at", _Large, primary_key=True),
    Column("stats", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

# Bytes of one instance in one month (UTC, as 2026-01). It outlives its instance: they were transferred.
transfers = Table(
    "transfers", metadata,
    Column("instance_id", String(64), primary_key=True),
    Column("month", String(7), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("instance_name", String(255), nullable=False),
    Column("bundle_id", String(64), nullable=False, default=""),
    Column("region", String(32), nullable=False, default="", server_default=""),
    Column("rx_bytes", _Large, nullable=False, default=0),
    Column("tx_bytes", _Large, nullable=False, default=0),
)

alarms = Table(
    "alarms", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("name", String(255), nullable=False),
    Column("instance_id", ForeignKey("instances.id"), nullable=False, index=True),
    Column("metric", String(64), nullable=False),
    Column("comparison", String(64), nullable=False),
    Column("threshold", Float, nullable=False),
    Column("evaluation_periods", Integer, nullable=False),
    Column("datapoints_to_alarm", Integer, nullable=False),
    Column("treat_missing_data", String(16), nullable=False),
    Column("contact_protocols", JSON, nullable=False),
    Column("notification_triggers", JSON, nullable=False),
    Column("notification_enabled", Boolean, nullable=False),
    Column("state", String(24), nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("account_id", "region", "name"),
)

# ``status`` as the API shows it: PendingVerification, Valid. The code that verifies it is kept as its SHA-256.
contact_methods = Table(
    "contact_methods", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("protocol", String(8), nullable=False),
    Column("endpoint", String(256), nullable=False),
    Column("status", String(24), nullable=False),
    Column("code_digest", String(64), nullable=False, index=True),
    Column("asked_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    UniqueConstraint("account_id", "region", "protocol"),
)

# Notices on their way. One is deleted when its receiver took it; ``due_at`` is NULL once it was given up.
deliveries = Table(
    "deliveries", metadata,
    Column("id", String(64), primary_key=True),
    Column("contact_method_id", String(64), nullable=False, index=True),
    Column("endpoint", String(256), nullable=False),
    Column("subject", String, nullable=False),
    Column("body", String, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due_at", Float, index=True),
    Column("error", String, nullable=False, default=""),
)

# The durable record of work. ``status`` is what the customer sees; ``step`` and ``done`` drive the workflow, which may
# go on after the customer's answer (a deleted instance's guest is torn down behind a terminal operation).
operations = Table(
    "operations", metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("region", String(32), nullable=False),
    Column("zone", String(4), nullable=False, default=""),
    Column("type", String(64), nullable=False),
    Column("resource_name", String(255), nullable=False),
    Column("resource_type", String(32), nullable=False),
    Column("resource_id", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("details", String, nullable=False, default=""),
    Column("error_code", String(64)),
    Column("error_details", String),
    Column("created_at", Float, nullable=False),
    Column("status_changed_at", Float, nullable=False),
    Column("workflow", String(32), nullable=False, default=""),
    Column("step", Integer, nullable=False, default=0),
    Column("unwinding", Boolean, nullable=False, default=False),
    Column("done", Boolean, nullable=False, default=True),
    Column("arguments", JSON, nullable=False, default=dict),
    Index("ix_operations_open", "done"),
    # In the order of a page of GetOperations and of GetOperationsForResource: a page reads only its own rows.
    Index("ix_operations_newest", "account_id", "region", "created_at", "id"),
    Index("ix_operations_of_resource", "account_id", "region", "resource_name", "created_at", "id"),
)
