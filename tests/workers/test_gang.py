"""A gang: all ranks get the order, one outcome comes back, and no rank that was left behind goes on working."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from configs.errors import Corrupt, InvalidInput, Unavailable
from configs.settings import WorkerSettings
from tests.builders import LAYOUT, task_spec, trained
from workers import gang as gang_module
from workers.gang import Gang, NoPlace, no_place
from workers.orders import Evaluate, Evaluated, Failed, Order, Progress, Rank, RankLost, Train, Trained
from workers.process_monitor import ProcessEnd

TRAIN = Train(
    token="token",
    task_id="task",
    attempt=1,
    spec=task_spec(),
    train_key="data/train",
    eval_key="data/eval",
    staging_key="staging/task/1-token/adapter.safetensors",
)


@dataclass
class StandInRank:
    """One process: remembers what it was asked, answers an order when the test says so."""

    sha256: str = LAYOUT.sha256
    dead: bool = False
    silent: bool = False
    loads: Future[None] | None = None
    """Done when the base model is there; None: it is."""
    order: Future[Any] = field(default_factory=Future)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    calls: list[Future[Any]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def die(self) -> None:
        self.dead = True
        for call in self.calls:
            if not call.done():
                call.set_exception(RankLost("its process died"))


class StandInRanks:
    """Implements workers.gang.Ranks without processes. `make` says what the ranks of each generation are like."""

    def __init__(self, size: int = 2) -> None:
        self.ends: dict[int, ProcessEnd] = {}
        """Rank to how its process ended; else nobody knows."""
        self.size = size
        self.generations: list[list[StandInRank]] = []
        self.room = True
        self.left = 0
        """How often places were given up."""
        self.make: Callable[[int, int], StandInRank] = lambda generation, index: StandInRank()

    @property
    def now(self) -> list[StandInRank]:
        return self.generations[-1]

    def start(self, waits: Callable[[str], None]) -> None:
        if not self.room:
            waits("no place for 2 ranks")
            time.sleep(0.001)
            raise NoPlace("no place for 2 ranks")
        assert all(rank.dead for ranks in self.generations for rank in ranks), "two generations at once"
        self.generations.append([self.make(len(self.generations), index) for index in range(self.size)])

    def end(self, leave: bool) -> None:
        self.left += leave
        for rank in self.now if self.generations else ():
            rank.die()

    def end_of(self, index: int) -> ProcessEnd | None:
        return self.ends.get(index)

    def warm(self, index: int) -> Future[Any]:
        return self._call(index, "warm")

    def meeting_place(self, index: int) -> Future[Any]:
        return self._call(index, "meeting_place")

    def run(self, index: int, order: Order, rank: Rank) -> Future[Any]:
        return self._call(index, "run", order, rank)

    def progress(self, index: int) -> Future[Any]:
        return self._call(index, "progress")

    def pid(self, index: int) -> Future[Any]:
        return self._call(index, "pid")

    def cancel(self, index: int, token: str) -> Future[Any]:
        return self._call(index, "cancel", token)

    def preempt(self, index: int, token: str) -> Future[Any]:
        return self._call(index, "preempt", token)

    def _call(self, index: int, method: str, *args: Any) -> Future[Any]:
        rank = self.now[index]
        rank.asked.append((method, *args))
        call = rank.order if method == "run" else Future()
        if rank.dead:
            call = Future()
            call.set_exception(RankLost("its process died"))
        elif method == "warm" and rank.loads is not None:
            rank.loads.add_done_callback(lambda _: call.set_result(self._answer(rank, index, method)))
        elif method != "run" and not rank.silent:
            call.set_result(self._answer(rank, index, method))
        rank.calls.append(call)
        return call

    def landed(self, calls: Sequence[Future[Any]], timeout_seconds: float) -> list[Future[Any]]:
        done = wait(calls, timeout_seconds, FIRST_COMPLETED).done
        return [call for call in calls if call in done]

    def result(self, call: Future[Any]) -> Any:
        return call.result(0)

    def _answer(self, rank: StandInRank, index: int, method: str) -> Any:
        if method in ("cancel", "preempt"):
            rank.stopped.set()
        return {
            "meeting_place": (f"10.0.0.{index + 1}", 5000 + index),
            "warm": replace(LAYOUT, sha256=rank.sha256),
            "progress": Progress(
                token="token", phase="training", step=3, steps=10, loss=0.5, log_lines=(f"a line of rank {index}",)
            ),
            "pid": 100 * len(self.generations) + index,
        }.get(method)


@pytest.fixture(autouse=True)
def _frequent_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gang_module, "WATCH_SECONDS", 0.01)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which a rank hangs; where all answer, nobody waits for its end."""
    monkeypatch.setattr(gang_module, "GRACE_SECONDS", 0.5)


@pytest.fixture
def ranks() -> StandInRanks:
    return StandInRanks()


@pytest.fixture
def gang(ranks: StandInRanks) -> Iterator[Gang]:
    gang = Gang(ranks, lease_seconds=5)
    gang.warm()
    yield gang
    ranks.end(leave=True)


class Run:
    """An order under way in a thread."""

    def __init__(self, gang: Gang, ranks: StandInRanks, order: Any = TRAIN) -> None:
        self._outcome: Future[Any] = Future()
        threading.Thread(target=self._do, args=(gang, order), daemon=True).start()
        while not all(any(asked[0] == "run" for asked in rank.asked) for rank in ranks.now):
            assert not self._outcome.done(), self._outcome.result()
            wait([self._outcome], 0.001)

    def _do(self, gang: Gang, order: Any) -> None:
        try:
            self._outcome.set_result(gang.run(order))
        except Exception as error:
            self._outcome.set_exception(error)

    @property
    def outcome(self) -> Any:
        return self._outcome.result(10)


def orders(rank: StandInRank) -> list[tuple[Any, ...]]:
    return [asked for asked in rank.asked if asked[0] == "run"]


def test_every_rank_gets_the_order_with_its_own_rank_and_the_place_of_rank_0(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    for rank in ranks.now:
        rank.order.set_result(trained("token", steps=7))
    assert isinstance(run.outcome, Trained)
    assert [orders(rank) for rank in ranks.now] == [
        [("run", TRAIN, Rank(index=0, size=2, master_address="10.0.0.1", master_port=5000))],
        [("run", TRAIN, Rank(index=1, size=2, master_address="10.0.0.1", master_port=5000))],
    ]


def test_a_warm_gang_says_so_at_once_also_while_an_order_is_running(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    assert gang.warm() == LAYOUT
    for rank in ranks.now:
        rank.order.set_result(trained("token"))
    assert isinstance(run.outcome, Trained)


def test_the_outcome_is_rank_0s_and_its_log_begins_with_where_the_ranks_are(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    ranks.now[1].order.set_result(trained("token", local_score=0.1))
    ranks.now[0].order.set_result(trained("token", local_score=0.8, log_lines=("the last line",)))
    assert run.outcome.local_score == 0.8
    assert run.outcome.log_lines == ("2 ranks: 1 on 10.0.0.1, 1 on 10.0.0.2", "the last line")
    assert len(ranks.generations) == 1  # warm between tasks


def test_a_score_is_rank_0s_too(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks, Evaluate(token="token", task_id="task", version=3, spec=task_spec(), eval_key="data/eval"))
    ranks.now[1].order.set_result(Evaluated(token="token", score=0.0, count=0, seconds=0.0))
    ranks.now[0].order.set_result(Evaluated(token="token", score=0.75, count=100, seconds=1.0))
    assert run.outcome == Evaluated(token="token", score=0.75, count=100, seconds=1.0)


@pytest.mark.usefixtures("short_grace")
def test_a_lost_rank_ends_all_and_the_next_order_finds_new_ones(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    old = ranks.now
    old[1].die()
    assert (run.outcome.fault, run.outcome.message) == (
        "lost",
        "rank 1 of 2 on 10.0.0.2 was lost: its process died",
    )
    assert all(rank.dead for rank in old)  # rank 0 waited in a collective for ever
    gang.warm()
    assert ranks.left == 0  # on the machines that are there
    assert gang.pids() == [("10.0.0.1", 200), ("10.0.0.2", 201)]


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize(
    ("end", "fault", "told"),
    [
        (ProcessEnd(pid=7, exit_code=3), "died", "(pid 7) died: it ended itself with exit code 3"),
        (
            ProcessEnd(pid=7, signal=9, out_of_memory="the kernel ended it", is_largest=False),
            "lost",
            "was lost: memory ran out: the kernel ended it; another worker of the machine had more",
        ),
    ],
)
def test_a_rank_whose_process_ended_is_told_with_how_it_ended(
    gang: Gang, ranks: StandInRanks, end: ProcessEnd, fault: str, told: str
) -> None:
    run = Run(gang, ranks)
    ranks.ends = {1: end}
    ranks.now[1].die()
    assert (run.outcome.fault, run.outcome.message) == (fault, f"rank 1 of 2 on 10.0.0.2 {told}")


def test_what_rank_0_says_of_the_broken_connection_is_not_taken_for_a_bug(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    ranks.now[0].order.set_result(Failed(token="token", fault="bug", message="RuntimeError: connection closed by peer"))
    ranks.now[1].die()
    assert run.outcome.fault == "lost"


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_is_silent_when_another_failed_counts_as_lost(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    old = ranks.now
    old[1].silent = True  # its machine was cut off: no process died, as far as anybody can see
    old[0].order.set_result(Failed(token="token", fault="bug", message="RuntimeError: timed out"))
    assert run.outcome.fault == "lost"
    assert "rank 1 of 2" in run.outcome.message
    assert all(rank.dead for rank in old)


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_is_silent_for_a_lease_is_lost_although_nothing_failed(ranks: StandInRanks) -> None:
    gang = Gang(ranks, lease_seconds=0.1)
    gang.warm()
    run = Run(gang, ranks)
    ranks.now[1].silent = True
    assert run.outcome.message == "rank 1 of 2 on 10.0.0.2 was lost: no answer for 0 s"


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_does_not_answer_is_told_of_long_before_it_is_lost(
    gang: Gang, ranks: StandInRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_module, "NOTICE_SECONDS", 0.05)
    run = Run(gang, ranks)
    assert gang.progress().trouble is None
    ranks.now[1].silent = True
    until = time.monotonic() + 5
    while (trouble := gang.progress().trouble) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert isinstance(trouble, RankLost)
    assert trouble.what == "rank 1 on 10.0.0.2 of 2 does not answer; it is lost after 5 s"
    ranks.now[1].silent = False
    for call in ranks.now[1].calls:
        if not call.done() and call is not ranks.now[1].order:
            call.set_result(101)
    while gang.progress().trouble is not None:
        assert time.monotonic() < until
        time.sleep(0.01)
    for rank in ranks.now:
        rank.order.set_result(trained(TRAIN))
    assert isinstance(run.outcome, Trained)


@pytest.mark.parametrize("fault", ["input", "preempted", "cancelled"])
def test_what_a_rank_says_of_the_task_outweighs_what_the_others_make_of_its_end(
    gang: Gang, ranks: StandInRanks, fault: str
) -> None:
    run = Run(gang, ranks)
    closed = "RuntimeError: connection closed by peer"
    ranks.now[0].order.set_result(Failed(token="token", fault="bug", message=closed, log_lines=("a line of rank 0",)))
    ranks.now[1].order.set_result(Failed(token="token", fault=fault, message="row 17 has no text"))
    assert (run.outcome.fault, run.outcome.message) == (fault, "row 17 has no text")
    assert run.outcome.log_lines == ("2 ranks: 1 on 10.0.0.1, 1 on 10.0.0.2", "a line of rank 0")
    assert len(ranks.generations) == 1  # all have answered: nobody is stuck, nobody is ended


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_hangs_after_anothers_bug_is_ended(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    old = ranks.now
    old[1].order.set_result(
        Failed(token="token", fault="bug", message="ZeroDivisionError: of our making", detail="traceback")
    )
    assert (run.outcome.fault, run.outcome.detail) == ("bug", "traceback")
    assert old[0].dead


def test_of_two_bugs_the_first_is_told_for_it_caused_the_other(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    ranks.now[1].order.set_result(Failed(token="token", fault="bug", message="ZeroDivisionError: of our making"))
    seen = len(ranks.now[0].asked)
    while len(ranks.now[0].asked) < seen + 3:  # by then the first has been taken note of
        time.sleep(0.001)
    ranks.now[0].order.set_result(Failed(token="token", fault="bug", message="RuntimeError: connection closed by peer"))
    assert run.outcome.message == "ZeroDivisionError: of our making"


@pytest.mark.usefixtures("short_grace")
def test_a_rank_that_outstays_rank_0s_success_is_ended_and_the_success_stands(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    old = ranks.now
    old[0].order.set_result(trained("token"))
    assert isinstance(run.outcome, Trained)
    assert old[1].dead


@pytest.mark.usefixtures("short_grace")
def test_the_same_token_is_answered_again_also_by_the_new_ranks(gang: Gang, ranks: StandInRanks) -> None:
    run, again = Run(gang, ranks), Run(gang, ranks)
    ranks.now[0].die()
    assert run.outcome == again.outcome
    gang.warm()
    assert gang.run(TRAIN) == run.outcome
    assert orders(ranks.now[0]) == []


def test_a_storage_that_was_away_is_raised_and_the_order_may_be_given_again(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    for rank in ranks.now:
        rank.order.set_exception(Unavailable("the storage is away"))
    with pytest.raises(Unavailable, match="the storage is away"):
        _ = run.outcome
    for rank in ranks.now:
        rank.order = Future()
        rank.order.set_result(trained("token"))
    assert isinstance(gang.run(TRAIN), Trained)
    assert len(orders(ranks.now[0])) == 2


def test_a_rank_that_reads_a_damaged_store_says_so_for_the_gang_whatever_becomes_of_the_others(
    gang: Gang, ranks: StandInRanks
) -> None:
    run = Run(gang, ranks)
    ranks.now[1].order.set_exception(Corrupt("the object that the log names is gone", "blobs/1"))
    ranks.now[0].order.set_exception(RankLost("ended with the others"))
    with pytest.raises(Corrupt, match="blobs/1"):
        _ = run.outcome


def test_an_idle_gang_that_lost_a_rank_says_so_and_is_made_whole_without_a_lost_order(
    gang: Gang, ranks: StandInRanks
) -> None:
    ranks.now[1].die()
    with pytest.raises(Unavailable, match=r"rank 1 of 2 on 10\.0\.0\.2 was lost"):
        gang.progress()
    ranks.make = lambda generation, index: _done(trained("token"))
    assert isinstance(gang.run(TRAIN), Trained)
    assert [rank.dead for rank in ranks.generations[0]] == [True, True]


def test_progress_is_rank_0s_with_its_lines(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    progress = gang.progress()
    assert (progress.token, progress.step, progress.loss) == ("token", 3, 0.5)
    assert progress.log_lines == ("2 ranks: 1 on 10.0.0.1, 1 on 10.0.0.2", "a line of rank 0")
    for rank in ranks.now:
        rank.order.set_result(trained("token"))
    assert run.outcome.log_lines == ()


@pytest.mark.parametrize("stop", ["cancel", "preempt"])
def test_all_ranks_are_told_to_stop(gang: Gang, ranks: StandInRanks, stop: str) -> None:
    assert getattr(gang, stop)("token") is False  # never given
    run = Run(gang, ranks)
    assert getattr(gang, stop)("token") is True
    for rank in ranks.now:
        assert rank.stopped.wait(5)
        assert (stop, "token") in rank.asked
        rank.order.set_result(Failed(token="token", fault="cancelled", message="cancelled while it was running"))
    assert run.outcome.fault == "cancelled"
    assert getattr(gang, stop)("token") is False


def test_an_order_that_waits_behind_another_can_be_stopped_too(gang: Gang, ranks: StandInRanks) -> None:
    first = Run(gang, ranks)
    second = Run(gang, ranks, replace(TRAIN, token="second"))
    while not gang.cancel("second"):
        time.sleep(0.001)
    assert not any(rank.stopped.is_set() for rank in ranks.now)
    now = ranks.now
    for rank in now:
        rank.order, done = Future(), rank.order
        done.set_result(trained("token"))
    assert isinstance(first.outcome, Trained)
    for rank in now:
        assert rank.stopped.wait(5)
        assert ("cancel", "second") in rank.asked
        rank.order.set_result(Failed(token="second", fault="cancelled", message="cancelled before it began"))
    assert second.outcome.fault == "cancelled"


def test_a_rank_that_dies_while_the_base_model_is_loaded_is_told_with_its_end_and_charged(ranks: StandInRanks) -> None:
    ranks.make = lambda generation, index: StandInRank(loads=Future())
    ranks.ends[1] = ProcessEnd(pid=7, signal=9)
    gang = Gang(ranks, lease_seconds=5)
    with ThreadPoolExecutor(1) as thread:
        order = thread.submit(gang.run, TRAIN)
        while not (ranks.generations and all(("warm",) in rank.asked for rank in ranks.now)):
            time.sleep(0.001)
        first = ranks.now
        first[1].die()
        outcome = order.result(10)
    assert (outcome.token, outcome.fault) == ("token", "died")
    assert outcome.message.startswith("while the base model was loaded, rank 1 of 2 on 10.0.0.2 (pid 7) died: ")
    assert "SIGKILL" in outcome.message
    assert all(rank.dead for rank in first)  # the next order gets new ones
    # Its machine is gone with it: that is nobody's fault, and the order is given again.
    ranks.ends = {}
    with ThreadPoolExecutor(1) as thread:
        order = thread.submit(gang.run, replace(TRAIN, token="again"))
        while not (len(ranks.generations) > 1 and all(("warm",) in rank.asked for rank in ranks.now)):
            time.sleep(0.001)
        ranks.now[1].die()
        with pytest.raises(RankLost, match="was lost"):
            order.result(10)


def test_an_order_waits_for_places_says_why_and_begins_by_itself(ranks: StandInRanks) -> None:
    gang = Gang(ranks, lease_seconds=5)
    ranks.room, ranks.make = False, lambda generation, index: _done(trained("token"))
    with ThreadPoolExecutor(1) as thread:
        order = thread.submit(gang.run, TRAIN)
        while ranks.left < 3:  # places are asked for anew: those that Ray still believes in may be gone
            time.sleep(0.001)
        progress = gang.progress()
        assert (progress.token, progress.phase) == ("token", "waiting")
        assert progress.log_lines == ("waits: no place for 2 ranks",)  # once
        ranks.room = True
        assert isinstance(order.result(10), Trained)


def test_places_on_a_machine_that_is_gone_are_given_up_at_once(ranks: StandInRanks) -> None:
    gang = Gang(ranks, lease_seconds=5)
    ranks.make = lambda generation, index: StandInRank(dead=True) if generation == 0 else _done(trained("token"))
    assert isinstance(gang.run(TRAIN), Trained)
    assert (len(ranks.generations), ranks.left) == (2, 1)


def test_who_asks_for_a_warm_gang_is_told_that_there_is_no_place(ranks: StandInRanks) -> None:
    gang = Gang(ranks, lease_seconds=5)
    ranks.room = False
    with pytest.raises(Unavailable, match="no place for 2 ranks"):
        gang.warm()
    with pytest.raises(Unavailable, match="being formed"):
        gang.progress()


@pytest.mark.parametrize(("stop", "fault"), [("cancel", "cancelled"), ("preempt", "preempted")])
def test_an_order_that_waits_for_places_can_be_stopped(ranks: StandInRanks, stop: str, fault: str) -> None:
    gang = Gang(ranks, lease_seconds=5)
    ranks.room = False
    with ThreadPoolExecutor(1) as thread:
        order = thread.submit(gang.run, TRAIN)
        while not getattr(gang, stop)("token"):
            time.sleep(0.001)
        outcome = order.result(10)
    assert isinstance(outcome, Failed)
    assert (outcome.fault, outcome.message) == (fault, f"{fault} while it waited")
    assert outcome.worker_seconds == 0.0  # it had no place yet


def test_no_rank_begins_before_all_have_loaded_the_base_model(ranks: StandInRanks) -> None:
    """Else those that have it already would wait for the others in the process group, and not for long."""
    gang = Gang(ranks, lease_seconds=5)
    ranks.make = lambda generation, index: StandInRank(loads=Future())
    with ThreadPoolExecutor(1) as thread:
        order = thread.submit(gang.run, TRAIN)
        while not (ranks.generations and all(("warm",) in rank.asked for rank in ranks.now)):
            time.sleep(0.001)
        ranks.now[0].loads.set_result(None)
        seen = len(ranks.now[1].asked)
        while len(ranks.now[1].asked) < seen + 3:  # it is asked whether it is there, and nothing else
            time.sleep(0.001)
        assert [orders(rank) for rank in ranks.now] == [[], []]
        ranks.now[1].loads.set_result(None)
        for rank in ranks.now:
            rank.order.set_result(trained("token"))
        assert isinstance(order.result(10), Trained)


def test_a_rank_that_does_not_reach_the_others_is_lost_with_what_to_check(gang: Gang, ranks: StandInRanks) -> None:
    run = Run(gang, ranks)
    old = ranks.now
    alone = RankLost("it could not join the others within 60 s", "10.0.0.1:5000", "does a firewall let them?")
    for rank in old:
        rank.order.set_exception(alone)
    assert (run.outcome.fault, run.outcome.message) == (
        "lost",
        "10.0.0.1:5000: rank 0 of 2 on 10.0.0.1 was lost: it could not join the others within 60 s\n"
        "  → does a firewall let them?",
    )
    assert all(rank.dead for rank in old)


def test_ranks_that_loaded_different_weights_are_refused(ranks: StandInRanks) -> None:
    ranks.make = lambda generation, index: StandInRank(sha256=str(index))
    with pytest.raises(InvalidInput, match=r"10\.0\.0\.1, 10\.0\.0\.2: the ranks loaded different weights"):
        Gang(ranks, lease_seconds=5).warm()


@pytest.mark.parametrize(
    ("cpus", "gpus", "why"),
    [
        (2, 0, "the 2 machines that are up (10.0.0.3 went away) have room for 3"),  # 2 beside 1, for 4 ranks
        (1, 0, "the 2 machines that are up (10.0.0.3 went away) have room for 6, but something else has taken it"),
        (1, 1, "the 2 machines that are up (10.0.0.3 went away) have room for 1"),
    ],
)
def test_who_finds_no_place_is_told_what_is_missing(cpus: float, gpus: float, why: str) -> None:
    def machine(number: int, alive: bool = True, **resources: float) -> dict[str, Any]:
        where = f"10.0.0.{number}"
        return {"Alive": alive, "NodeID": f"id-{number}", "NodeManagerAddress": where, "Resources": resources}

    # The first was away for a while, and is back.
    nodes = [machine(1, alive=False), machine(1, CPU=4.0), machine(2, CPU=2.0, GPU=1.0), machine(3, alive=False)]
    workers = WorkerSettings(ranks=4, cpus=cpus, gpus=gpus)
    assert no_place(workers, nodes) == f"no place for 4 ranks with {cpus} CPUs and {gpus} GPUs each: {why}"


def test_a_drained_machine_is_no_room_that_something_else_has_taken() -> None:
    nodes = [
        {"Alive": True, "NodeID": f"id-{n}", "NodeManagerAddress": f"10.0.0.{n}", "Resources": {"CPU": 4.0}}
        for n in (1, 2)
    ]
    assert no_place(WorkerSettings(ranks=4, cpus=2), nodes, avoid=("id-2",)) == (
        "no place for 4 ranks with 2 CPUs and 0 GPUs each: the 1 machines that are up have room for 2; drained, and "
        "not counted: 10.0.0.2"
    )


def _done(outcome: Any) -> StandInRank:
    rank = StandInRank()
    rank.order.set_result(outcome)
    return rank
