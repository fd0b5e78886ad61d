"""Checks the arguments of a subspace's methods: values of the right types, or InvalidInput before anything is done.

Values are never converted: the text "1" is not a version, "no" is not a boolean, and a text is not a list of ids.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, validate_call

from configs.document import LINE_MAX, Line
from configs.errors import InvalidInput
from configs.plain_text import blanked, escaped

TEXT_MAX = 200_000
"""Most characters of a text of several lines, such as the reason why a version of a thousand tasks was rejected."""
LATEST = 253402300799.0
"""The end of the year 9999 in Unix seconds: what a calendar can show."""


def _plain(text: str) -> str:
    if escaped(text) != text:
        raise ValueError("must be plain text, without control characters or halves of characters")
    return text


Text = Annotated[str, Field(max_length=TEXT_MAX), AfterValidator(_plain)]
"""Text of several lines."""


def as_text(words: str) -> str:
    """A message of another program (a library, a worker) as a `Text`: characters that are not plain text become
    spaces."""
    return blanked(_cut(words, TEXT_MAX))


def as_escaped_text(words: str) -> str:
    """As `as_text`, but characters that are not plain text become escapes: \\x1b, \\ud800."""
    return escaped(_cut(words, TEXT_MAX))


def as_line(words: str) -> str:
    """The beginning of a reason, as long as a `Line` may be: before release 0.4 a reason could have any length."""
    return _cut(words, LINE_MAX)


def _cut(words: str, length: int) -> str:
    return words if len(words) <= length else f"{words[: length - 1]}…"


TaskId = Annotated[Line, Field(min_length=1)]
Moment = Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False)]
"""Unix seconds."""
Days = Annotated[float, Field(ge=0, le=36_500, allow_inf_nan=False)]
"""A time of at most a century."""

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True, revalidate_instances="always")


def strict(method: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Decorator of a method: arguments that do not fit its annotations are refused before it begins.

    Raises:
        InvalidInput: Names each argument that is wrong.
    """

    @functools.wraps(method)
    def checked(*args: Parameters.args, **keywords: Parameters.kwargs) -> Answer:
        try:
            taken, named = _check_of(method)(*args, **keywords)
        except ValidationError as error:
            raise _told(error, method) from error
        return method(*taken, **named)

    return checked


@functools.cache
def _check_of(method: Callable[..., Any]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A function that checks arguments. Made at the first call, when everything that the annotations name is
    defined."""

    @functools.wraps(method)
    def as_they_came(*args: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, keywords

    as_they_came.__annotations__ = {
        name: eval(hint, method.__globals__, _Exports()) if isinstance(hint, str) else hint
        for name, hint in method.__annotations__.items()
        if name != "return"
    }
    checked = validate_call(config=_CONFIG)(as_they_came)
    return cast("Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]", checked)


class _Exports(dict[str, Any]):
    """Names that annotations may use beside the globals of their own file: those that the package exports. A file that
    loads no torch imports `Adapter` for the type checker alone."""

    def __missing__(self, name: str) -> Any:
        package = importlib.import_module(__package__)
        if name not in package.__all__:
            raise KeyError(name)
        return getattr(package, name)


def _told(error: ValidationError, method: Callable[..., Any]) -> InvalidInput:
    names = list(inspect.signature(method).parameters)
    lines = []
    for mistake in error.errors():
        first, *rest = mistake["loc"]
        name = names[first] if isinstance(first, int) and first < len(names) else first
        path = ".".join(str(part) for part in (name, *rest))
        lines.append(f"{path}: {mistake['msg'].removeprefix('Value error, ')} (got {_shown(mistake['input'])})")
    what = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)
    return InvalidInput(what, f"{method.__name__}()", "hand over what its annotations say; nothing was done")


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # the __repr__ of a foreign object may fail
        return type(value).__name__
