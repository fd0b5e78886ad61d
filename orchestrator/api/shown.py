"""An answer, or an error, for somebody who sees some teams alone: nothing in it names another team's tasks. Pure.

Rows of other teams' tasks are left out, and counted in `hidden`; in sentences their names are replaced. It is done to
whatever a request answers, by what a name looks like and not by where it stands: a field that is added later is safe as
it is. Version numbers, sizes and counts stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import OnebasisError

_NAME = r"[a-z0-9][a-z0-9._-]{0,62}"
_TITLE = re.compile(rf"{_NAME}/{_NAME}")
_TITLE_IN_TEXT = re.compile(rf"(?<![\w./-]){_NAME}/{_NAME}")
_TASK_ID = re.compile(r"\bt[0-9a-f]{21}\b")
ID_LENGTH = 22
"""Characters of a task's id: shorter texts hold none."""
ANOTHER = "another team's task"
"""What stands for its name, and for its id."""
OF_A_TEAM = ("waiting", "teams")
"""Fields of `status` whose keys are teams."""
IN_DOUBT = "in_doubt"
"""Field of `status` that lists what anybody asked for, with its keys."""


@dataclass(frozen=True)
class Eyes:
    """What somebody sees.

    Args:
        teams: Teams whose tasks it sees.
        others: Names of all other teams that there are.
        is_own: Whether an id is that of a task of its teams.
        said: Names and ids that it wrote into its request: an error that quotes them says nothing new, and must not be
            another one for a task that is there.
    """

    teams: frozenset[str]
    others: frozenset[str]
    is_own: Callable[[str], bool]
    said: frozenset[str] = frozenset()

    def sees_title(self, title: str) -> bool:
        """Whether `team/name` is one of its tasks."""
        return title.partition("/")[0] in self.teams

    def text(self, text: str) -> str:
        """A sentence without other teams' tasks."""
        told = text
        if "/" in text:  # else it names none, and most texts of an answer do not
            told = _TITLE_IN_TEXT.sub(lambda found: ANOTHER if self._hides(found[0]) else found[0], text)
        if len(told) < ID_LENGTH:
            return told
        return _TASK_ID.sub(lambda found: found[0] if found[0] in self.said or self.is_own(found[0]) else ANOTHER, told)

    def _hides(self, title: str) -> bool:
        return title not in self.said and title.partition("/")[0] in self.others


def names_in(value: Any) -> frozenset[str]:
    """Every `team/name` and every task id that stands anywhere in a request."""
    texts = list(_texts(value))
    return frozenset(name for text in texts for names in (_TITLE_IN_TEXT, _TASK_ID) for name in _all(names, text))


def task_ids_in(value: Any) -> set[str]:
    """Every task id that stands anywhere in an answer."""
    return {found for text in _texts(value) if len(text) >= ID_LENGTH for found in _all(_TASK_ID, text)}


def shown(answer: Any, eyes: Eyes) -> Any:
    """The answer without what the caller does not see."""
    if isinstance(answer, bytes):  # an export: its task was looked for before
        return answer
    return _seen(answer, eyes)


def shown_error(error: OnebasisError, eyes: Eyes) -> OnebasisError:
    """The error without what the caller does not see."""
    return type(error)(*(_seen(argument, eyes) for argument in error.args))


def _seen(value: Any, eyes: Eyes) -> Any:
    match value:
        case str():
            return eyes.text(value)
        case None | bool() | int() | float():  # before Mapping, which is slow to ask for
            return value
        case Mapping():
            return _seen_mapping(value, eyes)
        case tuple() | list():
            return type(value)(_seen(item, eyes) for item in value if not _is_anothers(item, eyes))
    return value


def _seen_mapping(value: Mapping[str, Any], eyes: Eyes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    hidden: dict[str, int] = {}
    for name, inner in value.items():
        if name == "spec":  # of a task that the caller sees: it is what its team wrote
            found[name] = inner
        elif name in OF_A_TEAM and isinstance(inner, Mapping):
            found[name] = {team: _seen(facts, eyes) for team, facts in inner.items() if team in eyes.teams}
        elif name == IN_DOUBT:
            found[name] = []
        elif not _is_anothers(name, eyes):
            found[name] = _seen(inner, eyes)
            if isinstance(inner, list | tuple) and (count := sum(_is_anothers(item, eyes) for item in inner)):
                hidden[name] = count
    return found | ({"hidden": found.get("hidden", {}) | hidden} if hidden else {})


def _is_anothers(item: Any, eyes: Eyes) -> bool:
    """Whether an item of a list, or a key, stands for a task of another team."""
    if isinstance(item, str):
        if "/" not in item and len(item) < ID_LENGTH:
            return False
        is_title = _TITLE.fullmatch(item) is not None and item.partition("/")[0] in eyes.others
        return is_title or (_TASK_ID.fullmatch(item) is not None and not eyes.is_own(item))
    if isinstance(item, Mapping):
        named = [item[key] for key in ("title", "name") if isinstance(item.get(key), str) and "/" in item[key]]
        return any(not eyes.sees_title(title) for title in named if _TITLE.fullmatch(title))
    return False


def _all(pattern: re.Pattern[str], text: str) -> list[str]:
    return [found[0] for found in pattern.finditer(text)]


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, keys too, in any order."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case None | bool() | int() | float():  # before Mapping, which is slow to ask for
                pass
            case Mapping() as inner:
                yield from map(str, inner)
                waiting += inner.values()
            case list() | tuple() as inner:
                waiting += inner
