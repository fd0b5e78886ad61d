"""A store behind a proxy that loses requests and replies, in front of real S3 servers."""

import pytest

from subspace_store import open_storage
from tests.servers.cut_replies import wrong_answers
from tests.servers.cutting_proxy import LOST, OWN, cutting_proxy
from tests.servers.merges import merge_through, prove
from tests.servers.server import Server

# A date cut in half is a warning of dateutil, then an answer without a size.
pytestmark = [pytest.mark.s3, pytest.mark.filterwarnings("ignore::dateutil.parser.UnknownTimezoneWarning")]

MERGES = 30


def test_cut_connections_lose_and_double_nothing(server: Server, figure: list[str], without_waits: None) -> None:
    place = server.place()
    with cutting_proxy(server.endpoint_url, seed=4) as proxy:
        heard, unavailable, doubts = merge_through(proxy, place, MERGES)
        figure.append(
            f"{len(heard)} merges, {proxy.requests} requests, {proxy.cuts} connections cut "
            f"({proxy.counts[LOST]} after the write), {unavailable} times Unavailable ({doubts} records in doubt, "
            f"{proxy.counts[OWN]} refused as taken by themselves)"
        )
        assert proxy.counts[LOST] > MERGES
    prove(open_storage(place), heard)


def test_a_reply_cut_at_any_byte_is_never_taken_for_another_one(server: Server, without_waits: None) -> None:
    assert list(wrong_answers(server.place(), step=7)) == []
