"""Which task a text is for: by sums that no order changes, or by the updates alone; and the task then answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import InvalidInput, NotFound
from subspace_store.module_names import plain
from tests.subspace_store.builders import fresh_storage, merged
from tests.workers.serving.sites import TEXTS, Site, site
from tests.workers.serving.test_replica import publish, replica, said, title
from tests.workers.tiny_bases import save_llama
from tests.workers.worker_builders import tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.rows.task_data import CompletionRow, TextRow
from workers.serving.question import AUTO, Answer, Question
from workers.serving.routers import LOOK_SECONDS
from workers.serving.routing import Router, features, features_key, keep_sums, read_sums, sums_of, text_of, write_sums


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], BaseModel]) -> Site:
    return site(tiny("bert"), "sequence_classification", ["query"])


def backbone(made: Site) -> torch.nn.Module:
    spec = made.specs["seed-0"]
    return getattr(made.base.task_model(spec).eval(), made.base.prefix)  # type: ignore[no-any-return]


def test_the_sums_of_parts_are_those_of_the_whole_in_any_order(made: Site) -> None:
    found = features(made.base, backbone(made), TEXTS)
    assert found.shape == (5, 33)  # 32 numbers of a hidden state and a constant
    assert torch.allclose(found[:, :-1].norm(dim=1), torch.ones(5), atol=1e-5)
    one_by_one = torch.cat([features(made.base, backbone(made), [text]) for text in TEXTS])
    assert torch.allclose(found, one_by_one, atol=1e-5)  # padding is not looked at
    whole, parts = sums_of(found), sums_of(found[3:]) + sums_of(found[[2, 0, 1]])
    assert (whole.count, parts.count) == (5, 5)
    assert torch.allclose(whole.second_KK, parts.second_KK, atol=1e-12)
    assert torch.allclose(whole.first_K, parts.first_K, atol=1e-12)


def test_a_router_is_least_squares_with_every_task_of_the_same_weight() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = {f"t{n}": torch.randn(40 + 30 * n, 6, generator=draw) + 2 * torch.eye(6)[n] for n in range(3)}
    router = Router({task: sums_of(some) for task, some in rows.items()})
    # The same by an ordinary solver: rows weighted by 1/√count, and a row for each ridge.
    left = torch.cat([some / len(some) ** 0.5 for some in rows.values()]).double()
    ridge = (1e-2 * (left.T @ left).diagonal().mean()) ** 0.5
    right = torch.cat([torch.eye(3)[n].expand(len(s), 3) / len(s) ** 0.5 for n, s in enumerate(rows.values())]).double()
    expected = torch.linalg.lstsq(
        torch.cat([left, ridge * torch.eye(6).double()]), torch.cat([right, torch.zeros(6, 3).double()])
    ).solution
    texts = torch.randn(7, 6, generator=draw)
    assert torch.allclose(router.scores(texts), texts.double() @ expected, atol=1e-8)
    for number, task in enumerate(router.tasks):
        right_ones = router.scores(rows[task]).argmax(dim=1) == number
        assert float(right_ones.double().mean()) > 0.7


def test_sums_are_kept_beside_the_results_once_and_read_back(made: Site) -> None:
    storage, rows = fresh_storage(), [TextRow(text, None, 0) for text in TEXTS]
    assert keep_sums(storage, made.base, backbone(made), "t1", rows)
    kept, before = read_sums(storage, "t1"), storage.read(features_key("t1"))
    assert kept is not None
    expected = sums_of(features(made.base, backbone(made), TEXTS))
    assert torch.equal(kept.second_KK, expected.second_KK)
    assert torch.equal(kept.first_K, expected.first_K)
    assert keep_sums(storage, made.base, backbone(made), "t1", rows[:1])
    assert storage.read(features_key("t1")) == before
    assert not keep_sums(storage, made.base, backbone(made), "t2", [TextRow("a", "b", 0)])  # nobody asks with one text
    assert read_sums(storage, "t2") is None


def test_the_text_of_a_row_is_what_a_caller_would_send() -> None:
    assert text_of(TextRow("a", None, 0)) == "a"
    assert text_of(CompletionRow((("user", "ask"), ("assistant", "say")), True)) == "ask"


def test_energy_is_how_much_each_update_changes_the_layers_relative_to_its_size(made: Site) -> None:
    tasks = ["seed-0", "renewed-0", "partly", "private"]
    one = replica(made)
    batch = one._batch(made.version)
    found = batch.energies(TEXTS, tasks, 32)
    for place, task in enumerate(tasks):
        adapter = made.store.adapter(task, made.version)
        model = made.base.task_model(made.specs[task]).eval()
        changed, size = torch.zeros(len(TEXTS)), 0.0
        inputs: dict[str, torch.Tensor] = {}
        for name in adapter.modules:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, given, n=name, at=inputs: at.update({n: given[0]})
            )
        encoded = made.base.tokenizer(list(TEXTS), padding=True, return_tensors="pt")
        with torch.inference_mode():
            model(**encoded)
        for name, update in adapter.modules.items():
            delta = update.delta().float()
            changed += ((inputs[name] @ delta.T).square().sum(dim=-1) * encoded["attention_mask"]).sum(dim=1)
            size += float(delta.square().sum())
        assert torch.allclose(found[:, place].float(), changed / size, rtol=2e-2), task
    assert {plain(name) for name in made.store.parts("private", made.version).private}


def test_a_question_of_no_task_is_answered_by_the_one_that_it_is_for(made: Site) -> None:
    one = replica(made)
    storage = made.store.storage
    french = ["Paris is the capital of France", "the capital of France", "France Paris capital"]
    green = ["grass is green", "the colour of grass", "green green grass colour"]
    for task, texts in (("seed-0", french), ("seed-1", green)):
        write_sums(storage, task, sums_of(features(made.base, backbone(made), texts)))
    asked = [Question(AUTO, text) for text in (*french, *green)] + [Question(title(made, "seed-1"), "Paris")]
    found = said(one.answer(asked))
    assert [answer.task_id for answer in found] == ["seed-0"] * 3 + ["seed-1"] * 4
    for question, answer in zip(asked[:6], found, strict=False):
        assert answer.routed is not None
        assert answer.routed_by == "features"
        assert next(iter(answer.routed)) == title(made, answer.task_id)
        (named,) = said(one.answer([Question(title(made, answer.task_id), question.inputs)]))
        assert answer.label == named.label
    assert found[-1].routed is None
    only = (title(made, "seed-1"),)
    (kept,) = said(one.answer([Question(AUTO, french[0], among=only)]))
    assert kept.task_id == "seed-1"
    (by_energy,) = said(one.answer([Question(AUTO, french[0], by="energy")]))
    assert by_energy.routed_by == "energy"
    assert by_energy.routed is not None
    assert len(by_energy.routed) == 3
    two, none = Question(AUTO, {"text": "x", "text_pair": "y"}), Question(AUTO, "a", among=())
    for wrong, error in ((two, InvalidInput), (none, NotFound)):
        (refused,) = one.answer([wrong])
        assert isinstance(refused, error)
    assert isinstance(replace(found[0], routed=None), Answer)
    # Whoever asks at the same time is told what is wrong with his own row alone.
    odd = [two, Question(AUTO, {"messages": "hello"}), Question(AUTO, {"messages": [7]}), Question(AUTO, [])]  # type: ignore[arg-type]
    *wrong_ones, right = one.answer([*odd, Question(AUTO, green[0])])
    assert [type(said_) for said_ in wrong_ones] == [InvalidInput] * 4
    assert isinstance(right, Answer)
    assert right.task_id == "seed-1"


def test_a_task_whose_sums_come_after_it_is_found_by_them_without_a_new_version(
    tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one, green = replica(made), Question(AUTO, "grass is green")
    french, of_grass = ["the capital of France"], ["the colour of grass", "green grass"]
    write_sums(made.store.storage, "seed-0", sums_of(features(made.base, backbone(made), french)))
    assert said(one.answer([green]))[0].task_id == "seed-0"  # the only one that is known
    write_sums(made.store.storage, "seed-1", sums_of(features(made.base, backbone(made), of_grass)))
    assert said(one.answer([green]))[0].task_id == "seed-0"  # the storage is not asked for each text
    now = time.monotonic()
    monkeypatch.setattr("workers.serving.routers.time.monotonic", lambda: now + LOOK_SECONDS + 1)
    assert said(one.answer([green]))[0].task_id == "seed-1"


def test_a_revision_is_found_by_its_own_rows_and_an_earlier_version_by_those_it_had(
    tiny: Callable[[str], BaseModel],
) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    one, green = replica(made), Question(AUTO, "grass is green")
    french, of_grass = ["the capital of France"], ["the colour of grass", "green grass"]

    def has_rows(task: str, texts: list[str]) -> None:
        write_sums(made.store.storage, task, sums_of(features(made.base, backbone(made), texts)))

    for task in made.store.state.tasks_at(made.version):
        has_rows(task, ["Paris"])
    has_rows("seed-0", french)
    has_rows("seed-1", of_grass)
    assert said(one.answer([green]))[0].task_id == "seed-1"
    replaces = {"seed-0@2": "seed-0", "seed-1@2": "seed-1"}
    version = merged(made.store, {new: made.store.delivered(old) for new, old in replaces.items()}, replaces=replaces)
    has_rows("seed-0@2", of_grass)
    has_rows("seed-1@2", french)
    made.store.publish(version.number, op_key="publish the revisions", actor="test")
    assert one.follow()
    assert said(one.answer([green]))[0].task_id == "seed-0@2"
    (then,) = said(one.answer([replace(green, version=made.version)]))
    assert then.task_id == "seed-1"
    publish(made, made.version)
    assert one.follow()
    assert said(one.answer([green])) == [then]


def test_a_chat_of_no_task_keeps_all_its_messages(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, chat=True, initializer_range=0.6)))
    one = replica(made := site(base, "causal_lm", ["q_proj"], max_new_tokens=4, messages_column="messages"))
    chat = [
        {"role": "user", "content": "The capital of France is"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "grass"},
    ]
    for is_chat in (True, None):
        auto = Question(AUTO, {"messages": chat}, by="energy", is_chat=is_chat)
        (answer,) = said(one.answer([auto]))
        (named,) = said(one.answer([replace(auto, task=title(made, answer.task_id), by="")]))
        assert (answer.text, answer.prompt_tokens) == (named.text, named.prompt_tokens)
        (last,) = said(one.answer([replace(auto, task=title(made, answer.task_id), inputs={"messages": chat[-1:]})]))
        assert answer.prompt_tokens > last.prompt_tokens
