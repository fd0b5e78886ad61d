"""verify finds what is damaged, and nothing where all is well."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from subspace_store import SubspaceStore, Version, digest
from subspace_store.adapter import ModuleUpdate
from subspace_store.files import blobs
from subspace_store.files.tensor_file import TensorFile
from subspace_store.log.fold import log_key, to_plain
from subspace_store.log.version import BlobRef, SubspaceState
from subspace_store.merging.basis import ModuleBasis
from subspace_store.merging.merge import Transport
from subspace_store.verify import verify
from tests.subspace_store.builders import fresh_storage, merged, opened, random_adapter, reading


@pytest.fixture
def store() -> SubspaceStore:
    store = opened(energy_ratio_min=0.8)
    for number in (1, 2, 3):
        merged(store, {f"t{number}": random_adapter(number)})
        store.publish(number, op_key=f"p{number}", actor="test")
    return store


def test_nothing_is_found_where_all_is_well(store: SubspaceStore) -> None:
    assert verify(store) == []
    store.rollback(1, op_key="back", actor="test")
    merged(store, {"t2": random_adapter(5), "t9": random_adapter(9)}, op_key="branch")
    assert verify(store) == []
    assert verify(reading(fresh_storage())) == []


def test_nothing_is_found_in_the_papers_form_where_a_projection_loses_nothing() -> None:
    store = opened(variant="paper", rank_max=8)
    merged(store, {"t1": random_adapter(1)})
    assert store.state.tasks_at(1)["t1"].error_at_birth < 1e-6
    assert verify(store) == []


def test_snapshots_and_checkpoints_are_checked_too(store: SubspaceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 2)
    monkeypatch.setattr("subspace_store.log.version_log.CHECKPOINT_EVERY", 2)
    merged(store, {"t4": random_adapter(4)})
    assert store.state.versions[4].snapshot is not None
    assert verify(store) == []


def lie(store: SubspaceStore, change: Callable[[Version], Version]) -> None:
    """Rewrite the newest merge and everything after it, so that chain and digests fit again."""
    storage, prev = store.storage, ""
    for seq in range(1, store.state.seq + 1):
        record = json.loads(storage.read(log_key(seq)))
        if record["op"] == "merge" and record["body"]["version"]["number"] == 3:
            record["body"]["version"] = to_plain(change(store.state.versions[3]))
        record["prev_sha256"] = prev
        content = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        storage.write(log_key(seq), content)
        prev = digest(content)


def test_a_changed_record_is_found(store: SubspaceStore) -> None:
    record = store.storage.read(log_key(2))
    store.storage.write(log_key(2), record.replace(b'"actor":"test"', b'"actor":"eve"'))
    assert ["chain is broken" in finding.what for finding in verify(store)] == [True]


def test_a_missing_record_is_found(store: SubspaceStore) -> None:
    store.storage.delete(log_key(3))
    assert ["record 3 is missing" in finding.what for finding in verify(store)] == [True]


@pytest.mark.parametrize("kind", ["basis", "transport", "adapter", "coefficients"])
def test_a_damaged_blob_is_found_by_name(store: SubspaceStore, kind: str) -> None:
    version = store.state.versions[2]
    ref: BlobRef = getattr(version, kind) if kind in ("basis", "transport") else getattr(version.added[0], kind)
    store.storage.write(ref.key, store.storage.read(ref.key)[:-1] + b"\x01")
    assert any(ref.key in finding.where for finding in verify(store))


def test_a_wrong_error_and_a_wrong_drift_are_found(store: SubspaceStore) -> None:
    lie(store, lambda v: replace(v, added=(replace(v.added[0], error_at_birth=0.5),), drift=(0.25, *v.drift[1:])))
    texts = [finding.what for finding in verify(store)]
    assert len(texts) == 2
    assert "error at birth" in texts[0]
    assert "task t1 drifted" in texts[1]


def test_a_basis_that_is_not_orthonormal_is_found(store: SubspaceStore) -> None:
    def stretched(basis: ModuleBasis) -> ModuleBasis:
        return replace(basis, p_NK=basis.p_NK * 1.01)

    bases = {name: stretched(basis) for name, basis in store.basis(3).items()}
    parts = [blobs.pack_basis(name, basis) for name, basis in bases.items()]
    ref = blobs.write_basis(store.storage, 1, list(bases), {}, parts)
    lie(store, lambda v: replace(v, basis=ref))
    assert any("is off by 2.0e-02" in finding.what for finding in verify(store))


def test_a_transport_of_other_bases_is_found(store: SubspaceStore) -> None:
    def rotated(name: str) -> Transport:
        (k_out, k_in), (new_out, new_in) = store.basis(2)[name].ranks, store.basis(3)[name].ranks
        double = torch.float64
        return Transport(torch.eye(new_out, k_out, dtype=double), torch.eye(new_in, k_in, dtype=double))

    ref = blobs.write_transports(store.storage, 1, {name: rotated(name) for name in store.basis(2)})
    lie(store, lambda v: replace(v, transport=ref))
    assert any("does not fit its bases" in finding.what for finding in verify(store))


def test_wrong_ranks_are_found(store: SubspaceStore) -> None:
    lie(store, lambda v: replace(v, rank_max=1))
    assert ["of rank" in finding.what for finding in verify(store)] == [True]


def test_an_empty_state_has_nothing_to_verify() -> None:
    assert reading(fresh_storage()).state == SubspaceState()


def test_each_private_part_is_read_once_however_many_versions_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # With all tasks' private parts read for each version and module, 130 tasks took nine minutes.
    store = opened(rank_max=4)
    for number in range(1, 7):
        merged(store, {f"t{number}": random_adapter(number)})
    tasks = store.state.tasks_at(6).values()
    assert sum(task.private is not None for task in tasks) >= 4
    reads: list[str] = []
    read = blobs.read_private

    def counted(file: TensorFile, module: str) -> ModuleUpdate:
        reads.append(f"{file.ref.key} {module}")
        return read(file, module)

    monkeypatch.setattr(blobs, "read_private", counted)
    assert verify(store) == []
    assert reads
    assert len(reads) == len(set(reads))


@pytest.mark.parametrize("size", [1e-6, 1e-25, 1e-36])
def test_what_a_merge_takes_from_a_small_update_is_told_whatever_its_size(size: float) -> None:
    # The square of 1e-25 is 0 in float32: the log said that nothing was lost, and verify called that damage.
    store = opened(energy_ratio_min=0.8)
    tiny = random_adapter(1)
    modules = {name: replace(update, sigma_R=update.sigma_R * size) for name, update in tiny.modules.items()}
    merged(store, {"tiny": replace(tiny, modules=modules)})
    for number in range(2, 5):
        merged(store, {f"t{number}": random_adapter(number)})
    assert verify(store) == []
    held = store.adapter("tiny", 4)
    lost = sum(
        float((update.delta() / size - tiny.modules[name].delta()).square().sum())
        for name, update in held.modules.items()
    )
    error = (lost / sum(update.energy for update in tiny.modules.values())) ** 0.5
    assert 0.1 < error == pytest.approx(store.state.errors(4)["tiny"], rel=0.01)
