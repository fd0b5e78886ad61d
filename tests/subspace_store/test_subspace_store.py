"""The store from outside: what a worker, the control plane and a person see."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch

from configs.errors import Conflict, Corrupt, Fenced, InvalidInput, NameTaken, NotFound, Unavailable
from subspace_store import (
    Adapter,
    ModuleUpdate,
    StagedAdapter,
    SubspaceReader,
    SubspaceStore,
    TaskScore,
    adapter_to_bytes,
    digest,
)
from subspace_store.merge_writer import SNAPSHOT_EVERY
from subspace_store.refs import Refs
from subspace_store.storage.memory import MemoryStorage
from tests.subspace_store.builders import (
    BASE,
    FaultyStorage,
    deltas,
    fresh_storage,
    in_the_basis,
    merged,
    opened,
    random_adapter,
    reading,
    refined,
    relative_distance,
    staged,
)


def three_published() -> SubspaceStore:
    """Versions 1, 2, 3 with tasks a, b, c; all published."""
    store = opened()
    for number, task in enumerate("abc", 1):
        merged(store, {task: random_adapter(number)})
        store.publish(number, op_key=f"publish {number}", actor="test")
    return store


# Opening


def test_a_reader_of_an_empty_folder_sees_an_empty_subspace_and_writes_nothing() -> None:
    storage = fresh_storage()
    reader = reading(storage)
    assert reader.state.versions == {}
    assert reader.basis() == {}
    assert reader.footprint().total_numbers == 0
    assert math.isnan(reader.footprint().ratio_with_basis)
    assert storage.keys("") == []


def test_reading_and_previewing_write_nothing() -> None:
    store = three_published()
    before = store.storage.keys("")
    reader = reading(store.storage)
    reader.adapter("a")
    reader.diff(1, 3)
    reader.footprint(2)
    reader.history()
    reader.preview_rollback(1)
    reader.collectable()
    reader.forecast({"new": random_adapter(9)})
    assert store.storage.keys("") == before


def test_a_reader_has_nothing_that_writes() -> None:
    writes = {name for kind in (Refs, SubspaceStore) for name in vars(kind) if not name.startswith("_")}
    assert {"merge", "refine", "remove", "publish", "rollback", "expire", "collect", "stage", "tag"} < writes
    assert {name for name in dir(reading(fresh_storage())) if name in writes} == {"open"}


def test_a_folder_of_another_base_model_is_refused_with_both_names() -> None:
    storage = fresh_storage()
    SubspaceStore.open(storage, base_model="minilm", base_sha256="aa", writer="w")
    for open_one in (partial(SubspaceStore.open, writer="w"), SubspaceReader.open):
        with pytest.raises(InvalidInput, match=r"(?s)'minilm', not 'llama'"):
            open_one(storage, base_model="llama")
        with pytest.raises(InvalidInput, match="'aa', not 'bb'"):
            open_one(storage, base_model="minilm", base_sha256="bb")
    assert SubspaceReader.open(storage).base_model == "minilm"
    assert SubspaceReader.open(storage).state.epoch == 1


def test_one_adapter_merged_and_published_is_served_with_its_head() -> None:
    store = opened()
    adapter = random_adapter(1)
    version = merged(store, {"a": adapter})
    assert (version.number, version.parent, version.added[0].name) == (1, 0, "team/a")
    with pytest.raises(NotFound, match="version 0 holds no task a"):
        store.adapter("a")
    store.publish(1, op_key="p", actor="test")
    served = store.adapter("a")
    assert (served.base_model, served.info) == (BASE, adapter.info)
    assert torch.equal(served.head["classifier.weight"], adapter.head["classifier.weight"])
    assert adapter_to_bytes(store.delivered("a")) == adapter_to_bytes(adapter)
    share = sum(u.energy for u in served.modules.values()) / sum(u.energy for u in adapter.modules.values())
    assert share >= 0.98
    assert version.added[0].delivered_energy == pytest.approx(sum(u.energy for u in adapter.modules.values()))
    assert version.added[0].parameter_count == adapter.parameter_count
    assert version.added[0].head_count == 10


def test_the_same_request_again_is_the_same_version() -> None:
    storage = fresh_storage()
    store = opened(storage)
    first = merged(store, {"a": random_adapter(1)}, op_key="k")
    keys = storage.keys("blobs/") + storage.keys("log/0")
    assert merged(store, {"a": random_adapter(1)}, op_key="k") == first
    assert storage.keys("blobs/") + storage.keys("log/0") == keys
    assert merged(opened(storage, writer="successor"), {"a": random_adapter(1)}, op_key="k") == first


def test_a_key_of_another_operation_is_a_conflict() -> None:
    store = opened()
    store.hold("wait", actor="test", op_key="taken")
    with pytest.raises(Conflict, match="under op_key 'taken' another request was done, a hold"):
        merged(store, {"a": random_adapter(1)}, op_key="taken")


# Under the key "k" the first was done; the others are not the same.
OTHER_REQUESTS: Mapping[str, tuple[Callable[[SubspaceStore], object], ...]] = {
    "merge": (
        lambda s: merged(s, {"d": random_adapter(4)}, "k"),
        lambda s: merged(s, {"e": random_adapter(5)}, "k"),
        lambda s: merged(s, {"d": random_adapter(4), "e": random_adapter(5)}, "k"),
        lambda s: s.remove("b", op_key="k", actor="test"),
    ),
    "refine": (
        lambda s: refined(s, {"a": in_the_basis(s, 7, 3)}, "k"),
        lambda s: refined(s, {"b": in_the_basis(s, 8, 3)}, "k"),
        lambda s: merged(s, {"a": random_adapter(1)}, "k"),
    ),
    "scores": (
        lambda s: s.record_scores(3, [TaskScore(task_id="a", score=0.5, count=10)], op_key="k", actor="test"),
        lambda s: s.record_scores(2, [TaskScore(task_id="a", score=0.5, count=10)], op_key="k", actor="test"),
    ),
    "rollback": (
        lambda s: s.rollback(2, op_key="k", actor="test"),
        lambda s: s.rollback(1, op_key="k", actor="test"),
        lambda s: s.rollback(2, op_key="k", actor="test", hold=True),
        lambda s: s.publish(2, op_key="k", actor="test"),
    ),
    "remove": (
        lambda s: s.remove("c", op_key="k", actor="test"),
        lambda s: s.remove("b", op_key="k", actor="test"),
        lambda s: s.remove("c", op_key="k", actor="test", publish=True),
    ),
    "tag": (
        lambda s: s.tag("good", 2, op_key="k", actor="test"),
        lambda s: s.tag("better", 2, op_key="k", actor="test"),
        lambda s: s.tag("good", 3, op_key="k", actor="test"),
    ),
    "hold": (
        lambda s: s.hold("an audit", op_key="k", actor="test"),
        lambda s: s.hold("a holiday", op_key="k", actor="test"),
        lambda s: s.release(op_key="k", actor="test"),
    ),
    "quarantine": (
        lambda s: s.quarantine("d", "leaks", op_key="k", actor="test"),
        lambda s: s.quarantine("e", "leaks", op_key="k", actor="test"),
        lambda s: s.unquarantine("d", op_key="k", actor="test"),
    ),
    "pin": (
        lambda s: s.pin(2, "red", 9e9, op_key="k", actor="test"),
        lambda s: s.pin(1, "red", 9e9, op_key="k", actor="test"),
        lambda s: s.pin(2, "blue", 9e9, op_key="k", actor="test"),
        lambda s: s.unpin(2, "red", op_key="k", actor="test"),
    ),
    "expire": (
        lambda s: s.expire([1], op_key="k", actor="test"),
        lambda s: s.expire([2], op_key="k", actor="test"),
        lambda s: s.expire([1, 2], op_key="k", actor="test"),
    ),
    "drop": (
        lambda s: s.drop_adapters(["a"], op_key="k", actor="test"),
        lambda s: s.drop_adapters(["b"], op_key="k", actor="test"),
        lambda s: s.drop_adapters(["a", "b"], op_key="k", actor="test"),
    ),
}


@pytest.mark.parametrize("kind", OTHER_REQUESTS)
def test_a_key_that_names_another_request_is_refused_and_the_same_request_is_done_once(kind: str) -> None:
    store = three_published()
    first, *others = OTHER_REQUESTS[kind]
    first(store)
    before = store.state
    for other in others:
        with pytest.raises(Conflict, match="under op_key 'k' another request was done"):
            other(store)
        assert store.state == before
    first(store)
    assert store.state == before
    successor = opened(store.storage, writer="successor")
    with pytest.raises(Conflict, match="under op_key 'k' another request was done"):
        others[0](successor)


def test_adapters_that_were_let_go_may_be_asked_for_again_whatever_was_done_since() -> None:
    store = three_published()
    store.drop_adapters(["b"], op_key="d", actor="test")
    store.remove("a", op_key="r", actor="test", publish=True)  # b is made again, from a version not published alone
    store.drop_adapters(["b"], op_key="d", actor="test")
    store.remove("b", op_key="r2", actor="test", publish=True)
    store.expire([n for n in store.state.versions if n not in store.state.refs.values()], op_key="e", actor="test")
    before = store.state
    store.drop_adapters(["b"], op_key="d", actor="test")
    assert store.state == before
    with pytest.raises(Conflict, match="another request was done, a drop-adapters"):
        store.drop_adapters(["b", "c"], op_key="d", actor="test")


def test_a_pin_of_thirty_days_asked_for_again_later_is_the_same_request_and_another_end_is_another() -> None:
    store = three_published()
    store.pin(2, "red", days=30, op_key="k", actor="test")
    (end,) = store.state.pins[2].values()
    store.pin(2, "red", days=30.0, op_key="k", actor="test")
    store.pin(2, "blue", 9e9, op_key="b", actor="test")
    for other in ({"until": end}, {"days": 31}, {}):
        with pytest.raises(Conflict, match="another request was done, a pin"):
            store.pin(2, "red", **other, op_key="k", actor="test")  # type: ignore[arg-type]
    with pytest.raises(Conflict, match="another request was done, a pin"):
        store.pin(2, "blue", 9e9 + 60, op_key="b", actor="test")
    with pytest.raises(InvalidInput, match="one end"):
        store.pin(2, "red", 9e9, days=1, actor="test")
    assert store.state.pins == {2: {"red": end, "blue": 9e9}}


NOTHING_NEW = {
    "tag": lambda s, **keys: s.tag("gold", 2, **keys),
    "hold": lambda s, **keys: s.hold("why", **keys),
    "release": lambda s, **keys: s.release(**keys),
    "quarantine": lambda s, **keys: s.quarantine("x", "why", **keys),
    "unquarantine": lambda s, **keys: s.unquarantine("x", **keys),
    "pin": lambda s, **keys: s.pin(2, "red", **keys),
    "unpin": lambda s, **keys: s.unpin(2, "red", **keys),
    "expire": lambda s, **keys: s.expire([1], **keys),
    "drop-adapters": lambda s, **keys: s.drop_adapters(["a"], **keys),
}


@pytest.mark.parametrize("what", NOTHING_NEW)
def test_the_key_of_a_request_that_changed_nothing_belongs_to_it_too(what: str) -> None:
    store, ask = three_published(), NOTHING_NEW[what]
    ask(store, actor="test")
    before = store.state
    ask(store, actor="test")  # it is so already: without a key, no record
    assert store.state == before
    ask(store, actor="test", op_key="k")
    ask(store, actor="test", op_key="k")
    ours = (before.seq + 1, {**before.op_keys, "k": store.state.op_keys["k"]})
    assert (store.state.seq, store.state.op_keys) == ours
    assert replace(store.state, seq=0, head_sha256="", op_keys={}, asked={}) == replace(
        before, seq=0, head_sha256="", op_keys={}, asked={}
    )
    for reader in (store, SubspaceReader.open(store.storage)):  # by whoever folds the log
        assert reader.state.op_keys["k"] == store.state.op_keys["k"]
    with pytest.raises(Conflict, match=f"another request was done, a {what}"):
        store.tag("other", 3, actor="test", op_key="k")
    assert "other" not in store.state.tags


def test_requests_about_versions_repeat_without_a_second_record() -> None:
    store = opened()
    merged(store, {"a": random_adapter(1)})
    for _ in range(2):
        store.record_scores(1, [TaskScore(task_id="a", score=0.5, count=10)], op_key="s", actor="test")
        store.publish(1, op_key="p", actor="test")
    merged(store, {"b": random_adapter(2)})
    for _ in range(2):
        store.reject(2, "forgets", op_key="r", actor="test")
        preview = store.rollback(0, op_key="back", actor="test")
        assert (preview.from_version, preview.to_version) == (1, 0)
        assert [task.task_id for task in preview.vanishing] == ["a"]
    assert [entry.op for entry in store.history()] == [
        "acquire",
        "merge",
        "scores",
        "publish",
        "merge",
        "reject",
        "rollback",
    ]


def test_a_task_that_the_candidate_holds_is_a_conflict_and_one_rolled_back_may_come_again() -> None:
    store = three_published()
    with pytest.raises(Conflict, match=r"task team/b \(b\): was merged as version 2"):
        merged(store, {"b": random_adapter(2)}, op_key="again")
    store.rollback(1, op_key="back", actor="test")
    version = merged(store, {"b": random_adapter(9)}, op_key="again")
    assert (version.number, version.parent) == (4, 1)
    assert store.state.tasks_at(4)["b"].version == 4
    assert adapter_to_bytes(store.delivered("b")) == adapter_to_bytes(random_adapter(9))


def with_module(name: str, update: ModuleUpdate) -> Adapter:
    return replace(random_adapter(2), modules={**random_adapter(2).modules, name: update})


NAN = ModuleUpdate(torch.full((24, 1), math.nan), torch.ones(1), torch.ones(20, 1))
BFLOAT16 = ModuleUpdate(torch.ones(24, 1).bfloat16(), torch.ones(1), torch.ones(20, 1))
WIDE = random_adapter(3, shapes={"layer.0.query": (24, 21)}).modules["layer.0.query"]
TORN = ModuleUpdate(torch.ones(24, 2), torch.ones(1), torch.ones(20, 1))
BAD: Mapping[str, tuple[Adapter, str]] = {
    "NaN": (with_module("layer.0.query", NAN), r"layer\.0\.query\.u: has NaN or infinite values"),
    "another shape": (with_module("layer.0.query", WIDE), r"layer\.0\.query: has shape \(24, 21\), .* \(24, 20\)"),
    "parts that do not fit": (with_module("layer.0.query", TORN), r"layer\.0\.query: U, σ and V do not fit"),
    "another base": (random_adapter(2, base="llama"), "base model is 'llama', this subspace has 'tiny-base'"),
    "no modules": (Adapter(BASE, "", {}), "no modules"),
    "too large": (random_adapter(2, size=1e20), r"layer\.0\.query\.sigma: has values above 1e\+08"),
    "bfloat16": (with_module("layer.0.query", BFLOAT16), r"layer\.0\.query\.u: is torch\.bfloat16"),
    "NaN in the head": (replace(random_adapter(2), head={"w": torch.tensor([math.inf])}), "w: has NaN or infinite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_with_its_task_and_nothing_is_written(kind: str) -> None:
    store = opened()
    merged(store, {"a": random_adapter(1)})
    adapter, complaint = BAD[kind]
    uploads = [staged(store, "good", random_adapter(4)), staged(store, "bad", adapter)]
    before = store.storage.keys("")
    with pytest.raises(InvalidInput, match=r"task team/bad \(bad\): .*" + complaint):
        store.merge(uploads, op_key="k", actor="test")
    assert store.storage.keys("") == before


def test_other_weights_of_the_base_are_refused_where_both_are_known() -> None:
    store = SubspaceStore.open(fresh_storage(), base_model=BASE, base_sha256="aa", writer="w")
    merged(store, {"unknown": random_adapter(1)})
    with pytest.raises(InvalidInput, match="sha256 is 'bb', this subspace has 'aa'"):
        merged(store, {"other": replace(random_adapter(2), base_sha256="bb")})


def test_uploads_that_are_not_what_was_announced_are_refused() -> None:
    store = opened()
    upload = staged(store, "a", random_adapter(1))
    with pytest.raises(NotFound, match="the upload staging/b is not there"):
        store.merge([replace(upload, key="staging/b")], op_key="k", actor="test")
    with pytest.raises(InvalidInput, match=r"task team/a \(a\).*the task says 000000"):
        store.merge([replace(upload, sha256="0" * 64)], op_key="k", actor="test")
    store.storage.write("staging/junk", b"no tensors")
    with pytest.raises(InvalidInput, match="is not an adapter file"):
        store.merge(
            [StagedAdapter(task_id="a", name="team/a", key="staging/junk", sha256=digest(b"no tensors"))],
            op_key="k",
            actor="test",
        )
    with pytest.raises(InvalidInput, match="named twice"):
        store.merge([upload, upload], op_key="k", actor="test")
    with pytest.raises(InvalidInput, match="at least one"):
        store.merge([], op_key="k", actor="test")
    with pytest.raises(InvalidInput, match="belongs below staging/"):
        store.stage("log/00000000000000000002.json", random_adapter(1))
    assert store.state.versions == {}


def test_a_group_is_one_version_and_one_record() -> None:
    store = opened()
    version = merged(store, {"a": random_adapter(1), "b": random_adapter(2)})
    assert [task.task_id for task in version.added] == ["a", "b"]
    assert len(store.storage.keys("log/0")) == 2


# Failures in the middle of a merge


def faults_at_records(*faults: str | None) -> Callable[[str], str | None]:
    remaining = list(faults)
    return lambda key: remaining.pop(0) if remaining and key.startswith("log/0") else None


def test_a_merge_whose_reply_was_lost_is_merged_once() -> None:
    storage = fresh_storage()
    store = opened(FaultyStorage(storage, faults_at_records(None, "after")))
    version = merged(store, {"a": random_adapter(1)}, op_key="k")
    assert merged(store, {"a": random_adapter(1)}, op_key="k") == version
    assert reading(storage).state.versions == {1: version}


def test_a_crash_between_blobs_and_record_changes_nothing_and_the_retry_merges() -> None:
    class Crash(BaseException):
        """The process is gone: nothing may catch this."""

    def crash(key: str) -> None:
        if key == "log/00000000000000000002.json":
            raise Crash

    storage = fresh_storage()
    store = opened(FaultyStorage(storage, crash))
    with pytest.raises(Crash):
        merged(store, {"a": random_adapter(1)}, op_key="k")
    assert len(storage.keys("blobs/")) == 4
    assert reading(storage).state.versions == {}
    assert merged(opened(storage, writer="restarted"), {"a": random_adapter(1)}, op_key="k").number == 1


def test_a_storage_that_damages_a_blob_is_caught_before_the_record() -> None:
    class Damaging(MemoryStorage):
        def write(self, key: str, content: bytes) -> None:
            super().write(key, content[:-1] + b"\x7e" if key.startswith("blobs/") else content)

    storage = Damaging(fresh_storage().name)
    with pytest.raises(Corrupt, match="not what was written"):
        merged(opened(storage), {"a": random_adapter(1)})
    assert len(storage.keys("log/0")) == 1


def test_a_fenced_store_does_not_merge_and_its_tasks_are_merged_by_the_new_one() -> None:
    storage = fresh_storage()
    old = opened(storage, writer="old")
    merged(old, {"a": random_adapter(1)})
    new = opened(storage, writer="new")
    with pytest.raises(Conflict, match="'new'"):
        merged(old, {"b": random_adapter(2)})
    assert merged(new, {"b": random_adapter(2)}).number == 2
    assert old.refresh().versions == new.state.versions
    with pytest.raises(Conflict):
        old.publish(2, op_key="p", actor="test")


def test_a_damaged_blob_is_named_when_it_is_read() -> None:
    store = three_published()
    ref = store.state.versions[2].transport
    store.storage.write(ref.key, store.storage.read(ref.key)[:-1] + b"\x00")
    with pytest.raises(Corrupt, match=ref.key):
        reading(store.storage).adapter("a")
    store.storage.delete(ref.key)
    with pytest.raises(Corrupt, match="is gone"):
        reading(store.storage).adapter("a")


# Judging


def test_a_rejected_version_stays_readable_and_the_next_merge_starts_at_main() -> None:
    store = three_published()
    merged(store, {"bad": random_adapter(4)})
    store.reject(4, "a lost 0.10", op_key="r", actor="gate")
    assert store.state.refs == {"candidate": 3, "main": 3}
    assert store.state.rejected == {4: "a lost 0.10"}
    assert store.adapter("bad", 4).modules
    assert merged(store, {"d": random_adapter(5)}).parent == 3
    assert "bad" not in store.state.tasks_at(5)
    with pytest.raises(InvalidInput, match=r"version 4 was rejected: a lost 0\.10"):
        store.rollback(4, op_key="x", actor="test")


def test_only_the_candidate_is_judged() -> None:
    store = three_published()
    merged(store, {"d": random_adapter(4)})
    merged(store, {"e": random_adapter(5)})
    with pytest.raises(Conflict, match="the candidate is version 5, not 4"):
        store.publish(4, op_key="x", actor="test")
    with pytest.raises(Conflict, match="the candidate is version 5, not 4"):
        store.reject(4, "late", op_key="x", actor="test")
    with pytest.raises(NotFound, match="no version 9"):
        store.publish(9, op_key="x", actor="test")
    store.publish(5, op_key="p", actor="test")
    with pytest.raises(Conflict, match="roll back instead"):
        store.reject(5, "late", op_key="x", actor="test")


def test_scores_are_kept_per_version_the_later_one_counts_and_nan_survives() -> None:
    store = three_published()
    store.record_scores(
        3,
        [TaskScore(task_id="a", score=0.9, count=100), TaskScore(task_id="b", score=math.nan, count=0)],
        op_key="s1",
        actor="test",
    )
    store.record_scores(3, [TaskScore(task_id="a", score=0.8, count=100)], op_key="s2", actor="test")
    scores = reading(store.storage).state.scores
    assert set(scores) == {3}
    assert scores[3]["a"].score == 0.8
    assert math.isnan(scores[3]["b"].score)
    with pytest.raises(NotFound, match="version 1 holds no task b"):
        store.record_scores(1, [TaskScore(task_id="b", score=0.5, count=1)], op_key="s3", actor="test")
    with pytest.raises(InvalidInput, match="cannot be infinite"):
        store.record_scores(1, [TaskScore(task_id="a", score=math.inf, count=1)], op_key="s3", actor="test")


def test_rolling_back_is_one_record_that_copies_nothing_and_forward_again_is_the_same_call() -> None:
    store = three_published()
    before = {task: adapter_to_bytes(store.adapter(task)) for task in "abc"}
    count, blobs = len(store.storage.keys("log/0")), store.storage.keys("blobs/")
    preview = store.preview_rollback(1)
    assert [task.name for task in preview.vanishing] == ["team/b", "team/c"]
    assert preview.returning == ()
    assert store.rollback(1, op_key="back", actor="me", reason="b is wrong") == preview
    assert store.state.refs == {"candidate": 1, "main": 1}
    assert len(store.storage.keys("log/0")) == count + 1
    assert store.storage.keys("blobs/") == blobs
    with pytest.raises(NotFound):
        store.adapter("b")
    forward = store.rollback(3, op_key="forth", actor="me")
    assert [task.task_id for task in forward.returning] == ["b", "c"]
    assert {task: adapter_to_bytes(store.adapter(task)) for task in "abc"} == before
    assert store.rollback(0, op_key="empty", actor="me").to_version == 0
    assert store.basis() == {}
    with pytest.raises(NotFound, match="no version 7"):
        store.preview_rollback(7)


@pytest.mark.parametrize("kind", ["basis", "adapter", "coefficients"])
def test_main_is_not_moved_to_a_version_whose_files_are_gone_and_is_to_one_that_needs_them_not(kind: str) -> None:
    store = three_published()
    version = store.state.versions[2]
    ref = version.basis if kind == "basis" else getattr(version.added[0], kind)
    store.storage.delete(ref.key)
    with pytest.raises(Corrupt, match=f"version 2 needs 1 objects that are not as they were written: .*{ref.key}"):
        store.rollback(2, op_key="back", actor="me")
    assert store.state.refs["main"] == 3
    assert store.rollback(1, op_key="back", actor="me").to_version == 1
    assert store.rollback(0, op_key="empty", actor="me").to_version == 0


def test_main_cannot_be_moved_to_a_version_that_no_gate_has_let_pass() -> None:
    store = three_published()
    merged(store, {"d": random_adapter(4)})
    with pytest.raises(InvalidInput, match="version 4 never passed the gate"):
        store.rollback(4, op_key="early", actor="me")
    assert store.state.refs == {"candidate": 4, "main": 3}


# Reading


def test_a_reader_follows_the_writer_record_by_record() -> None:
    store = opened()
    reader = reading(store.storage)
    for number, task in enumerate("abc", 1):
        merged(store, {task: random_adapter(number)})
        store.publish(number, op_key=f"p{number}", actor="test")
        assert reader.state.refs["main"] == number - 1
        assert reader.refresh().refs["main"] == number
        for held in "abc"[:number]:
            assert adapter_to_bytes(reader.adapter(held)) == adapter_to_bytes(store.adapter(held))


def test_any_version_can_be_read_in_any_order() -> None:
    store = three_published()
    merged(store, {"d": random_adapter(4), "e": random_adapter(5)})
    expected = {n: {t: adapter_to_bytes(store.adapter(t, n)) for t in store.state.tasks_at(n)} for n in (1, 2, 3, 4)}
    for order in ((4, 1, 3, 2, 4), (1, 2, 3, 4), (2, 4, 1)):
        reader = reading(store.storage)
        for number in order:
            found = {task: adapter_to_bytes(reader.adapter(task, number)) for task in expected[number]}
            assert found == expected[number]


def test_the_difference_of_versions_counts_tasks_ranks_overlap_and_drift() -> None:
    store = three_published()
    diff = store.diff(1, 3)
    assert ([t.task_id for t in diff.added], [t.task_id for t in diff.removed]) == (["b", "c"], [])
    assert diff.ranks["layer.0.query"][0] == store.basis(1)["layer.0.query"].ranks
    assert diff.drift_bound == {"a": pytest.approx(store.state.drift_bound("a", 1, 3))}
    name = "layer.0.query"
    old, new = store.basis(1)[name].p_NK.double(), store.basis(3)[name].p_NK.double()
    assert diff.overlap[name][0] == pytest.approx(float((new @ (new.T @ old)).norm() ** 2) / old.shape[1])
    assert 0.5 < diff.overlap[name][0] < 1
    back = store.diff(3, 1)
    assert [t.task_id for t in back.removed] == ["b", "c"]
    assert back.drift_bound == diff.drift_bound
    assert store.diff(0, 2).overlap == {}
    # Two branches from version 1: the bound goes through it, and a task merged anew is another birth.
    store.rollback(1, op_key="back", actor="test")
    merged(store, {"b": random_adapter(9)}, op_key="again")
    branches = store.diff(2, 4)
    assert [t.version for t in branches.added + branches.removed] == [4, 2]
    assert branches.drift_bound == {"a": pytest.approx(store.state.drift(2)["a"] + store.state.drift(4)["a"])}


def test_the_footprint_is_counted_from_the_tensors() -> None:
    store = opened(rank_fixed=5)
    merged(store, {"a": random_adapter(1, rank=4), "b": random_adapter(2, rank=3)})
    foot = store.footprint(1)
    # Two modules, 24×20 and 16×20, 5 directions a side; tasks of rank 4 and 3.
    assert foot.basis_numbers == 5 * (24 + 20) + 5 * (16 + 20)
    assert foot.coefficient_numbers == 2 * (5 + 5) * (4 + 3)
    assert foot.separate_numbers == (4 + 3) * (24 + 20 + 16 + 20)
    assert foot.head_numbers == 2 * 10
    assert foot.total_bytes == 4 * (foot.basis_numbers + foot.coefficient_numbers)
    assert foot.ratio_with_basis == pytest.approx(560 / 540)
    assert foot.ratio_coefficients_only == pytest.approx(560 / 140)


def test_history_tells_people_what_happened() -> None:
    store = three_published()
    store.rollback(2, op_key="back", actor="eve", reason="c is slow")
    lines = [(entry.op, entry.summary) for entry in store.history()]
    assert lines[0] == ("acquire", "epoch 1")
    assert lines[1:3] == [("merge", "version 1: team/a"), ("publish", "version 1")]
    assert lines[-1] == ("rollback", "version 3 → 2: c is slow")
    assert store.history()[-1].actor == "eve"


# What a merge costs when there are many tasks


def test_bytes_of_a_merge_do_not_grow_with_the_number_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    store = opened(rank_fixed=12)  # full after three tasks of rank 4
    shapes = {"layer.query": (64, 64)}
    written: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for count in range(1, 65):
        before = set(store.storage.keys("blobs/") + store.storage.keys("log/0"))
        version = merged(store, {f"t{count}": random_adapter(count, shapes=shapes)})
        new = set(store.storage.keys("blobs/") + store.storage.keys("log/0")) - before
        snapshot = version.snapshot.size_bytes if version.snapshot else 0
        written[count] = sum(len(store.storage.read(key)) for key in new) - snapshot
        seconds[count] = version.merge_seconds
    with capsys.disabled():
        print(f"\n  bytes of a merge at T=4: {written[4]}, at T=64: {written[64]} (snapshot of {snapshot} apart)")
        print(f"  seconds at T=4: {seconds[4]:.4f}, at T=64: {seconds[64]:.4f}")
    # What grows is one drift number per task in the record: about 27 bytes each.
    assert written[64] - written[4] < 40 * 60
    assert written[64] < 1.2 * written[4]


def test_a_snapshot_spares_the_versions_before_it_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 4)
    store = opened()
    for number in range(1, 7):
        merged(store, {f"t{number}": random_adapter(number, rank=2)})
    assert [v.number for v in store.state.versions.values() if v.snapshot] == [4]
    for number in (1, 2, 3):
        store.storage.delete(store.state.versions[number].transport.key)
    reader = reading(store.storage)
    assert adapter_to_bytes(reader.adapter("t1", 6)) == adapter_to_bytes(store.adapter("t1", 6))
    assert SNAPSHOT_EVERY == 64


def test_the_drift_in_the_log_covers_many_merges() -> None:
    store = opened(rank_fixed=8)
    for number in range(1, 13):
        merged(store, {f"t{number}": random_adapter(number)})
    original = deltas(store.delivered("t1"))
    now, birth = deltas(store.adapter("t1", 12)), deltas(store.adapter("t1", 1))
    assert relative_distance(now, birth, original) <= store.state.drift_bound("t1", 1, 12)


# Errors


def test_a_fenced_writer_refuses_nothing_by_an_old_state_but_says_that_it_is_fenced() -> None:
    store = three_published()
    ref = store.stage("staging/c/2/adapter.safetensors", random_adapter(3))
    newer = opened(store.storage, "newer")
    newer.rollback(2, op_key="back", actor="test")  # c is free again, and `store` has not heard of it
    newer.tag("gold", 1, actor="test")
    again = [StagedAdapter(task_id="c", name="team/c", key=ref.key, sha256=ref.sha256)]
    for refused in (
        lambda: store.merge(again, op_key="again", actor="test"),
        lambda: store.publish(2, op_key="publish again", actor="test"),
        lambda: store.rollback(9, op_key="forward", actor="test"),
        lambda: store.expire([3], actor="test"),
    ):
        with pytest.raises(Fenced):
            refused()


def test_a_name_means_one_task_in_every_version() -> None:
    store = opened()
    merged(store, {"old": random_adapter(1)})
    refs = {task: store.stage(f"staging/{task}/1/adapter.safetensors", random_adapter(2)) for task in ("new", "third")}
    seq = store.state.seq
    held = store.state.tasks_at(1)["old"].name
    with pytest.raises(NameTaken, match="version 1 holds another task of this name") as caught:
        store.merge(
            [StagedAdapter(task_id="new", name=held, key=refs["new"].key, sha256=refs["new"].sha256)],
            op_key="again",
            actor="test",
        )
    assert (caught.value.task_id, caught.value.other_id) == ("new", "old")
    both = [StagedAdapter(task_id=task, name="team/twin", key=ref.key, sha256=ref.sha256) for task, ref in refs.items()]
    with pytest.raises(NameTaken) as caught:
        store.merge(both, op_key="both", actor="test")
    assert (caught.value.task_id, caught.value.other_id) == ("third", "new")
    assert store.state.seq == seq


def test_an_outage_while_merging_is_unavailable_and_leaves_the_store_usable() -> None:
    class Outage(MemoryStorage):
        down = False

        def write(self, key: str, content: bytes) -> None:
            if self.down and key.startswith("blobs/"):
                raise Unavailable("no route", key)
            super().write(key, content)

    storage = Outage(fresh_storage().name)
    store = opened(storage)
    storage.down = True
    with pytest.raises(Unavailable):
        merged(store, {"a": random_adapter(1)}, op_key="k")
    storage.down = False
    assert merged(store, {"a": random_adapter(1)}, op_key="k").number == 1


def test_some_modules_of_a_task_are_read_alone_and_a_name_it_does_not_adapt_is_refused() -> None:
    store = opened()
    merged(store, {"a": random_adapter(1)})
    whole, one = store.adapter("a", 1), store.adapter("a", 1, modules=["layer.0.value"])
    assert list(one.modules) == ["layer.0.value"]
    assert torch.equal(one.modules["layer.0.value"].u_NR, whole.modules["layer.0.value"].u_NR)
    with pytest.raises(NotFound, match=r"does not adapt layer\.9"):
        store.adapter("a", 1, modules=["layer.9"])
