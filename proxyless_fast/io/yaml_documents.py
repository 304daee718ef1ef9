"""YAML documents: the plain part of YAML 1.2, read within limits, and written so that it is read as it was.

Mappings with string keys, lists, strings, numbers, true, false and null. What could hide something is refused by its
line: doubled keys, anchors, aliases, merge keys, tags, a second document. A plain scalar is a number where YAML 1.2
says so in decimal (9e-05, 5e-2, .5); what versions of YAML read differently (010, 0x10, 1_000, 1:30) stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .files import atomic
from .text import read_text, said, short

# A table of 50,000 operations; read in about a second.
MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 16 << 20, 500_000, 16, 64

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.nan|\.NaN|\.NAN")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class _Dumper(_Base):
    """Quotes every text that this module's reader would take for a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"({_FLOAT.pattern})$"), list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"({_INTEGER.pattern})$"), list("-+0123456789"))


def read_yaml(path: str | Path, what: str) -> Any:
    """What a YAML file holds; None for an empty one.

    Raises FileNotFoundError, or ValueError naming the file and the line for what is no YAML, or not of the plain part.
    """
    text = read_text(path, what, MAX_BYTES)
    try:
        return _Reader(text).document()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as {what}: {said(error)}") from error


def write_yaml(content: Any, path: str | Path) -> None:
    """Write a document; it appears under its name only when it is complete. Raises yaml.YAMLError for other objects."""
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class _Reader:
    """Builds the document from the parser's events, so that each limit holds before what passes it is built.

    PyYAML's own construction recurses in C, as deep as the file says.
    """

    def __init__(self, text: str) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self.nodes = 0

    def document(self) -> Any:
        content, documents = None, 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _fault(event, "expected one document, got a second")
                content = self.value(next(self.events), 1)
        return content

    def value(self, event: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise _fault(event, f"expected at most {MAX_DEPTH} levels, got more")
        if self.nodes > MAX_NODES:
            raise _fault(event, f"expected at most {MAX_NODES:,} values, got more")
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _fault(event, f"anchors and aliases are not taken, got {short(event.anchor)}")
        if event.tag is not None:
            raise _fault(event, f"tags are not taken, got {short(event.tag)}")
        if isinstance(event, yaml.ScalarEvent):
            return _resolve(event) if event.implicit[0] else event.value
        if isinstance(event, yaml.SequenceStartEvent):
            return [self.value(item, depth + 1) for item in self.until(yaml.SequenceEndEvent)]
        found: dict[str, Any] = {}
        for item in self.until(yaml.MappingEndEvent):
            key = self.value(item, depth + 1)
            if not isinstance(key, str):
                raise _fault(item, f"expected text as a key, got {short(key)}")
            if key in found:
                raise _fault(item, f"the key {short(key, 120)} stands twice")
            if key == "<<" and item.implicit[0]:
                raise _fault(item, "merge keys (<<) are not taken")
            found[key] = self.value(next(self.events), depth + 1)
        return found

    def until(self, end: type) -> Iterator[Any]:
        for event in self.events:
            if isinstance(event, end):
                return
            yield event


def _resolve(event: Any) -> Any:
    """A plain scalar by YAML 1.2's core schema, numbers in decimal only."""
    text = event.value
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise _fault(event, f"expected numbers of at most {MAX_DIGITS} digits, got one of {len(text)}")
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "", 1)) if _SPECIAL.fullmatch(text) else text


def _fault(event: Any, sentence: str) -> ValueError:
    return ValueError(f"line {event.start_mark.line + 1}: {sentence}")
