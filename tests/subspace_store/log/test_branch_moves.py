"""The moves of a branch: who moved it, when, why, from where to where; read off the log alone."""

import pytest

from configs.errors import NotFound
from subspace_store import SubspaceReader, SubspaceStore
from subspace_store.log.branch_moves import Move
from subspace_store.log.version import CANDIDATE, MAIN
from subspace_store.storage.memory import MemoryStorage
from tests.subspace_store.builders import merged, opened, random_adapter, reading


@pytest.fixture(scope="module")
def store() -> SubspaceStore:
    """Two versions published, the third rejected; back to 1 and held, released, forward to 2, task a removed."""
    store = opened()
    for number, task in enumerate("ab", 1):
        merged(store, {task: random_adapter(number)})
        store.publish(number, op_key=f"publish {number}", actor="gate")
    merged(store, {"c": random_adapter(3)})
    store.reject(3, "c scores 0.1", op_key="reject 3", actor="gate")
    store.rollback(1, op_key="back", actor="ann", reason="b smells", hold=True)
    store.release(actor="bob")
    store.rollback(2, op_key="forward", actor="bob")
    store.tag("gold", 2, actor="ann")
    store.remove("a", op_key="out", actor="ann", reason="asked for by its owner", publish=True)
    return store


def told(move: Move) -> tuple[str, str, str, int, int]:
    return move.actor, move.how, move.reason, move.before, move.after


def test_every_move_of_main_says_who_did_what_and_why_from_which_version_to_which(store: SubspaceStore) -> None:
    moves = list(reading(store.storage).moves.newest_first(MAIN))
    assert [told(move) for move in reversed(moves)] == [
        ("gate", "published", "passed the gate", 0, 1),
        ("gate", "published", "passed the gate", 1, 2),
        ("ann", "rolled back", "b smells", 2, 1),
        ("bob", "released", "", 1, 1),
        ("bob", "rolled back", "", 1, 2),
        ("ann", "removed", "team/a was removed: asked for by its owner", 2, 4),
    ]
    assert [move.holds for move in reversed(moves)] == [False, False, True, False, False, False]
    log = {entry.seq: entry.time for entry in store.history()}
    assert [move.time for move in moves] == [log[move.seq] for move in moves]


def test_the_candidate_has_moves_of_its_own(store: SubspaceStore) -> None:
    moves = [told(move)[1:] for move in reading(store.storage).moves.newest_first(CANDIDATE)]
    assert moves[::-1] == [
        ("merged", "", 0, 1),
        ("merged", "", 1, 2),
        ("merged", "", 2, 3),
        ("rejected", "c scores 0.1", 3, 2),
        ("rolled back", "b smells", 2, 1),
        ("rolled back", "", 1, 2),
        ("removed", "team/a was removed: asked for by its owner", 2, 4),
    ]


def test_pages_put_together_are_the_whole(store: SubspaceStore) -> None:
    moves = reading(store.storage).moves
    whole, paged = list(moves.newest_first(MAIN)), []
    below = None
    while page := [move for _, move in zip(range(2), moves.newest_first(MAIN, below), strict=False)]:
        paged += page
        below = page[-1].seq
    assert paged == whole
    assert list(moves.since(whole[3].seq)) == whole[:3][::-1]


def test_a_hold_is_no_move_of_the_version_and_is_in_its_place() -> None:
    store = opened()
    merged(store, {"a": random_adapter(1)})
    store.hold("wait for the audit", actor="ann")
    assert [told(move) for move in store.moves.newest_first(MAIN)] == [("ann", "held", "wait for the audit", 0, 0)]
    store.release(actor="ann")
    store.publish(1, op_key="p", actor="gate")
    assert told(next(store.moves.newest_first(MAIN)))[1:] == ("published", "passed the gate", 0, 1)


def test_what_the_branches_named_at_a_moment_is_what_the_last_record_until_then_says(store: SubspaceStore) -> None:
    reader = reading(store.storage)
    named: dict[str, int] = {MAIN: 0, CANDIDATE: 0}
    entries, moves = store.history(), reader.moves
    after = {move.seq: (branch, move.after) for branch in named for move in moves.newest_first(branch)}
    both = {seq: [] for seq in after}  # a rollback moves both with one record
    for branch in named:
        for move in moves.newest_first(branch):
            both[move.seq].append((branch, move.after))
    for entry in entries:
        named |= dict(both.get(entry.seq, []))
        assert moves.at(entry.time) == (named, entry.seq)
    assert moves.at(entries[-1].time + 1000) == ({MAIN: 4, CANDIDATE: 4}, entries[-1].seq)
    with pytest.raises(NotFound, match="there was no store yet"):
        moves.at(entries[0].time - 0.001)


class Counting(MemoryStorage):
    """Counts reads of records."""

    reads = 0

    def read(self, key: str) -> bytes:
        self.reads += key.startswith("log/0")
        return super().read(key)


def test_a_record_is_read_once_and_no_tensor_ever() -> None:
    storage = Counting("counted")
    store = opened(storage)
    for number in range(1, 30):
        merged(store, {f"t{number}": random_adapter(number)})
        store.publish(number, op_key=f"publish {number}", actor="gate")
    reader = SubspaceReader.open(storage)
    storage.reads = 0
    newest = next(reader.moves.newest_first(MAIN))
    assert newest.after == 29
    assert storage.reads <= 20  # two records a version: those of the last two, and what was read ahead
    list(reader.moves.newest_first(MAIN))
    assert storage.reads == reader.state.seq
    list(reader.moves.newest_first(CANDIDATE))
    assert storage.reads == reader.state.seq
    assert "_tensors" not in vars(reader)
