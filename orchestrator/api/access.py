"""Who may what. Pure: a caller, what a request needs and which teams it is about are handed in.

Which request needs which role stands in one place, the table in routes.py. What a caller may not see is not there for
it: a task of another team is answered as one that does not exist, by the same error. What it sees and may not change is
refused with who may.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from configs.errors import InvalidInput, NotAllowed, NotFound, OnebasisError
from configs.settings import MainRule, MainSettings

EVERY_TEAM = ""
"""Stands for all teams, those that come later too. No team has an empty name."""
EVERY_TEAM_TOLD = "all teams"
"""The same in answers. No team's name has a space."""


class Role(StrEnum):
    """What somebody may do; each role includes those above it."""

    VIEWER = "viewer"
    """Read."""
    SUBMITTER = "submitter"
    """Submit tasks, cancel and retry them."""
    MAINTAINER = "maintainer"
    """Pause and preempt; roll back, hold, tag; remove its own team's tasks from `main`."""
    ADMIN = "admin"
    """Tokens; with all teams, whatever concerns the whole service: settings, workers, the audit log."""

    def includes(self, other: Role) -> bool:
        """Whether who has this role may do what needs the other one."""
        return _RANK[self] >= _RANK[other]


_RANK = {role: rank for rank, role in enumerate(Role)}


class About(StrEnum):
    """What a request is about, and so in which teams its role is needed."""

    SERVICE = "service"
    """Nothing of a team in particular: the role is needed in any team."""
    EVERYTHING = "everything"
    """What all teams share, and what cannot be undone: the role is needed for all teams."""
    TASK = "task"
    """The task that `reference` names: in its team."""
    TEAM = "team"
    """The team that the request names; where it names none, all teams."""
    OWN_TEAMS = "own teams"
    """The team that the request names; where it names none, those that the caller sees."""
    MERGED = "merged"
    """Tasks that a version holds, `task_id` or `task_ids`: in their teams."""


MOVES_MAIN: Mapping[str, str] = {
    "submit": "publish",
    "retry": "publish",
    "remove": "publish",
    "compact": "publish",
    "rollback": "rollback",
    "reject": "rollback",
    "restore-revision": "rollback",
    "hold": "hold",
    "release": "hold",
}
"""Routes whose requests move `main`, or keep it where it is, to the rule of `MainSettings` that they obey."""


@dataclass(frozen=True)
class Caller:
    """Who asks, as the service has made sure of: never what a request says of itself."""

    name: str
    """Name of the person or service account, as records keep it."""
    token_id: str
    """Token that was shown, for the audit log: an id that is no secret."""
    roles: Mapping[str, Role]
    """Team to role; `EVERY_TEAM`: in all of them."""
    expires_at: float | None = None
    """Unix time; None: never."""

    @property
    def teams(self) -> frozenset[str] | None:
        """Teams whose tasks it sees; None: all."""
        return None if EVERY_TEAM in self.roles else frozenset(self.roles)

    def role_in(self, team: str) -> Role | None:
        """Its role in a team (`EVERY_TEAM`: in all of them); None: it sees nothing of it."""
        held = [self.roles[name] for name in {team, EVERY_TEAM} if name in self.roles]
        return max(held, key=_RANK.__getitem__, default=None)

    def may(self, role: Role, team: str) -> bool:
        """Whether it may do in a team what needs a role."""
        held = self.role_in(team)
        return held is not None and held.includes(role)


def owner(name: str) -> Caller:
    """Whoever may read the service's state folder: its files say everything, so its owner may do everything."""
    return Caller(name, "owner", {EVERY_TEAM: Role.ADMIN})


def check_role(caller: Caller, route: str, role: Role, about: About, teams: Collection[str]) -> None:
    """Let a request pass, or refuse it.

    Args:
        route: Name of the request.
        role: Role that it needs.
        teams: Teams that it is about, where it is about teams; it needs the role in each of them.

    Raises:
        NotFound: It is about a team of which the caller sees nothing.
        NotAllowed: The caller sees what it is about, and its role is too low.
    """
    if about is About.SERVICE:
        if any(held.includes(role) for held in caller.roles.values()):
            return
        raise _too_low(caller, route, role, "")
    for team in (EVERY_TEAM,) if about is About.EVERYTHING else teams:
        if team != EVERY_TEAM and caller.role_in(team) is None:
            raise no_such_team(caller, team)
        if not caller.may(role, team):
            raise _too_low(caller, route, role, f"in team {team}" if team != EVERY_TEAM else "for all teams")


def no_such_team(caller: Caller, team: str, teams: Collection[str] = ()) -> OnebasisError:
    """The error for a team of which a caller sees nothing, whether there is one of that name or not. teams: Those
    of the service, for who sees all."""
    known = f"teams of this service: {', '.join(sorted(teams))}"
    if caller.teams is not None:
        known = f"your teams: {', '.join(sorted(caller.teams))}"
    return NotFound(f"there is no team '{team}'", "team", known)


def check_main(caller: Caller, route: str, rules: MainSettings, teams: Collection[str], holds: bool = False) -> None:
    """Let a request pass that moves `main` or holds it, or refuse it. Other requests pass.

    Args:
        teams: Teams that it is about; empty: none in particular.
        holds: Whether a rollback keeps `main` there as well.

    Raises:
        NotAllowed: A rule of the settings leaves it to others; says to whom.
    """
    names = [MOVES_MAIN[route]] if route in MOVES_MAIN else []
    for name in [*names, *(["hold"] if holds and "hold" not in names else [])]:
        rule: MainRule = getattr(rules, name)
        mine = teams or caller.roles.keys()
        if not any(caller.may(Role(rule.role), team) and _is_among(rule, team, caller) for team in mine):
            whose = f" of {', '.join(rule.teams)}" if rule.teams is not None else ""
            raise NotAllowed(
                f"{route} needs the role {rule.role}{whose}, since `main` is protected",
                f"main.{name}",
                f"ask somebody who has it; the setting main.{name} says who may",
            )


def _is_among(rule: MainRule, team: str, caller: Caller) -> bool:
    return rule.teams is None or team in rule.teams or EVERY_TEAM in caller.roles


def _too_low(caller: Caller, route: str, role: Role, where: str) -> NotAllowed:
    held = ", ".join(f"{role_} of {team or 'all teams'}" for team, role_ in sorted(caller.roles.items()))
    what = " ".join(filter(None, (f"{route} needs the role {role}", where)))
    return NotAllowed(f"{what}, and {caller.name} is {held or 'nothing'}", "", "ask somebody who has that role")


def check_given(caller: Caller, role: Role, team: str) -> None:
    """Nobody gives more than they have. Raises NotAllowed."""
    if not caller.may(role, team):
        raise _too_low(caller, f"giving the role {role}", role, f"in team {team}" if team else "for all teams")


def after_another_team(caller: Caller, titles: Collection[str]) -> InvalidInput | None:
    """The error for a task that comes after one of another team: that of a task that does not exist."""
    for title in titles:
        if caller.role_in(title.partition("/")[0]) is None:
            return InvalidInput(f"there is no task {title}", "after", "submit that one first, or leave it out")
    return None
