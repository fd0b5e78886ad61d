"""A store behind a proxy that loses requests and replies: every merge is done once. On real servers: tests/servers."""

import pytest

from configs.settings import StorageSettings
from subspace_store import open_storage
from tests.moto_server import CREDENTIALS, moto_server
from tests.servers.cutting_proxy import LOST, cutting_proxy, no_waits
from tests.servers.merges import merge_through, prove

MERGES = 4


# A date cut in half is a warning of dateutil, then an answer without a size.
@pytest.mark.filterwarnings("ignore::dateutil.parser.UnknownTimezoneWarning")
def test_cut_connections_lose_and_double_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    no_waits(monkeypatch)
    with moto_server("versions") as server, cutting_proxy(server, seed=3) as proxy:
        place = StorageSettings(url="s3://versions/x", endpoint_url=server)
        heard, _, _ = merge_through(proxy, place, MERGES)
        assert proxy.counts[LOST] >= MERGES
        prove(open_storage(place), heard)
