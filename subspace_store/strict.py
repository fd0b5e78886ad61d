"""What a method of a subspace may be handed: values of the right types, or InvalidInput before anything is done.

Values are taken as they are, never converted: "1" is no version, "no" no boolean, and a string no list of ids.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import unicodedata
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, validate_call

from configs.document import LINE_MAX, Line
from configs.errors import InvalidInput

TEXT_MAX = 200_000
"""Characters of a text of several lines: why a version of a thousand tasks was rejected."""
LATEST = 253402300799.0
"""The end of the year 9999 in Unix seconds: what a calendar can show."""


def _is_bad(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"


def _plain(text: str) -> str:
    if any(map(_is_bad, text)):
        raise ValueError("must be plain text, without control characters or halves of characters")
    return text


Text = Annotated[str, Field(max_length=TEXT_MAX), AfterValidator(_plain)]
"""Of several lines."""


def as_text(words: str) -> str:
    """What somebody else wrote (a library, a worker), as a `Text`: what is no plain text becomes a space."""
    cut = words if len(words) <= TEXT_MAX else f"{words[: TEXT_MAX - 1]}…"
    return "".join(" " if _is_bad(character) else character for character in cut)


def as_escaped_text(words: str) -> str:
    """As `as_text`; what is no plain text is shown as Python writes it: \\x1b, \\ud800."""
    cut = words if len(words) <= TEXT_MAX else f"{words[: TEXT_MAX - 1]}…"
    if not any(map(_is_bad, cut)):
        return cut
    return "".join(repr(character)[1:-1] if _is_bad(character) else character for character in cut)


def as_line(words: str) -> str:
    """The beginning of a reason, as long as a `Line` may be: before release 0.4 one could have any length."""
    return words if len(words) <= LINE_MAX else f"{words[: LINE_MAX - 1]}…"


TaskId = Annotated[Line, Field(min_length=1)]
Moment = Annotated[float, Field(ge=0, le=LATEST, allow_inf_nan=False)]
"""Unix seconds."""

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True, revalidate_instances="always")


def strict(method: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """The same method; arguments that are not what its annotations say are refused before it begins.

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
    """Arguments to the same arguments, checked. Made at the first call, when all that annotations name is there."""

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
    """What annotations may name beside their file's own globals: what the package exports. A file that loads no torch
    imports `Adapter` for the type checker alone."""

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
    except Exception:  # what a stranger handed over may not even be able to say what it is
        return type(value).__name__
