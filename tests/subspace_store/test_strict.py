"""Whatever a program hands to a method of a subspace: it is done, or refused as one of our errors and nothing changed.

What is handed over is made from the methods' own annotations, so a new method is tried as well.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import DataObject, SearchStrategy
from safetensors.torch import save

import subspace_store
from configs.errors import Corrupt, Held, InvalidInput, MissingAdapters, OnebasisError, RefusedAdapters
from subspace_store import Adapter, ModuleUpdate, StagedAdapter, Storage, SubspaceReader, SubspaceStore, TaskScore
from subspace_store.adapter import adapter_from_bytes, adapter_to_bytes
from subspace_store.log.fold import to_plain
from subspace_store.log.version import Identity
from subspace_store.strict import TEXT_MAX, as_text
from subspace_store.verify import verify
from tests.subspace_store.builders import fresh_storage, merged, opened, random_adapter, reading, staged

LARGE = "x" * 5_000_000
WILD_TEXT = st.sampled_from(
    ["", " ", "1", "main", "a\nb", "\0", "\ud800", "../../log", "log/1", "é" * 300, "x" * 2001, "٣", "9" * 5000, LARGE]
)
KNOWN_TEXT = st.sampled_from(
    ["t1", "t2", "t3", "t4", "team/t1", "layer.0.query", "gold", "candidate", "staging/t9/1/adapter.safetensors"]
)
TEXT = KNOWN_TEXT | WILD_TEXT | st.text(max_size=8)
NUMBER = st.integers(-1, 5) | st.sampled_from([2**53, 2**53 + 1, 2**64, 10**400])
REAL = st.floats() | st.sampled_from([0.0, 1e12, 1e300, float("nan"), float("inf"), -1.0, 4e9])
ANYTHING: SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    NUMBER,
    REAL,
    TEXT,
    st.binary(max_size=3),
    st.sampled_from([object(), object, {}, {"a": 1}, [], [None], {1}, (), b"", 1j, iter("ab"), torch.zeros(2), "no"]),
    st.lists(st.one_of(TEXT, NUMBER, st.none()), max_size=3),
)
"""Of any type."""
ADAPTERS = [
    random_adapter(7),
    random_adapter(8, shapes={"layer.0.query": (5, 5)}),
    replace(random_adapter(9), base_model="another"),
    Adapter("tiny-base", "", {}),
    replace(random_adapter(9), modules={"a/b": random_adapter(9).modules["layer.0.query"]}),
    replace(random_adapter(9), modules={"\ud800": random_adapter(9).modules["layer.0.query"]}),
    replace(random_adapter(9), modules={"": random_adapter(9).modules["layer.0.query"]}),
    replace(random_adapter(9), info={"\ud800": "\ud800"}, base_model="\0"),
    replace(random_adapter(9), info={"a": 1}),  # type: ignore[dict-item]
    replace(random_adapter(9), modules={"layer.0.query": "none"}),  # type: ignore[dict-item]
    replace(random_adapter(9), head={"": torch.zeros(0), "\ud800": torch.zeros(2, dtype=torch.complex64)}),
    replace(random_adapter(9), head={"w": torch.zeros(2, 2).to_sparse()}),
    replace(random_adapter(9), modules={"m": ModuleUpdate(torch.zeros(()), torch.zeros(()), torch.zeros(()))}),
    replace(random_adapter(9), modules={"m": ModuleUpdate(torch.zeros(3, 0), torch.zeros(0), torch.zeros(2, 0))}),
    replace(random_adapter(9), modules={"m": ModuleUpdate(torch.zeros(0, 1), torch.ones(1), torch.zeros(0, 1))}),
]


def written() -> tuple[SubspaceStore, list[StagedAdapter]]:
    """A store in which there is something of everything, and uploads that wait."""
    store = opened()
    for number in (1, 2, 3):
        merged(store, {f"t{number}": random_adapter(number)})
        store.publish(number, op_key=f"publish {number}", actor="test")
    store.tag("gold", 2, actor="ann")
    store.pin(1, "audit", 4e9, actor="ann")
    store.quarantine("t9", "poisoned", actor="ann")
    merged(store, {"t4": random_adapter(4)})
    return store, [staged(store, name, random_adapter(5)) for name in ("t4", "t5", "t6")]


STORE, UPLOADS = written()
SNAPSHOT = {key: STORE.storage.read(key) for key in STORE.storage.keys("")}


def copied() -> Storage:
    """The same store in a place of its own."""
    storage = fresh_storage()
    for key, content in SNAPSHOT.items():
        storage.write(key, content)
    return storage


def right(hint: Any, name: str) -> SearchStrategy[Any]:
    """Values of an annotation's type, wild ones among them; a new type that a method takes has to be added here."""
    origin, inner = getattr(hint, "__origin__", None), get_args(hint)
    if hasattr(hint, "__metadata__"):
        return right(inner[0], name)
    if hint is type(None):
        return st.none()
    if hint is str:
        return TEXT
    if hint is bool:
        return st.booleans()
    if hint is int:
        return NUMBER
    if hint is float:
        return REAL
    if hint is Adapter:
        return st.sampled_from(ADAPTERS)
    if hint is StagedAdapter:
        wild = st.builds(StagedAdapter, task_id=TEXT, name=TEXT, key=TEXT, sha256=TEXT)
        return st.sampled_from([*UPLOADS, replace(UPLOADS[1], name="team/t1")]) | wild
    if hint is Identity:
        return st.builds(Identity, service_id=TEXT, name=TEXT)
    if hint is TaskScore:
        return st.builds(TaskScore, task_id=TEXT, score=REAL, count=NUMBER)
    text = str(hint)
    if "Callable" in text and "|" not in text:
        return st.sampled_from([tuple, list, lambda: None, lambda: 3])
    if "Mapping" in text and "|" not in text:
        return st.dictionaries(TEXT, right(inner[1], name), max_size=2)
    if "Sequence" in text and "|" not in text:
        return st.lists(right(inner[0], name), max_size=3) | st.lists(right(inner[0], name), max_size=2).map(tuple)
    if inner and (origin is None or "Union" in str(origin)):
        return st.one_of([right(one, name) for one in inner])
    raise NotImplementedError(f"no values for {name}: {hint}")


def methods_of(kind: type) -> list[str]:
    """Public methods, inherited ones too, but for what opens."""
    named = [name for name, _ in inspect.getmembers(kind, inspect.isfunction)]
    return [name for name in named if not name.startswith("_")]


CALLS = [(reading, name) for name in methods_of(SubspaceReader)] + [
    (opened, name) for name in methods_of(SubspaceStore)
]


def arguments(data: DataObject, method: Callable[..., Any]) -> dict[str, Any]:
    """For a method: of the right types, wrong ones here and there."""
    bare = inspect.unwrap(method)
    exported = {name: getattr(subspace_store, name) for name in subspace_store.__all__}
    hints = {
        name: eval(str(hint), bare.__globals__, exported)
        for name, hint in bare.__annotations__.items()
        if name != "return"
    }
    keywords: dict[str, Any] = {}
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.default is not parameter.empty and data.draw(st.booleans(), f"{parameter.name} left out"):
            continue
        wrong = data.draw(st.integers(0, 5), "wrong") == 0
        value = data.draw(ANYTHING if wrong else right(hints[parameter.name], parameter.name), parameter.name)
        keywords[parameter.name] = value
    return keywords


@pytest.mark.parametrize(("open_one", "name"), CALLS, ids=lambda value: getattr(value, "__name__", value))
def test_every_method_does_what_it_is_asked_or_refuses_and_changes_nothing(
    open_one: Callable[[Storage], SubspaceReader], name: str
) -> None:
    # Not made smaller when one fails: every example copies a store.
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def tried(data: DataObject) -> None:
        storage = copied()
        subspace = open_one(storage)
        before, state = {key: storage.read(key) for key in storage.keys("")}, to_plain(subspace.state)
        keywords = arguments(data, getattr(type(subspace), name))
        try:
            getattr(subspace, name)(**keywords)
            is_reader = not isinstance(subspace, SubspaceStore)
        except OnebasisError:
            is_reader = True
            assert to_plain(subspace.state) == state
        if is_reader:
            now = {key: storage.read(key) for key in storage.keys("")}
            assert {key: content for key, content in now.items() if not key.startswith("blobs/")} == {
                key: content for key, content in before.items() if not key.startswith("blobs/")
            }
            assert before.items() <= now.items()
        # Whatever was done can be read again.
        assert to_plain(reading(storage).state) == to_plain(subspace.state)
        reading(storage).history()

    tried()


@pytest.mark.parametrize(("open_one", "name"), CALLS, ids=lambda value: getattr(value, "__name__", value))
def test_no_argument_of_any_method_may_be_just_anything(
    open_one: Callable[[Storage], SubspaceReader], name: str
) -> None:
    subspace = open_one(copied())
    method = getattr(subspace, name)
    for parameter in (*inspect.signature(method).parameters, "unheard_of"):
        with pytest.raises(InvalidInput, match=parameter):
            method(**{parameter: object()})


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: store.rollback("1", op_key="k", actor="me"),
        lambda store: store.rollback(True, op_key="k", actor="me"),
        lambda store: store.rollback(1.0, op_key="k", actor="me"),
        lambda store: store.rollback(-1, op_key="k", actor="me"),
        lambda store: store.rollback(1, op_key="k", actor="me", hold=1),
        lambda store: store.rollback(1, op_key="k", actor="me", reason="x" * 5_000_000),
        lambda store: store.remove("t1", op_key="k", actor="me", publish="no"),
        lambda store: store.expire("1", actor="me"),
        lambda store: store.expire(["1"], actor="me"),
        lambda store: store.drop_adapters("t1", actor="me"),
        lambda store: store.tag("main", 1, actor="me"),
        lambda store: store.tag("gold-2", "main", actor="me"),
        lambda store: store.pin(1, "me", "2030", actor="me"),
        lambda store: store.pin(1, "me", float("nan"), actor="me"),
        lambda store: store.pin(1, "me", 1e300, actor="me"),
        lambda store: store.hold("why\x1b[2J", actor="me"),
        lambda store: store.hold("why", actor=None),
        lambda store: store.hold("why", actor="me", op_key="\ud800"),
        lambda store: store.quarantine("", "why", actor="me"),
        lambda store: store.reject(4, "worse", op_key="k", actor="me", task_ids="t4"),
        lambda store: store.record_scores(
            4, [TaskScore(task_id="t4", score=float("inf"), count=3)], op_key="k", actor="me"
        ),
        lambda store: store.record_scores(4, [TaskScore(task_id="t4", score=0.5, count=-1)], op_key="k", actor="me"),
        lambda store: store.record_scores(4, [TaskScore(task_id="t4", score="0.5", count=3)], op_key="k", actor="me"),
        lambda store: store.merge([replace(UPLOADS[1], key=1)], op_key="k", actor="me"),
        lambda store: store.merge(UPLOADS[1], op_key="k", actor="me"),
        lambda store: store.collect(uploads_in_use=lambda: "t1"),
        lambda store: store.adapter(1),
        lambda store: store.adapter("t1", modules="layer.0.query"),
        lambda store: store.diff(1, "2"),
        lambda store: store.forecast({}),
        lambda store: store.publish(),
        lambda store: store.publish(4, op_key="k", actor="me", force=True),
    ],
)
def test_what_is_of_another_type_is_wrong_input_and_nothing_is_written(ask: Callable[[Any], object]) -> None:
    store = opened(copied())
    before, state = store.storage.keys(""), store.state
    with pytest.raises(InvalidInput):
        ask(store)
    assert (store.storage.keys(""), store.state) == (before, state)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_any_adapter_is_merged_and_served_or_refused_with_its_task(adapter: Adapter) -> None:
    store = opened(copied())
    seq = store.state.seq
    try:
        upload = staged(store, "new", adapter)
    except InvalidInput:
        with pytest.raises(InvalidInput):
            store.forecast({"new": adapter})
        return
    try:
        version = store.merge([upload], op_key="k", actor="me")
    except RefusedAdapters as error:
        culprits = error.task_ids
    if store.state.seq == seq:
        assert culprits == ("new",)
        with pytest.raises(InvalidInput):
            store.forecast({"new": adapter})
    else:
        assert reading(store.storage).adapter("new", version.number).modules
        assert verify(reading(store.storage)) == []
        assert store.forecast({"newer": adapter}).error_at_birth["newer"] < 1


def test_all_that_are_refused_are_named_at_once_and_the_others_are_merged_without_them() -> None:
    store = opened(copied())
    good, other = staged(store, "good", random_adapter(1)), staged(store, "other", replace(ADAPTERS[0], base_model="b"))
    wide = staged(store, "wide", random_adapter(2, shapes={"new": (4, 5)}))
    narrow = staged(store, "narrow", random_adapter(2, shapes={"new": (4, 6)}))
    gone = replace(staged(store, "gone", random_adapter(3)), key="staging/gone/2/adapter.safetensors")
    with pytest.raises(RefusedAdapters) as refused:
        store.merge([good, other, wide, narrow, gone], op_key="k", actor="me")
    assert refused.value.task_ids == ("other", "narrow")
    assert "team/narrow (narrow): new: has shape (4, 6), the subspace has (4, 5)" in str(refused.value)
    with pytest.raises(MissingAdapters) as missing:
        store.merge([good, wide, gone], op_key="k", actor="me")
    assert missing.value.task_ids == ("gone",)
    assert [task.task_id for task in store.merge([good, wide], op_key="k", actor="me").added] == ["good", "wide"]


def test_a_refinement_takes_the_place_of_tasks_of_these_ids_and_names() -> None:
    store = opened(copied())
    mine, stranger = staged(store, "t1", random_adapter(1)), staged(store, "t9", random_adapter(1))
    with pytest.raises(MissingAdapters) as missing:
        store.refine([mine, stranger], op_key="k", actor="me")
    assert missing.value.task_ids == ("t9",)
    with pytest.raises(RefusedAdapters, match="is called otherwise: team/t1") as renamed:
        store.refine([replace(mine, name="team/t2")], op_key="k", actor="me")
    assert renamed.value.task_ids == ("t1",)


def test_whoever_is_kept_from_publishing_is_told_by_whom() -> None:
    store = opened(copied())
    store.hold("customers complain", actor="ann")
    for ask in (lambda: store.publish(4, op_key="p", actor="gate"), lambda: store.hold("holiday", actor="bob")):
        with pytest.raises(Held) as held:
            ask()
        assert (held.value.actor, held.value.reason) == ("ann", "customers complain")


@given(place=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 3000))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_an_upload_of_any_bytes_is_an_adapter_or_refused(place: int, byte: int, cut: int) -> None:
    content = bytearray(adapter_to_bytes(random_adapter(1)))
    content[place] = byte
    changed = bytes(content[: cut or None])
    with contextlib.suppress(Corrupt, InvalidInput):
        adapter_from_bytes(changed)


@pytest.mark.parametrize("header", ["[]", "null", '{"format": 1}', '{"format": "onebasis-adapter-1", "info": []}'])
def test_an_upload_with_another_header_is_refused(header: str) -> None:
    content = save({"module/m/u": torch.ones(1, 1)}, {"onebasis": header})
    with pytest.raises(Corrupt, match="is not an adapter file"):
        adapter_from_bytes(content)


def test_what_others_wrote_becomes_a_text_that_can_be_kept() -> None:
    assert as_text("out of\x1b[31m memory\n\tat\ud800 3") == "out of [31m memory\n\tat  3"
    assert len(as_text(LARGE)) == TEXT_MAX
    assert as_text(LARGE).endswith("…")
