"""Reading a YAML file, with every value bounded and no value guessed.

Programs read some words of YAML in two ways: `no` is false to those of YAML 1.1 (PyYAML, which is ours) and a text to
those of YAML 1.2; `010` is 8 or 10, `1e3` a text or 1000, `1:30` is 90 or a text, `2024-01-01` a date or a text. Where
that matters the schema alone can say, so each such word is kept beside its value, see `Word`, and configs/document.py
refuses it where the readings differ in what they would do.

A document is made of the parser's events, not by PyYAML's composer: so an alias is counted wherever it stands before
anything is built of it, and depth has a limit.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InvalidInput
from configs.limits import DEPTH_MAX, KEYS_MAX, VALUES_MAX, check_values, read_bytes, short, short_text, too_deep

_TAG = "tag:yaml.org,2002:"
_MERGE = "<<"
_WHOLE = re.compile(r"[-+]?[0-9]+")
_WHOLE_OF_BASE = re.compile(r"0o([0-7]+)|0x([0-9a-fA-F]+)")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_DIGITS_MAX = 40
"""Characters of a number; Python takes quadratic time to read a longer one."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Reading:
    """What a word means to one kind of program."""

    kind: str
    """`text`, `number`, `boolean`, `nothing` or `date`."""
    value: Any

    def __str__(self) -> str:
        names = {"text": "a text", "date": "a date", "nothing": "nothing"}
        return names.get(self.kind) or f"the {self.kind} {self.written}"

    @property
    def written(self) -> str:
        """How to write it so that all programs read it like this."""
        return json.dumps(self.value)


@dataclass(frozen=True)
class Word:
    """A value that was written without quotes, and what programs make of it."""

    text: str
    ours: Reading
    other: Reading
    """The reading of YAML 1.2."""

    @property
    def is_clear(self) -> bool:
        """Whether all programs read the same."""
        return (self.ours.kind, repr(self.ours.value)) == (self.other.kind, repr(self.other.value))

    def __str__(self) -> str:
        how = f"write '{self.text}' in quotes for a text"
        if self.is_clear:
            return f"`{self.text}` is {self.ours}; {how}"
        for reading in (self.ours, self.other):
            if reading.kind not in ("text", "date"):
                how += f", or {reading.written} for {reading}"
        return f"`{self.text}` is {self.ours} to some programs and {self.other} to others; {how}"


Words = Mapping[tuple[Any, ...], Word]
"""Path of a value to the word that it was written as; of texts those alone that another program reads as another
value."""


@dataclass(frozen=True)
class YamlFile:
    """What a YAML file says."""

    values: Any
    words: Words


def read_yaml(path: Path) -> YamlFile:
    """The values in a YAML file, not checked against a schema.

    Raises:
        InvalidInput: The file is missing, no plain file or not YAML, or it holds what no document may hold.
        TooLarge: It has too many bytes.
    """
    return yaml_of(read_bytes(path), str(path))


def yaml_of(content: bytes, where: str) -> YamlFile:
    """The same of a file's content. where: What it is called. Raises InvalidInput, as `read_yaml`."""
    text = _decoded(content, where)
    import yaml  # not needed by a command that only asks a running service

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(where).file(yaml.parse(text, loader))
    except yaml.YAMLError as error:
        todo = "fix the syntax at that line"
        if re.search(r"^ *\t", text, re.MULTILINE):
            todo = "indent with spaces: YAML takes no tabs there"
        raise InvalidInput(f"is not valid YAML: {_syntax_problem(error)}", where, todo) from None


def _decoded(content: bytes, where: str) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        what = f"is not {encoding.removesuffix('-sig').upper()} text: byte {error.start} is {content[error.start]:#04x}"
        raise InvalidInput(f"cannot read the file: it {what}", where, "save it as UTF-8") from error


def _syntax_problem(error: Any) -> str:
    """What YAML says and where, without the line itself, which may hold a password."""
    parts = [str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    if (mark := getattr(error, "problem_mark", None)) is not None:
        parts.append(f"line {mark.line + 1}, column {mark.column + 1}")
    return ", ".join(parts) or str(error)


@dataclass(frozen=True)
class _Node:
    """A part of the document. `size`: values in it; `height`: levels below it."""

    line: int
    tag: str
    """Empty where none was written."""
    size: int = 1
    height: int = 0
    text: str = ""
    is_plain: bool = False
    """Whether it is a scalar without quotes."""
    items: tuple[_Node, ...] | None = None
    pairs: tuple[tuple[_Node, _Node], ...] | None = None


@dataclass
class _Builder:
    """Makes values of events."""

    where: str
    anchors: dict[str, _Node] = field(default_factory=dict)
    words: dict[tuple[Any, ...], Word] = field(default_factory=dict)

    def file(self, events: Iterator[Any]) -> YamlFile:
        import yaml

        root = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._wrong(event, "a second document begins there", "write one document per file")
                root = self._node(next(events), events, 0)
        if root is None:
            raise InvalidInput("holds nothing", self.where, "write keys and values into it")
        values = self._value(root, ())
        check_values(values, self.where)
        return YamlFile(values, self.words)

    def _wrong(self, at: Any, what: str, todo: str = "correct that line") -> InvalidInput:
        line = at.line if isinstance(at, _Node) else at.start_mark.line + 1
        return InvalidInput(f"line {line}: {what}", self.where, todo)

    # --- events to nodes ---------------------------------------------------------------------------------------

    def _node(self, event: Any, events: Iterator[Any], depth: int) -> _Node:
        import yaml

        if depth > DEPTH_MAX:
            raise too_deep(self.where)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self._wrong(event, f"*{short(event.anchor)} stands for nothing that ends before it")
            return self.anchors[event.anchor]
        line, tag = event.start_mark.line + 1, event.tag or ""
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(line, tag, text=event.value, is_plain=bool(event.implicit[0]) and not tag)
        else:
            end = yaml.SequenceEndEvent if isinstance(event, yaml.SequenceStartEvent) else yaml.MappingEndEvent
            children, size = [], 1
            while not isinstance(inner := next(events), end):
                children.append(self._node(inner, events, depth + 1))
                size += children[-1].size
                if len(children) > 2 * KEYS_MAX and end is yaml.MappingEndEvent:
                    raise self._wrong(inner, f"a mapping has more than {KEYS_MAX:,} keys by then", "write fewer")
                if size > VALUES_MAX:
                    what = f"has more than {VALUES_MAX:,} values by then, those of aliases counted wherever they stand"
                    raise self._wrong(inner, what, "write fewer")
            height = 1 + max((child.height for child in children), default=0)
            if depth + height > DEPTH_MAX:
                raise too_deep(self.where)
            if isinstance(event, yaml.SequenceStartEvent):
                node = _Node(line, tag, size, height, items=tuple(children))
            else:
                node = _Node(line, tag, size, height, pairs=tuple(zip(children[::2], children[1::2], strict=True)))
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    # --- nodes to values ---------------------------------------------------------------------------------------

    def _value(self, node: _Node, path: tuple[Any, ...]) -> Any:
        if len(path) > DEPTH_MAX:  # an alias may stand deeper than what it names
            raise too_deep(self.where)
        if node.pairs is not None:
            self._expect(node, "map")
            return {key: self._value(value, (*path, key)) for key, value in self._pairs(node).items()}
        if node.items is not None:
            self._expect(node, "seq")
            return [self._value(item, (*path, number)) for number, item in enumerate(node.items)]
        if not node.is_plain and node.tag in ("", "!", f"{_TAG}str"):
            return node.text
        word = self._word(node)
        if node.tag:
            names = {"int": "number", "float": "number", "bool": "boolean", "null": "nothing"}
            if names.get(node.tag.removeprefix(_TAG)) != word.ours.kind:
                raise self._unknown_tag(node)
        elif word.ours.kind != "text" or not word.is_clear:
            self.words[path] = word
        return word.ours.value

    def _pairs(self, node: _Node) -> dict[str, _Node]:
        """The keys of a mapping with what stands behind them. Those merged in with `<<` give way to its own, and of
        several mappings those of a later one to those of an earlier."""
        own: dict[str, _Node] = {}
        merged: dict[str, _Node] = {}
        has_merged = False
        for key_node, value in node.pairs or ():
            key, merges = self._key(key_node), key_node.is_plain and key_node.text == _MERGE
            if has_merged if merges else key in own:
                raise self._wrong(key_node, f"the key {short(key)} stands twice", "keep one of them")
            if not merges:
                own[key] = value
                continue
            has_merged = True
            for source in (value,) if value.items is None else value.items:
                if source.pairs is None:
                    raise self._wrong(source, f"{_MERGE} takes a mapping, or a list of mappings")
                for name, inner in self._pairs(source).items():
                    merged.setdefault(name, inner)
        return merged | own

    def _key(self, node: _Node) -> str:
        if node.items is not None or node.pairs is not None:
            raise self._wrong(node, "a list or a mapping is no key", "write a text in front of the colon")
        if node.is_plain and node.text != _MERGE:
            word = self._word(node)
            if word.ours.kind != "text" or not word.is_clear:
                raise self._wrong(node, f"the key {word}")
        return node.text

    def _expect(self, node: _Node, kind: str) -> None:
        if node.tag not in ("", "!", _TAG + kind):
            raise self._unknown_tag(node)

    def _unknown_tag(self, node: _Node) -> InvalidInput:
        tag = node.tag.replace(_TAG, "!!", 1)
        return self._wrong(node, f"{short(tag)} is no plain value", "write values only: no objects of a program")

    def _word(self, node: _Node) -> Word:
        return Word(short_text(node.text) if len(node.text) > 80 else node.text, _ours(node.text), _other(node.text))


def _ours(text: str) -> Reading:
    """As PyYAML reads it; a date stays a text, since nothing here wants a date."""
    import yaml

    node = yaml.ScalarNode(_TAG + "str", text)
    tag: str = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    kind = tag.removeprefix(_TAG)
    if kind in ("null", "bool", "int", "float") and len(text) <= _DIGITS_MAX:
        constructor = yaml.constructor.SafeConstructor()
        read = getattr(constructor, f"construct_yaml_{kind}")
        names = {"null": "nothing", "bool": "boolean"}
        try:
            return Reading(names.get(kind, "number"), read(node))
        except ValueError:  # `0b_`: a number by its form alone
            return Reading("text", text)
    return Reading("text", text)


def _other(text: str) -> Reading:
    """As the core schema of YAML 1.2 says; a date as those read it who know dates."""
    if text in ("", "~", "null", "Null", "NULL"):
        return Reading("nothing", None)
    if text.lower() in ("true", "false") and text in (text.lower(), text.upper(), text.capitalize()):
        return Reading("boolean", text.lower() == "true")
    if len(text) <= _DIGITS_MAX:
        if _WHOLE.fullmatch(text):
            return Reading("number", int(text))
        if of_base := _WHOLE_OF_BASE.fullmatch(text):
            return Reading("number", int(of_base[1], 8) if of_base[1] else int(of_base[2], 16))
        if _REAL.fullmatch(text):
            return Reading("number", float(re.sub(r"\.(?=inf|nan)", "", text.lower())))
    if re.match(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}($|[Tt ]|\s)", text):
        return Reading("date", text)
    return Reading("text", text)
