"""Rows join and leave between two tokens, and each is written as if it were alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs.errors import InvalidInput
from tests.workers.serving.sites import TEXTS, Site, mixed, site
from tests.workers.tiny_bases import save_llama, talking_tokenizer
from tests.workers.worker_builders import tiny_settings
from workers.base_model import load_base_model
from workers.evaluation import adapted_model, generate
from workers.rows.task_data import CompletionRow
from workers.serving import running_batch
from workers.serving.mixed_batch import Asked, MixedBatch, Said
from workers.serving.question import Answer, Writing
from workers.serving.running_batch import RunningBatch
from workers.serving.writing import Pen

PROMPTS = [[1, *range(10 + row, 10 + row + length)] for row, length in enumerate((3, 17, 1, 9, 5, 30, 2))]
LIMITS = (12, 20, 5, 30, 9, 14, 40)
TOKENIZER = talking_tokenizer()
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": len(TOKENIZER), "initializer_range": 0.4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    # Every place is a token's; layers see the last six alone; places are looked up in a table; no column a token.
    "llama": ATTENTION | {"num_hidden_layers": 2},
    "mistral": ATTENTION | {"num_hidden_layers": 2, "sliding_window": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 45},
    "mamba2": {"num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
}


class Alone:
    """A model without tasks."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def together(self, tasks: Sequence[Any], before: Any) -> None:
        return None

    def serving(self, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()


def model_of(name: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **ENDS, **MODELS[name])).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.35)  # else they write the same token for ever
    return model


def ids_alone(model: Any, prompt: Sequence[int], limit: int) -> list[int]:
    """What transformers' own generation writes."""
    prompt_1T = torch.tensor([prompt])
    written = model.generate(
        prompt_1T, attention_mask=torch.ones_like(prompt_1T), max_new_tokens=limit, do_sample=False, use_cache=True
    )
    ids: list[int] = written[0, len(prompt) :].tolist()
    return ids[: ids.index(2)] if 2 in ids else ids


@pytest.mark.parametrize("name", MODELS)
def test_rows_that_come_and_go_are_written_as_each_would_be_alone(name: str) -> None:
    model = model_of(name)
    running, together = RunningBatch(Alone(model), 0, lambda: None), 0
    pens = [Pen(TOKENIZER, prompt, Writing(), limit) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]
    over: list[Pen] = []
    for pen in pens:
        running.add([pen])
        for _ in range(3):
            over += running.step()
    while running.pens:
        over += running.step()
        together += len(running.pens) > 1
    assert [pen.ids for pen in pens] == [ids_alone(model, p, n) for p, n in zip(PROMPTS, LIMITS, strict=True)]
    assert sorted(over, key=pens.index) == pens
    assert over != pens  # the shorter ones have not waited for the longer ones
    assert together > 5
    assert len({tuple(pen.ids) for pen in pens}) == len(pens)


def test_no_more_rows_than_there_is_room_for_are_written_at_once() -> None:
    running = RunningBatch(Alone(model_of("llama")), 0, lambda: None, rows_max=2)
    pens = [Pen(TOKENIZER, PROMPTS[0], Writing(), limit) for limit in (3, 9, 9)]
    running.add(pens)
    for _ in range(4):
        running.step()
    assert [len(pen.ids) for pen in pens] == [3, 4, 2]  # the third takes the place of the first


class Broken(Alone):
    """Fails whenever rows of a task go through the model."""

    def together(self, tasks: Sequence[Any], before: Any) -> Any:
        return list(tasks)

    def serving(self, batch: Any) -> AbstractContextManager[None]:
        if "wrong" in batch:
            raise RuntimeError("no such layer")
        return nullcontext()


class Small(Alone):
    """Has memory for so many columns; notes the rows of each pass."""

    def __init__(self, model: Any, columns_max: int) -> None:
        super().__init__(model)
        self.passes: list[int] = []
        forward = model.forward

        @functools.wraps(forward)
        def limited(*args: Any, **inputs: Any) -> Any:
            rows, columns = inputs["attention_mask"].shape
            if rows * columns > columns_max:
                forward(*args, **inputs)  # the cache has half of it already
                raise torch.OutOfMemoryError("out of memory")
            self.passes.append(rows)
            return forward(*args, **inputs)

        model.forward = limited


def pens_of(tasks: Sequence[str]) -> list[Pen]:
    return [Pen(TOKENIZER, PROMPTS[n], Writing(), LIMITS[n], task=task) for n, task in enumerate(tasks)]


def written(running: RunningBatch) -> dict[Pen, Exception | None]:
    over: dict[Pen, Exception | None] = {}
    while running.pens:
        over |= running.step()
    return over


def expected(model: Any, count: int) -> list[list[int]]:
    return [ids_alone(model, prompt, limit) for prompt, limit in zip(PROMPTS[:count], LIMITS, strict=False)]


def test_a_prompt_that_cannot_be_read_costs_nobody_else_an_answer() -> None:
    model = model_of("llama")
    running, pens = RunningBatch(Broken(model), 0, lambda: None), pens_of(("a", "wrong", "b"))
    over: dict[Pen, Exception | None] = {}
    for pen in pens:
        running.add([pen])
        over |= running.step()
    assert [str(error) for error in over.values()] == ["no such layer"]
    over |= written(running)
    assert [over[pen] is None for pen in pens] == [True, False, True]
    assert [pens[n].ids for n in (0, 2)] == [expected(model, 3)[n] for n in (0, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_a_row_that_fails_in_the_middle_costs_itself_alone(name: str) -> None:
    model = model_of(name)
    running, pens = RunningBatch(Broken(model), 0, lambda: None), pens_of("abcdefg")
    running.add(pens)
    over: dict[Pen, Exception | None] = {}
    for _ in range(3):
        over |= running.step()
    assert not over
    pens[3].task = "wrong"  # as if what its layers hold could be used no more
    over |= written(running)
    assert {pen.task: str(error) for pen, error in over.items() if error} == {"wrong": "no such layer"}
    assert 3 <= len(pens[3].ids) < LIMITS[3]
    right = [place for place in range(7) if place != 3]
    assert [pens[place].ids for place in right] == [expected(model, 7)[place] for place in right]


def test_a_callers_own_failure_costs_its_row_alone() -> None:
    def left(_: str) -> None:
        raise ConnectionError("nobody reads it")

    model, pens = model_of("llama"), pens_of("abc")
    pens[1] = Pen(TOKENIZER, PROMPTS[1], Writing(), LIMITS[1], wrote=left)
    running = RunningBatch(Alone(model), 0, lambda: None)
    running.add(pens)
    over = written(running)
    assert [str(over[pen]) for pen in pens] == ["None", "nobody reads it", "None"]
    assert [pens[n].ids for n in (0, 2)] == [expected(model, 3)[n] for n in (0, 2)]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_batch_that_memory_has_no_room_for_becomes_smaller_ones(name: str) -> None:
    alone = expected(model_of(name), 7)
    small = Small(model_of(name), 60)
    running, pens = RunningBatch(small, 0, lambda: None), pens_of("abcdefg")
    running.add(pens)
    over = written(running)
    assert [over[pen] for pen in pens] == [None] * 7
    assert [pen.ids for pen in pens] == alone
    assert max(small.passes) > 1


def test_a_row_that_memory_has_no_room_for_by_itself_is_told_so_and_the_others_are_written() -> None:
    alone = expected(model_of("llama"), 7)
    running, pens = RunningBatch(Small(model_of("llama"), 32), 0, lambda: None), pens_of("abcdefg")
    running.add(pens)
    over = written(running)
    too_long = [place for place in range(7) if len(PROMPTS[place]) + LIMITS[place] - 1 > 32]
    assert {place for place, pen in enumerate(pens) if over[pen]} == {*too_long}
    assert all(isinstance(over[pens[place]], torch.OutOfMemoryError) for place in too_long)
    for place in {*range(7)} - {*too_long}:
        assert pens[place].ids == alone[place]


def test_after_a_while_there_is_as_much_room_as_before_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_batch, "CALM_STEPS", 3)
    small = Small(model_of("llama"), 70)
    running = RunningBatch(small, 0, lambda: None)
    running.add([Pen(TOKENIZER, PROMPTS[0], Writing(), 8) for _ in range(8)])
    written(running)
    small.passes.clear()
    running.add([Pen(TOKENIZER, PROMPTS[0], Writing(), 3) for _ in range(6)])
    running.step()
    assert small.passes == [6]


def test_how_long_an_answer_may_become_keeps_no_other_row_out() -> None:
    long = Pen(TOKENIZER, PROMPTS[0], Writing(), 8000, wanted=lambda: len(long.ids) < 9)
    running, pens = RunningBatch(Alone(model_of("llama")), 0, lambda: None), pens_of("abcdefg")
    running.add([long, *pens])
    running.step()
    assert [len(pen.ids) for pen in (long, *pens)] == [1] * 8
    written(running)
    assert [pen.ids for pen in pens] == expected(model_of("llama"), 7)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_long_row_makes_no_other_rows_cache_as_long(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 15 columns at most beside one of 44: 7 x 44 have no room, 6 x 15 + 44 have."""
    monkeypatch.setattr(running_batch, "SPARE", 2)
    model, room = model_of(name), 140
    running = RunningBatch(Alone(model), 0, lambda: None, room=room)
    pens = [
        Pen(TOKENIZER, prompt, Writing(), limit) for prompt, limit in zip(PROMPTS, (9, 8, 9, 5, 9, 14, 9), strict=True)
    ]
    running.add(pens)
    lanes: list[list[list[Pen]]] = []
    while running.pens:
        running.step()
        assert running.columns <= room
        lanes.append(running.lanes)
    assert any([pens[5]] in both and len(both) > 1 for both in lanes)
    assert [pen.ids for pen in pens] == [ids_alone(model, pen.prompt, pen.limit) for pen in pens]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_that_outgrow_the_room_wait_and_go_on_where_they_were(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_batch, "SPARE", 1)
    model, room = model_of(name), 60
    running, pens = RunningBatch(Alone(model), 0, lambda: None, room=room), pens_of("abcdefg")
    drawn = Pen(TOKENIZER, PROMPTS[0], Writing(temperature=1.0, seed=4), 12)
    running.add([*pens, drawn])
    waited = set[Pen]()
    while running.pens:
        running.step()
        assert running.columns <= room
        now = [pen for lane in running.lanes for pen in lane]
        waited |= {pen for pen in running.pens if pen.ids and pen not in now}
    assert waited
    assert pens[0] not in waited  # the first to come is the last to leave
    assert [pen.ids for pen in pens] == expected(model, 7)
    again = Pen(TOKENIZER, PROMPTS[0], Writing(temperature=1.0, seed=4), 12)
    alone = RunningBatch(Alone(model), 0, lambda: None)
    alone.add([again])
    written(alone)
    assert drawn.ids == again.ids


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Site:
    source = save_llama(tmp_path_factory.mktemp("writers"), initializer_range=0.6)
    return site(load_base_model(tiny_settings(source)), "causal_lm", ["q_proj", "v_proj"], max_new_tokens=20)


def row_of(text: str) -> CompletionRow:
    return CompletionRow((("user", text), ("assistant", "")), False)


def written_one_after_another(batch: MixedBatch, asked: Sequence[Asked]) -> list[Said]:
    """Each row begins two tokens after the one before."""
    found: dict[int, Said] = {}
    for place, one in enumerate(asked):
        batch.begin([one], lambda _, said, place=place: found.__setitem__(place, said))  # type: ignore[misc]
        batch.step()
        batch.step()
    while batch.is_writing:
        batch.step()
    return [found[place] for place in range(len(asked))]


def test_a_row_joins_those_of_other_tasks_and_is_written_by_its_own(writers: Site) -> None:
    asked = [Asked(task, row_of(TEXTS[n % 3])) for n, task in enumerate((*writers.specs, *writers.specs))]
    found = written_one_after_another(mixed(writers), asked)
    for one, said in zip(asked, found, strict=True):
        spec = writers.specs[one.task_id]
        model = adapted_model(writers.base, writers.store.adapter(one.task_id, writers.version), spec).eval()
        assert isinstance(said, Answer)
        assert [said.text] == generate(model, writers.base, [one.row], spec)


def test_what_stops_all_while_texts_are_written_is_told_to_all_and_nothing_of_it_stays(writers: Site) -> None:
    passes = iter((True, True, False))

    def between() -> None:
        if not next(passes, True):
            raise RuntimeError("stopped")

    specs = writers.specs
    batch = MixedBatch(writers.base, writers.store, writers.version, lambda p: specs[p.task_id], between)
    first, second = written_one_after_another(batch, [Asked(task, row_of("Paris")) for task in ("seed-0", "seed-1")])
    assert (str(first), str(second)) == ("stopped", "stopped")
    assert not batch.is_writing
    assert batch.answer([Asked("seed-0", row_of("Paris"))])[0].text


def test_what_one_row_is_asked_wrongly_costs_that_row_alone(writers: Site) -> None:
    writing = Writing(temperature=1.0, seed=2**70)
    asked = [Asked(task, row_of("Paris")) for task in ("seed-0", "seed-1", "partly")]
    right = mixed(writers).answer(asked)
    found: dict[int, Said] = {}
    batch = mixed(writers)
    batch.begin([asked[0], replace(asked[1], writing=writing), asked[2]], found.__setitem__)
    while batch.is_writing:
        batch.step()
    assert isinstance(found[1], Exception)
    assert (found[0], found[2]) == (right[0], right[2])


def test_coefficients_that_are_no_numbers_cost_their_own_task_alone(writers: Site) -> None:
    asked = [Asked(task, row_of("Paris")) for task in ("seed-0", "seed-1", "partly")]
    right, batch = mixed(writers).answer(asked), mixed(writers)
    batch.spec("seed-1")
    for factors in batch._tasks["seed-1"].factors.values():
        factors.e_RK.fill_(torch.nan)
    found: dict[int, Said] = {}
    batch.begin(asked, found.__setitem__)
    while batch.is_writing:
        batch.step()
    assert isinstance(found[1], InvalidInput)
    assert "seed-1: the model's output is no number" in str(found[1])
    assert (found[0], found[2]) == (right[0], right[2])
