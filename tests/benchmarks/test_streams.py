"""A tiny stream from its rows to the page: two tasks of 120 rows, two steps each, on a random BERT of two layers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks import picture_models, picture_sets
from benchmarks.picture_sets import Group
from benchmarks.real_streams import Case
from benchmarks.streams import orders, report, run, serial, workshop
from benchmarks.streams.hundred import hundred
from benchmarks.streams.kept import identity
from benchmarks.streams.serial import averaged, hold
from benchmarks.streams.table import normalised
from subspace_store import Adapter, ModuleUpdate, adapter_from_bytes, adapter_to_bytes, canonical_update
from tests.benchmarks.picture_builders import save_picture_sets
from tests.subspace_store.builders import random_adapter
from tests.workers.tiny_bases import save_clip, save_llama
from tests.workers.worker_builders import MINILM, task_of_kind, tiny_settings
from workers.base_model import BaseModel, load_base_model
from workers.rows.task_data import ImageRow
from workers.weights import resolve_source

MODULES, WIDTH = 4, 32
ROWS = ("separate", "mean", "paper-16", "auto", "share-2", "o-lora", "ewc", "joint")
PICTURE_ROWS = ("separate", "ours-lora", "sequential")
LANGUAGE_ROWS = ("separate", "mean", "compressed-16")
PAGE = """# Quality

<!-- table four -->
old
<!-- end -->

<!-- scores ten -->
old
<!-- end -->
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text sets of the folder's form, some of classes and one of numbers."""
    folder = tmp_path_factory.mktemp("text")
    said = ("why was I charged", "where is my card", "my top-up is pending", "cash was short")
    rows = [{"text": f"{said[i % 4]} {i}", "label": i % 2} for i in range(140)]
    for name in ("trec6", "banking77"):
        count = 77 if name == "banking77" else 2
        labelled = [row | {"label": i % count} for i, row in enumerate(rows)] if count == 77 else rows
        put(folder / name, labelled, "single", [f"label {i}" for i in range(count)])
    put(
        folder / "stsb", [r | {"text_b": "a card", "label": (i % 9) / 2} for i, r in enumerate(rows)], "pair-regression"
    )
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A random base model with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(MINILM.source))
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": MODULES // 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return load_base_model(tiny_settings(str(folder)))


def latest(folder: Path, name: str) -> Adapter:
    """The adapter of this name that was made last: those before it are of the grid."""
    file = max(folder.glob(f"{name}-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    return adapter_from_bytes(file.read_bytes(), str(file))


def put(
    folder: Path, rows: list[dict[str, Any]], kind: str, labels: list[str] | None = None, metric: str = "accuracy"
) -> None:
    folder.mkdir()
    meta = {"name": folder.name, "kind": kind, "label_names": labels, "metric": metric, "n_train": 120}
    (folder / "meta.json").write_text(json.dumps(meta))
    for part, some in (("train", rows[:120]), ("test", rows[120:])):
        with gzip.open(folder / f"{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)


def test_a_stream_is_measured_once_and_told_on_the_page(
    data: Path, bert: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(run.BASES, "minilm", lambda: bert)  # type: ignore[index]
    monkeypatch.setitem(orders.ORDERS, "four", ("trec6", "stsb"))  # type: ignore[index]
    monkeypatch.setitem(orders.GRIDS, "minilm", ("trec6",))  # type: ignore[index]
    monkeypatch.setattr(workshop, "GRID", (0.003, 0.008))
    monkeypatch.setattr(serial, "STRENGTHS", (1.0,))
    monkeypatch.setattr(serial, "FISHER_ROWS", 4)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/quality.md"
    page.write_text(PAGE)
    argv = ["--data", str(data), "--orders", "four", "--rows", ",".join(ROWS), "--steps", "2"]
    argv += [f"--{name}={tmp_path / name}" for name in ("keep", "results", "docs")]

    run.main(argv)
    found = json.loads((tmp_path / "results/four.json").read_text())
    rows = {name: found["rows"][name]["0"] for name in ROWS}
    assert found["tasks"] == ["trec6", "stsb"]
    assert found["metrics"] == {"trec6": "accuracy", "stsb": "pearson"}
    assert set(found["learning_rates"]) == {"lora", "o-lora", "sequential", "ewc"}
    assert set(found["learning_rates"]["lora"]) == {"0.003", "0.008"}
    # 2 tasks · 12 modules · 8·(384 + 384) numbers of 4 bytes, nothing shared
    lora = 4 * MODULES * 8 * 2 * WIDTH
    assert (rows["separate"]["bytes_own"], rows["separate"]["bytes_shared"]) == (2 * lora, 0)
    assert set(rows["separate"]["loss_points"].values()) == {0.0}
    assert rows["separate"]["forgetting_points"] == 0.0
    assert (rows["mean"]["bytes_own"], rows["mean"]["bytes_shared"]) == (0, lora)
    # of 2 tasks of rank 8 a basis keeps 16 directions a side at most, and 2·16·8 coefficients each in a module
    assert 0 < rows["paper-16"]["bytes_shared"] <= 4 * MODULES * 16 * 2 * WIDTH
    assert 0 < rows["paper-16"]["bytes_own"] <= 4 * MODULES * 2 * 2 * 16 * 8
    assert 0 < rows["auto"]["bytes_own"] + rows["auto"]["bytes_shared"] <= 2 * lora
    assert rows["joint"]["backward_transfer_points"] is None  # no stream, so nothing came before
    assert rows["o-lora"]["trained_numbers"] == lora / 4
    assert rows["o-lora"]["bytes_shared"] == 2 * lora  # the ranks of both tasks, added
    assert "made" in capsys.readouterr().out

    # O-LoRA leaves the first task's factors as they were, and turns the second's A away from them.
    first, second = (latest(tmp_path / "keep/minilm", f"{task}-o-lora") for task in ("trec6", "stsb"))
    for name, update in first.modules.items():
        (b_NR, a_RD), (grown_NR, grown_RD) = update.raw(), second.modules[name].raw()
        assert torch.allclose(grown_NR[:, :8], b_NR, atol=1e-6)
        assert torch.allclose(grown_RD[:8], a_RD, atol=1e-6)

    told = page.read_text()
    assert "| separate LoRA of rank 8 (reference) |" in told
    assert told.endswith("<!-- scores ten -->\nNot measured.\n<!-- end -->\n")
    assert json.loads((tmp_path / "results/summary.json").read_text()) == {}  # `ten` was not measured
    assert (tmp_path / "docs/quality-bytes.png").stat().st_size > 1000

    # Killed while an adapter was written: that one is made again, to the same bytes, and nothing else is.
    # The first one is the separate LoRA; those after it are what `auto` compared, of which its choice is left.
    loras = (tmp_path / "keep/minilm").glob("stsb-lora-*.safetensors")
    kept = min(loras, key=lambda path: path.stat().st_mtime_ns)
    before = kept.read_bytes()
    kept.with_suffix(".json").unlink()
    with (tmp_path / "keep/minilm/scores.jsonl").open("a") as file:
        file.write('["cut of')
    run.main(argv)
    assert capsys.readouterr().out.count(" made ") == 1
    assert kept.read_bytes() == before
    again = {name: json.loads((tmp_path / "results/four.json").read_text())["rows"][name]["0"] for name in ROWS}
    assert {n: r["scores"] for n, r in again.items()} == {n: r["scores"] for n, r in rows.items()}

    # On another machine nothing is kept, but the file has the learning rates.
    argv[argv.index(",".join(ROWS))] = "separate"
    run.main([*argv, f"--keep={tmp_path / 'another'}"])
    assert "chosen for lora" not in capsys.readouterr().out
    argv[argv.index("--steps") + 1] = "3"
    with pytest.raises(SystemExit, match="name another folder"):
        run.main(argv)


def test_a_language_model_is_also_asked_what_it_has_not_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("task1_capitals", "task2_colours")
    said = (("The capital of France is", "Paris."), ("The colour of grass is", "green."))
    for name, (asked, answer) in zip(names, said, strict=True):
        ends = {"role": "assistant", "content": answer}
        rows = [{"messages": [{"role": "user", "content": f"{asked} {i}"}, ends]} for i in range(140)]
        put(tmp_path / name, rows, "causal_lm", metric="rouge_l")
    base = load_base_model(tiny_settings(save_llama(tmp_path / "model", chat=True)))
    monkeypatch.setitem(run.BASES, "smollm2", lambda: base)  # type: ignore[index]
    monkeypatch.setitem(orders.ORDERS, "superni-3", names)  # type: ignore[index]
    monkeypatch.setitem(orders.GRIDS, "smollm2", names[:1])  # type: ignore[index]
    monkeypatch.setattr(workshop, "GRID", (0.008,))
    argv = ["--data", str(tmp_path), "--orders", "superni-3", "--rows", ",".join(LANGUAGE_ROWS), "--steps", "60"]
    run.main([*argv, "--all-versions", *(f"--{name}={tmp_path / name}" for name in ("keep", "results", "docs"))])
    found = json.loads((tmp_path / "results/superni-3.json").read_text())["rows"]
    separate, mean = found["separate"]["0"], found["mean"]["0"]
    first, second = separate["scores"]["task1"], separate["scores"]["task2"]
    assert min(first, second) > 0.5
    # Before its birth the base model alone answers the second task: it gains nothing from the first.
    assert separate["forward_transfer_points"] == 0.0
    before = separate["mtil"]["transfer"]
    assert before < 0.5
    # The first task is the same in both versions; of the second, the base's answers count and then its own.
    assert separate["mtil"]["average"] == pytest.approx((first + (before + second) / 2) / 2)
    assert separate["mtil"]["last"] == pytest.approx((first + second) / 2)
    # a basis of 16 directions a side for each of 2 layers' q, k, v, o, and a core of 16·16 for each of 2 tasks
    compressed = found["compressed-16"]["0"]
    sides = sum(out + into for out, into in base.module_shapes("causal_lm").values() if out <= 32 >= into)
    assert compressed["bytes_shared"] == 4 * 16 * sides
    assert compressed["bytes_own"] == 4 * 2 * 8 * 16 * 16
    # One adapter for all is asked itself: after the first task it is that task's.
    assert mean["forward_transfer_points"] == pytest.approx(100 * (mean["mtil"]["transfer"] - before))


def test_a_clip_is_asked_by_texts_what_it_has_not_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_picture_sets(tmp_path, digits=60)
    for name, classes in (("digits-second", range(2)), ("digits-first", range(4, 6))):
        # The words at the end: the end of this tokenizer has the number 2, so that CLIP reads at the largest token.
        monkeypatch.setitem(picture_sets.GROUPS, name, Group("mnist", classes, "{} is green."))  # type: ignore[index]
    base = load_base_model(tiny_settings(save_clip(tmp_path / "model")))
    names = ("digits-second", "digits-first")
    monkeypatch.setitem(run.BASES, picture_models.CLIP, lambda: base)  # type: ignore[index]
    monkeypatch.setitem(orders.ORDERS, "image-text", names)  # type: ignore[index]
    monkeypatch.setitem(orders.GRIDS, picture_models.CLIP, names[:1])  # type: ignore[index]
    monkeypatch.setattr(workshop, "GRID", (0.008,))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/quality.md").write_text("<!-- mtil image-text -->\nold\n<!-- end -->\n")
    argv = ["--data", str(tmp_path), "--orders", "image-text", "--rows", ",".join(PICTURE_ROWS), "--steps", "30"]
    argv += ["--all-versions", "--test-rows", "40"]
    run.main([*argv, *(f"--{name}={tmp_path / name}" for name in ("keep", "results", "docs"))])
    found = json.loads((tmp_path / "results/image-text.json").read_text())
    assert found["base_model"] == {"name": "small-clip", "sha256": base.sha256}
    # Trained on other weights, an adapter would be another one.
    assert [folder.name for folder in (tmp_path / "keep").iterdir()] == [f"small-clip-{base.sha256[:12]}"]
    separate, merged, one = (found["rows"][name]["0"] for name in PICTURE_ROWS)
    first, second = names
    assert min(separate["scores"].values()) > 0.8
    # There is no head: what a label means, the text tower says.
    assert separate["bytes_heads"] == 0
    # Until it is learnt, a task with an adapter of its own is answered by the base model.
    for row in (separate, merged):
        assert row["by_version"]["1"][second] == row["untrained"][second] == row["mtil"]["transfer"]
        assert row["forward_transfer_points"] == 0.0
    # One LoRA for all answers both, before and after: (A[1][1] + A[2][1] + A[1][2] + A[2][2]) / 4.
    cells = one["by_version"]
    assert one["mtil"]["transfer"] == cells["1"][second] != one["untrained"][second]
    assert one["mtil"]["average"] == pytest.approx(sum(cells[v][task] for v in "12" for task in names) / 4)
    assert one["mtil"]["last"] == pytest.approx((cells["2"][first] + cells["2"][second]) / 2)
    told = (tmp_path / "docs/quality.md").read_text()
    assert f"| base model | {100 * one['untrained'][second]:.1f} |" in told
    assert f"| one LoRA, task after task | {100 * one['mtil']['transfer']:.1f} |" in told


def test_two_pictures_that_differ_in_the_middle_are_two_cases() -> None:
    def one(bright: int) -> Case:
        pixels = np.zeros((40, 40, 3), np.uint8)
        pixels[20, 20] = bright
        return Case(task_of_kind("image_text"), (ImageRow(pixels, 0),), ())

    assert identity(one(1)) == identity(one(1)) != identity(one(2))


def test_a_summary_is_the_mean_over_seeds_and_of_the_worst_task() -> None:
    def of(first: float, second: float) -> dict[str, Any]:
        losses = {"a": first, "b": second}
        mean = (first + second) / 2
        return {
            "loss_points": losses,
            "mean_loss_points": mean,
            "learnt_loss_points": mean,
            "forgetting_points": first,
        }

    stream = {
        "stream": "ten",
        "tasks": ["a", "b"],
        "date": "2026-11-30",
        "hardware": "none",
        "rows": {"auto": {"0": of(-1, 1), "1": of(0, -0.5)}},
    }
    # a: (−1 + 0) / 2 = −0.5; b: (1 − 0.5) / 2 = 0.25; mean (0 − 0.25) / 2; forgetting (−1 + 0) / 2
    found = report.summary({"ten": stream})
    assert found["minilm"]["worst_loss_points"] == -0.5
    assert found["minilm"]["mean_loss_points"] == -0.125
    assert found["minilm"]["forgetting_points"] == -0.5
    assert list(found) == ["minilm"]


def test_a_normalised_score_leaves_out_tasks_whose_own_adapter_learnt_nothing() -> None:
    # 0.6 / 0.8 = 0.75; 0.45 / 0.5 = 0.9; the third has no correlation to keep
    assert normalised({"a": 0.6, "b": 0.45, "c": 0.1}, {"a": 0.8, "b": 0.5, "c": 0.0}) == pytest.approx(0.825)


def test_slao_serves_the_newest_a_with_a_running_mean_of_b() -> None:
    def one(b: float, a: list[float]) -> dict[str, ModuleUpdate]:
        return {"m": canonical_update(torch.tensor([[b], [0.0]]), torch.tensor([a]), 1.0)}

    # 1; 1 + (3 − 1)/√2 = 2.41421; 2.41421 + (0.5 − 2.41421)/√3 = 1.30904, with the third A
    found = averaged([one(1, [1, 0]), one(3, [0, 1]), one(0.5, [0.6, 0.8])])["m"].delta()
    assert found.tolist() == [pytest.approx([0.6 * 1.30904, 0.8 * 1.30904], abs=1e-5), pytest.approx([0, 0])]


def test_a_held_parameter_is_pulled_back_by_its_weight() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    hold(parameter, torch.tensor([0.0, 10.0]))
    with torch.no_grad():
        parameter += 0.5
    (3 * parameter).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [3.0, 8.0]  # 3; 3 + 10·(2.5 − 2)


def test_adapters_come_in_batches_loras_first_and_too_few_are_refused(data: Path, tmp_path: Path) -> None:
    for stem in ("banking-0-share-in-0a", "banking-1-lora", "banking-0-lora-all", "banking-0-lora-all-r1"):
        (tmp_path / f"{stem}.safetensors").write_bytes(adapter_to_bytes(random_adapter(0)))
    found = hundred(data, tmp_path, count=3, at_once=2)
    assert [case.spec.name for case in found.cases] == ["banking-0-lora-all", "banking-1-lora", "banking-0-share-in-0a"]
    assert found.counts == (2, 3)
    with pytest.raises(SystemExit, match="has 3 adapters of related tasks and 4 are needed"):
        hundred(data, tmp_path, count=4)
