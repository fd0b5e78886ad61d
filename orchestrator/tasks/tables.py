"""The tables of the task database as this release has them. How older ones become these: migrations/.

A task's truth is the JSON in `tasks.record`. The other columns of that table are copies of single fields, written with
it, so that the database can choose and order rows without reading their records.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

HEAD = "0011"
"""Revision of these tables: that of the newest file in migrations/versions/."""

metadata = MetaData()

schema = Table(
    "onebasis_schema",  # not Alembic's usual name: MLflow, which also uses it, may share the database
    metadata,
    Column("version_num", String(32), primary_key=True),
)

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", String(40), primary_key=True),
    Column("team", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("client_key", String(120), nullable=False),
    Column("state", String(20), nullable=False),
    Column("token", String(40), nullable=False, default=""),
    Column("revision", Integer, nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("version", Integer, nullable=False, server_default="0"),
    Column("content_sha256", String(64), nullable=False, server_default=""),
    Column("blocked", String(20), nullable=False, server_default=""),
    Column("base_model", String(63), nullable=False, server_default=""),
    Column("pool", String(63), nullable=False, server_default=""),
    Column("not_before", Float),
    Column("gave_back_at", Float),
    Column("max_run_seconds", Float),
    Column("lease_until", Float),
    Column("progress", Text),
    Column("record", Text, nullable=False),
    UniqueConstraint("team", "client_key"),
    Index("tasks_by_name", "team", "name"),
    Index("tasks_by_content", "team", "content_sha256"),
    Index("tasks_by_age", "submitted_at", "task_id"),
    Index("tasks_by_team", "team", "submitted_at", "task_id"),
    Index("tasks_by_state", "state", "submitted_at", "task_id"),
    Index("tasks_by_version", "base_model", "state", "version", "task_id"),
    Index("tasks_by_base_model", "base_model", "submitted_at", "task_id"),
    Index("tasks_in_line", "state", "blocked", "team", "pool", "priority", "submitted_at", "task_id"),
    Index("tasks_by_pool", "state", "pool", "submitted_at", "task_id"),
    Index("tasks_by_due", "state", "blocked", "not_before"),
)
"""`priority` is kept negative, as `-spec.priority`: so a team's waiting tasks of one pool are one index read forwards.
`blocked` says what keeps a queued task from standing in line: however many there are, they are no part of what is
read."""

awaits = Table(
    "awaits",
    metadata,
    Column("after_id", String(40), primary_key=True),
    Column("task_id", String(40), primary_key=True),
)
"""Tasks that come after another, until that one is published: a copy of `record.awaits`, to be found by the other."""

pauses = Table(
    "pauses",
    metadata,
    Column("team", String(63), primary_key=True),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
)
"""Pauses of teams, and of the service, whose team is empty. Those of single tasks are in their records."""

drains = Table(
    "drains",
    metadata,
    Column("what", String(255), primary_key=True),
    Column("is_node", Boolean, primary_key=True),
    Column("by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("waits", Boolean, key="lets_end", nullable=False),
)
"""Workers, and machines by their addresses, that get nothing new before maintenance."""

leadership = Table(
    "leadership",
    metadata,
    Column("fence", Integer, primary_key=True, autoincrement=False),
    Column("holder", String(120), nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("since", Float, nullable=False),
    Column("until", Float, nullable=False),
    Column("service_id", String(40), nullable=False),
    Column("settings", Text, nullable=False),
)
"""The lease of the control plane that leads: one row. `fence` grows with each new leader, and as the table's key it
cannot change while a leader's transaction holds it; prolonging the lease changes other columns, and waits for none.
All times are those of the database's clock."""

control_planes = Table(
    "control_planes",
    metadata,
    Column("member_id", String(120), primary_key=True),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("since", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
)
"""The control planes that were seen, the leader too."""

events = Table(
    "events",
    metadata,
    Column("event_id", Integer, primary_key=True, autoincrement=True),
    Column("task_id", String(40), nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("text", Text, nullable=False),
    Column("facts", Text),
    Index("events_by_task", "task_id", "event_id"),
)
"""`text` is for people; `facts`, as JSON, for traces: empty for log lines, and for what older releases wrote."""

uses = Table(
    "uses",
    metadata,
    Column("task_id", String(40), primary_key=True),
    Column("token", String(120), primary_key=True),
    Column("team", String(63), nullable=False),
    Column("what", String(20), nullable=False),
    Column("seconds", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("places", Integer, nullable=False, server_default="1"),
    Column("gpus", Float, nullable=False, server_default="0"),
    Column("worker", String(80), nullable=False, server_default=""),
    Column("done_at", Text),
)
"""Worker-seconds, one row for each order that a worker had, the places of the worker, and the GPUs of each. `token` is
the order's: reported twice, it counts once. `done_at`, as JSON, is the order's `DoneAt`, for traces."""

team_uses = Table(
    "team_uses",
    metadata,
    Column("team", String(63), primary_key=True),
    Column("seconds", Float, nullable=False),
    Column("at", Float, nullable=False),
    Column("gpu_seconds", Float, nullable=False, server_default="0"),
)
"""Place-seconds and GPU-seconds summed by team, decayed to `at`, so that nobody has to add up all rows."""

tokens = Table(
    "tokens",
    metadata,
    Column("token_id", String(40), primary_key=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("team", String(63), nullable=False),
    Column("role", String(20), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("expires_at", Float),
    Column("used_at", Float),
    Column("revoked_at", Float),
)
"""Tokens of people and service accounts, as digests. `team` is empty for all teams."""

audit = Table(
    "audit",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("name", Text, nullable=False),
    Column("token_id", Text, nullable=False),
    Column("request", String(40), nullable=False),
    Column("about", Text, nullable=False),
    Column("outcome", String(40), nullable=False),
    Column("of", BigInteger, nullable=False),
    Column("previous_sha256", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
)
"""Every request that writes, in a chain of digests: see audit_log.py."""

kept_answers = Table(
    "kept_answers",
    metadata,
    Column("name", String(120), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("at", Float, nullable=False),
    Column("answer", Text),
    Index("kept_answers_by_age", "at"),
)
"""Requests that had a key, with their answers as JSON; without one while they are carried out: see answer_book.py."""

happenings = Table(
    "happenings",
    metadata,
    Column("happening_id", Integer, primary_key=True, autoincrement=True),
    Column("key", String(200), nullable=False, unique=True),
    Column("kind", String(20), nullable=False),
    Column("at", Float, nullable=False),
    Column("sentence", Text, nullable=False),
    Column("team", String(63), nullable=False),
    Column("task_id", String(40), nullable=False),
    Column("title", String(130), nullable=False),
    Column("base_model", String(63), nullable=False),
    Column("version", BigInteger),
    Column("is_given_out", Boolean, nullable=False),
    Index("happenings_to_give_out", "is_given_out", "happening_id"),
)
"""What webhooks are told of: see outbox.py. Not numbered in the order of their commits, hence `is_given_out`."""

deliveries = Table(
    "deliveries",
    metadata,
    Column("happening_id", Integer, primary_key=True, autoincrement=False),
    Column("hook", String(130), primary_key=True),
    Column("tries", Integer, nullable=False),
    Column("due_at", Float),
    Column("tried_at", Float),
    Column("status", String(20), nullable=False),
    Column("answer", Text, nullable=False),
    Index("deliveries_by_due", "due_at"),
    Index("deliveries_by_hook", "hook", "happening_id"),
)
"""What each webhook is sent. `due_at` is empty once it was taken, or given up."""

verdicts = Table(
    "verdicts",
    metadata,
    Column("base_model", String(63), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("is_passed", Boolean, nullable=False),
    Column("reason", Text, nullable=False),
    Column("code", String(40), nullable=False),
    Column("at", Float, nullable=False),
)
"""What `gate.pre_publish` answered, once for each version."""

followers = Table(
    "followers",
    metadata,
    Column("name", String(80), primary_key=True),
    Column("number", BigInteger, nullable=False),
)
"""How far those have come who tell others of events, requests or versions: see followers.py."""
