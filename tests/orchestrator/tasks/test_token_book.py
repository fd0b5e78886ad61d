"""Tokens and the audit log on SQLite and on a real Postgres."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from configs.errors import InvalidInput, NotFound, NotLeading
from orchestrator.tasks.audit_log import FIRST, AuditLog
from orchestrator.tasks.database import Database
from orchestrator.tasks.token_book import PREFIX, TokenBook, TokenRecord
from tests.contracts.task_queue_contract import at_once
from tests.servers.postgres import Postgres


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url)
    yield made
    made.close()


def wanted(**changes: object) -> TokenRecord:
    facts = {"token_id": "", "name": "ann", "kind": "person", "team": "red", "role": "viewer"}
    return TokenRecord(**{**facts, "created_at": time.time(), "created_by": "bob", **changes})  # type: ignore[arg-type]


def test_a_token_is_found_by_itself_alone_and_kept_as_a_digest(database: Database) -> None:
    book = TokenBook(database)
    made, secret = book.create(wanted(expires_at=time.time() + 60))
    assert secret.startswith(PREFIX)
    assert len(secret) == len(PREFIX) + 43  # 256 bits, six in a character
    assert book.find(secret) == made
    assert book.find(secret[:-1]) is None
    assert book.find("") is None
    with database.reading() as connection:
        rows = str(connection.exec_driver_sql("SELECT * FROM tokens").all())
    assert made.token_id in rows
    assert secret[len(PREFIX) :] not in rows
    assert len({book.create(wanted())[1] for _ in range(50)}) == 50


def test_a_token_counts_until_it_ends_or_is_revoked(database: Database) -> None:
    book = TokenBook(database)
    made, _ = book.create(wanted(expires_at=2000.0))
    assert [made.counts_at(now) for now in (1999.9, 2000.0)] == [True, False]
    made, secret = book.create(wanted())
    assert made.counts_at(1e12)
    fresh, other = book.rotate(made.token_id, "carol", grace_seconds=100.0)
    assert (fresh.name, fresh.team, fresh.role, fresh.created_by) == ("ann", "red", "viewer", "carol")
    old = book.find(secret)
    assert old is not None
    assert old.revoked_at is not None
    assert [old.counts_at(old.revoked_at + by) for by in (-1, 0)] == [True, False]
    assert book.revoke(fresh.token_id).revoked_at is not None
    found = book.find(other)
    assert found is not None
    assert not found.counts_at(time.time())
    with pytest.raises(InvalidInput, match="has ended or was revoked"):
        book.rotate(fresh.token_id, "carol")
    with pytest.raises(NotFound, match="there is no such token"):
        book.revoke("000000000000")


def test_a_lifetime_is_kept_when_a_token_is_rotated(database: Database) -> None:
    made, _ = TokenBook(database).create(wanted(created_at=time.time() - 50, expires_at=time.time() + 50))
    fresh, _ = TokenBook(database).rotate(made.token_id, "ann")
    assert fresh.expires_at is not None
    assert fresh.expires_at - fresh.created_at == pytest.approx(100, abs=1)


def test_a_name_is_a_persons_or_a_programs(database: Database) -> None:
    TokenBook(database).create(wanted(name="ci", kind="service"))
    with pytest.raises(InvalidInput, match="ci is a service already"):
        TokenBook(database).create(wanted(name="ci"))


def test_its_last_use_is_noted_to_the_minute(database: Database) -> None:
    book = TokenBook(database)
    made, _ = book.create(wanted())
    for at in (1000.0, 1059.0, 1060.0):
        book.used(book.get(made.token_id), at)
    assert book.get(made.token_id).used_at == 1060.0
    book.used(book.get(made.token_id), 1061.0)
    assert book.get(made.token_id).used_at == 1060.0


def test_rows_that_are_written_at_once_are_one_chain(url: str, database: Database) -> None:
    logs = [AuditLog(Database(url)) for _ in range(4)]

    def ask(n: int) -> None:
        for turn in range(10):
            logs[n].ended(logs[n].asked(f"p{n}", "t", "tag", {"turn": turn, "é": "\u2028"}), "done")

    at_once(4, ask)
    found = AuditLog(database).verify()
    assert (found.rows, found.problem, found.holds_known) == (80, "", None)
    rows = AuditLog(database).page(limit=1000)
    assert [row.seq for row in rows] == [*range(1, 81)]
    by_seq = {row.seq: row for row in rows}
    ended = [row for row in rows if row.outcome == "done"]
    assert len(ended) == 40
    assert all((by_seq[row.of].outcome, by_seq[row.of].name) == ("asked", row.name) for row in ended)
    assert AuditLog(database).newest(3) == rows[-3:]
    assert AuditLog(database).verify(rows[40].sha256).holds_known is True
    for log in logs:
        log._database.close()


def test_an_empty_log_is_whole(database: Database) -> None:
    assert (AuditLog(database).verify().rows, AuditLog(database).verify().head) == (0, FIRST)


@pytest.mark.parametrize("column", ["at", "name", "token_id", "request", "about", "outcome", "of", "previous_sha256"])
def test_a_change_of_any_field_is_found(database: Database, column: str) -> None:
    log = AuditLog(database)
    for _ in range(2):
        log.asked("ann", "t", "tag", {})
    value = "7" if column in ("at", "of") else "'x'"
    with database.writing() as connection:
        connection.exec_driver_sql(f'UPDATE audit SET "{column}" = {value} WHERE seq = 1')
    assert log.verify().problem in ("row 1 was changed", "row 1 does not follow the row before it")


def test_who_no_longer_leads_writes_nothing(postgres: Postgres) -> None:
    postgres.empty()
    stale = Database(postgres.url, fence=7)
    with pytest.raises(NotLeading):
        AuditLog(stale).asked("ann", "t", "tag", {})
    with pytest.raises(NotLeading):
        TokenBook(stale).create(wanted())
    assert AuditLog(stale).verify().rows == 0
    stale.close()
