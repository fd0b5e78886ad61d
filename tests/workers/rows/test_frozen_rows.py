"""The same rows are the same task data in every format, and come back as they were given, whatever their number."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.errors import Corrupt, InvalidInput, NotFound, Unavailable
from configs.task_spec import Kind, TaskSpec
from subspace_store import SubspaceReader
from subspace_store.storage.local import LocalStorage
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.protocol import Storage
from tests.workers.data_builders import spec_of, written
from workers.base_model import BaseModel
from workers.orders import Train
from workers.rows import columns, frozen_rows
from workers.rows.frozen_rows import FrozenRows, FrozenTask, StoredRows, freeze, open_rows
from workers.rows.task_data import CompletionRow, ImageRow, Row, TextRow
from workers.training import train_task

Tiny = Callable[[str], BaseModel]

SPEC = spec_of()
IMAGES = spec_of("image_classification")


@pytest.fixture(params=["mapped", "fetched"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One whose files can be mapped, and one from which they come in pieces."""
    return LocalStorage(str(tmp_path / "storage")) if request.param == "mapped" else MemoryStorage(str(tmp_path))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, temporary files and several requests, as if the rows were large."""
    monkeypatch.setattr(frozen_rows, "BATCH_ROWS", 3)
    monkeypatch.setattr(frozen_rows, "SPOOLED_BYTES", 100)
    monkeypatch.setattr(frozen_rows, "PIECE", 160)


@contextlib.contextmanager
def frozen(spec: TaskSpec, train: Path, evaluation: Path | None = None) -> Iterator[FrozenTask]:
    with contextlib.closing(freeze(spec, train, evaluation)) as task:
        yield task


def sha256_of(spec: TaskSpec, path: Path) -> str:
    with frozen(spec, path) as task:
        assert task.train
        return task.train.sha256


def kept(storage: Storage, spec: TaskSpec, rows: FrozenRows | None) -> StoredRows:
    """Rows that went to the storage and came back."""
    assert rows
    key = rows.key("data/t-1", "train")
    rows.write(storage, key)
    return open_rows(storage, key, spec)


def texts(storage: Storage, spec: TaskSpec, path: Path) -> tuple[list[str], list[str]]:
    """The texts that are trained on and those that are kept for evaluation."""
    with frozen(spec, path) as task:
        sides = [kept(storage, spec, rows) for rows in (task.train, task.evaluation)]
    left, right = ([row.text for row in rows if isinstance(row, TextRow)] for rows in sides)
    return left, right


# --- what rows say -----------------------------------------------------------------------------------------------


def test_the_same_texts_are_the_same_task_data_in_every_format(tmp_path: Path) -> None:
    lines = written(tmp_path / "a.jsonl", {"text": "one, two", "label": "no"}, {"text": "три\n", "label": "yes"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes().replace(b"\n", b"\n\n")))
    (tmp_path / "c.csv").write_text('id,label,text\r\n7,0,"one, two"\r\n8,1,"три\n"\r\n', newline="")
    pq.write_table(pa.table({"label": [0, 1], "text": ["one, two", "три\n"]}), tmp_path / "d.parquet")
    files = [lines, tmp_path / "b.jsonl.gz", tmp_path / "c.csv", tmp_path / "d.parquet"]
    assert len({sha256_of(SPEC, file) for file in files}) == 1


def test_the_same_numbers_are_the_same_task_data_however_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,3\nb,0.10\n")
    other = written(tmp_path / "b.jsonl", {"text": "a", "label": 3.0}, {"text": "b", "label": 0.1})
    spec = spec_of("sequence_regression")
    assert sha256_of(spec, tmp_path / "a.csv") == sha256_of(spec, other)


def test_the_same_pixels_are_the_same_task_data_as_an_array_and_as_pictures(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (4, 5, 6, 3), np.uint8)
    np.savez(tmp_path / "a.npz", image=images, label=[0, 1, 0, 1])
    encoded = []
    for pixels in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": encoded, "label": ["no", "yes"] * 2}), tmp_path / "b.parquet")
    assert sha256_of(IMAGES, tmp_path / "a.npz") == sha256_of(IMAGES, tmp_path / "b.parquet")


def test_other_texts_labels_or_order_are_other_task_data(tmp_path: Path) -> None:
    spec = spec_of(text_pair_column="pair")
    files = [
        [("a", "b", 0), ("c", "d", 1)],
        [("c", "d", 1), ("a", "b", 0)],
        [("a", "b", 1), ("c", "d", 1)],
        [("a", "b", 0), ("c", "d", 1), ("c", "d", 1)],
        [("ab", "c", 0), ("d", "x", 1)],
        [("a", "bc", 0), ("d", "x", 1)],
    ]
    digests = set()
    for number, rows in enumerate(files):
        lines = [{"text": text, "pair": pair, "label": label} for text, pair, label in rows]
        digests.add(sha256_of(spec, written(tmp_path / f"{number}.jsonl", *lines)))
    assert len(digests) == len(files)


def test_labels_are_counted_and_rows_shared_between_the_files_whatever_their_labels(tmp_path: Path) -> None:
    train = written(tmp_path / "t.jsonl", *({"text": text, "label": 0} for text in "abcdeff12345678"))
    other = written(tmp_path / "e.jsonl", *({"text": text, "label": 1} for text in "aaabcdeABCDEFGHI"))
    with frozen(SPEC, train, other) as task:
        assert task.train
        assert task.evaluation
        assert (task.train.count, task.evaluation.count, task.shared_rows) == (15, 16, 7)  # a three times, b to e
        assert dict(task.train.per_label) == {"no": 15, "yes": 0}
        assert (task.evaluation.constant_score, task.train.constant_score) == (1.0, 1.0)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_evaluation_rows_that_are_training_rows_are_refused_unless_asked_for(suffix: str, tmp_path: Path) -> None:
    train = written(tmp_path / "t.jsonl", *({"text": text, "label": 0} for text in "abcdef"))
    other = tmp_path / f"e.{suffix}"  # the same texts in another format, order, and with other labels: half of the rows
    if suffix == "csv":
        other.write_text("label,text\n" + "".join(f"1,{text}\n" for text in "fedcbaABCDEF"))
    else:
        written(other, *({"label": "yes", "text": text} for text in "fedcbaABCDEF"))
    for evaluation, said in ((train, "6 of 6"), (other, "6 of 12")):
        with pytest.raises(InvalidInput, match=f"{said} evaluation rows are also training rows") as caught:
            freeze(SPEC, train, evaluation)
        assert caught.value.where == str(evaluation)
        assert "set data.eval_is_train to true" in caught.value.todo
        with frozen(spec_of(eval_is_train=True), train, evaluation) as task:
            assert task.shared_rows == 6


DISGUISED = ["an order of cards\n", "an  order\tof cards", "an order of cards\u200b", "ａｎ order of cards"]
"""What to a reader, or to a tokenizer, is `an order of cards`."""


def test_evaluation_rows_that_to_a_reader_are_training_rows_are_refused(tmp_path: Path) -> None:
    train = written(tmp_path / "t.jsonl", {"text": "an order of cards", "label": 0}, {"text": "else", "label": 1})
    for number, text in enumerate(DISGUISED):
        evaluation = written(tmp_path / f"{number}.jsonl", {"text": text, "label": 0})
        with pytest.raises(InvalidInput, match="1 of 1 evaluation rows are also training rows"):
            freeze(SPEC, train, evaluation)
    evaluation = written(tmp_path / "e.jsonl", {"text": "AN ORDER OF CARDS", "label": 0}, {"text": "Else", "label": 1})
    with frozen(SPEC, train, evaluation) as task:  # which a model may tell apart
        assert (task.shared_rows, task.alike_rows) == (0, 2)


def test_rows_that_only_look_alike_and_that_a_share_has_parted_are_counted(tmp_path: Path) -> None:
    lines = written(
        tmp_path / "t.jsonl", *({"text": f"x{space}y", "label": 0} for space in (" " * n for n in range(1, 30)))
    )
    with frozen(spec_of(eval_fraction=0.3), lines) as task:
        assert task.train
        assert task.evaluation
        assert (task.shared_rows, task.alike_rows) == (0, task.evaluation.count)
        assert (task.train.inputs, task.evaluation.inputs) == (1, 1)


def test_inputs_with_several_labels_are_counted(tmp_path: Path) -> None:
    texts = [("a", 0), ("a ", 1), ("b", 1), ("b", 1), ("c", 0)]
    lines = written(tmp_path / "t.jsonl", *({"text": text, "label": label} for text, label in texts))
    with frozen(SPEC, lines) as task:
        assert task.train
        assert (task.train.inputs, task.train.contradicted) == (3, 1)
    with frozen(spec_of("sequence_regression"), lines) as task:  # of several opinions the mean is right
        assert task.train
        assert (task.train.inputs, task.train.contradicted) == (3, 0)


def test_what_rows_unpack_to_is_bounded_by_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (columns, frozen_rows):
        monkeypatch.setattr(module, "UNPACKED_BYTES_FREE", 10**6)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 90, pa.int32()), ["x" * 2**20])  # one value, named 90 times
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": text, "label": [0] * 90}), path, compression="zstd", store_schema=False)
    with pytest.raises(InvalidInput, match="unpacks to more than"):
        freeze(SPEC, path, None)


# --- there and back ----------------------------------------------------------------------------------------------

CHAT = ("system", "user", "assistant")
ROWS: dict[str, tuple[TaskSpec, list[dict[str, Any]], Sequence[Row]]] = {
    "texts": (
        SPEC,
        [{"text": f"text {n}", "label": n % 2} for n in range(20)],
        [TextRow(f"text {n}", None, n % 2) for n in range(20)],
    ),
    "pairs": (
        spec_of("sequence_regression", text_pair_column="pair"),
        [{"text": "a", "pair": f"ü{n}", "label": n / 7} for n in range(6)],
        [TextRow("a", f"ü{n}", n / 7) for n in range(6)],
    ),
    "prompts": (
        spec_of("causal_lm"),
        [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(7)],
        [CompletionRow((("user", f"{n}+1="), ("assistant", str(n + 1))), False) for n in range(7)],
    ),
    "messages": (
        spec_of("causal_lm", messages_column="m"),
        [{"m": [{"role": role, "content": role * n} for role in CHAT]} for n in range(1, 9)],
        [CompletionRow(tuple((role, role * n) for role in CHAT), True) for n in range(1, 9)],
    ),
    "pixels": (
        IMAGES,
        [{"image": [[n, n], [n, 0], [0, 0]], "label": 1} for n in range(5)],
        [ImageRow(np.array([[n, n], [n, 0], [0, 0]], np.uint8)[..., None], 1) for n in range(5)],
    ),
}


def equal(row: Row, other: Row) -> bool:
    if isinstance(row, ImageRow) and isinstance(other, ImageRow):
        return np.array_equal(row.image, other.image) and (row.label, row.encoded) == (other.label, other.encoded)
    return row == other and isinstance(row, TextRow | CompletionRow)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.usefixtures("small_pieces")
def test_rows_of_every_kind_come_back_as_they_were_given(name: str, storage: Storage, tmp_path: Path) -> None:
    spec, given, rows = ROWS[name]
    with frozen(spec, written(tmp_path / "a.jsonl", *given)) as task:
        back = kept(storage, spec, task.train)
    assert len(back) == len(rows)
    assert all(equal(*pair) for pair in zip(back, rows, strict=True))
    for index in (0, 3, 1, len(rows) - 1, 2, -1, -len(rows)):
        assert equal(back[index], rows[index])
    assert all(equal(*pair) for pair in zip(back[1:-1:2], rows[1:-1:2], strict=True))
    for beyond in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            back[beyond]


def test_encoded_pictures_are_kept_encoded(storage: Storage, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (200, 100), (1, 2, 3)).save(file, "PNG")
    pq.write_table(pa.table({"image": [file.getvalue()], "label": [1]}), tmp_path / "a.parquet")
    with frozen(IMAGES, tmp_path / "a.parquet") as task:
        (row,) = kept(storage, IMAGES, task.train)
    assert equal(row, ImageRow(np.full((100, 200, 3), (1, 2, 3), np.uint8), 1, file.getvalue()))
    assert len(storage.read(storage.keys("")[0])) < 5000  # 60,000 as pixels


@pytest.mark.usefixtures("small_pieces")
def test_rows_that_were_changed_in_the_storage_are_corrupt(storage: Storage, tmp_path: Path) -> None:
    with frozen(SPEC, written(tmp_path / "a.jsonl", *ROWS["texts"][1])) as task:
        kept(storage, SPEC, task.train)
    (key,) = storage.keys("data/")
    whole = storage.read(key)
    at = whole.index(b"text 7")
    for changed in (whole[:-9], b"", whole[:at] + b"T" + whole[at + 1 :]):
        storage.write(key, changed)
        with pytest.raises(Corrupt, match="not what its name says"):
            open_rows(storage, key, SPEC)
    storage.delete(key)
    with pytest.raises(NotFound):
        open_rows(storage, key, SPEC)


def test_rows_that_an_earlier_release_froze_can_still_be_opened(storage: Storage) -> None:
    storage.write("data/t-1/eval.jsonl.gz", gzip.compress(b'{"text": "x", "label": "yes"}\n{"text": "y", "label": 0}'))
    rows = open_rows(storage, "data/t-1/eval.jsonl.gz", SPEC)
    assert list(rows) == [rows[0], rows[1]] == [TextRow("x", None, 1), TextRow("y", None, 0)]


# --- a share of the rows -----------------------------------------------------------------------------------------

QUARTER = spec_of(eval_fraction=0.25)
LINES = [{"text": f"text {n}", "label": n % 2} for n in range(400)]


def test_a_share_of_the_rows_is_kept_for_evaluation_and_not_trained_on(storage: Storage, tmp_path: Path) -> None:
    train, evaluation = texts(storage, QUARTER, written(tmp_path / "a.jsonl", *LINES))
    assert sorted(train + evaluation) == sorted(line["text"] for line in LINES)
    assert 70 < len(evaluation) < 130  # 100 ± 3.5 standard deviations of 8.7


def test_rows_stay_on_their_side_when_others_are_added_or_all_are_shuffled(storage: Storage, tmp_path: Path) -> None:
    train, evaluation = texts(storage, QUARTER, written(tmp_path / "a.jsonl", *LINES[:300]))
    more, kept_more = texts(storage, QUARTER, written(tmp_path / "b.jsonl", *reversed(LINES)))
    assert set(train) < set(more)
    assert set(evaluation) < set(kept_more)


def test_equal_texts_are_on_one_side_whatever_their_labels(storage: Storage, tmp_path: Path) -> None:
    doubled = [line | {"label": label} for line in LINES for label in (0, 1)]
    train, evaluation = texts(storage, QUARTER, written(tmp_path / "a.jsonl", *doubled))
    assert not set(train) & set(evaluation)


@pytest.mark.parametrize(
    ("fraction", "said"),
    [(0.001, "has no rows for evaluation\n  → raise data.eval_fraction"), (0.999, "has no rows\n  → lower data.eval_")],
)
def test_a_share_that_leaves_a_side_empty_is_refused(fraction: float, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", *LINES[:5])
    with pytest.raises(InvalidInput) as caught:
        freeze(spec_of(eval_fraction=fraction), path, None)
    assert said in str(caught.value)


# --- scores that cannot be computed ------------------------------------------------------------------------------

ALIKE = [{"text": f"text {n}", "label": 1} for n in range(3)]
NUMBERS = [{"text": "a", "label": 1.0}, {"text": "b", "label": 1.0 + 1e-9}]  # the same in float32
NOT_DEFINED = [
    ("sequence_regression", "pearson", NUMBERS),
    ("sequence_regression", "spearman", NUMBERS[:1]),
    ("sequence_classification", "matthews_correlation", ALIKE),
    ("image_classification", "matthews_correlation", [{"image": [[n]], "label": 1} for n in range(2)]),
]


@pytest.mark.parametrize(("kind", "metric", "rows"), NOT_DEFINED)
def test_evaluation_rows_of_one_label_are_refused_where_the_metric_is_not_defined(
    kind: Kind, metric: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path, train = written(tmp_path / "e.jsonl", *rows), written(tmp_path / "t.jsonl", *rows)
    said = f"all {len(rows)} evaluation rows have the same label: {metric} is not defined"
    spec = spec_of(kind, {"metric": metric}, eval_is_train=True)
    with pytest.raises(InvalidInput, match=said) as caught:
        freeze(spec, train, path)
    assert caught.value.where == str(path)
    with frozen(spec, train, written(path, rows[0], rows[-1] | {"label": 0})) as task:
        assert task.evaluation


def test_other_metrics_are_defined_on_one_label(tmp_path: Path) -> None:
    path = written(tmp_path / "e.jsonl", *ALIKE)
    with frozen(spec_of(eval_is_train=True), path, path) as task:
        assert task.evaluation
    said = "have the same label: pearson is not defined"
    lines = written(tmp_path / "r.jsonl", *(line | {"label": 2} for line in LINES))
    with pytest.raises(InvalidInput, match=said) as caught:
        freeze(spec_of("sequence_regression", eval_fraction=0.25), lines, None)
    assert caught.value.where == str(lines)


# --- large files -------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys
from pathlib import Path
from subspace_store.storage.local import LocalStorage
from tests.workers.data_builders import spec_of
from workers.rows.frozen_rows import freeze, open_rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def held():  # mapped files do not count: the system drops their pages when it needs the space
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

def through(path):
    task = freeze(spec, path, None)
    after_freezing = peak()
    key = task.train.key("data", path.stem)
    task.train.write(storage, key)
    task.close()
    rows = open_rows(storage, key, spec)
    words = sum(len(rows[index].text.split()) for index in range(0, len(rows), 50))
    return len(rows), words, after_freezing, held()

folder = Path(sys.argv[1])
spec, storage = spec_of(), LocalStorage(str(folder / "storage"))
_, _, before_peak, before_held = through(folder / "small.csv")  # imports and allocators take their share
count, words, after_peak, after_held = through(folder / "large.csv")
print(json.dumps([count, words, after_peak - before_peak, after_held - before_held]))
"""


def test_a_large_file_is_checked_frozen_and_opened_without_being_in_memory(tmp_path: Path) -> None:
    for name, rows in (("small", 2_000), ("large", 12_500)):
        with open(tmp_path / f"{name}.csv", "w") as file:
            file.write("text,label\n")
            file.writelines(f'"{number}{" word" * 1000}",{number % 2}\n' for number in range(rows))
    assert (tmp_path / "large.csv").stat().st_size > 62e6
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    count, words, frozen_kb, opened_kb = json.loads(answer.stdout)
    assert (count, words) == (12_500, 250 * 1001)
    assert frozen_kb < 30_000  # of 62,500, however large the file; some batches and buffers
    assert opened_kb < 15_000


def test_rows_that_would_fill_the_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_rows, "FROZEN_BYTES_MAX", 1000)
    monkeypatch.setattr(frozen_rows, "BATCH_ROWS", 3)
    with pytest.raises(InvalidInput, match="more than 1000 bytes"):
        freeze(SPEC, written(tmp_path / "a.jsonl", *LINES), None)


@pytest.mark.usefixtures("small_pieces")
def test_a_disk_without_space_is_no_mistake_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, storage = written(tmp_path / "a.jsonl", *LINES), MemoryStorage(str(tmp_path))
    with frozen(SPEC, path) as task:
        kept(storage, SPEC, task.train)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(Unavailable, match="no temporary file"):
        freeze(SPEC, path, None)
    with pytest.raises(Unavailable, match="no temporary file"):
        open_rows(storage, storage.keys("data/")[0], SPEC)


# --- into training -----------------------------------------------------------------------------------------------


def write_csv(path: Path) -> None:
    path.write_text("text,label\n" + "".join(f"a text of {number},{number / 4}\n" for number in range(24)))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": [f"a text of {n}" for n in range(24)], "label": ["yes", "no"] * 12}), path)


def write_prompts(path: Path) -> None:
    written(path, *({"prompt": f"one and {number} is", "completion": f" {number + 1}"} for number in range(24)))


def write_pixels(path: Path) -> None:
    np.savez(path, image=np.random.default_rng(1).integers(0, 256, (24, 9, 7), np.uint8), label=np.arange(24) % 2)


@pytest.mark.parametrize(
    ("architecture", "kind", "name", "write"),
    [
        ("bert", "sequence_regression", "rows.csv", write_csv),
        ("bert", "sequence_classification", "rows.parquet", write_parquet),
        ("llama-lm", "causal_lm", "rows.jsonl", write_prompts),
        ("vit", "image_classification", "rows.npz", write_pixels),
    ],
)
def test_a_task_of_every_kind_is_trained_and_scored_on_its_frozen_rows(
    architecture: str, kind: Kind, name: str, write: Callable[[Path], None], tiny: Tiny, tmp_path: Path
) -> None:
    base, storage = tiny(architecture), MemoryStorage(str(tmp_path))
    write(tmp_path / name)
    training = {"max_steps": 3, "per_device_train_batch_size": 4}
    sections = {"training": training, "lora": {"r": 2, "target_modules": list(base.module_shapes())[:1]}}
    spec = spec_of(kind, sections, eval_fraction=0.25, max_length=16)
    with frozen(spec, tmp_path / name) as task:
        assert task.train
        assert task.evaluation
        assert task.train.count + task.evaluation.count == 24
        keys = [task.train.key("data/t-1", "train"), task.evaluation.key("data/t-1", "eval")]
        task.train.write(storage, keys[0])
        task.evaluation.write(storage, keys[1])
    order = Train(
        token="token",
        task_id="t-1",
        attempt=1,
        spec=spec,
        train_key=keys[0],
        eval_key=keys[1],
        staging_key="staging/t-1/1/adapter.safetensors",
    )
    trained = train_task(order, base, storage, SubspaceReader.open(storage), lambda progress: None, lambda: "")
    assert (trained.steps, trained.score_count) == (3, task.evaluation.count)
    assert math.isfinite(trained.local_score)
    assert trained.local_score == trained.metrics[spec.metric]


def test_labels_of_several_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    spec = spec_of("image_regression", label_names=("x", "y"))
    path = written(tmp_path / "t.jsonl", *({"image": [[n]], "label": [n / 7, -n]} for n in range(4)))
    frozen = freeze(spec, path, None)
    assert frozen.train is not None
    assert [row.label for row in frozen.train.rows(spec.kind)] == [(n / 7, float(-n)) for n in range(4)]
    frozen.close()
