"""Values of a method's fields: lists and dicts that do not change, so that a method hashes, and patterns of paths.

Imports nothing of the package.
"""

from __future__ import annotations

import re
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


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a key of ``rank_pattern`` or ``alpha_pattern`` names a path: it matches whole, or after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Returns the value of the first pattern that names the path, else the default."""
    return next((value for key, value in patterns.items() if pattern_matches(key, path)), default)
