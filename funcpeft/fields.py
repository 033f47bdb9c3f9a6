"""Values of a method's fields: lists and dicts that do not change, so that a method hashes, their types, patterns of paths.

Imports nothing of the package.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any


class FrozenDict(dict[str, Any]):
    """A dict that hashes and does not change; the form in which methods keep their patterns."""

    def __hash__(self) -> int:  # type: ignore[override]  # dict declares __hash__ = None, which is what this mends
        return hash(tuple(self.items()))

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise TypeError("FrozenDict: a method's fields do not change; make another method with dataclasses.replace.")

    __setitem__ = __delitem__ = update = pop = popitem = clear = setdefault = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """Returns lists as tuples, sets as sorted tuples and dicts as ``FrozenDict``, at any depth."""
    if isinstance(value, Mapping):
        return FrozenDict({k: freeze(v) for k, v in value.items()})
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


def thaw(value: Any) -> Any:
    """Inverts ``freeze`` as far as JSON goes: tuples become lists, frozen dicts become dicts."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    return [thaw(v) for v in value] if isinstance(value, tuple) else value


def finite(value: Any) -> bool:
    """Whether no number of a frozen value is NaN, infinite or an integer that torch cannot count to, at any depth."""
    if isinstance(value, Mapping | tuple):
        return all(map(finite, value.values() if isinstance(value, Mapping) else value))
    return -(2**63) <= value < 2**63 if isinstance(value, int) else not isinstance(value, float) or math.isfinite(value)


def fits(value: Any, hint: Any) -> bool:
    """Whether a frozen value is of an annotated type: a bool is no number, an integer is a float too.

    Lists and sets are tuples by then. Types that are no classes, as variables, take any value.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple and args[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(fits, value, args))
    if (origin or hint) in (tuple, list, set, frozenset):
        return isinstance(value, tuple) and all(fits(v, args[0]) for v in (value if args else ()))
    if (origin or hint) in (Mapping, dict):
        inner = value.items() if isinstance(value, Mapping) and args else ()
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in inner)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    kind = type(None) if hint is None else origin or hint
    return isinstance(value, kind) if isinstance(kind, type) and hint is not Any else True


_WORDS = {
    bool: ("True or False", "booleans"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    type(None): ("None", ""),
}


def described(hint: Any) -> str:
    """Says in words what ``fits`` takes."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(arg) for arg in args))
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"a list of {' and '.join(map(described, args))}"
    if origin in (tuple, list, set, frozenset, Mapping, dict):
        keyed = origin in (Mapping, dict)
        one = args[1 if keyed else 0]
        of = "pairs" if typing.get_origin(one) is tuple else _WORDS.get(one, ("", ""))[1]
        return " of ".join(part for part in ("a dict" if keyed else "a list", of) if part)
    return _WORDS[hint][0] if hint in _WORDS else f"a {getattr(hint, '__name__', hint)}"


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` names a path: it matches whole, or after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns the value of the first pattern that names the path, else the default."""
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)
