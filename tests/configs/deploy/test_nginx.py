"""The example for nginx: a real parser of its language takes it, and what it lets through is what the product sends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import crossplane
import pytest
import yaml

from configs.limits import BYTES_MAX
from configs.settings import ServingSettings
from orchestrator.api.feed import HEARTBEAT_SECONDS
from orchestrator.tasks.uploads import PIECE_BYTES_MAX
from tests.configs.deploy.files import DEPLOY, ROOT, settings_from

CONF = DEPLOY / "nginx/onebasis.conf"
Block = list[dict[str, Any]]


def parsed(text: str, folder: Path) -> Block:
    """The directives of a file that stands in `http { … }`. Raises what is wrong with them."""
    (folder / "onebasis.conf").write_text(text)
    whole = folder / "nginx.conf"
    whole.write_text("events {}\nhttp { include onebasis.conf; }\n")
    found = crossplane.parse(str(whole), strict=True)
    if found["errors"]:
        raise ValueError(found["errors"][0]["error"])
    directives: Block = found["config"][1]["parsed"]
    return directives


def one(block: Block, name: str) -> list[str]:
    (found,) = [directive["args"] for directive in block if directive["directive"] == name]
    return list(found)


def inside(block: Block, name: str) -> list[Block]:
    return [directive["block"] for directive in block if directive["directive"] == name]


def size(text: str) -> int:
    return int(text.removesuffix("m")) * 2**20


@pytest.fixture
def servers(tmp_path: Path) -> list[Block]:
    found = parsed(CONF.read_text(), tmp_path)
    return inside(found, "server")


def test_a_misspelt_directive_would_be_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="proxy_read_timout"):
        parsed(CONF.read_text().replace("proxy_read_timeout", "proxy_read_timout", 1), tmp_path)


def test_the_settings_that_it_names_are_read_by_the_service(servers: list[Block], tmp_path: Path) -> None:
    told = re.findall(r"^#   ((?:production|server): .*)$", CONF.read_text(), flags=re.MULTILINE)
    given = yaml.safe_load((ROOT / "configs/cluster.yaml").read_text()) | yaml.safe_load("\n".join(told))
    settings = settings_from(yaml.safe_dump(given), tmp_path)
    assert settings.production
    assert settings.server.behind_proxy
    api, answers = inside(parsed(CONF.read_text(), tmp_path), "upstream")
    assert one(api, "server") == [f"{settings.server.host}:{settings.server.port}"]
    assert one(answers, "server") == [f"127.0.0.1:{ServingSettings().port}"]


def test_what_is_not_encrypted_is_sent_to_where_it_is(servers: list[Block]) -> None:
    plain, *encrypted = servers
    assert one(plain, "return") == ["301", "https://$host$request_uri"]
    assert len(encrypted) == 2
    for server in encrypted:
        assert one(server, "listen") == ["443", "ssl"]
        assert one(server, "ssl_protocols") == ["TLSv1.2", "TLSv1.3"]
        assert set(one(server, "server_name")) <= set(one(plain, "server_name"))


def test_pieces_documents_and_streams_pass(servers: list[Block]) -> None:
    _, api, answers = servers
    assert size(*one(api, "client_max_body_size")) > max(PIECE_BYTES_MAX, BYTES_MAX)
    assert size(*one(answers, "client_max_body_size")) > BYTES_MAX
    (location,) = inside(api, "location")
    (minutes,) = one(location, "proxy_read_timeout")
    assert 60 * int(minutes.removesuffix("m")) > 100 * HEARTBEAT_SECONDS
    assert "proxy_buffering" not in [directive["directive"] for directive in location]  # the streams say so themselves
    assert 'x-accel-buffering": "no"' in (ROOT / "orchestrator/api/server.py").read_text()
    assert one(inside(answers, "location")[0], "proxy_buffering") == ["off"]


def test_a_request_is_sent_once_on_a_connection_of_its_own(servers: list[Block]) -> None:
    for server in servers[1:]:
        (location,) = inside(server, "location")
        assert one(location, "proxy_next_upstream") == ["off"]
        headers = [d["args"] for d in location if d["directive"] == "proxy_set_header"]
        assert ["Connection", ""] in headers
        assert ["Host", "$http_host"] in headers
