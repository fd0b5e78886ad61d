"""A store behind a proxy that loses requests and replies, in front of real S3 servers."""

import pytest

from subspace_store import open_storage
from tests.servers.cutting_proxy import LOST, cutting_proxy
from tests.servers.merges import merge_all, prove
from tests.servers.server import Server

pytestmark = pytest.mark.s3

MERGES = 30


def test_cut_connections_lose_and_double_nothing(server: Server, figure: list[str], without_waits: None) -> None:
    place = server.place()
    with cutting_proxy(server.endpoint_url, seed=4) as proxy:
        heard, unknown = merge_all(place.model_copy(update={"endpoint_url": proxy.endpoint_url}), MERGES)
        figure.append(
            f"{MERGES} merges, {proxy.counts.total()} requests, {proxy.cuts} connections cut "
            f"({proxy.counts[LOST]} after the write), {unknown} outcomes unknown"
        )
        assert proxy.counts[LOST] > MERGES
    prove(open_storage(place), heard)
