"""The writer as an actor: of several control planes it listens to the one that leads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.errors import NotLeading, NotWritten
from subspace_store.log.version import Identity
from subspace_store.requests import Hold
from subspace_store.store_actor import StoreActor
from tests.builders import settings


def test_a_leader_that_was_overtaken_is_refused_by_every_request_and_by_its_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subspace_store.store_actor.write_as_actor", lambda form: None)  # this is no process of Ray's
    ours = settings(tmp_path)
    made: Any = StoreActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    actor = made(ours.storage, "base", ours.subspace, ours.base_model, Identity("s", "here"), 2)
    with pytest.raises(NotWritten):  # there is no store yet: it was listened to
        actor.do(Hold(reason="why"), 2)
    assert actor.pid(3) == actor.pid(3)
    for ask in (lambda: actor.do(Hold(reason="why"), 2), lambda: actor.pid(2), lambda: actor.open("0" * 64, 2)):
        with pytest.raises(NotLeading, match="control plane number 3 leads"):
            ask()
    with pytest.raises(NotWritten):
        actor.do(Hold(reason="why"), 3)
