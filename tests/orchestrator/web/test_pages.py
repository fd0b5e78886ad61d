"""The web page's files: built from the sources that are there, and sent with the right headers and nothing else."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import httpx
import pytest

from configs.errors import Corrupt
from orchestrator.web.pages import BUILT, INDEX, MANIFEST, SOURCE, digests_of_sources, read_manifest, read_pages
from tests.orchestrator.site import Site

PAGES = read_pages()
LICENCES = "licences.txt"
SCRIPT = next(name for name in PAGES if name.endswith(".js"))


# --- built from these sources ------------------------------------------------------------------------------------


def test_what_is_built_belongs_to_the_sources_that_are_there() -> None:
    assert read_manifest()["sources"] == digests_of_sources(), "the sources have changed: make web"


def test_a_changed_a_new_and_a_missing_source_are_found_and_what_npm_puts_there_is_none(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("node_modules"))
    before = digests_of_sources(copy)
    assert before == read_manifest()["sources"]
    (copy / "node_modules/preact").mkdir(parents=True)
    (copy / "node_modules/preact/index.js").write_text("")
    assert digests_of_sources(copy) == before
    (copy / "main.tsx").write_text((copy / "main.tsx").read_text() + " ")
    (copy / "new.ts").write_text("")
    (copy / "words.ts").unlink()
    after = digests_of_sources(copy)
    assert {name for name, _ in after.items() ^ before.items()} == {"main.tsx", "new.ts", "words.ts"}


def test_a_file_that_is_not_what_was_built_is_sent_to_nobody(tmp_path: Path) -> None:
    copy = tmp_path / "built"
    shutil.copytree(BUILT, copy)
    (copy / SCRIPT).write_text("alert(1)")
    with pytest.raises(Corrupt, match="is not what was built"):
        read_pages(copy)
    for name in (SCRIPT, MANIFEST):
        (copy / name).unlink()
        with pytest.raises(Corrupt, match="is missing"):
            read_pages(copy)


def test_nothing_lies_beside_what_was_built() -> None:
    assert {path.name for path in BUILT.iterdir()} == {*PAGES, MANIFEST}


def test_the_page_is_small_and_asks_nobody_else_for_anything() -> None:
    assert sum(len(file.zipped or file.content) for file in PAGES.values()) < 100_000
    index = PAGES[INDEX].content.decode()
    named = re.findall(r'(?:src|href)="([^"]+)"', index)
    assert len(named) == 3
    assert {name.removeprefix("web/") for name in named} < {*PAGES}
    for file in (file for name, file in PAGES.items() if name != LICENCES):
        found = set(re.findall(rb"https?://[\w.-]+", file.content))
        assert found <= {b"http://www.w3.org"}, found  # names of XML, which are never asked


def test_the_licence_of_what_is_built_in_is_there() -> None:
    built_in = json.loads((SOURCE / "package.json").read_text())["dependencies"]
    licences = PAGES[LICENCES].content.decode()
    assert licences.count("The MIT License") == len(built_in)
    assert all(f"{name}\n\nThe MIT License" in licences for name in built_in)


# --- sent --------------------------------------------------------------------------------------------------------


def ask(site: Site, path: str, **headers: str) -> httpx.Response:
    with httpx.Client(trust_env=False) as client:
        return client.get(f"{site.url}{path}", headers=headers)


def test_the_page_needs_no_token_and_allows_nothing_from_elsewhere(site: Site) -> None:
    answer = ask(site, "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert {rules[kind] for kind in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_page_is_asked_for_again_each_time_and_its_files_are_kept_for_ever(site: Site) -> None:
    index = ask(site, "/")
    assert index.headers["cache-control"] == "no-cache"
    again = ask(site, "/", **{"if-none-match": index.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert ask(site, "/", **{"if-none-match": '"another"'}).status_code == 200
    script = ask(site, f"/web/{SCRIPT}")
    assert script.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["etag"] != index.headers["etag"]


def test_a_browser_gets_gzip_and_who_takes_none_gets_the_same_without(site: Site) -> None:
    with httpx.Client(trust_env=False) as client:
        for accepted, is_zipped in (("gzip, br", True), ("identity", False), ("br;q=1, gzip;q=0", False), ("", False)):
            with client.stream("GET", f"{site.url}/web/{SCRIPT}", headers={"accept-encoding": accepted}) as answer:
                raw = b"".join(answer.iter_raw())
            assert (answer.headers.get("content-encoding") == "gzip") is is_zipped
            assert (gzip.decompress(raw) if is_zipped else raw) == (BUILT / SCRIPT).read_bytes()
            assert answer.headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize(
    "path",
    [
        "/web/../pages.py", "/web/%2e%2e/pages.py", "/web/..%2fpages.py", "/web//etc/passwd", "/web/%2fetc%2fpasswd",
        "/web/", "/web/manifest.json", "/web/nothing.js", "/web/%00", "/web/source/main.tsx",
    ],
)  # fmt: skip
def test_no_path_leads_to_another_file(site: Site, path: str) -> None:
    answer = ask(site, path)
    assert answer.status_code in (401, 404)  # 401: it left the page's folder, where a token is needed
    assert answer.json()["what"]
    assert b"import" not in answer.content


def test_beside_the_page_nothing_is_open(site: Site) -> None:
    for path in ("/status", "/web", "/webb/x", "/index.html", "/openapi.json"):
        assert ask(site, path).status_code == 401, path
    with httpx.Client(trust_env=False) as client:
        assert client.post(f"{site.url}/").status_code == 405
        assert client.head(f"{site.url}/").status_code == 200
