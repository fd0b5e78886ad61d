"""A replica answers by what `main` names, follows it, and refuses what it cannot answer."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import InvalidInput, NotFound, OnebasisError, Unavailable
from configs.settings import CanarySettings
from subspace_store.subspace_reader import SubspaceReader
from tests.subspace_store.builders import merged
from tests.workers.families import FAMILIES, save
from tests.workers.serving.sites import TEXTS, Site, site
from tests.workers.tiny_bases import save_llama
from tests.workers.worker_builders import tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.evaluation import adapted_model
from workers.rows.task_data import CompletionRow, ImageRow, TextRow
from workers.serving.question import Answer, Piece, Question, Writing
from workers.serving.replica import Replica
from workers.tokens import encode_prompt

DRAWS = 400


def replica(made: Site, version: int | None = None) -> Replica:
    publish(made, made.version if version is None else version)
    return Replica(made.base, SubspaceReader.open(made.store.storage))


def publish(made: Site, version: int) -> None:
    """Move `main`, forwards or back."""
    made.store.rollback(version, op_key=f"{version} after {len(list(made.store.history()))}", actor="test")


def title(made: Site, task_id: str) -> str:
    return made.store.state.tasks_at(made.version)[task_id].name


def said(found: list[Answer | OnebasisError]) -> list[Answer]:
    assert all(isinstance(one, Answer) for one in found), found
    return [one for one in found if isinstance(one, Answer)]


def test_it_answers_by_title_and_by_id_what_the_tasks_own_adapters_answer(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    asked = [Question(title(made, task), {"text": text}) for task in made.specs for text in TEXTS]
    found = said(replica(made).answer(asked))
    for place, task in enumerate(made.specs):
        expected = made.alone(task, [TextRow(text, None, 0) for text in TEXTS]).softmax(dim=-1)
        for answer, row in zip(found[place * len(TEXTS) :], expected, strict=False):
            assert list((answer.probabilities or {}).values()) == pytest.approx(row.tolist(), abs=1e-5)
            assert answer.version == made.version
    (by_id,) = said(replica(made).answer([Question("seed-1", TEXTS[0])]))
    assert by_id == said(replica(made).answer([Question(title(made, "seed-1"), {"text": TEXTS[0]})]))[0]


def test_it_follows_main_and_another_version_is_answered_by_its_number(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one = replica(made, 1)
    assert (one.version, one.follow()) == (1, False)
    (first,) = said(one.answer([Question("seed-0", "Paris")]))
    (refused,) = one.answer([Question("partly", "Paris")])
    assert isinstance(refused, NotFound)
    publish(made, made.version)
    assert (one.follow(), one.version, one.trouble) == (True, made.version, "")
    now, partly, old = said(
        one.answer([Question("seed-0", "Paris"), Question("partly", "Paris"), Question("seed-0", "Paris", version=1)])
    )
    assert [now.version, partly.version, old] == [made.version, made.version, first]
    publish(made, 1)
    assert one.follow()
    assert said(one.answer([Question("seed-0", "Paris")])) == [first]


def test_a_name_is_answered_by_the_revision_that_the_version_holds(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    before = title(made, "seed-0")
    newer = made.store.delivered("seed-1")
    version = merged(made.store, {"seed-0@2": newer}, replaces={"seed-0@2": "seed-0"})
    made.store.publish(version.number, op_key="publish the revision", actor="test")
    one = Replica(made.base, SubspaceReader.open(made.store.storage))
    now, then = said(one.answer([Question(before, "Paris"), Question(before, "Paris", version=made.version)]))
    assert (now.task_id, then.task_id) == ("seed-0@2", "seed-0")
    assert set(now.probabilities or {}) == {"seed-1-0", "seed-1-1", "seed-1-2"}
    assert set(then.probabilities or {}) == {"seed-0-0", "seed-0-1"}
    (gone,) = one.answer([Question("seed-0", "Paris")])
    assert isinstance(gone, NotFound)


def test_a_version_that_cannot_be_read_leaves_the_one_before_in_its_place(
    tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one = replica(made, 1)
    (first,) = said(one.answer([Question("seed-0", "Paris")]))
    publish(made, made.version)
    with monkeypatch.context() as patch:

        def away(*_: object) -> None:
            raise Unavailable("the storage is away", "s3://bucket")

        patch.setattr(SubspaceReader, "basis", away)
        assert not one.follow()
        assert (one.version, one.trouble) == (1, "s3://bucket: the storage is away")
        assert said(one.answer([Question("seed-0", "Paris")])) == [first]
    assert (one.follow(), one.version, one.trouble) == (True, made.version, "")


@pytest.mark.parametrize("part", ["head", "coefficients"])
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "damaged"])
def test_a_version_of_which_one_task_cannot_be_read_leaves_the_one_before_in_its_place(
    tiny: Callable[[str], BaseModel], part: str, is_gone: bool
) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one, name = replica(made), title(made, "seed-0")
    first, beside = said(one.answer([Question(name, "Paris"), Question("seed-1", "Paris")]))
    version = merged(made.store, {"seed-0@2": made.store.delivered("seed-2")}, replaces={"seed-0@2": "seed-0"})
    made.store.publish(version.number, op_key="publish the revision", actor="test")
    (new,) = version.added
    ref = new.coefficients if part == "coefficients" else made.store.state.heads.get(new.adapter.key, new.adapter)
    storage = made.store.storage
    whole = storage.read(ref.key)
    if is_gone:
        storage.delete(ref.key)
    else:
        storage.write(ref.key, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not one.follow()
    assert (one.version, ref.key in one.trouble) == (made.version, True), one.trouble
    assert said(one.answer([Question(name, "Paris"), Question("seed-1", "Paris")])) == [first, beside]
    storage.write(ref.key, whole)
    assert (one.follow(), one.version, one.trouble) == (True, version.number, "")
    (now,) = said(one.answer([Question(name, "Paris")]))
    assert (now.task_id, now.version) == ("seed-0@2", version.number)


def test_more_tasks_than_can_be_read_in_time_are_looked_for_all_the_same(
    tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.serving.replica.FETCH_SECONDS", -1.0)
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one = replica(made, 3)
    storage, key = made.store.storage, made.store.state.versions[made.version].added[0].coefficients.key
    whole = storage.read(key)
    publish(made, made.version)
    storage.delete(key)
    assert not one.follow()
    assert (one.version, key in one.trouble) == (3, True), one.trouble
    storage.write(key, whole)
    assert (one.follow(), one.version) == (True, made.version)


def test_one_that_has_just_started_says_that_it_cannot_read_its_version(
    tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one = replica(made)
    with monkeypatch.context() as patch:

        def away(*_: object) -> None:
            raise Unavailable("the storage is away", "s3://bucket")

        patch.setattr(SubspaceReader, "basis", away)
        assert not one.follow()
        assert (one.version, one.trouble) == (made.version, "s3://bucket: the storage is away")
    assert (one.follow(), one.trouble) == (False, "")


def test_what_one_asks_wrongly_costs_nobody_else_an_answer(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    wrong = [
        (Question("seed-9", "Paris"), NotFound, "holds no such task"),
        (Question("seed-0", {"txt": "Paris"}), InvalidInput, "has 'txt', which the task does not read"),
        (Question("seed-0", {}), InvalidInput, "has no column 'text'"),
        (Question("seed-0", ""), InvalidInput, "column 'text' is empty"),
        (Question("seed-0", {"text": "a", "text_pair": "b"}), InvalidInput, "has 'text_pair', which the task does not"),
        (Question("seed-0", "Paris", version=99), NotFound, "99"),
        (Question("seed-0", "Paris", is_chat=True), InvalidInput, "has learnt from sequence_classification"),
    ]
    found = replica(made).answer([*(question for question, _, _ in wrong), Question("seed-0", "Paris")])
    assert isinstance(found[-1], Answer)
    for (_, kind, words), error in zip(wrong, found[:-1], strict=True):
        assert isinstance(error, kind)
        assert words in str(error)


def test_the_names_of_inputs_are_the_same_whatever_the_rows_called_them(tiny: Callable[[str], BaseModel]) -> None:
    names = {"text_column": "premise", "text_pair_column": "hypothesis", "label_column": "text"}
    made = site(tiny("bert"), "sequence_classification", ["query"], **names)
    (found,) = said(replica(made).answer([Question("seed-0", {"text": "Paris", "text_pair": "France"})]))
    expected = made.alone("seed-0", [TextRow("Paris", "France", 0)]).softmax(dim=-1)
    assert list((found.probabilities or {}).values()) == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_pictures_come_as_files_in_base64(tmp_path: Path) -> None:
    made = site(
        load_base_model(tiny_settings(save("vit", "backbone", tmp_path))),
        "image_classification",
        FAMILIES["vit"].targets,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    one = replica(made)
    (found,) = said(one.answer([Question("seed-0", base64.b64encode(buffer.getvalue()).decode())]))
    expected = made.alone("seed-0", [ImageRow(pixels, 0)]).softmax(dim=-1)
    assert list((found.probabilities or {}).values()) == pytest.approx(expected[0].tolist(), abs=1e-5)
    (refused,) = one.answer([Question("seed-0", "no picture")])
    assert "image is not base64" in str(refused)


@pytest.fixture
def writers(tmp_path: Path) -> Site:
    return site(
        load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6))),
        "causal_lm",
        ["q_proj"],
        max_new_tokens=12,
    )


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_pieces_make_up_the_answer_and_each_row_has_its_own_ends(writers: Site) -> None:
    one, pieces = replica(writers), [list[Piece](), list[Piece](), list[Piece]()]
    whole = said(one.answer([Question("seed-0", text) for text in TEXTS[:3]]))
    asked = [
        Question("seed-0", TEXTS[0], wrote=pieces[0].append),
        Question("seed-0", TEXTS[1], writing=Writing(new_tokens=3), wrote=pieces[1].append),
        Question("seed-0", TEXTS[2], wanted=lambda: False),  # nobody waits
    ]
    found = said(one.answer(asked))
    assert found[0] == whole[0]
    assert text_of(pieces[0]) == whole[0].text
    assert {piece.version for piece in pieces[0]} == {whole[0].version}
    assert len(pieces[0]) > 3
    assert (found[1].tokens, found[1].ended, text_of(pieces[1])) == (3, "length", found[1].text)
    assert (whole[1].text or "").startswith(found[1].text or "?")
    assert (found[2].tokens, found[2].ended) == (1, "")


def test_an_answer_ends_before_a_stop_text_and_pieces_never_show_a_part_of_it(writers: Site) -> None:
    one = replica(writers)
    (whole,) = said(one.answer([Question("seed-0", TEXTS[0])]))
    assert whole.text is not None
    stop = whole.text[len(whole.text) // 2 :][:4]
    pieces: list[Piece] = []
    asked = Question("seed-0", TEXTS[0], writing=Writing(stop=(stop,)), wrote=pieces.append)
    (found,) = said(one.answer([asked]))
    assert found.ended == "stop"
    assert text_of(pieces) == found.text == whole.text[: whole.text.index(stop)]


def first_tokens(made: Site, task: str, prompt: str) -> dict[str, float]:
    """Text of each token that may be written first, to its probability, by the exported adapter."""
    model = adapted_model(made.base, made.store.adapter(task, made.version), made.specs[task]).eval()
    row = CompletionRow((("user", prompt), ("assistant", "?")), False)
    with torch.inference_mode():
        ids = torch.tensor([encode_prompt(made.base.tokenizer, row, 64)])
        probabilities = model(input_ids=ids).logits[0, -1].softmax(dim=-1).tolist()
    found: dict[str, float] = {}
    for token, probability in enumerate(probabilities):
        text = made.base.tokenizer.decode([token], skip_special_tokens=True)
        found[text] = found.get(text, 0.0) + probability
    return found


def test_a_seed_draws_the_same_and_temperature_draws_as_often_as_probable(writers: Site) -> None:
    one = replica(writers)
    hot = Writing(temperature=1.0, new_tokens=1)
    same = said(one.answer([Question("seed-0", TEXTS[0], writing=replace(hot, seed=5, new_tokens=9))] * 2))
    assert same[0] == same[1]
    asked = [Question("seed-0", TEXTS[0], writing=replace(hot, seed=n)) for n in range(DRAWS)]
    drawn = Counter(answer.text for answer in said(one.answer(asked)))
    (likeliest,) = said(one.answer([Question("seed-0", TEXTS[0], writing=Writing(new_tokens=1))]))
    expected = first_tokens(writers, "seed-0", TEXTS[0])
    assert len(drawn) > 3
    for text, probability in expected.items():
        assert abs(drawn[text] / DRAWS - probability) < 4 * (probability * (1 - probability) / DRAWS) ** 0.5 + 1 / DRAWS
    narrow = [Question("seed-0", TEXTS[0], writing=replace(hot, seed=n, top_p=1e-6)) for n in range(20)]
    assert {answer.text for answer in said(one.answer(narrow))} == {likeliest.text}


def test_chats_and_prompts_are_not_mixed_up(writers: Site) -> None:
    one = replica(writers)
    (refused,) = one.answer([Question("seed-0", {"prompt": "Paris"}, is_chat=True)])
    assert "has learnt from prompts and completions" in str(refused)
    row = CompletionRow((("user", "Paris"), ("assistant", "?")), False)
    assert (
        said(one.answer([Question("seed-0", {"prompt": "Paris"}, is_chat=False)]))[0].text
        == writers.answers([("seed-0", row)])[0].text
    )


def test_a_text_is_ended_by_the_version_that_began_it_beside_those_of_the_next(writers: Site) -> None:
    one, found = replica(writers), dict[str, object]()
    (before,) = said(one.answer([Question("seed-0", TEXTS[0])]))
    one.begin([Question("seed-0", TEXTS[0])], lambda _, answer: found.setdefault("first", answer))
    one.step()
    publish(writers, 1)
    assert one.follow()
    one.begin([Question("seed-0", TEXTS[1])], lambda _, answer: found.setdefault("second", answer))
    one.step()
    assert found == {}
    while one.step():
        pass
    assert found["first"] == before
    assert found["second"] == said(one.answer([Question("seed-0", TEXTS[1], version=1)]))[0]


def test_a_request_of_which_the_canary_cannot_write_every_row_is_written_by_main(writers: Site) -> None:
    one = replica(writers, writers.version - 1)
    one.set_canary(CanarySettings(version=writers.version, share=1.0))
    one.follow()
    asked = [Question("seed-0", TEXTS[0], key="a"), Question("seed-0", TEXTS[1], key="b")]
    first, second, refused = one.answer([*asked, Question("seed-0", {"promt": "a"}, key="b")])
    assert [answer.version for answer in said([first, second])] == [writers.version, writers.version - 1]
    assert "promt" in str(refused)
    assert one.canary is not None
    assert one.canary.comparison.as_dict()["failed"] == 0  # main cannot answer it either
