"""Commands about who asks: tokens, the audit log, logging in to a service, contexts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from configs.errors import Corrupt, InvalidInput, OnebasisError
from configs.settings import LOOPBACK
from orchestrator.api.access import Role
from orchestrator.api.client import Client, Remote
from orchestrator.api.requests import (
    PAGE_MAX,
    CreateToken,
    Json,
    ListTokens,
    ReadAudit,
    RevokeToken,
    RotateToken,
    VerifyAudit,
    WhoAmI,
)
from orchestrator.commands.contexts import (
    LOCAL,
    Contexts,
    anywhere,
    asking,
    keep_contexts,
    read_contexts,
)
from orchestrator.commands.display import print_rows
from subspace_store.commands.terminal import (
    STATE_DIR,
    AsJson,
    StateDir,
    command_of,
    console,
    counted,
    me,
    new_app,
    note,
    show,
)

token_app = new_app("token", "Tokens of people and service accounts: create, list, rotate, revoke.")
STOPPED = "interrupted; `onebasis token list` shows what there is"
token_command = anywhere(command_of(token_app, STOPPED))

TokenId = Annotated[str, typer.Argument(metavar="ID", help="Id of the token; `onebasis token list` shows it.")]
AUDIT_PAGE = 50


@token_command
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Person or service account; records show it.")],
    role: Annotated[str, typer.Option(help="viewer, submitter, maintainer or admin.")],
    team: Annotated[str | None, typer.Option(help="Team that it is for.")] = None,
    all_teams: Annotated[bool, typer.Option("--all-teams", help="For all teams.")] = False,
    service: Annotated[bool, typer.Option("--service", help="It is a program's, not a person's.")] = False,
    days: Annotated[float, typer.Option(help="Days after which it ends.", min=0.0)] = 90.0,
    never_ends: Annotated[bool, typer.Option("--never-ends", help="Let it count until it is revoked.")] = False,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a token and show it, once: the service keeps a digest alone."""
    if role not in list(Role):
        raise InvalidInput(f"there is no role '{role}'", "--role", f"roles: {', '.join(Role)}")
    if (team is None) is not all_teams:
        raise InvalidInput("names not exactly one of --team and --all-teams", "token create", "name one of them")
    asked = CreateToken(
        name=name,
        role=role,  # type: ignore[arg-type]
        team=team,
        kind="service" if service else "person",
        days=None if never_ends else days,
        by=me(),
    )
    show(Client(state_dir).ask(asked), secret, as_json)


@token_command
def list_(state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """List tokens: whose they are, what they may, until when, when they were last used."""
    show(Client(state_dir).ask(ListTokens()), tokens, as_json)


@token_command
def rotate(
    token_id: TokenId,
    grace_hours: Annotated[float, typer.Option(help="Hours for which the old one still counts.", min=0.0)] = 0.0,
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a new token in place of an old one, and show it, once. Everybody may rotate their own."""
    asked = RotateToken(token_id=token_id, grace_seconds=grace_hours * 3600, by=me())
    show(Client(state_dir).ask(asked), secret, as_json)


@token_command
def revoke(token_id: TokenId, state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Let a token count no more, at once. Everybody may revoke their own."""
    answer = Client(state_dir).ask(RevokeToken(token_id=token_id, by=me()))
    show(answer, lambda a: note(f"the token {a['token_id']} of {a['name']} counts no more"), as_json)


def whoami(state_dir: StateDir = STATE_DIR, as_json: AsJson = False) -> None:
    """Show as whom the service knows you, and what you may do there."""
    show(Client(state_dir).ask(WhoAmI()), who, as_json)


def audit(
    limit: Annotated[int, typer.Option(help="Number of rows, the newest ones.", min=1, max=PAGE_MAX)] = AUDIT_PAGE,
    export: Annotated[Path | None, typer.Option(help="Write all rows to this file, as lines of JSON.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the whole chain; exit code 7: it is broken.")] = False,
    head: Annotated[
        str, typer.Option(help="With --verify: digest that it printed before; it has to be in the chain still.")
    ] = "",
    state_dir: StateDir = STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """List who asked for what that writes, when, and what came of it; two rows each, before and after."""
    client = Client(state_dir)
    if export is not None and verify:
        raise InvalidInput("--export and --verify are two commands", "audit", "ask for one, then the other")
    if export is not None:
        count = _export(client, export)
        show(
            {"output": str(export), "rows": count},
            lambda _: note(f"wrote {counted(count, 'row')} to {export}"),
            as_json,
        )
    elif verify:
        found = client.ask(VerifyAudit(known=head))
        problem = found["problem"] or (
            "the digest is not in it: rows were cut off" if found["holds_known"] is False else ""
        )
        if problem:
            whole = f"{counted(found['rows'], 'row')} before it are as they were written"
            raise Corrupt(
                f"the audit log is not what was written: {problem}; {whole}", "audit", "find out who changed it"
            )
        show(found, verified, as_json)
    else:
        show(client.ask(ReadAudit(limit=limit)), audit_rows, as_json)


def _export(client: Client, output: Path) -> int:
    """Write all rows, page by page. Returns how many."""
    count, after = 0, 0
    try:
        with output.open("x", encoding="utf-8") as file:
            while rows := client.ask(ReadAudit(cursor=after, limit=1000)):
                for row in rows:
                    file.write(json.dumps(row) + "\n")
                count, after = count + len(rows), rows[-1]["seq"]
    except OSError as error:
        raise InvalidInput(f"cannot be written: {error}", str(output), "name a new file") from error
    return count


def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the service, https://HOST[:PORT].")],
    name: Annotated[str | None, typer.Option(help="Name of the context; default: the host.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the token; default: it is asked for.")
    ] = None,
    ca_file: Annotated[Path | None, typer.Option(help="Certificate in PEM of an authority of your own.")] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Send the token unencrypted, on a network that you trust.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remember a service and a token for it. Commands ask it from now on; `onebasis context use local` undoes that."""
    place = urlsplit(url)
    if place.scheme not in ("http", "https") or not place.hostname or place.path not in ("", "/") or place.username:
        raise InvalidInput("is no address of a service", url, "write https://HOST or https://HOST:PORT")
    if place.scheme == "http" and place.hostname not in LOOPBACK and not plain_http:
        what = "over plain HTTP everybody on the way reads the token"
        raise InvalidInput(what, url, "use https; or add --plain-http on a network that you trust")
    chosen = name or place.hostname
    if chosen == LOCAL:
        raise InvalidInput(f"`{LOCAL}` is the service of the folder where a command runs", "--name", "choose another")
    remote = Remote(url.rstrip("/"), _token(token_file), str(ca_file.resolve()) if ca_file else "", chosen)
    with asking(remote, True):
        found = Client(Path()).ask(WhoAmI())
    contexts = read_contexts()
    keep_contexts(Contexts(chosen, contexts.known | {chosen: remote}))

    def told(answer: Json) -> None:
        who(answer)
        note(f"commands ask {remote.url} from now on; `onebasis context use {LOCAL}` undoes that")

    show({**found, "context": chosen, "url": remote.url}, told, as_json)


def _token(file: Path | None) -> str:
    """The token: from a file, the terminal, or what is piped in. Never from the command line, which others can read."""
    if file is not None:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot be read: {error}", str(file), "name a file with the token alone") from error
    elif sys.stdin.isatty():
        text = typer.prompt("token", hide_input=True, err=True)
    else:
        text = sys.stdin.read()
    token = text.strip()
    if not token or not token.isascii() or len(token.split()) != 1:
        raise InvalidInput("holds not exactly one token", str(file or "standard input"), "give the token alone")
    return token


def first_token(client: Client) -> Json | None:
    """An admin's token for a service that has none yet; None where it has one, or cannot be asked."""
    try:
        if client.ask(ListTokens()):
            return None
        return client.ask(CreateToken(name="admin", role="admin", by=me()))
    except OnebasisError:  # one that stands by makes none
        return None


# --- what is printed ---------------------------------------------------------------------------------------------


def secret(answer: Json) -> None:
    """A new token: the token itself alone on stdout, so that it can be piped into a file."""
    until = f"until {_clock(answer['expires_at'])}" if answer["expires_at"] else "until it is revoked"
    note(f"token {answer['token_id']} of {answer['name']}, {answer['role']} of {_team(answer)}, {until}; shown once:")
    console.print(answer["token"], markup=False, soft_wrap=True)


def tokens(rows: list[Json]) -> None:
    """A row for each token."""
    print_rows(
        ("token", "name", "kind", "team", "role", "ends", "last used", "revoked"),
        [
            (
                row["token_id"], row["name"], row["kind"], _team(row), row["role"],
                _clock(row["expires_at"]) if row["expires_at"] else "never",
                _clock(row["used_at"]) if row["used_at"] else "never",
                _clock(row["revoked_at"]) if row["revoked_at"] else "",
            )
            for row in rows
        ],
        "no token but the one in the state folder",
    )  # fmt: skip


def who(answer: Json) -> None:
    """Who asks."""
    roles = ", ".join(f"{role} of {team}" for team, role in answer["roles"].items())
    until = f", until {_clock(answer['expires_at'])}" if answer["expires_at"] else ""
    console.print(f"{answer['name']}: {roles} (token {answer['token_id']}{until})", markup=False, soft_wrap=True)


def audit_rows(rows: list[Json]) -> None:
    """The rows of the log."""
    told = [
        (str(row["seq"]), _clock(row["at"]), row["name"], row["token_id"], row["request"], row["outcome"],
         row["about"] or f"of row {row['of']}")
        for row in rows
    ]  # fmt: skip
    print_rows(("row", "when", "who", "token", "request", "outcome", "about"), told, "nothing was asked yet")


def verified(answer: Json) -> None:
    """What verifying has shown, with the digest to note."""
    note(f"{counted(answer['rows'], 'row')}, each as it was written; digest of the last one, to note elsewhere:")
    console.print(answer["head"], markup=False)


def _team(row: Any) -> str:
    return f"team {row['team']}" if row["team"] else "all teams"


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
