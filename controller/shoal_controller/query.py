"""The filter language, one for API, CLI, dashboard, endpoints and rollout targets.

    status:degraded class:x86* p95>50 label.site:lab -name:test* (arch:aarch64 or cores>=8) kitchen

Terms side by side must all hold; `or` joins alternatives, `-` or `not` negates, brackets group. `:`
and `=` compare text with `*` as a wildcard and take several values (`status:offline,degraded`); `!=` is
their opposite; `<` `<=` `>` `>=` compare numbers, with units where they make sense (`p95>50ms`,
`memory>=2GB`). A bare word is looked for in name, id, class and labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedInput, VisitError
from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_controller.store.tables import Device
from shoal_protos.errors import InvalidInput
from shoal_protos.v1 import profile_pb2

MAX_LENGTH = 2000

GRAMMAR = r"""
?start: either?
?either: all (_OR all)*
?all: unary (_AND? unary)*
?unary: _NOT unary -> negation
      | "(" either ")"
      | COMPARISON -> comparison
      | WORD -> word
      | QUOTED -> quoted

COMPARISON.3: /[A-Za-z_]\w*(\.[\w.\/-]+)?(:|!=|>=|<=|=|>|<)("[^"]*"|[^\s()"]+)/
_OR.2: /(or|OR|\|\|?)(?=[\s("-]|$)/
_AND.2: /(and|AND|&&?)(?=[\s("-]|$)/
_NOT.2: /(not|NOT)(?=[\s("-])|-(?=\S)/
QUOTED: /"[^"]+"/
WORD: /[^\s():=<>!"|&-][^\s():=<>!"|]*/
%ignore /\s+/
"""

_PARSER = Lark(GRAMMAR, parser="lalr", maybe_placeholders=False)
_COMPARISON = re.compile(r'([A-Za-z_]\w*(?:\.[\w./-]+)?)(:|!=|>=|<=|=|>|<)("[^"]*"|.+)\Z', re.DOTALL)
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)\s*([A-Za-z%]*)\Z")
_UNITS = {
    "": 1.0,
    "us": 0.001,
    "ms": 1.0,
    "s": 1000.0,
    "c": 1.0,
    "%": 0.01,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 1024.0,
    "mib": 1024.0**2,
    "gib": 1024.0**3,
}

Facts = Mapping[str, Any]
"""What a filter looks at: field -> text, number, list of texts or None; `labels` a mapping."""
Predicate = Callable[[Facts], bool]


@dataclass(frozen=True)
class Field:
    kind: str  # "text" or "number"
    stable: bool  # does not change by itself, so it may decide what a device should have
    meaning: str


FIELDS: Mapping[str, Field] = {
    "status": Field("text", False, "healthy, updating, degraded, drifting, offline, revoked"),
    "class": Field("text", True, "profile class"),
    "name": Field("text", True, "device name"),
    "id": Field("text", True, "device id"),
    "project": Field("text", True, "project"),
    "arch": Field("text", True, "x86_64, aarch64..."),
    "runtime": Field("text", True, "an installed runtime"),
    "isa": Field("text", True, "an instruction set feature"),
    "accelerator": Field("text", True, "vendor-kind of an accelerator"),
    "cores": Field("number", True, "usable cores"),
    "memory": Field("number", True, "bytes of memory"),
    "endpoint": Field("text", False, "an endpoint it has"),
    "version": Field("text", False, "what it serves"),
    "variant": Field("text", False, "the variant it serves"),
    "agent": Field("text", False, "agent version"),
    "p50": Field("number", False, "latest median latency in ms"),
    "p95": Field("number", False, "latest 95th percentile of latency in ms"),
    "errors": Field("number", False, "latest share of failed requests"),
    "temperature": Field("number", False, "degrees Celsius"),
    "seen": Field("number", False, "ms since the device was last heard"),
    "is": Field("text", False, "quarantined, pinned, fallback, emulated"),
}


@dataclass(frozen=True)
class Query:
    """A parsed filter. `text` is what was typed."""

    text: str
    fields: frozenset[str]
    matches: Predicate


@lru_cache(maxsize=256)
def parse(text: str) -> Query:
    """Reads a filter; the empty one fits every device.

    Raises:
        InvalidInput: says at which character, and what is known there.
    """
    if len(text) > MAX_LENGTH:
        raise InvalidInput(f"The filter is longer than {MAX_LENGTH} characters.")
    builder = _Builder()
    try:
        tree = _PARSER.parse(text) if text.strip() else None
        predicate = _everything if tree is None else builder.transform(tree)
    except UnexpectedInput as error:
        raise _syntax_error(text, error) from None
    except VisitError as error:
        if isinstance(error.orig_exc, InvalidInput):
            raise error.orig_exc from None
        raise
    return Query(text, frozenset(builder.seen), predicate)


def parse_stable(text: str) -> Query:
    """A filter that may decide what a device should have.

    Raises:
        InvalidInput: wrong, or it looks at something that changes by itself (status, latency...):
            an endpoint that came and went with it would never settle.
    """
    query = parse(text)
    for name in sorted(query.fields):
        field = FIELDS.get(name)
        if field is not None and not field.stable:
            stable = ", ".join(key for key, value in FIELDS.items() if value.stable)
            raise InvalidInput(
                f"An endpoint's filter cannot look at '{name}', which changes by itself.",
                f"Use {stable} or label.NAME.",
            )
    return query


def stable_facts(device: Device, profile: profile_pb2.Profile | None = None) -> dict[str, Any]:
    """The fields of a device that do not change by themselves."""
    profile = profile or profile_pb2.Profile.FromString(device.profile)
    return {
        "class": device.profile_class,
        "name": device.name,
        "id": device.id,
        "project": device.project,
        "labels": device.labels,
        "arch": profile.architecture,
        "runtime": [runtime.name for runtime in profile.runtimes],
        "isa": list(profile.isa_features),
        "accelerator": [f"{item.vendor}-{item.kind}" for item in profile.accelerators],
        "cores": profile.cores,
        "memory": profile.memory_bytes,
    }


def devices(session: Session, text: str, *, project: str | None = None) -> list[Device]:
    """Joined, not revoked devices that fit a filter of stable fields, by id.

    Raises:
        InvalidInput: the filter cannot be read.
    """
    wanted = parse(text)
    rows = select(Device).where(Device.revoked.is_(False)).order_by(Device.id)
    if project is not None:
        rows = rows.where(Device.project == project)
    return [device for device in session.scalars(rows) if wanted.matches(stable_facts(device))]


def _everything(_facts: Facts) -> bool:
    return True


def _syntax_error(text: str, error: UnexpectedInput) -> InvalidInput:
    at = error.pos_in_stream if error.pos_in_stream is not None and error.pos_in_stream >= 0 else len(text)
    if getattr(getattr(error, "token", None), "type", "") == "$END":
        at = len(text)
    shown = text[at : at + 20] or "the end"
    return InvalidInput(
        f"The filter is wrong at character {at + 1}, near '{shown}'.",
        "Write for example: status:degraded class:x86* p95>50 label.site:lab",
    )


class _Builder(Transformer[Token, Predicate]):
    """Turns the tree into one predicate and notes the fields it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def either(self, parts: list[Predicate]) -> Predicate:
        return lambda facts: any(part(facts) for part in parts)

    def all(self, parts: list[Predicate]) -> Predicate:
        return lambda facts: all(part(facts) for part in parts)

    def negation(self, parts: list[Predicate]) -> Predicate:
        inner = parts[0]
        return lambda facts: not inner(facts)

    @v_args(inline=True)
    def word(self, token: Token) -> Predicate:
        return _text_search(str(token))

    @v_args(inline=True)
    def quoted(self, token: Token) -> Predicate:
        return _text_search(str(token)[1:-1])

    @v_args(inline=True)
    def comparison(self, token: Token) -> Predicate:
        match = _COMPARISON.match(str(token))
        assert match is not None, "the terminal is the same expression"
        name, operator, value = match.groups()
        at = (token.start_pos or 0) + 1
        if name.startswith("label."):
            self.seen.add("label")
            return _label(name.removeprefix("label."), operator, _unquote(value), at)
        field = FIELDS.get(name)
        if field is None:
            raise InvalidInput(
                f"There is no field '{name}' (at character {at}).",
                f"Fields: {', '.join(FIELDS)}, label.NAME.",
            )
        self.seen.add(name)
        if operator in ("<", "<=", ">", ">="):
            return _numeric(name, field, operator, value, at)
        if field.kind == "number":
            return _number_equal(name, operator, value, at)
        return _textual(lambda facts: facts.get(name), operator, _unquote(value))


def _unquote(value: str) -> str:
    return value[1:-1] if value.startswith('"') and value.endswith('"') and len(value) > 1 else value


def _text_search(text: str) -> Predicate:
    wanted = text.lower()

    def matches(facts: Facts) -> bool:
        values = [facts.get("name"), facts.get("id"), facts.get("class"), facts.get("version")]
        labels = facts.get("labels") or {}
        values += [*labels.keys(), *labels.values()]
        return any(wanted in str(value).lower() for value in values if value)

    return matches


def _textual(get: Callable[[Facts], Any], operator: str, value: str) -> Predicate:
    wanted = [part.lower() for part in value.split(",") if part] or [""]

    def matches(facts: Facts) -> bool:
        found = get(facts)
        values = found if isinstance(found, (list, tuple, set, frozenset)) else [found]
        texts = [str(item).lower() for item in values if item is not None] or [""]
        return any(fnmatchcase(item, _literal(pattern)) for item in texts for pattern in wanted)

    if operator == "!=":
        return lambda facts: not matches(facts)
    return matches


@lru_cache(maxsize=1024)
def _literal(pattern: str) -> str:
    """Only `*` is special: brackets and question marks are taken as they are."""
    return pattern.replace("[", "[[]").replace("?", "[?]")


def _label(name: str, operator: str, value: str, at: int) -> Predicate:
    if operator in ("<", "<=", ">", ">="):
        raise InvalidInput(f"Labels are text: compare with ':' or '!=' (at character {at}).")
    return _textual(lambda facts: (facts.get("labels") or {}).get(name), operator, value)


_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _numeric(name: str, field: Field, operator: str, value: str, at: int) -> Predicate:
    if field.kind != "number":
        raise InvalidInput(f"'{name}' is text: compare with ':' or '!=' (at character {at}).")
    limit, compare = _parse_number(name, value, at), _COMPARE[operator]

    def matches(facts: Facts) -> bool:
        found = facts.get(name)
        return found is not None and compare(float(found), limit)

    return matches


def _number_equal(name: str, operator: str, value: str, at: int) -> Predicate:
    wanted = [_parse_number(name, part, at) for part in value.split(",")]

    def matches(facts: Facts) -> bool:
        found = facts.get(name)
        return found is not None and float(found) in wanted

    return (lambda facts: not matches(facts)) if operator == "!=" else matches


def _parse_number(name: str, value: str, at: int) -> float:
    match = _NUMBER.match(_unquote(value))
    factor = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise InvalidInput(
            f"'{value[:40]}' is not a number for '{name}' (at character {at}).",
            "Write for example p95>50, p95>50ms or memory>=2GB.",
        )
    return float(match.group(1)) * factor
