"""Rows of many tasks in one batch answer as each task's own adapter does: all kinds, all places of a task's update."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import InvalidInput, NotFound
from configs.task_spec import Kind
from subspace_store.adapter import SIZED
from subspace_store.module_names import is_renewed
from tests.subspace_store.builders import merged
from tests.workers.families import FAMILIES, save
from tests.workers.serving.sites import TEXTS, Site, mixed, site
from tests.workers.tiny_bases import save_clip, save_llama
from tests.workers.worker_builders import tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.evaluation import adapted_model, generate
from workers.features import collator
from workers.rows.task_data import CompletionRow, ImageRow, Row, TextRow
from workers.serving.mixed_batch import Asked, MixedBatch, Said
from workers.serving.mixed_layers import Batch, Current, MixedLayer, TaskFactors
from workers.serving.question import Answer, Writing
from workers.serving.task_file import TaskFile


@pytest.fixture(params=[*sorted(FAMILIES), "clip"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    name = request.param
    if name == "clip":
        base = load_base_model(tiny_settings(save_clip(tmp_path / "base")))
        return site(base, "image_text", ("q_proj", "fc1", "projection"), prompt_template="the {} of France")
    saved = save(name, "backbone", tmp_path / "base")
    kind: Kind = "image_classification" if name == "vit" else "sequence_classification"
    return site(load_base_model(tiny_settings(saved)), kind, FAMILIES[name].targets)


def rows_for(site: Site) -> list[Row]:
    if "image_classification" in site.base.kinds:
        draw = np.random.default_rng(1)
        return [ImageRow(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8), 0) for _ in TEXTS]
    return [TextRow(text, None, 0) for text in TEXTS]


def test_where_the_updates_are(tmp_path: Path) -> None:
    """The tests below are about nothing if all tasks lie in one place."""
    made = site(
        load_base_model(tiny_settings(save("bert", "backbone", tmp_path))), "sequence_classification", ["query"]
    )
    parts = {task: made.store.parts(task, made.version) for task in made.specs}
    assert any(map(is_renewed, parts["renewed-0"].coefficients))
    assert not parts["renewed-0"].private
    assert parts["seed-0"].coefficients
    assert not any(map(is_renewed, parts["seed-0"].coefficients))
    assert parts["private"].private
    assert all(update.foundation for update in parts["foundation"].private.values())
    assert any(part.coefficients and part.private for part in parts.values())


def test_a_mixed_batch_answers_as_each_exported_adapter(family: Site) -> None:
    rows = rows_for(family)
    asked = [(task, row) for row in rows for task in family.specs]
    found = dict(zip(itertools.product(range(len(rows)), family.specs), family.answers(asked), strict=True))
    for task, spec in family.specs.items():
        expected = family.alone(task, rows).softmax(dim=-1)
        for place in range(len(rows)):
            answer = found[place, task]
            assert answer.version == family.version
            assert answer.task_id == task
            assert answer.probabilities is not None
            assert tuple(answer.probabilities) == spec.data.label_names
            assert list(answer.probabilities.values()) == pytest.approx(expected[place].tolist(), abs=1e-5)
            assert answer.label == spec.data.label_names[int(expected[place].argmax())]


def test_the_update_counts(tmp_path: Path) -> None:
    """Without its update, each task would say something else: the tests above would not see it missing otherwise."""
    made = site(
        load_base_model(tiny_settings(save("bert", "backbone", tmp_path))), "sequence_classification", ["query"]
    )
    row = TextRow(TEXTS[0], None, 0)
    for task, answer in zip(made.specs, made.answers([(task, row) for task in made.specs]), strict=True):
        bare = replace(made.store.adapter(task, made.version), modules={})
        batch = collator(made.base, made.specs[task])([row])
        batch.pop("labels")
        with torch.inference_mode():
            logits = made.base.task_model(made.specs[task], adapter=bare).eval()(**batch).logits
        assert answer.probabilities is not None
        difference = torch.tensor(list(answer.probabilities.values())) - logits.softmax(dim=-1)[0]
        assert difference.abs().max() > 1e-3, task


def test_a_language_models_logits_are_those_of_each_exported_adapter(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    made = site(base, "causal_lm", ["q_proj", "down_proj", "up_proj"], max_new_tokens=8)
    batch = mixed(made)
    tasks = [batch._task(task) for task in made.specs]
    shared = batch._model(tasks[0].spec)
    ids = base.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode(), shared.serving(shared.together(tasks)):
        found = shared.model(input_ids=ids.repeat(len(tasks), 1)).logits
    for task, logits in zip(made.specs, found, strict=True):
        alone = adapted_model(base, made.store.adapter(task, made.version), made.specs[task]).eval()
        with torch.inference_mode():
            expected = alone(input_ids=ids).logits[0]
        assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())), task
    assert (found[0] - found[1]).abs().max() > 0.1  # the tasks differ


def test_a_long_answer_takes_none_of_the_prompt(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    made = site(base, "causal_lm", ["q_proj"], max_new_tokens=8)
    row = CompletionRow((("user", TEXTS[0]), ("assistant", "")), False)
    short, long, longer = (
        mixed(made).answer([Asked("seed-0", row, Writing(new_tokens=limit))])[0] for limit in (None, 60, 4000)
    )
    assert short.prompt_tokens == long.prompt_tokens == longer.prompt_tokens > 4
    assert (long.warning, longer.warning) == ("", "")
    assert long.text == longer.text
    assert (long.text or "").startswith(short.text or "")
    assert long.tokens <= 64 - long.prompt_tokens


def test_regressions_give_numbers(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_regression", ["query", "value"], text_pair_column="other")
    rows = [TextRow(text, text[::-1], 0.0) for text in TEXTS]
    found = made.answers([(task, row) for task in made.specs for row in rows])
    expected = torch.cat([made.alone(task, rows).squeeze(-1) for task in made.specs])
    assert [answer.value for answer in found] == pytest.approx(expected.tolist(), abs=1e-5)
    assert {answer.label for answer in found} == {None}


@pytest.mark.parametrize("ends", [("q_proj", "v_proj"), ("q_proj", "down_proj", "up_proj")])
def test_language_models_write_what_each_adapter_writes(tmp_path: Path, ends: Sequence[str]) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    made = site(base, "causal_lm", ends, max_new_tokens=8)
    rows = [CompletionRow((("user", text), ("assistant", "")), False) for text in TEXTS]
    found = made.answers([(task, row) for row in rows for task in made.specs])
    for place, task in enumerate(made.specs):
        model = adapted_model(base, made.store.adapter(task, made.version), made.specs[task]).eval()
        expected = [generate(model, base, [row], made.specs[task])[0] for row in rows]
        assert [answer.text for answer in found[place :: len(made.specs)]] == expected
    assert len({answer.text for answer in found}) > len(rows)  # the tasks differ
    assert all(answer.tokens for answer in found if answer.text)


def test_each_task_stops_at_its_own_length(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    made = site(base, "causal_lm", ["q_proj"], max_new_tokens=8)
    short = {"seed-0": 2, "seed-1": 9}
    specs = {
        task: spec.model_copy(update={"data": spec.data.model_copy(update={"max_new_tokens": short.get(task, 5)})})
        for task, spec in made.specs.items()
    }
    row = CompletionRow((("user", TEXTS[0]), ("assistant", "")), False)
    found = mixed(made, specs).answer([Asked(t, row) for t in short])
    model = {t: adapted_model(base, made.store.adapter(t, made.version), specs[t]).eval() for t in short}
    assert [answer.text for answer in found] == [generate(model[t], base, [row], specs[t])[0] for t in short]
    assert found[0].tokens <= 2


def test_tasks_of_different_lengths_stay_within_the_positions_of_the_model(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save("gpt2", "language model", tmp_path)))  # 64 positions in a table
    made = site(base, "causal_lm", FAMILIES["gpt2"].targets)
    lengths = {"seed-0": 4, "seed-1": 30}
    specs = {}
    for task, new_max in lengths.items():
        data = made.specs[task].data.model_copy(update={"max_new_tokens": new_max, "max_length": 60})
        specs[task] = made.specs[task].model_copy(update={"data": data})
    rows = {"seed-0": TEXTS[0] * 9, "seed-1": "Paris"}
    asked = [Asked(t, CompletionRow((("user", rows[t]), ("assistant", "")), False)) for t in lengths]
    together = mixed(made, specs).answer(asked)
    alone = [mixed(made, specs).answer([one])[0] for one in asked]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert together[1].tokens > 4


def test_a_task_is_read_as_its_adapter_says(tiny: Callable[[str], BaseModel]) -> None:
    base = tiny("bert-without-pooler")
    made = site(base, "sequence_classification", ["query"], text_column="said", max_length=9)
    kept = made.store.delivered("seed-0")
    merged(made.store, {"earlier": replace(kept, info={SIZED: "score"})})
    batch = MixedBatch(base, made.store, made.store.state.refs["candidate"])
    assert batch.spec("seed-0").data.model_dump() == made.specs["seed-0"].data.model_dump() | {
        "train_file": "-",
        "eval_file": "-",
        "eval_fraction": None,
    }
    with pytest.raises(InvalidInput, match="an earlier release, which did not note how its rows are read"):
        batch.spec("earlier")


def test_a_layer_that_computes_in_another_number_type_than_its_factors() -> None:
    """As a quantised layer does."""
    inner, current = torch.nn.Linear(6, 5).bfloat16(), Current()
    layer, x = MixedLayer(inner, "layer", None, current), torch.randn(2, 3, 6).bfloat16()
    b_RN, a_RD = torch.randn(2, 5), torch.randn(2, 6)
    none = torch.zeros(0, 0)
    current.batch = Batch([{"layer": TaskFactors(none, none, b_RN, a_RD)}], torch.tensor([0, 0]))
    with torch.inference_mode():
        y, expected = layer(x), inner(x).float() + x.float() @ a_RD.T @ b_RN
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, rtol=0.02, atol=0.05)


def test_a_task_with_parameters_of_its_own_inside_the_backbone(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert-without-pooler"), "sequence_classification", ["query"])
    assert any("pooler" in name for name in made.store.adapter("seed-0", made.version).head)
    rows = [TextRow(text, None, 0) for text in TEXTS]
    found = made.answers([(task, row) for task in ("seed-0", "renewed-1") for row in rows])
    expected = [p for task in ("seed-0", "renewed-1") for p in made.alone(task, rows).softmax(dim=-1).tolist()]
    for answer, probabilities in zip(found, expected, strict=True):
        assert answer.probabilities is not None
        assert list(answer.probabilities.values()) == pytest.approx(probabilities, abs=1e-5)


def test_every_version_answers_for_itself(tiny: Callable[[str], BaseModel]) -> None:
    made, row = site(tiny("bert"), "sequence_classification", ["query"]), TextRow(TEXTS[0], None, 0)
    (then,) = made.answers([("seed-0", row)], version=1)
    assert then.version == 1
    with pytest.raises(NotFound):
        made.answers([("private", row)], version=1)


def test_what_is_cut_is_told(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    long, short = (TextRow(word * 40, None, 0) for word in ("green ", ""))
    cut, whole = made.answers([("seed-0", long), ("seed-1", replace(short, text="green"))])
    assert "max_length" in cut.warning
    assert not whole.warning


def test_what_of_a_prompt_is_cut_or_of_a_text_is_unknown_is_told(
    tiny: Callable[[str], BaseModel], tmp_path: Path
) -> None:
    base = load_base_model(tiny_settings(save_llama(tmp_path, initializer_range=0.6)))
    made = site(base, "causal_lm", ["q_proj"], max_new_tokens=8)
    long, short = (CompletionRow((("user", text), ("assistant", "")), False) for text in (TEXTS[0] * 9, "Paris"))
    cut, whole = made.answers([("seed-0", long), ("seed-0", short)])
    assert "and its last 16 are read" in cut.warning
    assert not whole.warning
    (foreign,) = site(tiny("bert"), "sequence_classification", ["query"]).answers(
        [("seed-0", TextRow("\U0001f600", None, 0))]
    )
    assert "characters that the base model's tokenizer does not know" in foreign.warning


def test_a_row_of_another_kind_is_refused(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    with pytest.raises(InvalidInput, match="a sequence_classification is not asked about a CompletionRow"):
        made.answers([("seed-0", CompletionRow((("user", "a"), ("assistant", "")), False))])
    with pytest.raises(InvalidInput, match="was trained on one text at a time, and is asked about two texts"):
        made.answers([("seed-0", TextRow("a", "b", 0))])
    pairs = site(tiny("bert"), "sequence_classification", ["query"], text_pair_column="other")
    with pytest.raises(InvalidInput, match="was trained on two texts at a time, and is asked about one text"):
        pairs.answers([("seed-0", TextRow("a", None, 0))])


def test_memory_stays_within_its_limit(tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks leave memory, and are back from the file, not from the store, with the same answers to the last bit."""
    made = site(tiny("bert"), "sequence_classification", ["query", "value"])
    row, limit = TextRow(TEXTS[0], None, 0), 30_000
    batch, read = mixed(made, tasks_bytes=limit), list[str]()
    parts = made.store.parts
    monkeypatch.setattr(made.store, "parts", lambda task_id, version: read.append(task_id) or parts(task_id, version))
    first = [batch.answer([Asked(task, row)])[0].probabilities for task in made.specs]
    assert 0 < batch.bytes_of_tasks <= limit
    assert len(batch.tasks) < len(made.specs)
    assert batch.bytes_in_file > limit
    again = [batch.answer([Asked(task, row)])[0].probabilities for task in made.specs]
    assert first == again
    assert read == [*made.specs]
    together = batch.answer(
        [Asked(task, row) for task in made.specs]
    )  # more than the limit, as long as the batch lasts
    assert [one.label for one in together] == [max(p or {}, key=lambda name: (p or {})[name]) for p in first]
    assert batch.bytes_of_tasks <= limit


def test_without_room_on_the_disk_tasks_stay_in_memory(
    tiny: Callable[[str], BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, row = site(tiny("bert"), "sequence_classification", ["query"]), TextRow(TEXTS[0], None, 0)
    asked = [Asked(task, row) for task in made.specs]
    right = mixed(made).answer(asked)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(TaskFile, "write", full)
    batch = mixed(made)
    assert batch.answer(asked) == right
    in_file = mixed(made)
    monkeypatch.undo()
    in_file.answer(asked)
    assert batch.bytes_of_tasks > in_file.bytes_of_tasks > 0


def test_several_numbers_are_answered_by_their_names(tmp_path: Path) -> None:
    base = load_base_model(tiny_settings(save("vit", "backbone", tmp_path)))
    made = site(base, "image_regression", FAMILIES["vit"].targets)
    draw = np.random.default_rng(1)
    row = ImageRow(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8), (0.0,) * 3)
    for task in ("renewed-0", "renewed-1"):
        (answer,) = made.answers([(task, row)])
        assert answer.values is not None
        assert tuple(answer.values) == made.specs[task].data.label_names
        assert list(answer.values.values()) == pytest.approx(made.alone(task, [row])[0].tolist(), abs=1e-5)


def test_a_row_that_cannot_be_answered_costs_no_other_row(tiny: Callable[[str], BaseModel]) -> None:
    """A task whose head is no numbers, one that is not there, and one whose layers cannot be computed."""
    made = site(tiny("bert"), "sequence_classification", ["query"])
    row = TextRow(TEXTS[0], None, 0)
    tasks = ("seed-0", "seed-1", "seed-2", "nobody", "seed-3", "partly", "seed-0")
    right = dict(zip(made.specs, made.answers([(task, row) for task in made.specs]), strict=True))
    batch = mixed(made)
    for task in made.specs:
        batch.spec(task)
    # Not its coefficients: torch's attention on some CPUs makes numbers of what is none. The store has no such ones.
    loaded = batch._tasks["seed-1"]
    no_numbers = {name: torch.full_like(tensor, torch.nan) for name, tensor in loaded.head.items()}
    batch._tasks["seed-1"] = replace(loaded, head=no_numbers)
    name, factors = next(iter(batch._tasks["seed-3"].factors.items()))
    wrong = replace(factors, b_RN=torch.ones(2, 3), a_RD=torch.ones(2, 5))
    batch._tasks["seed-3"] = replace(batch._tasks["seed-3"], factors={name: wrong})
    found: dict[int, Said] = {}
    batch.begin([Asked(task, row) for task in tasks], found.__setitem__)
    failed = {tasks[place]: said for place, said in found.items() if isinstance(said, Exception)}
    assert {task: type(error) for task, error in failed.items()} == {
        "seed-1": InvalidInput,
        "nobody": NotFound,
        "seed-3": RuntimeError,
    }
    for place, said in found.items():
        if tasks[place] not in failed:
            assert isinstance(said, Answer)
            expected = list((right[tasks[place]].probabilities or {}).values())
            assert list((said.probabilities or {}).values()) == pytest.approx(expected, abs=1e-5)


def test_a_batch_that_memory_has_no_room_for_becomes_smaller_ones(tiny: Callable[[str], BaseModel]) -> None:
    made = site(tiny("bert"), "sequence_classification", ["query"])
    asked = [Asked(task, TextRow(text, None, 0)) for task in made.specs for text in TEXTS]
    right, batch, passes = mixed(made).answer(asked), mixed(made), list[int]()
    model = batch._model(made.specs["seed-0"])
    logits = model.logits

    def limited(inputs: Mapping[str, torch.Tensor], tasks: Sequence[Any]) -> Any:
        if len(tasks) > 6:
            raise torch.OutOfMemoryError("out of memory")
        passes.append(len(tasks))
        return logits(inputs, tasks)

    model.logits = limited  # type: ignore[method-assign]
    for answer, expected in zip(batch.answer(asked), right, strict=True):
        assert answer.label == expected.label
        assert list((answer.probabilities or {}).values()) == pytest.approx(
            list((expected.probabilities or {}).values()), abs=1e-5
        )
    assert sum(passes) == len(asked)
    assert max(passes) > 3
