"""The MessagePack form of the batch verbs: requests and answers are arrays, and bytes are not base64.

Owns: how the types of `minikms.api.verbs` are written in MessagePack. Each array type is made from the type of the JSON
object, so that a message is defined once. The rules, which docs/spec/api.md states for other clients:

- An object is an array of its members in their order; `bin` takes the place of base64 text.
- An optional member that is absent is `nil`, or left out at the end of the array.
- The answer for an item is a `bin`, or the array `[error, code]`.

Invariants: a longer array than the type has members is refused in a request; the number of items is checked before one
of them is decoded, also in an answer. It must never be used for another verb: a root key in a body is taken out of JSON
text.
"""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UnsetType

from minikms.api.contract import BATCH_ITEMS_MAX
from minikms.api.verb import Base64, Request, Verb

StructT = TypeVar("StructT", bound=msgspec.Struct)


class RefusedArray(msgspec.Struct, array_like=True, frozen=True):
    """Takes the place of a value in `ItemsArray`."""

    error: str
    code: str


_BATCH_BOUND: Final = msgspec.Meta(max_length=BATCH_ITEMS_MAX)


class ItemsArray(msgspec.Struct, array_like=True, frozen=True):
    """The answer of a verb whose JSON answer has `items`: the value of each, in order, or why it was refused."""

    items: Annotated[list[bytes | RefusedArray], _BATCH_BOUND]

    def __repr__(self) -> str:
        return f"ItemsArray({len(self.items)} items)"


def array_form(kind: type[StructT]) -> type[StructT]:
    """A new array type of a struct: its subclass with the same fields, where bytes are `bytes` and absent is None."""
    return _array_form(kind, bounded=True)


def form_with_raw_items(kind: type[StructT]) -> type[StructT]:
    """The array form of `kind` whose `items` is a `msgspec.Raw`: any one value, however long."""
    return _array_form(kind, bounded=False)


def _array_form(kind: type[StructT], *, bounded: bool) -> type[StructT]:
    hints = get_type_hints(kind, include_extras=True)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(kind):
        name, form = field.name, _type_of(hints[field.name])
        if get_origin(form) is list:
            form = Annotated[form, _BATCH_BOUND] if bounded else msgspec.Raw
        fields.append((name, form) if field.required else (name, form | None, None))
    array_type = msgspec.defstruct(f"{kind.__name__}Array", fields, bases=(kind,), module=__name__, array_like=True)
    return cast(type[StructT], array_type)


def _type_of(hint: Any) -> Any:
    """The type of a field in the array; without UNSET."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not UnsetType)
    if get_origin(hint) is list:
        (member,) = get_args(hint)
        return hint if member is bytes else list.__class_getitem__(array_form(member))
    return bytes if hint == Base64 else hint


@cache
def item_fields(verb: Verb[Any, Any]) -> tuple[str, ...]:
    """The members of an item of a batch verb, in their order."""
    (item,) = get_args(get_type_hints(verb.request)["items"])
    fields: tuple[str, ...] = item.__struct_fields__
    return fields


def answer_array(verb: Verb[Any, Any]) -> type[msgspec.Struct]:
    """The type of a batch verb's answer."""
    return ItemsArray if "items" in verb.answer.__struct_fields__ else array_form(verb.answer)


def is_array_form(request: Request) -> bool:
    """Whether the request came as an array, so that its values are bytes and its answer is an array too."""
    return request.__struct_config__.array_like
