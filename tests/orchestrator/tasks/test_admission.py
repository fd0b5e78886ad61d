"""Whatever is wrong with a submission is found before it is taken in, by key, file and row; nothing stays behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from configs.document import check_document
from configs.errors import Conflict, InvalidInput, NameTaken, QueueFull
from configs.settings import Settings
from configs.task_spec import METRICS, SCORE_MAX, TaskSpec
from orchestrator.tasks.admission import Draft, admit, check_submission
from orchestrator.tasks.doubtful_settings import EVALUATION_ROWS_FEW
from orchestrator.tasks.task_events import CancelRequested, Claimed, TrainingFailed
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord
from subspace_store import adapter_from_bytes
from subspace_store.formats.peft import write_peft_folder
from subspace_store.storage.memory import MemoryStorage
from tests.builders import LAYOUT, adapter, rows, settings, task_document, with_pools, write_rows
from tests.workers.tiny_bases import CHAT_TEMPLATE, talking_tokenizer
from workers import tokens
from workers.chat_template import ChatTemplate
from workers.compatibility import chosen_modules
from workers.heads import NO_HEAD
from workers.orders import BaseLayout
from workers.rows.frozen_rows import open_rows
from workers.rows.task_data import TextRow
from workers.tokens import packed


class Desk:
    """Where tasks are submitted: a data folder with good files in it, an empty queue, an empty storage."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.settings: Settings = settings(folder, data_roots=[str(self.data)])
        self.queue = TaskQueue(self.settings.database_url)
        self.storage = MemoryStorage(f"desk-{folder}")
        write_rows(self.data / "train.jsonl", rows(6))
        write_rows(self.data / "eval.jsonl.gz", [{"text": f"other {i}", "label": i % 2} for i in range(4)])

    def document(self, title: str = "red/alpha", **changes: Any) -> dict[str, Any]:
        files = {"train_file": str(self.data / "train.jsonl"), "eval_file": str(self.data / "eval.jsonl.gz")}
        method = {"name": "lora"} | (changes.get("method") or {})
        # No more rows in a step than there are.
        training = {} if method["name"] == "import" else {"per_device_train_batch_size": 1}
        parts = {"data": files, "training": training}
        return task_document(
            title, **{**changes, "method": method} | {key: part | changes.get(key, {}) for key, part in parts.items()}
        )

    def imported(self, **changes: Any) -> dict[str, Any]:
        """A submission of the PEFT folder `peft`."""
        method = {"name": "import", "adapter": str(self.data / "peft")}
        return self.document(**{"method": method, **changes, "data": {"train_file": None} | changes.get("data", {})})

    def submit(self, document: dict[str, Any]) -> tuple[TaskRecord, bool]:
        return admit(
            check_submission(check_document(document, TaskSpec, "task"), self.settings, LAYOUT),
            self.settings,
            self.queue,
            self.storage,
            "ann",
        )

    def refuse(self, document: dict[str, Any], kind: type[Exception] = InvalidInput) -> str:
        """The complaint; and nothing is left of the submission."""
        before = self.queue.tasks(), self.storage.keys("")
        with pytest.raises(kind) as caught:
            self.submit(document)
        assert (self.queue.tasks(), self.storage.keys("")) == before
        return str(caught.value)

    def peft(self, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None] | None = None) -> Path:
        """A good PEFT folder, or one that `change(config, tensors)` spoilt."""
        folder = self.data / "peft"
        write_peft_folder(folder, adapter(1), "tiny-source")
        if change:
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            change(config, tensors)
            (folder / "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, folder / "adapter_model.safetensors")
        return folder


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(autouse=True)
def _four_rows_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' few evaluation rows are too few for anybody else."""
    monkeypatch.setattr("orchestrator.tasks.doubtful_settings.EVALUATION_ROWS_FEW", 1)


# --- taken in ----------------------------------------------------------------------------------------------------


def test_a_good_task_is_taken_in_with_its_rows_frozen(desk: Desk) -> None:
    record, is_new = desk.submit(desk.document())
    assert is_new
    assert desk.queue.get(record.task_id) == record
    assert (record.title, record.train_count, record.eval_count, record.submitted_by) == ("red/alpha", 6, 4, "ann")
    kept = open_rows(desk.storage, record.train_key, record.spec)
    assert list(kept) == [TextRow(f"text {i}", None, i % 2) for i in range(6)]
    kept = open_rows(desk.storage, record.eval_key, record.spec)
    assert list(kept) == [TextRow(f"other {i}", None, i % 2) for i in range(4)]


def test_the_same_rows_in_another_format_are_the_same_task_data(desk: Desk) -> None:
    first, _ = desk.submit(desk.document())
    (desk.data / "e.csv").write_text("label,text\n" + "".join(f"{i % 2},other {i}\n" for i in range(4)))
    other, _ = desk.submit(desk.document("red/beta", data={"eval_file": str(desk.data / "e.csv")}))
    assert other.eval_sha256 == first.eval_sha256
    assert (other.eval_key, first.eval_key) == tuple(
        f"data/{record.task_id}/eval-{first.eval_key.rpartition('-')[2]}" for record in (other, first)
    )


def test_a_share_of_the_training_rows_is_frozen_as_evaluation_rows(desk: Desk) -> None:
    write_rows(desk.data / "train.jsonl", rows(40))
    record, _ = desk.submit(desk.document(data={"eval_file": None, "eval_fraction": 0.5}))
    train = open_rows(desk.storage, record.train_key, record.spec)
    evaluation = open_rows(desk.storage, record.eval_key, record.spec)
    assert (len(train), len(evaluation)) == (record.train_count, record.eval_count)
    assert record.train_count + record.eval_count == 40
    assert 10 < record.eval_count < 30  # 20 ± 3 standard deviations of 3.2
    again, is_new = desk.submit(desk.document(data={"eval_file": None, "eval_fraction": 0.5}))
    assert (again, is_new) == (record, False)


def test_a_folder_of_datasets_is_taken_in_if_every_file_of_it_may_be_read(desk: Desk, tmp_path: Path) -> None:
    folder = desk.data / "saved"
    folder.mkdir()
    table = pa.table({"text": ["a", "b"], "label": ["no", "yes"]})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    record, _ = desk.submit(desk.document(data={"train_file": str(folder)}))
    assert record.train_count == 2
    (folder / "data.arrow").rename(tmp_path / "secret.arrow")
    (folder / "data.arrow").symlink_to(tmp_path / "secret.arrow")
    assert "data.train_file" in desk.refuse(desk.document("red/beta", data={"train_file": str(folder)}))


def test_a_file_that_changes_later_changes_no_evaluation_row(desk: Desk) -> None:
    record, _ = desk.submit(desk.document())
    before = desk.storage.read(record.eval_key)
    write_rows(desk.data / "eval.jsonl.gz", rows(2))
    assert desk.storage.read(record.eval_key) == before


def test_a_good_adapter_is_taken_in_canonical_form(desk: Desk) -> None:
    desk.peft()
    record, _ = desk.submit(desk.imported())
    taken, given = adapter_from_bytes(desk.storage.read(record.train_key)), adapter(1)
    assert taken.base_sha256 == LAYOUT.sha256
    for name, update in given.modules.items():
        assert torch.allclose(taken.modules[name].delta(), update.delta(), atol=1e-5)


def test_an_import_without_evaluation_rows_has_none(desk: Desk) -> None:
    desk.peft()
    record, _ = desk.submit(desk.imported(data={"eval_file": None}))
    assert (record.eval_key, record.eval_count, record.eval_sha256) == ("", 0, "")


def test_an_import_without_rows_needs_no_length_that_the_base_model_can_read(desk: Desk) -> None:
    desk.peft()
    desk.submit(desk.imported(data={"eval_file": None, "max_length": 128}))
    assert "data.max_length" in desk.refuse(desk.imported(name="with-rows", data={"max_length": 128}))


def test_what_flatters_a_score_is_a_warning_not_an_error(desk: Desk) -> None:
    news = [{"text": f"new {place}", "label": "no"} for place in range(3)]
    write_rows(desk.data / "eval.jsonl.gz", [*rows(2), *news])
    write_rows(desk.data / "train.jsonl", rows(6, label="no"))
    draft = check_submission(check_document(desk.document(), TaskSpec, "task"), desk.settings, LAYOUT)
    assert draft.warnings == (
        "1 of 2 labels has no training row: 'yes'",
        "2 of 5 evaluation rows are also training rows: the scores flatter the task",
    )


# --- refused -----------------------------------------------------------------------------------------------------


def test_a_score_of_three_evaluation_rows_is_warned_of(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.tasks.doubtful_settings.EVALUATION_ROWS_FEW", EVALUATION_ROWS_FEW)
    write_rows(desk.data / "eval.jsonl.gz", [{"text": f"other {i}", "label": i % 2} for i in range(3)])
    (said,) = desk.submit(desk.document())[0].warnings
    assert said.startswith("the score rests on 3 evaluation rows: each is 33.3 points of 100")


def test_half_a_character_in_the_document_is_refused(desk: Desk) -> None:
    text = desk.refuse(desk.document(data={"label_names": ["no", "yes", "\ud800"]}))
    assert text.startswith("task: data.label_names.2: must be one line of plain text, and holds \\ud800")
    text.encode()


def test_an_unknown_team_is_answered_with_the_teams_there_are(desk: Desk) -> None:
    text = desk.refuse(desk.document("green/alpha"))
    assert text == "team: there is no team 'green'\n  → teams of this service: blue, red"


def test_another_base_model_is_answered_with_the_one_that_is_served(desk: Desk) -> None:
    text = desk.refuse(desk.document(base_model="gpt"))
    assert "base_model: 'gpt' is not allowed here" in text
    assert "this service serves 'tiny'" in text


def test_a_kind_that_the_base_model_cannot_do_is_answered_with_those_it_can(desk: Desk) -> None:
    layout = replace(LAYOUT, kinds=("sequence_regression", "causal_lm"))
    with pytest.raises(InvalidInput, match="no 'sequence_classification'") as caught:
        check_submission(check_document(desk.document(), TaskSpec, "task"), desk.settings, layout)
    assert (caught.value.where, caught.value.todo) == ("kind", "it has: sequence_regression, causal_lm")


def test_an_unknown_target_module_is_answered_with_those_of_the_base_model(desk: Desk) -> None:
    text = desk.refuse(desk.document(lora={"target_modules": ["query", "q_proj"]}))
    assert "lora.target_modules: the base model 'tiny' has no linear layer 'q_proj'" in text
    assert "it has: query, value" in text


def test_all_linear_is_every_layer_that_can_be_adapted(desk: Desk) -> None:
    desk.submit(desk.document(lora={"target_modules": ["all-linear"]}))
    assert chosen_modules(("all-linear",), LAYOUT.module_shapes, "tiny") == tuple(LAYOUT.module_shapes)


def test_a_part_of_a_modules_name_is_no_module(desk: Desk) -> None:
    assert "'uery'" in desk.refuse(desk.document(lora={"target_modules": ["uery"]}))


def test_more_tokens_than_the_base_model_reads_are_refused(desk: Desk) -> None:
    text = desk.refuse(desk.document(data={"max_length": 65}))
    assert text == "data.max_length: 65 tokens are more than the base model 'tiny' reads\n  → set it to 64 or less"
    desk.submit(desk.document(data={"max_length": 64}))


def talks(**data: Any) -> dict[str, Any]:
    """What makes a submission one of a language model that is judged by its answers."""
    return {"kind": "causal_lm", "metric": "exact_match", "data": {"label_names": None} | data}


def test_answers_that_leave_no_room_for_a_prompt_are_refused(desk: Desk) -> None:
    write_rows(desk.data / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    write_rows(desk.data / "eval.jsonl.gz", [{"prompt": "c", "completion": "d"}])
    assert desk.refuse(desk.document(**talks(max_new_tokens=64))).startswith("data.max_new_tokens: an answer of 64 tok")
    desk.submit(desk.document(**talks(max_new_tokens=63)))


CHATS = replace(LAYOUT, chat_template=ChatTemplate(CHAT_TEMPLATE, {}))


def chat(*roles: str) -> dict[str, Any]:
    return {"m": [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles)]}


def test_messages_that_the_base_model_cannot_render_are_refused(desk: Desk) -> None:
    write_rows(desk.data / "train.jsonl", [chat("user", "assistant")])
    write_rows(desk.data / "eval.jsonl.gz", [chat("user", "assistant", "user", "assistant")])
    document = check_document(desk.document(**talks(messages_column="m", max_new_tokens=9)), TaskSpec, "task")
    with pytest.raises(InvalidInput, match="base model 'tiny' has no chat template") as caught:
        check_submission(document, desk.settings, LAYOUT)
    assert caught.value.where == "data.messages_column"
    check_submission(document, desk.settings, CHATS).close()


@pytest.mark.parametrize("file", ["train.jsonl", "eval.jsonl.gz"])
def test_a_chat_that_the_template_refuses_is_found_at_submission_with_its_file_and_row(desk: Desk, file: str) -> None:
    write_rows(desk.data / "train.jsonl", [chat("user", "assistant")] * 2)
    write_rows(desk.data / "eval.jsonl.gz", [chat("user", "assistant", "user", "assistant")])
    write_rows(desk.data / file, [chat("user", "user", "assistant"), chat("system", "user", "assistant")])
    document = check_document(desk.document(**talks(messages_column="m", max_new_tokens=9)), TaskSpec, "task")
    with pytest.raises(InvalidInput, match="only user and assistant talk here; their roles are system, user") as caught:
        check_submission(document, desk.settings, CHATS)
    assert caught.value.where == f"{desk.data / file}, row 2"


def test_the_training_file_as_evaluation_file_is_refused_unless_asked_for(desk: Desk) -> None:
    same = desk.document(data={"eval_file": str(desk.data / "train.jsonl")})
    assert "6 of 6 evaluation rows are also training rows" in desk.refuse(same)
    same["data"]["eval_is_train"] = True
    record, _ = desk.submit(same)
    assert record.warnings == ("6 of 6 evaluation rows are also training rows: the scores flatter the task",)


@pytest.mark.parametrize(("least", "is_refused"), [(1.5, True), (1.0000001, True), (1.0, False), (-3.0, False)])
def test_a_least_score_that_no_training_can_reach_is_refused(desk: Desk, least: float, is_refused: bool) -> None:
    document = desk.document(gate={"min_score": least})
    if is_refused:
        assert "is more than accuracy can be, which is 1 at most" in desk.refuse(document)
    else:
        desk.submit(document)


def test_the_best_score_of_each_metric_is_known() -> None:
    assert set(SCORE_MAX) == {metric for metrics in METRICS.values() for metric in metrics}
    assert SCORE_MAX["log_likelihood"] == 0  # the logarithm of a probability


def test_rows_that_are_alike_and_contradict_each_other_are_warned_of(desk: Desk) -> None:
    one_text = [{"text": "the same", "label": "yes"}] * 3
    write_rows(desk.data / "train.jsonl", one_text)
    write_rows(desk.data / "eval.jsonl.gz", [{"text": "The Same", "label": "yes"}, {"text": "else", "label": "no"}])
    record, _ = desk.submit(desk.document())
    assert record.warnings == (
        "1 of 2 labels has no training row: 'no'",
        "1 of 2 evaluation rows differ from training rows in capital letters, white space or Unicode's form alone: the "
        "scores flatter the task",
        "all 3 training rows have the same input",
    )
    write_rows(desk.data / "train.jsonl", [*one_text, {"text": "the same", "label": "no"}, *rows(2)])
    record, _ = desk.submit(desk.document("red/beta"))
    assert record.warnings[-1] == "1 input has several labels in the training rows: no answer is right for all of them"


def test_auto_with_too_few_rows_to_compare_by_is_told_at_submission(desk: Desk) -> None:
    few, _ = desk.submit(desk.document(method={"name": "auto"}))
    (said,) = few.warnings
    assert said.startswith("auto compares nothing and trains a lora of rank 8: the training rows ")
    write_rows(desk.data / "train.jsonl", rows(400))
    enough, _ = desk.submit(desk.document("red/beta", method={"name": "auto"}))
    assert enough.warnings == ()
    plain, _ = desk.submit(desk.document("red/gamma"))
    assert plain.warnings == ()


def test_settings_of_another_method_are_warned_of(desk: Desk) -> None:
    idle = {"name": "lora", "candidates": ["lora"], "kappa_max": 3.0, "foundation": 3, "dense_fraction": 0.5}
    record, _ = desk.submit(desk.document(method=idle))  # 0.5 is the default
    assert record.warnings == (
        "the method lora does not read method.candidates, method.foundation, method.kappa_max → take that out, or name "
        "the method that it is for",
    )
    record, _ = desk.submit(desk.document("red/beta", method={"name": "lora", "start_of_a": "basis"}))
    assert record.warnings == ()


def test_a_training_that_is_other_than_its_settings_say_is_warned_of(desk: Desk) -> None:
    record, _ = desk.submit(desk.document(training={"warmup_steps": 100, "max_steps": 10, "learning_rate": 0.05}))
    assert record.warnings == (
        "the warm-up of 100 steps (training.warmup_steps) is not over when the training ends after 10 steps: the "
        "learning rate gets to 0.0045, never to 0.05 → write fewer, or a share of all steps, below 1",
    )
    desk.settings = with_pools(desk.settings, ranks=8)
    record, _ = desk.submit(desk.document("red/beta"))  # each of eight ranks takes one row
    assert record.warnings[0].startswith("one step takes 8 rows, more than the 6 training rows")


TALKING = replace(LAYOUT, tokenizer=packed(talking_tokenizer()))
"""A token for each byte of a word that is not one of two sentences, and `<s>` before every text."""


def warnings_of(desk: Desk, document: dict[str, Any], layout: BaseLayout = TALKING) -> tuple[str, ...]:
    with contextlib.closing(
        check_submission(check_document(document, TaskSpec, "task"), desk.settings, layout)
    ) as draft:
        return draft.warnings


def test_rows_that_are_longer_than_max_length_are_told_at_submission_as_training_tells_them(desk: Desk) -> None:
    write_rows(desk.data / "train.jsonl", [{"text": "x" * (5 + n), "label": n % 2} for n in range(6)])  # 6 to 11 tokens
    write_rows(desk.data / "eval.jsonl.gz", [{"text": "y" * n, "label": n % 2} for n in (6, 7, 8, 9)])  # 7 to 10 tokens
    count = "have more tokens than data.max_length, 8: their end is not read → raise it as far as the base model allows"
    said = warnings_of(desk, desk.document(data={"max_length": 8}))
    parts = ("3 of 6 training rows", "2 of 4 evaluation rows")
    assert [line[: len(f"{part} {count}")] for line, part in zip(said, parts, strict=True)] == [
        f"{part} {count}" for part in parts
    ]
    assert warnings_of(desk, desk.document(data={"max_length": 11})) == ()
    assert warnings_of(desk, desk.document(data={"max_length": 8}), LAYOUT) == ()  # no tokenizer to count with


def test_labels_that_a_text_tower_cannot_read_are_refused_at_submission(desk: Desk) -> None:
    write_rows(desk.data / "train.jsonl", [{"image": [[n]], "label": n % 2} for n in range(6)])
    write_rows(desk.data / "eval.jsonl.gz", [{"image": [[n]], "label": n % 2} for n in range(8, 30)])
    kinds, heads = (*LAYOUT.kinds, "image_text"), {**LAYOUT.heads, "image_text": next(iter(LAYOUT.heads.values()))}
    layout = replace(TALKING, kinds=kinds, heads=heads, length_max=24)

    def document(*names: str) -> dict[str, Any]:
        return desk.document(kind="image_text", metric="accuracy", data={"label_names": list(names), "max_length": 128})

    assert warnings_of(desk, document("grass", "Paris"), layout) == ()
    with pytest.raises(InvalidInput, match=r"the prompt of 'x+' has .* tokens, and the base model .* reads 24"):
        warnings_of(desk, document("grass", "x" * 40), layout)


def test_rows_that_the_tokenizer_does_not_know_are_told_at_submission_and_in_training(desk: Desk) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    known = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="[UNK]")
    layout = replace(LAYOUT, tokenizer=packed(known))
    texts = ["good film", "good 😀 film", "film 😀", "good 😀 😂", "😀", "😂"]  # unknown: 0, 1/3, 1/2, 2/3, 1, 1
    write_rows(desk.data / "train.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(texts)])
    write_rows(desk.data / "eval.jsonl.gz", [{"text": "good", "label": 0}, {"text": "👍", "label": 1}])
    train, held = warnings_of(desk, desk.document(), layout)
    said = "training rows are in characters that the base model's tokenizer does not know, 2 of them whole: "
    assert train.startswith(f"3 of 6 {said}")
    assert held.startswith("1 of 2 evaluation rows are in characters that the base model's tokenizer does not know, wh")
    spec = check_document(desk.document(), TaskSpec, "task")
    stored = [TextRow(text, None, n % 2) for n, text in enumerate(texts)]
    assert tokens.training_losses(known, spec, stored, "tiny") == (train,)  # what the worker says
    write_rows(desk.data / "eval.jsonl.gz", [{"text": "good", "label": 0}, {"text": "film", "label": 1}])
    write_rows(desk.data / "train.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(texts[:3])])
    assert warnings_of(desk, desk.document(), layout) == ()


def test_of_an_import_the_evaluation_rows_are_counted(desk: Desk) -> None:
    desk.peft()
    (said,) = warnings_of(desk, desk.imported(data={"max_length": 5}))  # `<s>`, and `other 0` in seven
    assert said.startswith("4 of 4 evaluation rows have more tokens than data.max_length, 5")


def test_answers_that_are_cut_are_told_and_such_without_a_token_refused(desk: Desk) -> None:
    rows = [{"prompt": "say", "completion": "x" * n} for n in (3, 30)]
    write_rows(desk.data / "train.jsonl", rows)
    write_rows(desk.data / "eval.jsonl.gz", [{"prompt": "s", "completion": "x" * 12}])
    document = desk.document(
        kind="causal_lm", metric="exact_match", data={"label_names": None, "max_length": 16, "max_new_tokens": 4}
    )
    training, late = warnings_of(desk, document)
    assert training.startswith(
        "1 of 2 training rows have an answer for which data.max_length, 16 tokens, leaves no room"
    )
    assert late.startswith("1 of 1 evaluation rows have an answer of more tokens than data.max_new_tokens, 4")
    mute = talking_tokenizer()
    mute.eos_token = None
    mute.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(
        InvalidInput, match="makes no token of the answer of 2 of 2 training rows, the first of them row"
    ):
        warnings_of(desk, document, replace(LAYOUT, tokenizer=packed(mute)))


def test_of_very_many_rows_the_first_are_counted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MEASURED_CHARACTERS", 350)  # three rows of 100 characters more than they have
    said = warnings_of(desk, desk.document(data={"max_length": 4}))
    assert said[0].startswith("4 of 4 first training rows have more tokens")


def test_evaluation_rows_of_one_label_are_warned_of(desk: Desk) -> None:
    write_rows(desk.data / "eval.jsonl.gz", [{"text": f"other {i}", "label": "yes"} for i in range(4)])
    record, _ = desk.submit(desk.document())
    assert record.warnings == ("all 4 evaluation rows have the same label: always giving it is right each time",)
    assert record.constant_score == 1


def test_numbers_as_labels_mean_the_names_in_every_format_and_what_else_they_could_mean_is_told(desk: Desk) -> None:
    numbers = {"label_names": ["1", "0"]}
    write_rows(desk.data / "train.jsonl", [{"text": f"text {i}", "label": i % 2} for i in range(6)])
    write_rows(desk.data / "eval.jsonl.gz", [{"text": f"other {i}", "label": i % 2} for i in range(4)])
    first, _ = desk.submit(desk.document(data=numbers))
    (desk.data / "e.csv").write_text("label,text\n" + "".join(f"{i % 2},other {i}\n" for i in range(4)))
    mixed, _ = desk.submit(desk.document("red/beta", data=numbers | {"eval_file": str(desk.data / "e.csv")}))
    assert mixed.eval_sha256 == first.eval_sha256
    rows_kept = open_rows(desk.storage, first.eval_key, first.spec)
    assert [row.label for row in rows_kept if isinstance(row, TextRow)] == [1, 0, 1, 0]  # 0 is the second name
    assert [warning[:53] for warning in first.warnings] == ["the labels in the file are numbers and are read as na"]
    assert first.warnings == mixed.warnings


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_missing_file_is_named(desk: Desk, key: str) -> None:
    absent = desk.data / "absent.jsonl"
    text = desk.refuse(desk.document(data={key: str(absent)}))
    assert f"{absent}: cannot read the file" in text


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json", "is not JSON"),
        ('["a", "list"]', "must be a JSON object, not list"),
        ({"text": "x", "label": "maybe"}, "label 'maybe' is not one of the 2 labels"),
        ({"text": "x", "label": 2}, "label 2 is not one of the 2 labels"),
        ({"text": "x", "label": True}, "label True is not one of the 2 labels"),
        ({"text": "  ", "label": "no"}, "column 'text' is empty"),
        ({"text": 7, "label": "no"}, "column 'text' must be a string, not int"),
        ({"txt": "x", "label": "no"}, "has no column 'text'; it has 'label', 'txt'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(desk: Desk, key: str, row: Any, complaint: str) -> None:
    path = write_rows(desk.data / "bad.jsonl.gz", [*rows(2), row])
    text = desk.refuse(desk.document(data={key: str(path)}))
    assert text.startswith(f"{path}, row 3: ")
    assert complaint in text


@pytest.mark.parametrize("name", ["a" * 300 + ".jsonl", "a\0b.jsonl"])
def test_a_path_that_the_system_refuses_is_named(desk: Desk, name: str) -> None:
    said = desk.refuse(desk.document(data={"train_file": str(desk.data / name)}))
    assert said.removeprefix("task: ").startswith("data.train_file: ")


def test_a_team_with_folders_of_its_own_reads_no_other_teams(desk: Desk) -> None:
    for team in ("red", "blue"):
        write_rows(desk.data / team / "train.jsonl", rows(6))
    own = {"red": {"data_roots": [str(desk.data / "red")]}, "blue": {}}
    desk.settings = settings(desk.data.parent, data_roots=[str(desk.data)], teams=own)
    files = {
        team: {"train_file": str(desk.data / team / "train.jsonl"), "eval_file": None, "eval_fraction": 0.5}
        for team in own
    }
    assert desk.submit(desk.document("red/own", data=files["red"]))[1]
    said = desk.refuse(desk.document("red/theirs", data=files["blue"]))
    assert f"is outside the folders that this service reads\n  → put it below one of: {desk.data / 'red'};" in said
    assert desk.submit(desk.document("blue/any", data=files["red"]))[1]  # it has none of its own


def test_where_no_folder_is_read_files_are_to_be_sent(desk: Desk) -> None:
    desk.settings = settings(desk.data.parent, data_roots=[])
    assert "\n  → send it with `onebasis login`; or add its folder to `data_roots:`" in desk.refuse(desk.document())


def test_a_file_outside_the_allowed_folders_is_refused(desk: Desk, tmp_path: Path) -> None:
    outside = write_rows(tmp_path / "secret.jsonl", rows(4))
    for path in (str(outside), str(desk.data / "../secret.jsonl")):
        text = desk.refuse(desk.document(data={"train_file": path}))
        assert text.startswith(f"data.train_file: {path} is outside the folders that this service reads")
        assert str(desk.data) in text


@pytest.mark.parametrize("link", [False, True])
def test_the_services_own_folder_is_not_read_though_it_lies_below_an_allowed_one(desk: Desk, link: bool) -> None:
    own = desk.data / ".onebasis"
    file = write_rows(own / "frozen.jsonl", rows(4))
    desk.settings = settings(own, data_roots=[str(desk.data)])
    if link:
        (desk.data / "looks-harmless.jsonl").symlink_to(file)
        file = desk.data / "looks-harmless.jsonl"
    text = desk.refuse(desk.document(data={"train_file": str(file)}))
    assert f"{file} is outside the folders that this service reads: {own} is its own" in text
    assert desk.submit(desk.document())[1]
    desk.settings = settings(own, data_roots=[str(own / "rows")])  # asked for by name
    inside = {"train_file": str(write_rows(own / "rows/train.jsonl", rows(4))), "eval_file": None, "eval_fraction": 0.5}
    assert desk.submit(desk.document("red/inside", data=inside))[1]


def test_a_folder_whose_name_only_begins_like_an_allowed_one_is_refused(desk: Desk, tmp_path: Path) -> None:
    sibling = write_rows(tmp_path / "data-of-others/train.jsonl", rows(4))
    assert "is outside" in desk.refuse(desk.document(data={"train_file": str(sibling)}))


@pytest.mark.parametrize("key", ["train_file", "eval_file"])
def test_a_link_that_leads_outside_the_allowed_folders_is_refused(desk: Desk, tmp_path: Path, key: str) -> None:
    outside = write_rows(tmp_path / "secret.jsonl", rows(4))
    (desk.data / "link.jsonl").symlink_to(outside)
    (desk.data / "folder").symlink_to(tmp_path)
    for path in ("link.jsonl", "folder/secret.jsonl"):
        assert f"data.{key}" in desk.refuse(desk.document(data={key: str(desk.data / path)}))


def test_a_link_inside_an_adapters_folder_that_leads_outside_is_refused(desk: Desk, tmp_path: Path) -> None:
    weights = desk.peft() / "adapter_model.safetensors"
    weights.rename(tmp_path / "secret.safetensors")
    weights.symlink_to(tmp_path / "secret.safetensors")
    text = desk.refuse(desk.imported())
    assert "method.adapter" in text
    assert "is outside the folders that this service reads" in text


def test_what_is_no_plain_file_is_not_waited_for(desk: Desk) -> None:
    os.mkfifo(desk.data / "pipe.jsonl")
    for path in ("pipe.jsonl", ""):
        text = desk.refuse(desk.document(data={"train_file": str(desk.data / path)}))
        assert "data.train_file" in text
        assert "is not a plain file" in text
    (desk.data / "pipe.jsonl").unlink()
    assert "not one of datasets' save_to_disk" in desk.refuse(desk.document(data={"train_file": str(desk.data)}))


def test_an_import_with_nan_is_refused_with_the_tensors_name(desk: Desk) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.layer.0.query.lora_A.weight"][0, 0] = torch.nan

    desk.peft(spoil)
    text = desk.refuse(desk.imported())
    assert "NaN or infinite values in 'base_model.model.layer.0.query.lora_A.weight'" in text


def test_an_import_whose_product_is_infinite_is_refused_with_the_adapters_folder(desk: Desk) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for part in "AB":
            tensors[f"base_model.model.layer.0.query.lora_{part}.weight"].fill_(3e38)

    folder = desk.peft(spoil)
    assert desk.refuse(desk.imported()).startswith(f"{folder}: layer.0.query.sigma: has NaN or infinite values")


def test_an_import_of_another_shape_is_refused_with_both_shapes(desk: Desk) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        name = "base_model.model.layer.0.query.lora_B.weight"
        tensors[name] = torch.ones(13, 2)

    desk.peft(spoil)
    text = desk.refuse(desk.imported())
    assert "the adapter's 'layer.0.query' has shape (13, 10); the base model's is (12, 10)" in text


def test_a_lora_of_diffusers_is_imported_for_a_pipeline_and_nothing_else(desk: Desk) -> None:
    layer = "unet.mid_block.attentions.0.to_q"
    layout = replace(LAYOUT, kinds=("text_to_image",), heads={"text_to_image": NO_HEAD}, module_shapes={layer: (6, 4)})
    factors = {f"{layer}.lora_A.weight": torch.randn(2, 4), f"{layer}.lora_B.weight": torch.randn(6, 2)}
    file = desk.data / "style.safetensors"
    save_file(factors, file)
    (desk.data / "saved").mkdir()
    save_file(factors, desk.data / "saved/pytorch_lora_weights.safetensors")

    def submission(place: Path | str, **changes: Any) -> dict[str, Any]:
        method, none = {"name": "import", "adapter": str(place)}, {"eval_file": None, "label_names": None}
        return desk.imported(**{"method": method, "kind": "text_to_image", "data": none, **changes})

    def check(document: dict[str, Any], layout: BaseLayout = layout) -> Draft:
        return check_submission(check_document(document, TaskSpec, "task"), desk.settings, layout)

    frozen = []
    for place in (file, desk.data / "saved"):
        draft = check(submission(place))
        assert draft.adapter is not None
        draft.adapter.file.seek(0)
        frozen.append(adapter_from_bytes(draft.adapter.file.read()))
        (warning,) = draft.warnings
        assert "nothing here scores a text_to_image task" in warning
        draft.close()
    for taken in frozen:
        exact = (factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"]).double()
        assert torch.allclose(taken.modules[layer].delta(), exact, atol=1e-5)
        assert taken.info["format"] == "diffusers"

    with pytest.raises(InvalidInput, match=r"is a LoRA of diffusers.*\n.*kind: text_to_image"):
        check(submission(file, kind="sequence_classification"), LAYOUT)
    desk.peft()
    with pytest.raises(InvalidInput, match="names no component of a pipeline"):
        check(submission(desk.data / "peft"))
    with pytest.raises(InvalidInput, match=r"has shape \(6, 4\); the base model's is \(6, 5\)"):
        check(submission(file), replace(layout, module_shapes={layer: (6, 5)}))
    save_file(factors, desk.data / "peft/pytorch_lora_weights.safetensors")
    with pytest.raises(InvalidInput, match="which of them is meant, nobody can tell"):
        check(submission(desk.data / "peft"))


def test_a_lora_file_that_is_a_link_to_elsewhere_is_refused(desk: Desk, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (desk.data / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (desk.data / "saved").mkdir()
    (desk.data / "saved/pytorch_lora_weights.safetensors").symlink_to(tmp_path / "secret.safetensors")
    for name in ("link.safetensors", "saved"):
        method = {"name": "import", "adapter": str(desk.data / name)}
        assert "is outside the folders that this service reads" in desk.refuse(desk.imported(method=method))


@pytest.mark.parametrize(
    ("said", "kind", "doubted"),
    [
        ("CAUSAL_LM", "sequence_classification", True),
        ("CAUSAL_LM", "causal_lm", False),
        ("SEQ_CLS", "sequence_classification", False),
        ("SEQ_CLS", "causal_lm", True),
        (None, "sequence_classification", False),
    ],
)
def test_an_adapter_that_says_what_it_is_for_is_not_taken_for_something_else_without_a_word(
    desk: Desk, said: str | None, kind: str, doubted: bool
) -> None:
    def say(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config |= {"task_type": said, "modules_to_save": None}
        for name in [name for name in tensors if "lora" not in name]:
            tensors.pop(name)

    desk.peft(say)
    warnings = warnings_of(desk, desk.imported(kind=kind, data={"eval_file": None, "label_names": None}))
    assert any(f"says task_type {said}" in warning for warning in warnings) == doubted


def test_an_import_of_an_unknown_module_is_refused_with_its_name(desk: Desk) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for part in "AB":
            tensors[f"base_model.model.layer.9.query.lora_{part}.weight"] = tensors.pop(
                f"base_model.model.layer.0.query.lora_{part}.weight"
            )
        config["target_modules"] = ["query", "value"]
        config["rank_pattern"] = config["alpha_pattern"] = {}

    desk.peft(spoil)
    assert "changes 'layer.9.query', which the base model 'tiny' does not have" in desk.refuse(desk.imported())


def spoilt_by_renaming(*names: str) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """The update of the query, under these names instead."""

    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for part in "AB":
            tensor = tensors.pop(f"base_model.model.layer.0.query.lora_{part}.weight")
            for name in names:
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.clone()
        config["target_modules"] = ["query", "value"]

    return spoil


def test_an_import_of_the_bare_backbone_gets_the_full_names(desk: Desk) -> None:
    desk.peft(spoilt_by_renaming("0.query"))
    record, _ = desk.submit(desk.imported())
    taken = adapter_from_bytes(desk.storage.read(record.train_key))
    assert torch.allclose(
        taken.modules["layer.0.query"].delta(), adapter(1).modules["layer.0.query"].delta(), atol=1e-5
    )


def test_an_import_without_a_head_is_refused_if_it_is_to_be_scored(desk: Desk) -> None:
    def take_off(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        del tensors["base_model.model.classifier.weight"]
        config["modules_to_save"] = None

    desk.peft(take_off)
    assert "the adapter has no head, so it cannot be scored" in desk.refuse(desk.imported())
    desk.submit(desk.imported(data={"eval_file": None}))


@pytest.mark.parametrize("is_scored", [True, False])
def test_an_import_whose_file_lacks_what_it_says_was_saved_is_refused(desk: Desk, is_scored: bool) -> None:
    document = desk.imported() if is_scored else desk.imported(data={"eval_file": None})

    def saved(*names: str, lost: str = "") -> None:
        def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            config["modules_to_save"] = list(names)
            tensors.pop(lost, None)

        desk.peft(change)

    saved("classifier", "score", "pooler")
    text = desk.refuse(document)
    assert "names 'pooler' in modules_to_save but has no tensors for 'pooler'" in text
    assert "the file is not complete" in text
    saved("classifier", "score", lost="base_model.model.classifier.weight")
    assert "names 'classifier' in modules_to_save but has no tensors for 'classifier'" in desk.refuse(document)
    saved("classifier", "score")  # as PEFT writes it for every classifier; the base model has no `score`
    desk.submit(document)


def test_a_layer_of_which_a_part_is_in_the_file_is_refused_by_the_name_of_the_other(desk: Desk) -> None:
    desk.peft()
    head = LAYOUT.heads["sequence_classification"]
    head = replace(head, shapes={**head.shapes, "classifier.bias": (1,)}, outputs=(*head.outputs, "classifier.bias"))
    layout = replace(LAYOUT, heads={"sequence_classification": head})
    with pytest.raises(InvalidInput, match=r"has a part of 'classifier', and not 'classifier\.bias'"):
        check_submission(check_document(desk.imported(), TaskSpec, "task"), desk.settings, layout)


@pytest.mark.parametrize(
    ("outputs", "names", "said"),
    [
        (1, None, "has 1 output, and a sequence_classification has two or more"),
        (0, None, "has no numbers in"),
        (3, ["a", "b"], "has 3 outputs, and the adapter names 2 labels"),
        (3, ["a", "b", "c"], ""),
        (3, None, ""),
    ],
)
def test_without_rows_and_label_names_the_outputs_are_counted_all_the_same(
    desk: Desk, outputs: int, names: list[str] | None, said: str
) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.classifier.weight"] = torch.ones(outputs, 4)
        if names:
            config["id2label"] = dict(enumerate(names))

    desk.peft(spoil)
    document = desk.imported(data={"eval_file": None, "label_names": None})
    if said:
        assert said in desk.refuse(document)
    else:
        desk.submit(document)


def test_an_import_without_rows_is_told_what_it_gives_up(desk: Desk) -> None:
    desk.peft()
    (said,) = desk.submit(desk.imported(data={"eval_file": None}))[0].warnings
    assert said.startswith("there are no evaluation rows: the task will have no score")
    assert "judge it by the error of its merge alone" in said
    (said,) = desk.submit(desk.imported(name="beta", data={"eval_file": None}, gate={"min_score": 0.8}))[0].warnings
    assert "gate.min_score, 0.8, has no effect" in said
    assert desk.submit(desk.imported(name="gamma"))[0].warnings == ()


def test_an_import_whose_outputs_are_not_the_label_names_is_refused_at_once(desk: Desk) -> None:
    desk.peft()
    text = desk.refuse(desk.imported(data={"label_names": ["a", "b", "c"]}))
    assert "the adapter's head has shape (2, 4); for 3 outputs the base model needs (3, 4)" in text
    assert "data.label_names must list the labels the adapter was trained with, in that order" in text


def test_an_import_whose_outputs_have_other_names_is_refused_with_both_lists(desk: Desk) -> None:
    named = replace(adapter(1), info={"label_names": json.dumps(["yes", "no"])})
    write_peft_folder(desk.data / "peft", named, "tiny-source")
    text = desk.refuse(desk.imported())
    assert "the adapter's outputs are ['yes', 'no']; data.label_names are ['no', 'yes']" in text
    desk.submit(desk.imported(data={"label_names": ["yes", "no"]}))


def test_an_import_with_a_part_of_a_head_is_refused_with_what_is_missing_whether_it_is_scored_or_not(
    desk: Desk,
) -> None:
    desk.peft()
    head = replace(LAYOUT.heads["sequence_classification"], missing=("classifier.weight", "pooler.weight"))
    layout = replace(LAYOUT, heads={"sequence_classification": head})
    for changes in ({}, {"data": {"eval_file": None}}):
        with pytest.raises(InvalidInput, match=r"head is not whole: neither .* has pooler\.weight"):
            check_submission(check_document(desk.imported(**changes), TaskSpec, "task"), desk.settings, layout)


def test_an_import_that_changes_nothing_is_taken_with_a_warning(desk: Desk) -> None:
    def untrain(parts: set[str]) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
        def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                if any(part in name for part in parts):
                    tensor.zero_()

        return spoil

    desk.peft(untrain({"query.lora_B"}))
    assert desk.submit(desk.imported(name="trained-in-part"))[0].warnings == ()
    desk.peft(untrain({"lora_B"}))
    (said,) = desk.submit(desk.imported())[0].warnings
    assert said.startswith("the adapter changes nothing: in every module lora_A or lora_B is all zeros")
    assert said.endswith("its head alone is its own")


def test_an_import_whose_update_is_lost_in_rounding_is_taken_with_a_warning(desk: Desk) -> None:
    layout = replace(LAYOUT, rounding={"layer.0.query": 6e-8, "layer.0.value": 3e-8})

    def warnings(query: float, value: float, layout: BaseLayout = layout) -> tuple[str, ...]:
        sized = {
            name: replace(update, sigma_R=update.sigma_R / update.sigma_R[0] * norm)
            for (name, update), norm in zip(adapter(1).modules.items(), (query, value), strict=True)
        }
        write_peft_folder(desk.data / "peft", replace(adapter(1), modules=sized), "tiny-source")
        return check_submission(check_document(desk.imported(), TaskSpec, "task"), desk.settings, layout).warnings

    (said,) = warnings(1e-9, 2e-9)
    assert said.startswith("the adapter changes nothing: in every module its update is less than the rounding of the")
    assert said.endswith("'layer.0.value', with norm 2.0e-09, where that is 3.0e-08; its head alone is its own")
    (said,) = warnings(5e-8, 2e-8)  # of 6e-8 and of 3e-8: the first is nearer
    assert "'layer.0.query', with norm 5.0e-08, where that is 6.0e-08;" in said
    assert warnings(7e-8, 2e-9) == warnings(5e-8, 4e-8) == ()  # one module is enough
    assert warnings(1e-9, 2e-9, LAYOUT) == ()  # quantised layers: nobody knows


def test_an_import_that_was_trained_on_another_base_model_of_the_same_shapes_is_taken_with_a_warning(
    desk: Desk,
) -> None:
    def warnings(source: str, sha256: str = "", called: tuple[str, ...] = ("org/Tiny-Source",)) -> tuple[str, ...]:
        write_peft_folder(desk.data / "peft", replace(adapter(1), base_sha256=sha256), source)
        layout = replace(LAYOUT, called=called)
        return check_submission(check_document(desk.imported(), TaskSpec, "task"), desk.settings, layout).warnings

    for same in ("", "tiny-source", "other/tiny_source/", "/cache/models--org--tiny-source/snapshots/0a1b2c"):
        assert warnings(same) == ()
    # A folder's name that any model may have says nothing: the one above it counts.
    (told,) = warnings("/models/tiny-other/model", called=("package:tiny_source/model",))
    assert told.startswith("the adapter was trained on '/models/tiny-other/model'")
    assert warnings("/data/tiny-source/checkpoint-500") == ()
    (said,) = warnings("org/tiny-other")
    assert said.startswith("the adapter was trained on 'org/tiny-other', and this service's base model is 'org/Tiny-So")
    assert warnings("org/tiny-other", LAYOUT.sha256) == ()  # the weights are the same, whatever they are called
    (said,) = warnings("tiny-source", "cd" * 32)
    assert "base weights with sha256 cdcdcdcdcdcdcdcd…, and this service's are abababababababab…" in said


def test_auto_is_refused_where_factors_are_merged_as_they_were_trained(desk: Desk) -> None:
    paper = desk.settings.subspace.model_copy(update={"variant": "paper"})
    desk.settings = desk.settings.model_copy(update={"subspace": paper})
    assert "auto cuts what it trains" in desk.refuse(desk.document(method={"name": "auto"}))
    assert desk.submit(desk.document(method={"name": "lora"}))[1]


def test_labels_counted_from_1_and_names_that_look_alike_are_found_at_submission(desk: Desk) -> None:
    names = ["neg", "neutral", "pos"]
    write_rows(desk.data / "train.jsonl", [{"text": f"text {i}", "label": 1 + i % 2} for i in range(6)])
    write_rows(desk.data / "eval.jsonl.gz", [{"text": f"other {i}", "label": 1 + i % 2} for i in range(4)])
    _, said = desk.submit(desk.document(data={"label_names": names}))[0].warnings
    assert "counted from 0: 1 is 'neutral', and 'neg' has no row" in said
    write_rows(desk.data / "train.jsonl", [{"text": f"text {i}", "label": names[1 + i % 2]} for i in range(6)])
    write_rows(desk.data / "eval.jsonl.gz", [{"text": f"other {i}", "label": names[1 + i % 2]} for i in range(4)])
    (said,) = desk.submit(desk.document("red/beta", data={"label_names": names}))[0].warnings
    assert said == "1 of 3 labels has no training row: 'neg'"  # by name there is one reading
    for wrong in (["neg", "neutral", "pos\u200b"], ["neg", "neutral", "Neg"]):
        assert "data.label_names: " in desk.refuse(desk.document(data={"label_names": wrong}))
    desk.peft()  # where no rows would tell
    desk.refuse(desk.imported(data={"label_names": ["a1", "A1"], "eval_file": None}))


def test_an_empty_label_name_is_refused_where_no_rows_would_tell(desk: Desk) -> None:
    desk.peft()
    names = desk.imported(data={"label_names": ["a", " "], "eval_file": None})
    assert "data.label_names: one of the names is empty" in desk.refuse(names)


def test_an_import_that_lacks_a_module_which_it_names_is_taken_with_a_warning(desk: Desk) -> None:
    layout = replace(LAYOUT, module_shapes=dict(LAYOUT.module_shapes) | {"layer.1.query": (12, 10)})

    def warnings(**settings: Any) -> tuple[str, ...]:
        desk.peft(lambda config, tensors: config.update({"target_modules": ["query", "value"]} | settings))
        return check_submission(check_document(desk.imported(), TaskSpec, "task"), desk.settings, layout).warnings

    (said,) = warnings()
    assert "names 3 modules of the base model, and the file has no tensors for 1 of them, 'layer.1.query'" in said
    assert warnings(exclude_modules=["layer.1.query"]) == ()
    assert warnings(target_modules=["layer.0.query", "layer.0.value"]) == ()


def test_an_expensive_pattern_in_an_import_holds_nothing_up(desk: Desk) -> None:
    def spoil(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["alpha_pattern"] = {"(|a)" * 29 + "b": 4}
        for part in "AB":
            tensor = tensors.pop(f"base_model.model.layer.0.query.lora_{part}.weight")
            tensors[f"base_model.model.{'a' * 29}.query.lora_{part}.weight"] = tensor
        config["target_modules"] = ["query", "value"]

    desk.peft(spoil)
    started = time.process_time()
    assert "which the base model 'tiny' does not have" in desk.refuse(desk.imported())
    assert time.process_time() - started < 2


@pytest.mark.parametrize("alpha", [10**400, float("nan"), -1, "2", [2], None])
def test_an_alpha_that_is_no_number_is_refused_as_input(desk: Desk, alpha: Any) -> None:
    desk.peft(lambda config, tensors: config.update(lora_alpha=alpha))
    assert "has lora_alpha=" in desk.refuse(desk.imported())


def test_two_names_of_an_import_that_mean_one_module_are_refused_with_both(desk: Desk) -> None:
    desk.peft(spoilt_by_renaming("0.query", "layer.0.query"))
    text = desk.refuse(desk.imported())
    assert "the adapter changes 'layer.0.query' twice, as '0.query' and as 'layer.0.query'" in text


def test_a_name_of_an_import_that_may_mean_two_modules_is_refused_with_both(desk: Desk) -> None:
    desk.peft(spoilt_by_renaming("query"))
    layout = replace(LAYOUT, module_shapes=dict(LAYOUT.module_shapes) | {"layer.1.query": (12, 10)})
    with pytest.raises(
        InvalidInput, match=r"'query', which may be any of 2 modules, 'layer\.0\.query' and 'layer\.1\.q"
    ):
        check_submission(check_document(desk.imported(), TaskSpec, "task"), desk.settings, layout)


def test_a_dora_import_is_refused_by_that_name(desk: Desk) -> None:
    desk.peft(lambda config, tensors: config.update(use_dora=True))
    assert "uses use_dora=True" in desk.refuse(desk.imported())


def test_an_import_that_is_a_pickle_is_never_read(desk: Desk) -> None:
    folder = desk.peft()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    text = desk.refuse(desk.imported())
    assert "only adapter_model.bin is there, a pickle" in text
    assert "safe_serialization=True" in text


def test_an_import_of_a_folder_that_is_not_there_is_named(desk: Desk) -> None:
    assert f"{desk.data}/peft: there is no such folder or file" in desk.refuse(desk.imported())
    (desk.data / "peft").mkdir()
    assert str(desk.data / "peft/adapter_config.json") in desk.refuse(desk.imported())


def test_a_team_with_too_many_waiting_tasks_is_told_its_limit(desk: Desk) -> None:
    teams = {"red": {"queued_max": 2}, "blue": {}}
    desk.settings = settings(desk.data.parent, data_roots=[str(desk.data)], teams=teams)
    desk.submit(desk.document("red/a"))
    desk.submit(desk.document("red/b"))
    text = desk.refuse(desk.document("red/c"), QueueFull)
    assert "team 'red' has 2 tasks waiting, its limit" in text
    assert "wait until some of them have begun" in text
    assert desk.submit(desk.document("blue/c"))[1]


def test_a_name_that_is_taken_is_refused_and_its_copied_data_is_deleted(desk: Desk) -> None:
    desk.submit(desk.document())
    text = desk.refuse(desk.document(training={"seed": 1}), Conflict)
    assert "red/alpha: task" in text
    assert "this submission differs from it" in text


# --- once --------------------------------------------------------------------------------------------------------


def test_the_same_submission_twice_is_one_task(desk: Desk) -> None:
    first, _ = desk.submit(desk.document())
    keys = desk.storage.keys("")
    again, is_new = desk.submit(desk.document())
    assert (again, is_new) == (first, False)
    assert desk.storage.keys("") == keys
    assert len(desk.queue.tasks()) == 1


def test_the_same_submission_with_a_full_queue_is_still_the_same_task(desk: Desk) -> None:
    teams = {"red": {"queued_max": 1}, "blue": {}}
    desk.settings = settings(desk.data.parent, data_roots=[str(desk.data)], teams=teams)
    first, _ = desk.submit(desk.document())
    assert desk.submit(desk.document()) == (first, False)


def moved(desk: Desk, document: dict[str, Any], *, csv: bool) -> dict[str, Any]:
    """The same document with the same rows in files of other names, in another folder, of another format perhaps."""
    data = dict(document["data"])
    for key, name in (("train_file", "train.jsonl"), ("eval_file", "eval.jsonl.gz")):
        packed = (desk.data / name).read_bytes()
        lines = (gzip.decompress(packed) if name.endswith("gz") else packed).decode().splitlines()
        examples = [json.loads(line) for line in lines]
        if csv:
            path = desk.data / "elsewhere" / f"{key}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("label,text\n" + "".join(f"{e['label']},{e['text']}\n" for e in examples))
        else:
            path = write_rows(desk.data / "elsewhere" / f"{key}-copy.jsonl", examples)
        data[key] = str(path)
    return document | {"data": data}


@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("key", [{}, {"client_key": "mine"}])
def test_the_same_rows_in_other_files_elsewhere_are_the_same_submission(
    desk: Desk, csv: bool, key: dict[str, str]
) -> None:
    first, _ = desk.submit(desk.document(**key))
    kept = desk.storage.keys("")
    assert desk.submit(moved(desk, desk.document(**key), csv=csv)) == (first, False)
    assert desk.storage.keys("") == kept


def test_the_same_adapter_in_another_folder_is_the_same_submission(desk: Desk) -> None:
    folder = desk.peft()
    first, _ = desk.submit(desk.imported())
    folder.rename(desk.data / "copied")
    assert desk.submit(desk.imported(method={"name": "import", "adapter": str(desk.data / "copied")})) == (first, False)


def test_a_setting_of_an_adapter_that_nobody_knows_is_a_warning(desk: Desk) -> None:
    desk.peft(lambda config, tensors: config.update(new_scale=3.0))
    record, _ = desk.submit(desk.imported())
    assert [w for w in record.warnings if w.startswith("adapter_config.json sets new_scale, which this release does")]


def test_an_import_that_names_training_rows_is_refused(desk: Desk) -> None:
    desk.peft()
    assert desk.refuse(desk.imported(data={"train_file": str(desk.data / "train.jsonl")})) == (
        "data.train_file: an import trains nothing, so these rows have no use\n  → leave it out"
    )


def test_what_is_written_out_in_a_document_and_what_is_left_to_its_default_is_the_same(desk: Desk) -> None:
    first, _ = desk.submit(desk.document())
    assert desk.submit(desk.document(metric="accuracy", training={"seed": 42}, priority=0)) == (first, False)


def test_other_training_rows_under_the_same_client_key_are_refused(desk: Desk) -> None:
    desk.submit(desk.document(client_key="mine"))
    write_rows(desk.data / "train.jsonl", rows(5))
    assert "client_key 'mine' was used for red/alpha" in desk.refuse(desk.document(client_key="mine"), Conflict)


def test_the_same_content_under_another_client_key_is_another_task_unless_the_name_is_taken(desk: Desk) -> None:
    first, _ = desk.submit(desk.document(client_key="one"))
    text = desk.refuse(desk.document(client_key="two"), NameTaken)
    assert "is queued, and is this very submission, under another client_key" in text
    assert "differs" not in text
    assert desk.submit(desk.document()) == (first, False)  # no key of its own: the content says which it is
    desk.queue.apply(first.task_id, CancelRequested("ann", 3.0))
    second, is_new = desk.submit(desk.document(client_key="two"))
    assert is_new
    assert second.content_sha256 == first.content_sha256


def test_other_data_under_the_same_document_is_another_submission(desk: Desk) -> None:
    first, _ = desk.submit(desk.document(name="one"))
    write_rows(desk.data / "train.jsonl", rows(5))
    second, is_new = desk.submit(desk.document(name="two"))
    assert is_new
    assert second.client_key != first.client_key


def test_a_client_key_of_ones_own_makes_it_one_task_and_is_no_key_to_another(desk: Desk) -> None:
    first, _ = desk.submit(desk.document(client_key="mine"))
    again, is_new = desk.submit(desk.document(client_key="mine"))
    assert (again.task_id, is_new) == (first.task_id, False)
    kept = desk.storage.keys("data/")
    with pytest.raises(Conflict, match="client_key 'mine' was used for"):
        desk.submit(desk.document(client_key="mine", training={"seed": 1}))
    assert desk.storage.keys("data/") == kept  # nothing of the refused submission is left


def test_after_it_was_parked_or_cancelled_it_may_be_submitted_again(desk: Desk) -> None:
    first, _ = desk.submit(desk.document())
    desk.queue.apply(first.task_id, Claimed(token="tok", worker="w", at=1.0))
    desk.queue.apply(first.task_id, TrainingFailed(token="tok", fault="input", message="too long", at=2.0))
    second, is_new = desk.submit(desk.document())
    assert is_new
    assert second.task_id != first.task_id
    assert desk.submit(desk.document()) == (second, False)
    desk.queue.apply(second.task_id, CancelRequested("ann", 3.0))
    third, is_new = desk.submit(desk.document())
    assert is_new
    assert len({first.client_key, second.client_key, third.client_key}) == 3
