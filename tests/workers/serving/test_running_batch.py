"""Rows join and leave between two tokens, and each is written as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.workers.serving.sites import TEXTS, Site, mixed, site
from tests.workers.tiny_bases import save_llama, talking_tokenizer
from tests.workers.worker_builders import tiny_settings
from workers.base_model import load_base_model
from workers.evaluation import adapted_model, generate
from workers.rows.task_data import CompletionRow
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


def test_a_prompt_that_cannot_be_read_costs_nobody_else_an_answer() -> None:
    class Small(Alone):
        def together(self, tasks: Sequence[Any], before: Any) -> None:
            if tasks == ["large"]:
                raise RuntimeError("out of memory")

    model = model_of("llama")
    running = RunningBatch(Small(model), 0, lambda: None)
    pens = [Pen(TOKENIZER, PROMPTS[n], Writing(), LIMITS[n], task=task) for n, task in enumerate(("a", "large", "b"))]
    over: dict[Pen, Exception | None] = {}
    for pen in pens:
        running.add([pen])
        over |= running.step()
    assert [str(error) for error in over.values()] == ["out of memory"]
    while running.pens:
        over |= running.step()
    assert [over[pen] is None for pen in pens] == [True, False, True]
    assert [pens[n].ids for n in (0, 2)] == [ids_alone(model, PROMPTS[n], LIMITS[n]) for n in (0, 2)]


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


def test_what_goes_wrong_while_texts_are_written_is_told_to_all_and_nothing_of_it_stays(writers: Site) -> None:
    passes = iter((True, True, False))

    def between() -> None:
        if not next(passes, True):
            raise RuntimeError("out of memory")

    specs = writers.specs
    batch = MixedBatch(writers.base, writers.store, writers.version, lambda p: specs[p.task_id], between)
    first, second = written_one_after_another(batch, [Asked(task, row_of("Paris")) for task in ("seed-0", "seed-1")])
    assert (str(first), str(second)) == ("out of memory", "out of memory")
    assert not batch.is_writing
    assert batch.answer([Asked("seed-0", row_of("Paris"))])[0].text
