"""Commands about webhooks: which there are and what they were sent; a test of one."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from configs.errors import Exit
from orchestrator.api.client import Client
from orchestrator.api.requests import PAGE_MAX, Json, ListWebhooks, TryWebhook
from orchestrator.commands.contexts import anywhere
from orchestrator.commands.display import print_rows
from subspace_store.commands.terminal import STATE_DIR, AsJson, StateDir, command_of, console, me, new_app, note, show

webhooks_app = new_app("webhooks", "Who is told of events over HTTP, as the settings say: list, test.")
command = anywhere(command_of(webhooks_app, "interrupted; `onebasis webhooks list` shows what was sent"))
LISTED = 20


@command
def list_(
    team: Annotated[str | None, typer.Option(help="Only webhooks of this team.")] = None,
    limit: Annotated[int, typer.Option(help="Number of deliveries, the newest ones.", min=1, max=PAGE_MAX)] = LISTED,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """List webhooks with their last status, and the newest deliveries."""
    show(Client(state_dir).ask(ListWebhooks(team=team, limit=limit)), listed, as_json)


@command
def test(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name in the settings, or TEAM/NAME for one of a team.")],
    state_dir: StateDir = STATE_DIR,  # noqa: PT028
    as_json: AsJson = False,  # noqa: PT028
) -> None:
    """Send a webhook a message of kind `test`, as every other one is sent, and show what it answered."""
    team, slash, inner = name.partition("/")
    asked = TryWebhook(name=inner if slash else name, team=team if slash else None, by=me())
    answer = Client(state_dir).ask(asked)
    show(answer, tested, as_json)
    if answer["status"] != "taken":
        raise typer.Exit(Exit.UNAVAILABLE)


def listed(answer: Json) -> None:
    """Webhooks, then deliveries."""
    rows = [
        (one["webhook"], one["host"], ", ".join(one["events"]), str(one["waiting"]), _last(one["last"]))
        for one in answer["webhooks"]
    ]
    print_rows(("webhook", "host", "events", "waiting", "last"), rows, "the settings name no webhook that you see")
    if answer["deliveries"]:
        console.print()
        told = [
            (_clock(one["time"]), one["webhook"], one["kind"], one["status"], str(one["tries"]), one["answer"] or "–",
             _clock(one["due_at"]) if one["due_at"] else "–", one["sentence"])
            for one in answer["deliveries"]
        ]  # fmt: skip
        print_rows(("when", "webhook", "kind", "status", "tries", "answer", "again at", "what"), told, "")


def tested(answer: Json) -> None:
    """What came of a test."""
    if answer["status"] == "taken":
        note(f"{answer['webhook']} ({answer['host']}) took it: {answer['answer']}")
    else:
        said = answer["answer"] or "it was not sent yet"
        note(f"{answer['webhook']} ({answer['host']}) did not take it: {said}; it is tried again")


def _last(one: Json | None) -> str:
    return f"{one['kind']} {one['status']}: {one['answer']}" if one else "nothing was sent"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
