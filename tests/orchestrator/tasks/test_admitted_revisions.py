"""New rows for a published task: what makes them its next revision, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from configs.errors import NameTaken
from orchestrator.tasks import tables
from orchestrator.tasks.admission import _document
from orchestrator.tasks.task_events import CancelRequested, Replaced
from orchestrator.tasks.task_record import EarlierRows, TaskRecord, TaskState
from orchestrator.tasks.task_rows import columns_of
from subspace_store.formats.peft import write_peft_folder
from tests.builders import LAYOUT, adapter, rows, write_rows
from tests.orchestrator.tasks.test_admission import Desk
from workers.rows.frozen_rows import open_rows


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr("orchestrator.tasks.doubtful_settings.EVALUATION_ROWS_FEW", 1)
    return Desk(tmp_path)


def put(desk: Desk, task: TaskRecord, state: TaskState, version: int = 1) -> TaskRecord:
    """The task in another state, by a writer that asks nobody."""
    record = task.model_copy(update={"state": state, "version": version})
    with desk.queue._database.writing() as connection:
        mine = tables.tasks.c.task_id == task.task_id
        connection.execute(update(tables.tasks).where(mine).values(**columns_of(record)))
    return record


def published(desk: Desk, **changes: Any) -> TaskRecord:
    return put(desk, desk.submit(desk.document(**changes))[0], TaskState.PUBLISHED)


def newer(desk: Desk, **changes: Any) -> dict[str, Any]:
    """A document with other rows than `Desk.document`'s."""
    train = write_rows(desk.data / "newer.jsonl", [{"text": f"newer {i}", "label": i % 2} for i in range(5)])
    evaluation = write_rows(desk.data / "newer_eval.jsonl", [{"text": f"unseen {i}", "label": i % 2} for i in range(3)])
    data = {"train_file": str(train), "eval_file": str(evaluation)} | changes.pop("data", {})
    return desk.document(**{"revises": True, "data": data, **changes})


def test_new_rows_for_a_published_task_are_its_second_revision(desk: Desk) -> None:
    first = published(desk)
    second, is_new = desk.submit(newer(desk))
    assert is_new
    assert (second.number, second.exact_title, second.revises) == (2, "red/alpha@2", first.task_id)
    assert second.earlier_rows == (
        EarlierRows(
            task_id=first.task_id,
            number=1,
            eval_key=first.eval_key,
            eval_count=first.eval_count,
            eval_sha256=first.eval_sha256,
        ),
    )
    assert (second.train_count, second.eval_count, second.scored_count) == (5, 3, 7)
    assert second.constant_score is None  # the most frequent label of all rows is not known
    assert [row.text for row in open_rows(desk.storage, second.eval_key, second.spec)] == [  # type: ignore[union-attr]
        "unseen 0",
        "unseen 1",
        "unseen 2",
    ]
    assert desk.submit(newer(desk)) == (second, False)  # the same submission is the same revision


def test_a_third_revision_is_scored_on_the_rows_of_both_before_it(desk: Desk) -> None:
    first = published(desk)
    second = put(desk, desk.submit(newer(desk))[0], TaskState.PUBLISHED, 2)
    desk.queue.apply(first.task_id, Replaced("in the place of", 5.0))
    write_rows(desk.data / "third.jsonl", [{"text": f"third {i}", "label": i % 2} for i in range(9)])
    third, _ = desk.submit(newer(desk, data={"train_file": str(desk.data / "third.jsonl"), "eval_file": None,
                                             "eval_fraction": 0.4}))  # fmt: skip
    assert (third.number, third.revises) == (3, second.task_id)
    assert [(rows.number, rows.task_id) for rows in third.earlier_rows] == [(1, first.task_id), (2, second.task_id)]
    assert third.numbers_of_rows == {first.task_id: 1, second.task_id: 2, third.task_id: 3}


def test_a_revision_that_says_several_numbers_keeps_their_names(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, heads = (
        (*LAYOUT.kinds, "image_regression"),
        {**LAYOUT.heads, "image_regression": next(iter(LAYOUT.heads.values()))},
    )
    layout = replace(LAYOUT, kinds=kinds, heads=heads)
    monkeypatch.setattr("tests.orchestrator.tasks.test_admission.LAYOUT", layout)

    def document(names: list[str], first: int, **changes: Any) -> dict[str, Any]:
        files = {}
        for key, shift in (("train_file", first), ("eval_file", first + 50)):
            found = [{"image": [[shift + i]], "label": [i / 7] * len(names)} for i in range(5)]
            files[key] = str(write_rows(desk.data / f"{key}-{shift}.jsonl", found))
        data = {**files, "label_names": names}
        return desk.document(kind="image_regression", metric="neg_mean_absolute_error", data=data, **changes)

    put(desk, desk.submit(document(["x", "y"], 0))[0], TaskState.PUBLISHED)
    assert "list the same names" in desk.refuse(document(["x", "y", "z"], 100, revises=True))
    assert desk.submit(document(["x", "y"], 100, revises=True))[0].number == 2


def test_a_revision_asks_for_its_labels_by_the_same_prompt(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, heads = (*LAYOUT.kinds, "image_text"), {**LAYOUT.heads, "image_text": next(iter(LAYOUT.heads.values()))}
    layout = replace(LAYOUT, kinds=kinds, heads=heads)
    monkeypatch.setattr("tests.orchestrator.tasks.test_admission.LAYOUT", layout)

    def document(first: int, template: str, *names: str, **changes: Any) -> dict[str, Any]:
        files = {}
        for key, shift in (("train_file", first), ("eval_file", first + 50)):
            found = [{"image": [[shift + i]], "label": i % 2} for i in range(5)]
            files[key] = str(write_rows(desk.data / f"{key}-{shift}.jsonl", found))
        data = {**files, "label_names": names, "prompt_template": template}
        return desk.document(kind="image_text", metric="accuracy", data=data, **changes)

    put(desk, desk.submit(document(0, "the {}", "cat", "dog"))[0], TaskState.PUBLISHED)
    said = desk.refuse(document(100, "a {}", "cat", "dog", "cow", revises=True))
    assert "data.prompt_template: is 'a {}', and 'the {}' in red/alpha" in said
    assert desk.submit(document(100, "the {}", "cat", "dog", "cow", revises=True))[0].number == 2


def test_without_being_asked_for_nothing_is_revised(desk: Desk) -> None:
    first = published(desk)
    said = desk.refuse(newer(desk, revises=False), NameTaken)
    assert f"task {first.task_id} of that name is published, and this submission differs from it" in said
    assert "`onebasis submit --revise FILE` (or revises: true) makes its next revision of them" in said


@pytest.mark.parametrize("state", [None, TaskState.QUEUED, TaskState.EVALUATING, TaskState.PARKED, TaskState.REPLACED])
def test_only_a_published_task_is_revised(desk: Desk, state: TaskState | None) -> None:
    if state is not None:
        put(desk, desk.submit(desk.document())[0], state)
    said = desk.refuse(newer(desk))
    alive = state in (TaskState.QUEUED, TaskState.EVALUATING)
    assert f"red/alpha is {state if alive else 'not there'}, and only a published task is revised" in said
    assert ("wait until it is published" if alive else "leave revises or --revise out") in said


def test_one_revision_is_on_its_way_at_a_time(desk: Desk) -> None:
    published(desk)
    second, _ = desk.submit(newer(desk))
    write_rows(desk.data / "third.jsonl", [{"text": f"third {i}", "label": i % 2} for i in range(5)])
    write_rows(desk.data / "third_eval.jsonl", [{"text": f"fourth {i}", "label": i % 2} for i in range(5)])
    files = {"train_file": str(desk.data / "third.jsonl"), "eval_file": str(desk.data / "third_eval.jsonl")}
    third = newer(desk, data=files)
    said = desk.refuse(third, NameTaken)
    assert f"red/alpha@2 ({second.task_id}) is queued" in said
    assert f"onebasis cancel {second.task_id}" in said
    desk.queue.apply(second.task_id, CancelRequested("ann", 3.0))
    again, _ = desk.submit(third)
    assert (again.number, again.exact_title) == (2, "red/alpha@2")  # the cancelled one has given its number back


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "f1_macro"}, "metric: is 'f1_macro', and 'accuracy' in red/alpha, whose next revision this is"),
        (
            {"kind": "sequence_regression", "data": {"label_names": None}},
            "kind: is 'sequence_regression', and 'sequence_classification' in red/alpha",
        ),
        ({"data": {"label_names": ["yes", "no"]}}, "list its labels first, in their order, and new ones after them"),
        ({"data": {"label_names": ["no", "odd", "yes"]}}, "list its labels first"),
        ({"data": {"label_names": ["no", "odd"]}}, "list its labels first"),
    ],
)
def test_what_could_not_go_on_from_the_revision_before_is_refused(
    desk: Desk, changes: dict[str, Any], said: str
) -> None:
    published(desk)
    if "kind" in changes:
        for name in ("newer", "newer_eval"):
            write_rows(desk.data / f"{name}.jsonl", [{"text": f"{name} {i}", "label": i / 2} for i in range(5)])
        document = desk.document(
            revises=True,
            kind=changes["kind"],
            data={
                "train_file": str(desk.data / "newer.jsonl"),
                "eval_file": str(desk.data / "newer_eval.jsonl"),
                "label_names": None,
            },
        )
    else:
        document = newer(desk, **changes)
    assert said in desk.refuse(document)


def test_another_base_model_is_refused(desk: Desk) -> None:
    first = published(desk)
    other = first.spec.model_copy(update={"base_model": "large"})
    put(desk, first.model_copy(update={"spec": other}), TaskState.PUBLISHED)
    said = desk.refuse(newer(desk))
    assert "base_model: is 'tiny', and 'large' in red/alpha" in said


def test_new_labels_may_follow_the_old_ones(desk: Desk) -> None:
    published(desk)
    second, _ = desk.submit(newer(desk, data={"label_names": ["no", "yes", "odd"]}))
    assert second.spec.data.label_names == ("no", "yes", "odd")


def test_the_same_rows_again_are_no_revision(desk: Desk) -> None:
    first = published(desk)
    said = desk.refuse(desk.document(revises=True))
    assert "data.train_file: the training rows of red/alpha once more: nothing is new" in said
    assert "onebasis rollback-task red/alpha --to 1" in said
    old = {"eval_file": str(desk.data / "eval.jsonl.gz")}
    assert "data.eval_file: the evaluation rows of red/alpha once more" in desk.refuse(newer(desk, data=old))
    # Of a record that an older release wrote, only the digest of the whole submission is known.
    put(desk, first.model_copy(update={"brought_sha256": ""}), TaskState.PUBLISHED)
    assert "nothing is new" in desk.refuse(desk.document(revises=True))


def test_an_imported_adapter_may_be_a_revision_of_an_imported_one(desk: Desk) -> None:
    desk.peft()
    put(desk, desk.submit(desk.imported())[0], TaskState.PUBLISHED)
    assert "the adapter of red/alpha once more" in desk.refuse(desk.imported(revises=True))
    write_peft_folder(desk.data / "peft", adapter(2), "tiny-source")
    files = {"eval_file": str(write_rows(desk.data / "more.jsonl", rows(4)))}
    second, _ = desk.submit(desk.imported(revises=True, data=files))
    assert (second.number, second.eval_count, second.scored_count) == (2, 4, 8)


def test_a_fresh_start_is_said_of_a_revision_alone(desk: Desk) -> None:
    assert "start is about a revision of a published task: set revises: true" in desk.refuse(
        newer(desk, revises=False, start="base")
    )
    published(desk)
    assert desk.submit(newer(desk, start="base"))[0].spec.start == "base"


def test_nothing_of_a_document_without_revisions_has_another_digest_than_before(desk: Desk) -> None:
    assert "revises" not in _document(desk.submit(desk.document())[0].spec)
