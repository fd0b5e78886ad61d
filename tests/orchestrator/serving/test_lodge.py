"""Whose a token is, as the door finds out: from a real control plane, and from what it knew while that is away."""

from __future__ import annotations

import pytest

from configs.errors import OnebasisError, TooManyRequests, Unavailable, UnknownToken
from orchestrator.api.requests import CreateToken, RevokeToken
from orchestrator.serving import lodge
from orchestrator.serving.lodge import Lodge, Lodger, digest_of
from tests.orchestrator.site import TOKEN, Site

NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def site(bare_site: Site) -> Site:
    return bare_site


def lodger(url: str, per_second: float | None = None) -> Lodger:
    return Lodger(Lodge(url, "", per_second, digest_of(TOKEN)))


def token(site: Site, team: str | None) -> tuple[str, str]:
    """(id, token) of a viewer."""
    made = site.client.ask(CreateToken(name="reader", role="viewer", team=team))
    return made["token_id"], made["token"]


def away(one: Lodger) -> None:
    one._lodge = Lodge(NOBODY, "", None, one._lodge.owner)


def test_a_control_plane_that_is_away_is_asked_once_in_a_while(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, (_, known), (_, other) = lodger(site.url), token(site, "red"), token(site, "red")
    assert one.teams_of(known) == frozenset({"red"})
    monkeypatch.setattr(lodge, "KNOWN_SECONDS", 0.0)
    asked, real = list[str](), one._ask

    def hangs(secret: str) -> frozenset[str] | None:
        asked.append(secret)
        raise Unavailable("it hangs")

    monkeypatch.setattr(one, "_ask", hangs)
    assert one.teams_of(known) == frozenset({"red"})
    for secret in (known, other, known):
        if secret == known:
            assert one.teams_of(secret) == frozenset({"red"})
        else:
            with pytest.raises(Unavailable, match="it hangs"):
                one.teams_of(secret)
    assert asked == [known]
    monkeypatch.setattr(one, "_ask", real)
    later = lodge.time.monotonic() + lodge.PAUSE_SECONDS + 1
    monkeypatch.setattr(lodge.time, "monotonic", lambda: later)
    assert one.teams_of(other) == frozenset({"red"})  # it is asked again


def test_one_that_has_too_much_to_do_forgets_no_token(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one, (_, known) = lodger(site.url), token(site, "red")
    assert one.teams_of(known) == frozenset({"red"})
    monkeypatch.setattr(lodge, "KNOWN_SECONDS", 0.0)

    def busy(secret: str) -> frozenset[str] | None:
        raise OnebasisError("internal error")

    monkeypatch.setattr(one, "_ask", busy)
    assert one.teams_of(known) == frozenset({"red"})


def test_a_token_is_its_teams_and_the_owners_is_everybodys(site: Site) -> None:
    one = lodger(site.url)
    assert one.teams_of(token(site, "red")[1]) == frozenset({"red"})
    assert one.teams_of(token(site, None)[1]) is None
    assert lodger(NOBODY).teams_of(TOKEN) is None  # nobody has to be asked
    for wrong in ("", "obt_wrong", "a.b.c"):
        with pytest.raises(UnknownToken):
            one.teams_of(wrong)


def test_while_the_control_plane_is_away_what_was_known_counts_and_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, (_, known), (_, other) = lodger(site.url), token(site, "red"), token(site, "red")
    assert one.teams_of(known) == frozenset({"red"})
    away(one)
    monkeypatch.setattr(lodge, "KNOWN_SECONDS", 0.0)  # it is asked again, and nobody is there
    assert one.teams_of(known) == frozenset({"red"})
    with pytest.raises(Unavailable, match="it alone knows whose a token is"):
        one.teams_of(other)
    monkeypatch.setattr(lodge, "AWAY_SECONDS", 0.0)
    with pytest.raises(Unavailable):
        one.teams_of(known)


def test_a_token_that_was_revoked_counts_no_more_when_the_control_plane_goes_away(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, (token_id, secret) = lodger(site.url), token(site, "red")
    assert one.teams_of(secret) == frozenset({"red"})
    site.client.ask(RevokeToken(token_id=token_id))
    monkeypatch.setattr(lodge, "KNOWN_SECONDS", 0.0)
    with pytest.raises(UnknownToken):
        one.teams_of(secret)
    away(one)
    with pytest.raises(Unavailable):
        one.teams_of(secret)


def test_a_token_asks_no_more_often_than_it_may(site: Site) -> None:
    one, (_, secret) = lodger(site.url, 0.01), token(site, "red")
    assert one.teams_of(secret) == frozenset({"red"})
    with pytest.raises(TooManyRequests):
        one.teams_of(secret)
