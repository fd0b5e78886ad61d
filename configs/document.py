"""Reading a YAML document that a person wrote into a frozen, checked record.

Every mistake is reported at once, each with the path of its key and, for a misspelt key, the nearest right one.
YAML holds values only: `yaml.safe_load`, never Python objects.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from configs.errors import InvalidInput

# A name of a team, task, tag: safe in a path, a URL, a metric name and a shell.
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class Section(BaseModel):
    """A part of a document: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )


LINE_MAX = 2000
"""Characters: a reason is a sentence or two, and the log keeps it for ever."""


def _one_line(text: str) -> str:
    """Refuse what a terminal, a log or a database would take for something else than text."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError("must be one line of plain text, without control characters or halves of characters")
    return text


Line = Annotated[str, Field(max_length=LINE_MAX), AfterValidator(_one_line)]
"""A sentence that a person or a program wrote: one line of text."""


VersionNumber = Annotated[int, Field(ge=0, le=2**53)]
"""Of a subspace; 0 is the empty one. No larger than what JSON's readers keep exactly."""
Name = Annotated[str, Field(pattern=NAME_PATTERN)]


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
            raise told(error, type(self), type(self).__name__) from error

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
            if body is None:
                return cls.model_validate_strings({**query, **in_path})
            if query:
                raise InvalidInput(f"has parameters after the question mark: {', '.join(query)}", where, "use the body")
            fields = json.loads(body or b"{}", object_pairs_hook=_each_once, parse_constant=_no_number)
            if not isinstance(fields, dict):
                raise InvalidInput("the body is not a JSON object", where, "send one")
            if both := sorted({*fields} & {*in_path}):
                raise InvalidInput(f"stands in the path and in the body: {', '.join(both)}", where, "say it once")
            placed = _strings_as_json(cls, in_path)
            return cls.model_validate_json(pydantic_core.to_json({**fields, **placed}), strict=True)
        except ValidationError as error:
            raise told(error, cls, where) from error
        except (ValueError, RecursionError) as error:  # no JSON, a number without end, half a character
            raise InvalidInput(f"the body is not JSON: {error}", where, "send a JSON object") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key that stands twice is a mistake, not a way to say the second."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
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
    return check_document(read_yaml(path), kind, str(path))


def read_yaml(path: Path) -> Any:
    """The values in a YAML file, unchecked.

    Raises:
        InvalidInput: The file is missing or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "check the path") from error
    import yaml  # not needed by who only asks a running service

    class Loader(yaml.SafeLoader):
        """Plain values only; and a key that is written twice is a mistake, not a way to say the second."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", node.start_mark
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InvalidInput(f"is not valid YAML: {_problem(error)}", str(path), "fix the syntax at that line") from None


def without_password(text: str) -> str:
    """The same text without the password of any URL in it: for everything that is shown or logged."""
    return re.sub(r"(?<=://)([^\s:/@]*):[^\s]*@", r"\1:***@", text)


def _problem(error: Any) -> str:
    """What YAML says and where, without the line itself, which may hold a password."""
    parts = [str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    if (mark := getattr(error, "problem_mark", None)) is not None:
        parts.append(f"line {mark.line + 1}, column {mark.column + 1}")
    return ", ".join(parts) or str(error)


def check_document(values: Any, kind: type[T], where: str) -> T:
    """Check values that were read elsewhere (an HTTP body) against a schema.

    Raises:
        InvalidInput: With one line per mistake.
    """
    if not isinstance(values, dict):
        raise InvalidInput(f"must be a mapping of keys to values, not {type(values).__name__}", where)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise told(error, kind, where) from error


def told(error: ValidationError, kind: type[Section], where: str) -> InvalidInput:
    """Every mistake, each with its key path."""
    lines = [_describe(mistake, kind) for mistake in error.errors()]
    return InvalidInput(
        lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines),
        where,
        "correct the keys named above; every key is described in configs/",
    )


def _describe(mistake: Any, kind: type[Section]) -> str:
    path = without_password(".".join(str(part) for part in mistake["loc"])) or "(document)"
    if mistake["type"] == "extra_forbidden":
        known = _keys_at(kind, mistake["loc"][:-1])
        near = difflib.get_close_matches(str(mistake["loc"][-1]), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key '{path}' ({hint})"
    message, got = mistake["msg"].removeprefix("Value error, "), mistake["input"]
    # A whole section is not shown: it may hold a password.
    return f"{path}: {message}" + ("" if isinstance(got, dict) else f" (got {without_password(repr(got)):.80})")


def _keys_at(kind: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Names of the keys that the schema knows at a location."""
    section: Any = kind
    for part in location:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            continue
        found = _section_in(field.annotation)
        section = found or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[Section] | None:
    """The Section inside an annotation such as `Section | None` or `dict[str, Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
