"""Tokens that an identity provider signs (OpenID Connect): whose they are, and what their bearer's groups may do.

Signatures and claims are checked by joserfc, with the keys that the provider publishes. Those are kept, and asked for
again when they are old or a token names a key that is not among them; but not more often than every few seconds, so
that made-up tokens cause no storm of questions.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.request
from typing import Any

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from configs.errors import NotAllowed, Unavailable, UnknownToken
from configs.plain_text import escaped
from configs.settings import OidcSettings
from orchestrator.api.access import EVERY_TEAM, Caller, Role

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""Signatures with a public key. None with a shared secret, for which the public key could be passed off, and not
`none`."""
KEYS_SECONDS = 3600.0
"""Age from which on keys are asked for again: a key that the provider takes back counts no longer than that."""
AGAIN_SECONDS = 10.0
"""Least time between two questions for keys."""
WAIT_SECONDS = 5.0
"""Longest wait for the provider."""
LEEWAY_SECONDS = 30
"""Difference of the two clocks that is put up with."""
BYTES_MAX = 1 << 20
"""Bytes of an answer of the provider."""
NAME_MAX = 120


class Provider:
    """One identity provider. Safe for several threads."""

    def __init__(self, settings: OidcSettings) -> None:
        self.settings = settings
        self._claims = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": settings.issuer},
            aud={"essential": True, "value": settings.audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        self._lock = threading.Lock()
        self._keys: KeySet | None = None
        self._asked_at = -KEYS_SECONDS

    def caller(self, token: str) -> Caller:
        """Who bears a token.

        Raises:
            UnknownToken: It is not signed by the provider, not for this service, or has ended.
            NotAllowed: None of its bearer's groups may do anything here.
            Unavailable: The provider does not answer, and its keys are not known.
        """
        claims = self._checked(token)
        name = claims.get(self.settings.name_claim)
        if not isinstance(name, str) or not name:
            raise UnknownToken(
                f"the token has no {self.settings.name_claim}", "oidc.name_claim", "choose another claim"
            )
        groups = claims.get(self.settings.groups_claim)
        roles: dict[str, Role] = {}
        for group in groups if isinstance(groups, list) else [groups]:
            if isinstance(group, str) and (given := self.settings.groups.get(group)) is not None:
                team, role = given.team or EVERY_TEAM, Role(given.role)
                roles[team] = role if team not in roles or role.includes(roles[team]) else roles[team]
        if not roles:
            what = f"{_name(name)} is in no group that may do anything here"
            raise NotAllowed(what, "oidc.groups", "ask to be added to one of the groups that the settings name")
        return Caller(_name(name), f"oidc:{_name(str(claims['sub']))}", roles, float(claims["exp"]))

    def _checked(self, token: str) -> dict[str, Any]:
        """The claims of a token, its signature and they checked."""
        for fresh in (False, True):
            try:
                read = jwt.decode(token, self._key_set(fresh), algorithms=list(ALGORITHMS))
                self._claims.validate(read.claims)
                return dict(read.claims)
            except (JoseError, ValueError, KeyError, TypeError) as error:
                # A key that is not there may be new. Any other mistake would be the same with fresh keys.
                if fresh or not _is_about_keys(error):
                    why = getattr(error, "error", "") or type(error).__name__
                    raise UnknownToken(
                        f"the identity provider's token is refused: {why}", "authorization", "sign in again"
                    ) from None
        raise AssertionError

    def _key_set(self, fresh: bool) -> KeySet:
        with self._lock:
            age = time.monotonic() - self._asked_at
            if self._keys is None or age > KEYS_SECONDS or (fresh and age > AGAIN_SECONDS):
                try:
                    self._keys = self._fetched()
                except Unavailable:
                    if self._keys is None or age > 2 * KEYS_SECONDS:
                        raise
                else:
                    self._asked_at = time.monotonic()
            return self._keys

    def _fetched(self) -> KeySet:
        issuer = self.settings.issuer.rstrip("/")
        try:
            found = _json_at(f"{issuer}/.well-known/openid-configuration")
            if found.get("issuer") != self.settings.issuer:
                raise ValueError("it says that it is another issuer")
            return KeySet.import_key_set(_json_at(str(found["jwks_uri"])))  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError, JoseError) as error:
            what = f"the identity provider's keys cannot be read: {type(error).__name__}: {escaped(str(error))[:200]}"
            raise Unavailable(what, self.settings.issuer, "try again; the service's own tokens go on") from None


def _json_at(url: str) -> dict[str, Any]:
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"no address: {url[:80]}")
    with urllib.request.urlopen(url, timeout=WAIT_SECONDS, context=ssl.create_default_context()) as reply:
        found = json.loads(reply.read(BYTES_MAX))
    if not isinstance(found, dict):
        raise TypeError("no JSON object")
    return found


def _is_about_keys(error: Exception) -> bool:
    """Whether a token may be right, and the keys old: its key is not among them, or another one has its name by now."""
    return type(error).__name__ in ("InvalidKeyIdError", "BadSignatureError", "MissingKeyError", "ValueError")


def _name(text: str) -> str:
    """A name from outside, as one line of plain text."""
    return escaped(text)[:NAME_MAX]
