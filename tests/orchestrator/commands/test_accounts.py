"""Tokens, the audit log, logging in and contexts, as a person types them, on this machine and from another one."""

from __future__ import annotations

import datetime
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from configs.errors import Exit
from configs.settings import TlsSettings
from orchestrator.api.requests import CreateToken
from orchestrator.commands.cli import app
from orchestrator.commands.contexts import contexts_file
from orchestrator.tasks import audit_log
from tests.orchestrator.commands.test_cli import task_file
from tests.orchestrator.site import Site

Onebasis = Callable[..., Result]


@pytest.fixture
def here(site: Site, monkeypatch: pytest.MonkeyPatch) -> Onebasis:
    """Commands in the folder of the service."""
    monkeypatch.setenv("USER", "ann")

    def run(*arguments: str, given: str | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments, "--state-dir", str(site.folder)], input=given)

    return run


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Onebasis]:
    """Commands of somebody on another machine: no state folder is there, and no configuration yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("ONEBASIS_STATE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, given: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=given)

    yield run
    assert not (tmp_path / ".onebasis").exists()


def token_of(site: Site, role: str, team: str | None = "red") -> str:
    asked = CreateToken(name=f"{role}-{team}", role=role, team=team)  # type: ignore[arg-type]
    return str(site.client.ask(asked)["token"])


def test_a_token_is_made_listed_rotated_and_revoked(here: Onebasis) -> None:
    made = here("token", "create", "bob", "--role", "submitter", "--team", "red", "--days", "7")
    assert made.exit_code == 0, made.output
    (token,) = made.stdout.split()  # alone, so that it can be piped into a file
    assert token.startswith("onebasis_")
    assert "of bob, submitter of team red, until " in made.stderr
    rows = json.loads(here("token", "list", "--json").stdout)
    row = next(row for row in rows if row["name"] == "bob")
    assert (row["role"], row["team"], row["created_by"], row["used_at"]) == ("submitter", "red", "ann", None)
    assert token not in here("token", "list").output
    fresh = json.loads(here("token", "rotate", row["token_id"], "--json").stdout)
    assert (fresh["replaces"], fresh["name"]) == (row["token_id"], "bob")
    assert here("token", "revoke", fresh["token_id"]).exit_code == 0
    assert here("token", "revoke", "000000000000").exit_code == Exit.NOT_FOUND
    for wrong in (
        ("--role", "king", "--team", "red"),
        ("--role", "viewer"),
        ("--role", "viewer", "--team", "red", "--all-teams"),
    ):
        assert here("token", "create", "x", *wrong).exit_code == Exit.INPUT


def test_the_audit_log_is_listed_exported_and_verified(here: Onebasis, site: Site, tmp_path: Path) -> None:
    here("token", "create", "carol", "--role", "viewer", "--team", "red", "--json")
    listed = here("audit", "--limit", "2")
    assert "create-token" in listed.output
    head = json.loads(here("audit", "--verify", "--json").stdout)["head"]
    file = tmp_path / "audit.jsonl"
    assert here("audit", "--export", str(file)).exit_code == 0
    rows = [audit_log.AuditRow(**json.loads(line)) for line in file.read_text().splitlines()]
    found = audit_log.verified(iter(rows))
    assert (found.rows, found.head, found.problem) == (len(rows), head, "")
    assert here("audit", "--verify", "--head", head).exit_code == 0
    assert here("audit", "--verify", "--head", "f" * 64).exit_code == Exit.CORRUPT


def test_commands_ask_a_service_that_somebody_logged_in_to(elsewhere: Onebasis, site: Site, tmp_path: Path) -> None:
    token = token_of(site, "viewer")
    (tmp_path / "token").write_text(token + "\n")
    done = elsewhere("login", site.url, "--name", "prod", "--token-file", str(tmp_path / "token"))
    assert done.exit_code == 0, done.output
    assert "viewer-red: viewer of red" in done.stdout
    assert token not in done.output
    assert stat.S_IMODE(contexts_file().stat().st_mode) == 0o600
    shown = elsewhere("tasks")
    assert "red/alpha" in shown.stdout
    assert "blue/beta" not in shown.output
    assert f"context prod: {site.url}" in shown.stderr  # nobody takes one service for another
    assert json.loads(elsewhere("whoami", "--json").stdout)["name"] == "viewer-red"
    assert elsewhere("task", "blue/beta").exit_code == Exit.NOT_FOUND
    assert elsewhere("scores").exit_code == 0, elsewhere("scores").output
    for command in (("version", "2"), ("diff", "1", "2"), ("capacity",), ("status",), ("workers",), ("versions",)):
        told = elsewhere(*command)
        assert told.exit_code == 0, told.output
        assert "blue/beta" not in told.output
    refused = elsewhere("pause", "--team", "red")
    assert refused.exit_code == Exit.INPUT
    assert "pause needs the role maintainer in team red, and viewer-red is viewer of red" in refused.output


def test_a_context_is_chosen_by_name_and_the_folder_here_is_one_too(elsewhere: Onebasis, site: Site) -> None:
    for name, team in (("one", "red"), ("two", "blue")):
        assert elsewhere("login", site.url, "--name", name, given=token_of(site, "viewer", team)).exit_code == 0
    rows = json.loads(elsewhere("context", "list", "--json").stdout)
    assert [(row["context"], row["is_current"]) for row in rows] == [("local", False), ("one", False), ("two", True)]
    titles = [row["title"] for row in json.loads(elsewhere("tasks", "--json").stdout)]
    assert titles == ["blue/beta"]
    titles = [row["title"] for row in json.loads(elsewhere("tasks", "--json", "--context", "one").stdout)]
    assert titles == ["red/alpha"]
    assert elsewhere("context", "use", "local").exit_code == 0
    assert elsewhere("tasks").exit_code == Exit.UNAVAILABLE  # no service has run here
    assert len(json.loads(elsewhere("tasks", "--json", "--state-dir", str(site.folder)).stdout)) == 2
    both = elsewhere("tasks", "--context", "one", "--state-dir", str(site.folder))
    assert both.exit_code == Exit.INPUT
    assert "both name a service" in both.output
    assert elsewhere("tasks", "--context", "three").exit_code == Exit.NOT_FOUND


def test_a_folder_with_a_service_and_another_context_are_not_mixed_up(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("ONEBASIS_STATE_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".onebasis").symlink_to(site.folder)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--json"], input=token_of(site, "viewer"))

    assert len(json.loads(run("tasks").stdout)) == 2
    run("login", site.url, "--name", "prod")
    for command in (("tasks",), ("store", "tags")):
        refused = run(*command)
        assert refused.exit_code == Exit.INPUT, refused.output
        assert "could be meant" in refused.output
    assert len(json.loads(run("tasks", "--context", "local").stdout)) == 2
    assert len(json.loads(run("tasks", "--context", "prod").stdout)) == 1
    monkeypatch.setenv("ONEBASIS_CONTEXT", "local")
    assert len(json.loads(run("tasks").stdout)) == 2


def test_what_cannot_be_done_from_afar_says_so(elsewhere: Onebasis, site: Site) -> None:
    assert elsewhere("login", site.url, given=token_of(site, "admin")).exit_code == 0
    file = task_file(site, "red/afar")
    taken = elsewhere("submit", file, "--dry-run", "--their-files", "--json")
    assert json.loads(taken.stdout)["title"] == "red/afar", taken.output
    for command in (
        ("tags",),
        ("verify",),
        ("remove", "red/alpha"),
        ("quarantine", "red/alpha", "why"),
        ("tag", "gold", "main"),
        ("compact",),
    ):
        refused = elsewhere("store", *command)
        assert refused.exit_code == Exit.INPUT, refused.output
        assert "reads the storage itself" in refused.output or "is no number" in refused.output


@pytest.mark.changes
def test_the_store_is_written_to_from_afar_through_the_service(elsewhere: Onebasis, site: Site) -> None:
    assert elsewhere("login", site.url, "--name", "prod", given=token_of(site, "maintainer")).exit_code == 0
    for command in (("tag", "gold", "1"), ("hold", "looking into it"), ("pin", "2", "--owner", "ann")):
        done = elsewhere("store", *command, "--context", "prod")
        assert done.exit_code == 0, done.output
    state = site.plant.open_store().state
    assert (state.tags, state.held.reason if state.held else "") == ({"gold": 1}, "looking into it")
    assert state.held is not None
    assert state.held.actor == "maintainer-red"
    assert elsewhere("store", "unpin", "2", "--owner", "ann").exit_code == 0
    assert elsewhere("store", "release", "--json").exit_code == 0
    assert site.plant.open_store().state.held is None


@pytest.mark.changes
def test_a_task_is_removed_from_afar_after_a_look(elsewhere: Onebasis, site: Site) -> None:
    assert elsewhere("login", site.url, "--name", "prod", given=token_of(site, "maintainer")).exit_code == 0
    looked = elsewhere("remove", "red/alpha")
    assert "it would go back to version 0 and make 1 version again: 2 (--yes does it)" in looked.output
    assert site.plant.state.refs["main"] == 2
    assert elsewhere("remove", "blue/beta", "--yes").exit_code == Exit.NOT_FOUND
    done = elsewhere("remove", "red/alpha", "--yes", "--reason", "no licence")
    assert (done.exit_code, "red/alpha is removed" in done.output) == (0, True)
    assert site.plant.held() == ["blue/beta"]
    assert elsewhere("remove", "red/alpha", "--yes").exit_code == Exit.NOT_FOUND  # it is gone


@pytest.mark.parametrize(
    ("url", "given", "said"),
    [
        ("http://build.example.org", "x", "everybody on the way reads the token"),
        ("ftp://build.example.org", "x", "is no address of a service"),
        ("https://host/path", "x", "is no address of a service"),
        ("http://127.0.0.1:1", "x", "nobody answers there"),
        ("http://127.0.0.1:1", "two words", "not exactly one token"),
    ],
)
def test_logging_in_wrongly_keeps_nothing(elsewhere: Onebasis, url: str, given: str, said: str) -> None:
    refused = elsewhere("login", url, given=given)
    assert refused.exit_code in (Exit.INPUT, Exit.UNAVAILABLE)
    assert said in refused.output
    assert not contexts_file().exists()


def test_a_wrong_token_is_told_and_not_kept(elsewhere: Onebasis, site: Site) -> None:
    refused = elsewhere("login", site.url, given="onebasis_" + "x" * 43)
    assert refused.exit_code == Exit.INPUT
    assert "missing or wrong token" in refused.output
    assert not contexts_file().exists()


def certificate(folder: Path, name: str) -> TlsSettings:
    """A certificate that signs itself, made out for a name."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kinds = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_file.write_bytes(key.private_bytes(*kinds))
    return TlsSettings(cert_file=str(cert_file), key_file=str(key_file))


def test_over_tls_the_certificate_has_to_be_the_right_one(elsewhere: Onebasis, tmp_path: Path) -> None:
    tls = certificate(tmp_path, "localhost")
    site = Site(tmp_path / "site", tls=tls)
    try:
        assert site.client.ask(CreateToken(name="x", role="viewer", team="red"))["name"] == "x"  # who has the folder
        token, url = token_of(site, "viewer"), site.url.replace("127.0.0.1", "localhost")
        refused = elsewhere("login", url, given=token)
        assert refused.exit_code == Exit.INPUT
        assert "its certificate is not trusted" in refused.output
        assert elsewhere("login", url, "--ca-file", tls.cert_file, given=token).exit_code == 0
        assert json.loads(elsewhere("status", "--json").stdout)["running"] is True
        by_number = elsewhere("login", site.url, "--ca-file", tls.cert_file, given=token)
        assert (by_number.exit_code, "its certificate is not trusted" in by_number.output) == (Exit.INPUT, True)
    finally:
        site.close()
