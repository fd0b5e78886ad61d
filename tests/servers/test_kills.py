"""Writers that are killed or stopped in the middle of merges, on a folder and on real S3 servers."""

import random
import signal
import time

import pytest

from configs.errors import Conflict
from configs.settings import StorageSettings
from subspace_store import Storage, open_storage
from tests.servers.merger import Opened, Stopped, Unknown, Writer
from tests.servers.merges import log_digests, op_key, prove, records, seconds_per_merge
from tests.servers.ministack import Ministack
from tests.servers.server import Server

KILLS = 20
STOPS = 5
SERVER_KILLS = 5


def elsewhere(place: StorageSettings) -> StorageSettings:
    """Another empty place on the same storage."""
    return place.model_copy(update={"url": f"{place.url}-clock"})


def unnamed_blobs(storage: Storage, writer: Writer) -> set[str]:
    """Blobs that the writer wrote and no record names: it was killed between the two."""
    epochs = [answer.epoch for answer in writer.answers if isinstance(answer, Opened)]
    written = {key for epoch in epochs for key in storage.keys(f"blobs/{epoch:010d}/")}
    log = b"".join(storage.read(key) for key in log_digests(storage)).decode()
    return {key for key in written if key not in log}


def test_a_writer_killed_at_any_moment_loses_and_doubles_nothing(place: StorageSettings, figure: list[str]) -> None:
    chance, seconds = random.Random(1), seconds_per_merge(elsewhere(place))
    storage = open_storage(place)
    heard: dict[int, int] = {}
    unheard = halfway = 0
    for life in range(KILLS):
        # The last acknowledged merge is asked for again: it must answer with the same version.
        writer = Writer(place, f"life {life}", first=max(0, len(heard) - 1))
        if life % 5:  # else it dies while it opens
            writer.wait_for(merges=chance.randrange(1, 6))
        time.sleep(chance.uniform(0, 2 * seconds))
        writer.kill()
        for number, version in writer.merged.items():
            assert heard.setdefault(number, version) == version
        done = [record.op_key for record in records(storage) if record.op == "merge"]
        assert len(done) - len(heard) in (0, 1)
        unheard += len(done) > len(heard)
        halfway += bool(unnamed_blobs(storage, writer))
    last = Writer(place, "last", first=max(0, len(heard) - 1), last=len(heard) + 2)
    assert last.end() == 0
    assert {**heard, **last.merged} == {**last.merged, **heard}  # the same answers to the same requests
    heard |= last.merged
    prove(storage, heard)
    figure.append(
        f"{KILLS} kills -9, {len(heard)} merges of {seconds * 1000:.0f} ms; {halfway} between blobs and record, "
        f"{unheard} between record and answer"
    )
    assert halfway + unheard > 0


def test_a_writer_that_was_stopped_while_another_took_over_changes_nothing(
    place: StorageSettings, figure: list[str]
) -> None:
    chance, seconds = random.Random(2), seconds_per_merge(elsewhere(place))
    storage = open_storage(place)
    heard: dict[int, int] = {}
    late = 0
    for round_ in range(STOPS):
        sleeper = Writer(place, f"sleeper {round_}", first=len(heard))
        sleeper.wait_for(merges=chance.randrange(1, 4))
        time.sleep(chance.uniform(0, 2 * seconds))
        sleeper.signal(signal.SIGSTOP)
        heard |= (in_time := sleeper.merged)

        successor = Writer(place, f"successor {round_}", first=len(heard), last=len(heard) + 3)
        assert successor.end() == 0
        before = log_digests(storage)
        sleeper.signal(signal.SIGCONT)
        assert sleeper.end() == Conflict.exit_code

        assert log_digests(storage) == before
        assert isinstance(sleeper.answers[-1], Stopped)
        assert sleeper.answers[-1].kind == "conflict"
        assert "opened this subspace with epoch" in sleeper.answers[-1].what
        epochs = [record.epoch for record in records(storage)]
        assert epochs == sorted(epochs)
        assert successor.answers[0] == Opened(epochs[-1])
        # It may wake up with the answer to a merge that was committed before it was fenced, never to a later one.
        by_sleeper = {record.op_key for record in records(storage) if record.writer == f"sleeper {round_}"}
        assert {op_key(number) for number in sleeper.merged} <= by_sleeper
        late += len(sleeper.merged) > len(in_time)
        for number, version in {**sleeper.merged, **successor.merged}.items():
            assert heard.setdefault(number, version) == version
    prove(storage, heard)
    figure.append(f"{STOPS} writers stopped and fenced, {len(heard)} merges; {late} woke up to a merge done before")


@pytest.mark.s3
def test_a_server_killed_and_started_again_under_a_writer_loses_nothing(
    own_ministack: tuple[Server, Ministack], figure: list[str]
) -> None:
    chance = random.Random(3)
    server, process = own_ministack
    place = server.place()
    writer = Writer(place, "writer", first=0)
    for _ in range(SERVER_KILLS):
        writer.wait_for(merges=len(writer.merged) + chance.randrange(1, 4))
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        time.sleep(chance.uniform(0, 1.5))
        process.start()
    writer.wait_for(merges=len(writer.merged) + 3)
    writer.kill()
    # The same writer all the time: one epoch, and every merge that was in doubt was finished by it.
    assert {record.epoch for record in records(open_storage(place))} == {1}
    prove(open_storage(place), writer.merged)
    unknown = [answer for answer in writer.answers if isinstance(answer, Unknown)]
    figure.append(
        f"{SERVER_KILLS} kills -9 of the server, {len(writer.merged)} merges, {len(unknown)} outcomes unknown"
    )
