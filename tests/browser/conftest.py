"""A service that listens, and a real Chromium that looks at it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from orchestrator.api.requests import CreateToken
from tests.browser.install import CHROMIUM
from tests.orchestrator.site import Site

if TYPE_CHECKING:  # it is there once `make test-web` has installed it
    from playwright.sync_api import Browser, Page

torch.set_num_threads(1)
PICTURES = Path(__file__).resolve().parents[2] / ".web-pictures"
"""Folder of the pictures that a run keeps."""
FIRST = ("red/alpha", "blue/beta", "red/gamma", "blue/delta")
"""Tasks that `main` holds, each in a version of its own."""


def loses(title: str, held: frozenset[str]) -> float:
    """Score of a task in a version: red/alpha loses a little with each task that joins it, red/gamma gains."""
    moves = {"red/alpha": -0.003, "red/gamma": 0.002}
    return 0.9 + moves.get(title, 0.0) * len(held)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A real control plane whose workers are stand-ins, with four versions. The basis has room for two directions, so
    each merge moves the earlier tasks, and they are scored again."""
    small = {"rank_max": 2, "beyond_rank_max": "drop"}
    made = Site(tmp_path, subspace=small, gate={"drift_min": 0.0}, server={"requests_per_second": None})
    try:
        made.plant.cluster.score = loses
        for title in FIRST:
            made.publish(title)
        yield made
    finally:
        made.plant.cluster.hold = lambda order: False
        made.plant.cluster.release()
        made.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. As root it runs without its sandbox: it sees nothing but the page under test."""
    from playwright.sync_api import sync_playwright

    program = shutil.which(CHROMIUM)
    assert program, "make test-web installs it"
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


class Visit:
    """One person's tab, and what went wrong in it."""

    def __init__(self, site: Site, page: Page) -> None:
        self.site = site
        self.page = page
        self.complaints: list[str] = []
        self.origins: set[str] = set()
        page.on(
            "console", lambda told: self.complaints.append(told.text) if told.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda asked: self.origins.add("/".join(asked.url.split("/")[:3])))

    def log_in(self, role: str, team: str | None = None) -> None:
        """With a token of one's own."""
        made = self.site.client.ask(CreateToken(name=f"{role}-of-{team or 'all'}", role=role, team=team))  # type: ignore[arg-type]
        self.page.goto(self.site.url)
        self.page.get_by_label("Token").fill(made["token"])
        self.page.get_by_role("button", name="Log in").click()
        self.page.get_by_role("heading", name="Now", exact=True).wait_for()

    def open(self, name: str) -> None:
        """A page of the menu."""
        self.page.get_by_role("navigation").get_by_role("link", name=name, exact=True).click()
        self.page.get_by_role("heading", name=name, exact=True).wait_for()


Visits = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, site: Site) -> Iterator[Visits]:
    """Opens tabs, each of somebody else."""
    contexts = []

    def begin(**options: Any) -> Visit:
        chosen = {"viewport": {"width": 1300, "height": 900}, "permissions": ["clipboard-read", "clipboard-write"]}
        contexts.append(browser.new_context(**{**chosen, **options}))
        return Visit(site, contexts[-1].new_page())

    yield begin
    for context in contexts:
        context.close()
