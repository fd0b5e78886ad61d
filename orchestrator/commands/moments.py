"""A moment that has passed, as a person types it: read in one way, or refused with an example."""

from __future__ import annotations

import re
import time
from datetime import datetime, timedelta

from configs.errors import InvalidInput

EXAMPLES = "write 2026-11-30, 2026-11-30 14:05, 2026-11-30T14:05:00+01:00, or '2h ago' (s, min, h, d, w)"
UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_WRITTEN = re.compile(r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?(Z|[+-]\d{2}:\d{2})?)?")
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,6})?) ?([a-z]+) ago")


def moment(text: str, now: float | None = None) -> float:
    """The Unix time of what somebody typed.

    Args:
        text: A date (its first moment), a date with a time, either of them in the time zone of this machine, a time
            with its offset from UTC, or how long ago: `2h ago`.
        now: Unix time that `ago` counts from; default: now.

    Raises:
        InvalidInput: Anything else, a moment to come, or a local time that the clocks passed twice or left out.
    """
    now = time.time() if now is None else now
    if found := _AGO.fullmatch(text.strip()):
        if found[2] not in UNITS:
            raise InvalidInput(f"'{found[2]}' is no unit", "--at", EXAMPLES)
        return now - timedelta(**{UNITS[found[2]]: float(found[1])}).total_seconds()
    if not _WRITTEN.fullmatch(text.strip()):
        raise InvalidInput(f"{text!r:.80} is not a moment", "--at", EXAMPLES)
    try:
        written = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise InvalidInput(f"{text!r:.80} is not a moment: {error}", "--at", EXAMPLES) from error
    at = written.timestamp() if written.tzinfo else _local(written)
    if at > now:
        raise InvalidInput(f"{shown(at)} has not come yet", "--at", "name a moment that has passed")
    return at


def shown(at: float) -> str:
    """A moment in the time zone of this machine, with its offset from UTC: so it is seen which one was taken."""
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")


def _local(written: datetime) -> float:
    early, late = (written.replace(fold=fold).astimezone() for fold in (0, 1))
    if early.utcoffset() != late.utcoffset():
        what = "the clocks here were changed then, and passed it twice or not at all"
        raise InvalidInput(what, "--at", f"add the offset from UTC: {early.isoformat()} or {late.isoformat()}")
    return early.timestamp()
