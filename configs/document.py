"""Making a frozen, checked record of a document that a person wrote, or of a request.

Every mistake is reported at once, each with the path of its key and, for a misspelt key, the nearest right one. How
YAML becomes values is in configs/yaml_file.py, what any document may hold in configs/limits.py.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from configs.errors import InvalidInput
from configs.limits import check_values, key_path, short, short_text
from configs.plain_text import odd_character
from configs.yaml_file import Word, Words, read_yaml

# pydantic looks for plugins in the metadata of all installed packages, 200 files, before it builds the first validator:
# a tenth of what a command that only reads costs. onebasis has none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

# A name of a team, task, tag: safe in a path, a URL, a metric name and a shell.
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class Section(BaseModel):
    """A part of a document: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )


MISTAKES_MAX = 20
"""Mistakes that are told of one document: who has more mends these first."""
KEY_LENGTH_MAX = 60
"""Characters of a key that may be a misspelt one: comparing takes the square of them."""
MESSAGE_MAX = 500
"""Characters of one mistake's message: a rule's own words may quote a long value."""

LINE_MAX = 2000
"""Characters: a reason is a sentence or two, and the log keeps it for ever."""


def _one_line(text: str) -> str:
    """Refuse what a terminal, a log or a database would take for something else than text."""
    if odd_character(text) is not None:
        raise ValueError("must be one line of plain text, without control characters or halves of characters")
    return text


Line = Annotated[str, Field(max_length=LINE_MAX), AfterValidator(_one_line)]
"""A sentence that a person or a program wrote: one line of text."""


VersionNumber = Annotated[int, Field(ge=0, le=2**53, description="the number of a version: 0, 1, 2, …")]
"""Of a subspace; 0 is the empty one. No larger than what JSON's readers keep exactly."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
OfBaseModel = Annotated[Name | None, Field(description="the name of a base model of this service")]
"""Base model that is meant; None: the only one. Where a service has several, None is refused with their names."""
Title = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}/[a-z0-9][a-z0-9._-]{0,62}$")]
"""`team/name` of a task."""


class Request(Section):
    """What a program asks: a frozen record whose values are taken as they are, never converted.

    Raises:
        InvalidInput: When it is made with values of wrong types or with unknown fields; names each.
    """

    model_config = ConfigDict(strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refused(error, type(self)) from error

    # Read from JSON, a record is not made by way of __init__, which knows Python's types alone.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def from_http(cls, in_path: Mapping[str, str], query: Mapping[str, str], body: bytes | None) -> Self:
        """The record that came in over HTTP.

        Args:
            in_path, query: Strings, read as what the fields are.
            body: A JSON object with the other fields, or None where the request has none. Its values must have the
                right types: "1" is no number there.

        Raises:
            InvalidInput: A value of another type, an unknown field, a field that stands in two places.
        """
        where = cls.__name__
        try:
            check_values({**query, **in_path}, where)
            if body is None:
                return cls.model_validate_strings({**query, **in_path})
            if query:
                raise InvalidInput(f"has parameters after the question mark: {', '.join(query)}", where, "use the body")
            fields = read_json(body or b"{}")
            check_values(fields, where)
            if not isinstance(fields, dict):
                raise InvalidInput("the body is not a JSON object", where, "send one")
            if both := sorted({*fields} & {*in_path}):
                raise InvalidInput(f"stands in the path and in the body: {', '.join(both)}", where, "say it once")
            placed = _strings_as_json(cls, in_path)
            return cls.model_validate_json(pydantic_core.to_json({**fields, **placed}), strict=True)
        except ValidationError as error:
            raise _refused(error, cls) from error
        except (ValueError, RecursionError) as error:  # no JSON, a number without end, half a character
            raise InvalidInput(
                f"the body is not JSON: {short_text(str(error))}", where, "send a JSON object"
            ) from error


def read_json(content: bytes) -> Any:
    """The values in a JSON document. A key that stands twice, a number without end or with thousands of digits is a
    mistake.

    Raises:
        ValueError, RecursionError: It is no JSON, or deeper than Python reads.
    """
    return json.loads(content, object_pairs_hook=_each_once, parse_constant=_no_number)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} stands twice")
        found[key] = value
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _strings_as_json(kind: type[Request], strings: Mapping[str, str]) -> dict[str, Any]:
    """What stands in a path, as the types that the record's fields have."""
    known = {name: kind.model_fields[name] for name in strings}
    reader = create_model("InPath", **{name: (field.annotation, field) for name, field in known.items()})  # type: ignore[call-overload]
    return dict(reader.model_validate_strings(dict(strings)).model_dump())


T = TypeVar("T", bound=Section)


def read_document(path: Path, kind: type[T]) -> T:
    """Read and check one YAML file.

    Raises:
        InvalidInput: The file is missing, is no YAML mapping, or breaks the schema; names every key path.
    """
    file = read_yaml(path)
    return check_document(file.values, kind, str(path), file.words)


def without_password(text: str) -> str:
    """The same text without the password of any URL in it: for everything that is shown or logged."""
    return re.sub(r"(?<=://)([^\s:/@]*):[^\s]*@", r"\1:***@", text)


def check_document(values: Any, kind: type[T], where: str, words: Words = MappingProxyType({})) -> T:
    """Check values against a schema.

    Args:
        words: What of them was written in YAML without quotes.

    Raises:
        InvalidInput: With one line per mistake; a word that can be read in two ways is one, where they differ in what
            they would do.
    """
    check_values(values, where)
    if not isinstance(values, dict):
        raise InvalidInput(f"must be a mapping of keys to values, not {type(values).__name__}", where)
    try:
        made = kind.model_validate(values)
    except ValidationError as error:
        raise told(error, kind, where, words) from error
    # `true` is 1 to Python, and nobody means that.
    if truths := [(path, value) for path, value in _truths(values) if type(_at(made, path)) in (int, float)]:
        lines = [f"{key_path(path)}: has to be a number, not {str(value).lower()}" for path, value in truths]
        raise InvalidInput(_listed(lines), where, "correct the keys named above")
    unclear = [f"{key_path(path)}: {word}" for path, word in words.items() if _is_unclear(word, made, path)]
    if unclear:
        raise InvalidInput(_listed(unclear), where, "say which is meant")
    return made


def _truths(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], bool]]:
    """Each `true` and `false` in a document, with its place."""
    if isinstance(values, bool):
        yield path, values
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for part, value in parts:
        yield from _truths(value, (*path, part))


def _at(made: Section, path: tuple[Any, ...]) -> Any:
    """The value at a place in a document; None where the document has none."""
    value: Any = made
    for part in path:
        if isinstance(value, Section):
            names = {field.alias or name: name for name, field in type(value).model_fields.items()}
            value = getattr(value, names.get(part, ""), None)
        elif isinstance(value, Mapping):
            value = value.get(part)
        else:
            value = value[part] if isinstance(value, list | tuple) and part < len(value) else None
    return value


def _is_unclear(word: Word, made: Section, path: tuple[Any, ...]) -> bool:
    """Whether other programs would make another value of the word at its place in the document."""
    value = _at(made, path)
    if isinstance(value, str):
        return not word.is_clear
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return value != (float(word.text) if word.other.kind == "text" else word.other.value)
        except ValueError:  # to the others it is no number
            return True
    return False


def told(error: ValidationError, kind: type[Section], where: str, words: Words = MappingProxyType({})) -> InvalidInput:
    """Every mistake, each with its key path, up to so many that a person reads."""
    # A default that depends on a field with a mistake is no mistake of its own.
    mistakes = [m for m in error.errors(include_url=False) if m["type"] != "default_factory_not_called"]
    lines = [_describe(mistake, kind, words) for mistake in islice(mistakes, MISTAKES_MAX)]
    if (more := len(mistakes) - len(lines)) > 0:
        lines.append(f"and {more:,} more")
    return InvalidInput(_listed(lines), where, "correct the keys named above; every key is described in configs/")


def _refused(error: ValidationError, kind: type[Request]) -> InvalidInput:
    """As `told`, of a request: it names each argument, and what is right there."""
    found = told(error, kind, kind.__name__)
    names = dict.fromkeys(str(mistake["loc"][0]) for mistake in error.errors(include_url=False) if mistake["loc"])
    if "task" in names:  # a document in a request
        return found
    right = [f"{name} is {field.description}" for name, field in kind.model_fields.items() if field.description]
    todo = "; ".join(words for words in right if words.partition(" ")[0] in names)
    return InvalidInput(found.what, found.where, todo or "correct what is named above; /openapi.json describes it")


def _listed(lines: Sequence[str]) -> str:
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def _describe(mistake: Any, kind: type[Section], words: Words) -> str:
    path = without_password(key_path(mistake["loc"]))
    if mistake["type"] == "extra_forbidden":
        known, key = _keys_at(kind, mistake["loc"][:-1]), str(mistake["loc"][-1])
        near = difflib.get_close_matches(key, known, n=1) if len(key) <= KEY_LENGTH_MAX else []
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{path}' ({hint})"
    if mistake["type"] == "string_type" and (word := words.get(mistake["loc"])) is not None:
        return f"{path}: {word}"
    in_our_words = (_in_our_words(mistake) if issubclass(kind, Request) else "") or _without_jargon(mistake)
    message, got = in_our_words or mistake["msg"].removeprefix("Value error, "), mistake["input"]
    if not issubclass(kind, Request):
        if mistake["type"] == "missing":
            return f"{path} is missing{_wanted(kind, mistake['loc'])}"
        if mistake["type"] in ("string_pattern_mismatch", "string_type"):
            message += _wanted(kind, mistake["loc"])
    # A whole section is not shown: it may hold a password.
    place = f"{path}: " if mistake["loc"] else ""
    return f"{place}{message[:MESSAGE_MAX]}" + (
        "" if isinstance(got, dict) else f" (got {without_password(short(got))})"
    )


def _wanted(kind: type[Section], location: tuple[Any, ...]) -> str:
    """What a person is to write there, where the schema says it."""
    fields = {field.alias or name: field for name, field in _section_at(kind, location[:-1]).model_fields.items()}
    said = field.description if (field := fields.get(location[-1])) else None
    return f": {said}" if said else ""


def _without_jargon(mistake: Any) -> str:
    """What is wrong, where pydantic says it in words of Python; else empty."""
    is_nothing = mistake["input"] is None
    match mistake["type"]:
        case "string_pattern_mismatch" if mistake["ctx"]["pattern"] == NAME_PATTERN:
            return "has to be lower-case letters, digits, and . _ - after the first, 63 characters at most"
        case "tuple_type" | "list_type":
            one = mistake["input"] if isinstance(mistake["input"], str | int | float) else "first, second"
            return f"has to be a list, written as [{short_text(str(one))}]"
        case "too_short":
            return f"needs {mistake['ctx']['min_length']} or more of a list"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "is empty: write its keys below it, or take it out" if is_nothing else "has to be a mapping of keys"
        case "string_type" if is_nothing:
            return "is empty: write a text, or take it out"
    return ""


def _in_our_words(mistake: Any) -> str:
    """What is wrong with an argument, where pydantic would say it with more words; else empty."""
    limits = mistake.get("ctx", {})
    match mistake["type"]:
        case "string_too_short" | "too_short" if not mistake["input"]:
            return "is empty"
        case "greater_than_equal":
            return f"has to be {limits['ge']} or more"
        case "less_than_equal":
            return f"has to be {limits['le']} at most"
    return ""


def _keys_at(kind: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Names of the keys that the schema knows at a location."""
    return [field.alias or name for name, field in _section_at(kind, location).model_fields.items()]


def _section_at(kind: type[Section], location: tuple[Any, ...]) -> type[Section]:
    """The innermost section on the way to a location."""
    section = kind
    for part in location:
        if (field := section.model_fields.get(part)) is not None:
            section = _section_in(field.annotation) or section
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as `Section | None` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
