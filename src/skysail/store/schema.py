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
    text,
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
    # Also where a host was far ahead, and was overtaken.
    Column("generation", _Large, nullable=False, default=1),
    Column("observed_generation", _Large, nullable=False, default=0),
    Column("networked_generation", _Large, nullable=False, default=0, server_default="0"),
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
    # contract.facts.HostFacts, as it told them last. Why it is not spoken with, '' where it is. Since when it has not
    # answered.
    Column("facts", JSON),
    Column("refused", String, nullable=False, default="", server_default=""),
    Column("away_since", Float),
    # Where the disks of its guests are, when other hosts see that, too; '' for files of its own.
    Column("pool", String, nullable=False, default="", server_default=""),
    # ``cordoned``: it is given nothing new. ``name_server``: it answers for the cloud's domains.
    Column("cordoned", Boolean, nullable=False, default=False, server_default="0"),
    Column("name_server", Boolean, nullable=False, default=True, server_default="1"),
    # What is looked at again and again of thousands of hosts, without what else is in their rows: where they are, which
    # have not said that they hold what they shall, and which do not answer.
    Index("ix_hosts_address", "id", "address"),
    Index("ix_hosts_behind", "id", "generation", sqlite_where=text("generation != observed_generation"),
          postgresql_where=text("generation != observed_generation")),
    Index("ix_hosts_away", "id", "away_since", sqlite_where=text("away_since IS NOT NULL"),
          postgresql_where=text("away_since IS NOT NULL")),
)

# Hosts that have not answered for too long, each for as long as its ``away_since`` is ``since`` (hosts/outages.py). ``boot``
# is the one that it was last heard in. ``due_at`` is when the operator's program is asked next to turn it off, NULL while
# nobody wants that, ``asked`` where the operator does; ``tries`` and ``error`` say how that went. From ``fenced_at`` on it is
# off for certain, by the program's word, or the operator's (``vouched``). ``measured_at``: the last minute that its instances
# are known to have failed in. ``vain_at``: when none of them could go on elsewhere.
outages = Table(
    "outages", metadata,
    Column("host_id", ForeignKey("hosts.id"), primary_key=True),
    Column("since", Float, nullable=False),
    Column("boot", String(128), nullable=False, default=""),
    Column("due_at", Float),
    Column("asked", Boolean, nullable=False, default=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("error", String, nullable=False, default=""),
    Column("fenced_at", Float),
    Column("vouched", Boolean, nullable=False, default=False),
    Column("measured_at", _Large, nullable=False, default=0),
    Column("vain_at", Float, nullable=False, default=0.0),
)

# What is left, at a host that failed, of instances that went on elsewhere (hosts/remains.py), by the guest's id there. They
# went on (``how``) with their disks, which are in a ``pool`` of both hosts, so that nothing is left but a guest that must not
# run; or from a ``snapshot``, and their former disks are kept until their operator has them thrown away (``unwanted``): the
# guest's own, and ``disks``, as (id, GiB).
remains = Table(
    "remains", metadata,
    Column("host_id", ForeignKey("hosts.id"), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("instance_id", String(64), nullable=False, index=True),
    Column("instance_name", String(255), nullable=False),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("how", String(16), nullable=False),
    Column("went_to", String(64), nullable=False),
    Column("left_at", Float, nullable=False),
    Column("snapshot", String(255), nullable=False, default=""),
    Column("snapshot_at", Float),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_gib", Integer, nullable=False),
    Column("image", String(64), nullable=False),
    Column("mac", String(17), nullable=False),
    Column("private_ipv4", String(15), nullable=False),
    Column("network", Integer, nullable=False),
    Column("disks", JSON, nullable=False, default=list),
    Column("unwanted", Boolean, nullable=False, default=False),
    Column("observed_state", String(16), nullable=False, default=""),
)

# The authority that hosts and controllers have their certificates of; one row, where there is a second machine.
host_authority = Table(
    "host_authority", metadata,
    Column("id", Integer, primary_key=True),
    Column("certificate", String, nullable=False),
    Column("private_sealed", LargeBinary, nullable=False),
    Column("created_at", Float, nullable=False),
)

# What lets one machine join. ``host``: which it becomes, '' for the one that it asks to be. ``used_key``: SHA-256 of the
# public key of the machine that did.
join_tokens = Table(
    "join_tokens", metadata,
    Column("id", String(8), primary_key=True),
    Column("secret_hash", String(64), nullable=False),
    Column("host", String(64), nullable=False, default=""),
    Column("zone", String(40), nullable=False, default=""),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float),
    Column("used_key", String(64), nullable=False, default=""),
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
    Index("ix_host_zones_zone", "region", "zone", "host_id"),
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
    Index("ix_images_blueprint", "blueprint", "version"),
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
    Index("ix_instances_state", "state"),
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
    # Its system disk, where that is not called as the guest is: it is in a pool, and came to another host with its guest.
    Column("volume", String(64), nullable=False, default="", server_default=""),
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
    # Whether it carries our agents, where its host has said so. ``heir``: its host failed, and its disks go on here.
    Column("ours", Boolean),
    Column("heir", Boolean, nullable=False, default=False, server_default="0"),
    # The QEMU that its process is of, which its host's program need not be any more; '' where that is not known.
    Column("observed_qemu", String, nullable=False, default="", server_default=""),
    Index("uq_guests_public_ipv6", "public_ipv6", unique=True),
    Index("ix_guests_role", "role", "observed_state"),
)

# A public address that a guest had, until its host has said, by a document behind ``generation``, that it leads it there no
# more: nobody else is given it before.
leaving_addresses = Table(
    "leaving_addresses", metadata,
    Column("address", String(39), primary_key=True),
    Column("host_id", String(64), primary_key=True, index=True),
    Column("generation", _Large, nullable=False),
)

# A guest on its way from one host to another (hosts.transit.Move), by the id that it has at the target. Until it has gone
# over its row in ``guests`` is at the source, from then on at the target. ``operation_id`` is whose work it is.
moves = Table(
    "moves", metadata,
    Column("id", String(64), primary_key=True),
    Column("operation_id", String(64), nullable=False),
    Column("instance_id", String(64), nullable=False, index=True),
    Column("guest", String(64), nullable=False),
    Column("source", ForeignKey("hosts.id"), nullable=False, index=True),
    Column("target", ForeignKey("hosts.id"), nullable=False, index=True),
    Column("phase", String(16), nullable=False),
    Column("phase_at", Float, nullable=False),
    Column("terms", JSON, nullable=False),
    Column("passport", JSON),
    Column("destination", JSON),
    Column("progress", JSON),
    Column("source_state", String(16), nullable=False, default=""),
    Column("target_state", String(16), nullable=False, default=""),
    Column("target_reason", String, nullable=False, default=""),
    Column("balance_seconds", Float),
    Column("called_off", String, nullable=False, default=""),
    Column("lost", Boolean, nullable=False, default=False),
    Column("remains", JSON, nullable=False, default=list),
    # contract.migration.Pull, as the target told it last.
    Column("pull", JSON),
)

# Whether guests get whole from one version of QEMU to another (contract.qualification.Qualification).
qualifications = Table(
    "qualifications", metadata,
    Column("sender", String(255), primary_key=True),
    Column("receiver", String(255), primary_key=True),
    Column("machine", String(64), primary_key=True),
    Column("accelerator", String(16), primary_key=True),
    Column("kernel", String, nullable=False),
    Column("at", Float, nullable=False),
    Column("quick", Boolean, nullable=False),
    Column("trials", JSON, nullable=False),
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
    Index("ix_disks_host_id", "host_id"),
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
    Index("ix_snapshots_host_id", "host_id"),
    Index("ix_snapshots_guest_id", "guest_id"),
    Index("ix_snapshots_deleted", "deleted"),
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
    Index("ix_domain_entries_alias", "alias"),
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
    # Of open ones, which are few beside all that ever were, in the order of their age, and those of a resource.
    Index("ix_operations_open_by_age", "created_at", "id", sqlite_where=text("done IS 0"),
          postgresql_where=text("done IS false")),
    Index("ix_operations_open_of_resource", "resource_id", "region", sqlite_where=text("done IS 0"),
          postgresql_where=text("done IS false")),
    # In the order of a page of GetOperations and of GetOperationsForResource: a page reads only its own rows.
    Index("ix_operations_newest", "account_id", "region", "created_at", "id"),
    Index("ix_operations_of_resource", "account_id", "region", "resource_name", "created_at", "id"),
)
