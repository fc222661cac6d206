"""JSON as clients of other languages write it: 4.0 for 4, and null for a field that is left out."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeAlias

import msgspec

Coerce: TypeAlias = Callable[[Any], Any]
CHANGEABLE = frozenset({float, list, dict})


@cache
def coercion(kind: Any) -> Coerce:
    """Return a function that makes decoded JSON fit a type, for `msgspec.convert` to check.

    Where the type has an integer and no float, a whole float becomes an integer. Where a struct's field has a default
    and takes no null, a null is left out. All else stays as it is, also what may be any JSON.
    """
    return _coercion(msgspec.inspect.type_info(kind))


def _coercion(info: msgspec.inspect.Type) -> Coerce:
    match info:
        case msgspec.inspect.Metadata(type=inner):
            return _coercion(inner)
        case msgspec.inspect.IntType():
            return _whole
        case msgspec.inspect.ListType(item_type=item):
            return _list_coercion(_coercion(item))
        case msgspec.inspect.DictType(value_type=value):
            return _dict_coercion(_coercion(value))
        case msgspec.inspect.StructType(fields=fields):
            return _struct_coercion(fields)
        case msgspec.inspect.UnionType(types=types):
            return _union_coercion(types)
    return _unchanged


def _unchanged(value: Any) -> Any:
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _may_change(values: Iterable[Any]) -> bool:
    """Return whether a coercion may change any of these; a prompt of a million token ids is looked through quickly."""
    return not CHANGEABLE.isdisjoint(map(type, values))


def _list_coercion(item: Coerce) -> Coerce:
    if item is _unchanged:
        return item
    return lambda value: [item(part) for part in value] if isinstance(value, list) and _may_change(value) else value


def _dict_coercion(item: Coerce) -> Coerce:
    if item is _unchanged:
        return item

    def coerce(value: Any) -> Any:
        if not isinstance(value, dict) or not _may_change(value.values()):
            return value
        return {key: item(part) for key, part in value.items()}

    return coerce


def _struct_coercion(fields: tuple[msgspec.inspect.Field, ...]) -> Coerce:
    coercions = {field.encode_name: _coercion(field.type) for field in fields}
    optional = {field.encode_name for field in fields if not field.required and not _takes_null(field.type)}

    def coerce(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: coercions.get(key, _unchanged)(part)
            for key, part in value.items()
            if part is not None or key not in optional
        }

    return coerce


def _union_coercion(types: tuple[msgspec.inspect.Type, ...]) -> Coerce:
    """Return the coercions of a union's types one after the other: each changes only JSON of its own kind."""
    takes_floats = any(isinstance(kind, msgspec.inspect.FloatType) for kind in types)
    coercions = [_coercion(kind) for kind in types if not (takes_floats and isinstance(kind, msgspec.inspect.IntType))]

    def coerce(value: Any) -> Any:
        for change in coercions:
            value = change(value)
        return value

    return coerce


def _takes_null(info: msgspec.inspect.Type) -> bool:
    match info:
        case msgspec.inspect.UnionType(types=types):
            return any(map(_takes_null, types))
        case msgspec.inspect.NoneType() | msgspec.inspect.AnyType():
            return True
    return False
