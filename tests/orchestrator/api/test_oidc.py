"""Tokens of an identity provider, signed by a real small one that listens on loopback."""

from __future__ import annotations

import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, RSAKey

from configs.errors import InvalidInput, NotAllowed, Unavailable, UnknownToken
from configs.settings import OidcSettings
from orchestrator.api import oidc
from orchestrator.api.access import EVERY_TEAM, Role
from orchestrator.api.oidc import Provider
from orchestrator.api.routes import PREFIX
from tests.builders import settings as service_settings
from tests.orchestrator.site import Site

AUDIENCE = "onebasis"


class Issuer:
    """An identity provider: publishes its keys, signs tokens, counts who asks for keys."""

    def __init__(self) -> None:
        self.keys: list[Any] = [RSAKey.generate_key(2048, {"kid": "first"})]
        self.asked = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/realm/.well-known/openid-configuration":
                    told: Any = {"issuer": issuer.says, "jwks_uri": f"{issuer.url}/keys"}
                else:
                    issuer.asked += 1
                    told = KeySet(issuer.keys).as_dict(private=False)
                content = json.dumps(told).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/realm"
        self.says = self.url
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self, key: Any = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
        key = key or self.keys[-1]
        algorithm = {"RSA": "RS256", "EC": "ES256"}[key.key_type]
        now = int(time.time())
        told = {"iss": self.url, "aud": AUDIENCE, "sub": "ann@example.org", "exp": now + 600, "groups": ["red-team"]}
        kept = {name: value for name, value in {**told, **claims}.items() if value is not None}
        return jwt.encode({"alg": algorithm, "kid": key.kid, **(header or {})}, kept, key, algorithms=[algorithm])


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    made = Issuer()
    yield made
    made.close()


def _packed(part: Any) -> str:
    content = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def settings_of(provider: Issuer, **changes: Any) -> OidcSettings:
    groups = {"red-team": {"role": "submitter", "team": "red"}, "platform": {"role": "admin"}}
    return OidcSettings.model_validate({"issuer": provider.url, "audience": AUDIENCE, "groups": groups, **changes})


def test_the_groups_of_a_token_are_what_its_bearer_may_do(issuer: Issuer) -> None:
    provider = Provider(settings_of(issuer))
    ann = provider.caller(issuer.token())
    assert (ann.name, ann.token_id, ann.roles) == ("ann@example.org", "oidc:ann@example.org", {"red": Role.SUBMITTER})
    both = provider.caller(issuer.token(groups=["red-team", "platform", "a-third-one"]))
    assert both.roles == {"red": Role.SUBMITTER, EVERY_TEAM: Role.ADMIN}
    by_mail = Provider(settings_of(issuer, name_claim="email", groups_claim="roles"))
    assert by_mail.caller(issuer.token(email="ann@red.org", roles=["red-team"])).name == "ann@red.org"
    for groups in (["a-third-one"], [], None, "platform-like", [{"name": "platform"}]):
        with pytest.raises(NotAllowed, match="is in no group that may do anything here"):
            provider.caller(issuer.token(groups=groups))


def test_whatever_is_wrong_with_a_token_refuses_it(issuer: Issuer) -> None:
    provider = Provider(settings_of(issuer))
    now = int(time.time())
    good = issuer.token()
    head, body, signature = good.split(".")
    passed_off = f"{_packed({'alg': 'HS256', 'kid': 'first'})}.{body}"
    seal = hmac.digest(issuer.keys[0].as_pem(private=False), passed_off.encode(), "sha256")
    unsigned = f"{_packed({'alg': 'none'})}.{body}."
    wrong = {
        "of another issuer": issuer.token(iss="http://127.0.0.1/other"),
        "for another audience": issuer.token(aud="mail"),
        "for no audience": issuer.token(aud=None),
        "ended": issuer.token(exp=now - 60),
        "without an end": issuer.token(exp=None),
        "not begun": issuer.token(nbf=now + 600),
        "without a subject": issuer.token(sub=None),
        "signed by another key of that name": issuer.token(RSAKey.generate_key(2048, {"kid": "first"})),
        "signed by a key that is not published": issuer.token(ECKey.generate_key("P-256", {"kid": "x"})),
        "signed with the public key as a secret": f"{passed_off}.{_packed(seal)}",
        "that says it needs none": unsigned,
        "changed": f"{head}.{body[:-4]}AAAA.{signature}",
        "without a signature": f"{head}.{body}.",
        "no token": "a.b.c",
    }
    for what, token in wrong.items():
        with pytest.raises(UnknownToken) as refused:
            provider.caller(token)
        assert token not in str(refused.value), what
    assert provider.caller(good).name == "ann@example.org"


def test_keys_are_kept_and_a_new_one_is_found(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = Provider(settings_of(issuer))
    for _ in range(5):
        provider.caller(issuer.token())
    assert issuer.asked == 1
    for _ in range(5):  # a storm of made-up tokens asks the provider nothing
        with pytest.raises(UnknownToken):
            provider.caller(issuer.token(ECKey.generate_key("P-256", {"kid": "made-up"})))
    assert issuer.asked == 1
    monkeypatch.setattr(oidc, "AGAIN_SECONDS", 0.0)
    first = issuer.token()
    issuer.keys = [ECKey.generate_key("P-256", {"kid": "second"})]
    assert provider.caller(issuer.token()).name == "ann@example.org"
    assert issuer.asked == 2
    with pytest.raises(UnknownToken):
        provider.caller(first)  # its key was taken back


def test_a_provider_that_is_away_is_told_and_known_keys_go_on(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, token = Provider(settings_of(issuer)), issuer.token()
    provider.caller(token)
    issuer.says = "http://127.0.0.1/another"
    with pytest.raises(Unavailable, match="it says that it is another issuer"):
        Provider(settings_of(issuer)).caller(token)
    issuer.close()
    assert provider.caller(token).name == "ann@example.org"
    with pytest.raises(Unavailable, match="the identity provider's keys cannot be read"):
        Provider(settings_of(issuer)).caller(token)


def test_keys_come_over_https_and_groups_name_teams_that_are_there(issuer: Issuer) -> None:
    with pytest.raises(ValueError, match="issuer has to begin with https"):
        settings_of(issuer, issuer="http://login.example.org")
    strange = {"issuer": issuer.url, "audience": "a", "groups": {"g": {"role": "viewer", "team": "no-such-team"}}}
    with pytest.raises((InvalidInput, ValueError), match=r"oidc.groups.g: there is no team 'no-such-team'"):
        service_settings(oidc=strange)


@pytest.mark.changes
def test_the_service_takes_its_own_tokens_and_the_providers(site: Site, issuer: Issuer) -> None:
    def ask(token: str, path: str) -> httpx.Response:
        return httpx.get(site.url + PREFIX + path, headers={"authorization": f"Bearer {token}"}, trust_env=False)

    assert ask(issuer.token(), "/whoami").status_code == 401  # no provider is named
    before = site.service.sources.settings
    site.service.sources.settings = before.model_copy(update={"oidc": settings_of(issuer)})
    told = ask(issuer.token(), "/whoami").json()
    assert (told["name"], told["roles"]) == ("ann@example.org", {"red": "submitter"})
    assert [row["title"] for row in ask(issuer.token(), "/tasks").json()] == ["red/alpha"]
    refused = ask(issuer.token(groups=["strangers"]), "/tasks")
    assert (refused.status_code, refused.json()["code"]) == (403, "not-allowed")
