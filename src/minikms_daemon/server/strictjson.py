"""Strict JSON: a body is read in one way only, or refused.

Owns: decoding a request body into a `msgspec` struct. msgspec alone takes the last of two equal keys, and raises
RecursionError and UnicodeDecodeError; here each of these is an `InvalidRequestError`. Invariants:
- A body is accepted only if every object in it has each key once, and no key that the struct does not have.
- Error texts may name a field of the request; they never show a value, and are truncated.
It must never get a body that contains a key: its strings, and the copy of it that `decode` may make, stay on the heap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import attrgetter
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import NODEFAULT, UNSET

from minikms.api.errors import InvalidRequestError
from minikms.api.printable import clean

T = TypeVar("T", bound=msgspec.Struct)

_REASON_CHARS_MAX: Final = 160


def decode(decoder: msgspec.json.Decoder[T], body: memoryview | bytes) -> T:
    """Decode `body` with `decoder`, whose structs have no defaults but UNSET. Raises `InvalidRequestError`."""
    try:
        value = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(refused_sentence("The body does not have the expected form", error)) from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(refused_sentence("The body is not valid JSON", error)) from None
    except UnicodeDecodeError:
        raise InvalidRequestError("The body is not valid UTF-8.") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None
    # The check below, faster, for the bodies of most requests: required strings only, or a few optional ones. Most
    # bodies are too short for a key beside the two required ones. Counting the quotes takes twice as long.
    flat = _flat(type(value))
    if flat is not None and flat.two_required is not None:
        one, other = flat.two_required(value)
        if len(body) - len(one) - len(other) < flat.third_bytes_min:
            return value
    text = bytes(body)
    if flat is not None:
        quotes = text.count(b'"')
        if quotes == flat.quotes_min or quotes == 4 * (flat.fields_count - flat.optional(value).count(UNSET)):
            return value
    # In valid JSON every string has two quotes that are not escaped. `value` has every key and string once, so the text
    # of a repeated key has more. This costs a search of the body instead of a second parser.
    if _quotes(text) != 2 * _strings(value):
        raise InvalidRequestError("An object of the body has the same key twice.")
    return value


def refused_sentence(what: str, error: Exception) -> str:
    """`what: reason.` with msgspec's reason, printable and truncated: it may repeat a field name of the caller."""
    reason = clean(str(error)[:_REASON_CHARS_MAX])
    return f"{what}: {reason}."


def _quotes(text: bytes) -> int:
    """How many quotes of valid JSON are not escaped."""
    if b"\\" not in text:
        return text.count(b'"')
    # Backslashes occur only in strings, where each escapes the next character: remove the escaped backslashes first.
    unescaped = text.replace(b"\\\\", b"")
    return unescaped.count(b'"') - unescaped.count(b'\\"')


def _strings(value: Any) -> int:
    """How many strings, including keys, `value` has in JSON."""
    if isinstance(value, msgspec.Struct):
        shape = _shape(type(value))
        present = shape.fields_count
        for field in shape.optional:
            if field(value) is UNSET:
                present -= 1
        return 2 * present if shape.flat else present + sum(_strings(field(value)) for field in shape.nested)
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        if value and isinstance(value[0], msgspec.Struct) and _shape(type(value[0])).flat:
            return _column_strings(value)
        return sum(_strings(item) for item in value)
    if value is UNSET or value is None or isinstance(value, bool | int | float):
        return 0
    raise TypeError(f"strictjson does not count strings in {type(value).__name__}")


def _column_strings(items: list[msgspec.Struct]) -> int:
    """`_strings` of a list of flat structs of one type, field by field: for a batch, ten times as fast."""
    shape = _shape(type(items[0]))
    absent = sum(list(map(field, items)).count(UNSET) for field in shape.optional)
    return 2 * (shape.fields_count * len(items) - absent)


class _Flat(msgspec.Struct, frozen=True):
    """A struct of strings only: its number of fields, a getter of all optional ones, and the quotes without them. If
    two fields are required, a getter of them, and the bytes that a body with a third key has beside their strings.
    """

    fields_count: int
    optional: Callable[[object], tuple[object, ...]]
    quotes_min: int
    two_required: Callable[[object], tuple[str, str]] | None
    third_bytes_min: int


class _Shape(NamedTuple):
    """For `_strings`: the number of fields of a struct, and getters of the optional ones and of all."""

    fields_count: int
    optional: tuple[Callable[[msgspec.Struct], object], ...]
    flat: bool
    """All fields are strings."""
    nested: tuple[Callable[[msgspec.Struct], object], ...]


@cache
def _shape(struct: type[msgspec.Struct]) -> _Shape:
    """The shape of a struct. A TypeError for one that takes keys which it does not have, or in which an absent field
    looks like a present one.
    """
    fields = msgspec.structs.fields(struct)
    for field in fields:
        if not (field.default is NODEFAULT or field.default is UNSET) or field.default_factory is not NODEFAULT:
            raise TypeError(f"{struct.__name__}.{field.name} has a default other than UNSET")
    info = msgspec.inspect.type_info(struct)
    if not isinstance(info, msgspec.inspect.StructType) or not info.forbid_unknown_fields:
        raise TypeError(f"{struct.__name__} is not decoded as an object without unknown keys")
    optional = [field.name for field in fields if field.default is UNSET]
    return _Shape(
        fields_count=len(fields),
        optional=tuple(attrgetter(name) for name in optional),
        flat=all(_is_string(field.type) for field in info.fields),
        nested=tuple(attrgetter(field.name) for field in fields),
    )


@cache
def _flat(struct: type[msgspec.Struct]) -> _Flat | None:
    """None: `_strings` counts. As `_shape`, raises TypeError."""
    fields = msgspec.structs.fields(struct)
    optional = [field.name for field in fields if field.default is UNSET]
    if not _shape(struct).flat or len(optional) < 2:  # of one name, attrgetter makes no tuple
        return None
    required = [field.name for field in fields if field.name not in optional]
    member_bytes = {field.name: len(f'"{field.encode_name}":"",') for field in fields}
    return _Flat(
        fields_count=len(fields),
        optional=attrgetter(*optional),
        quotes_min=4 * len(required),
        two_required=attrgetter(*required) if len(required) == 2 else None,
        third_bytes_min=len("{}") + sum(member_bytes[name] for name in required) + min(member_bytes.values()) - 1,
    )


def _is_string(kind: msgspec.inspect.Type) -> bool:
    if isinstance(kind, msgspec.inspect.UnionType):
        # UNSET is a default here, not one of the union's types
        return all(_is_string(part) for part in kind.types)
    if isinstance(kind, msgspec.inspect.LiteralType):
        return all(isinstance(value, str) for value in kind.values)
    return isinstance(kind, msgspec.inspect.StrType)
