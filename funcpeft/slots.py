"""Slots: places in the collections and objects of a module that hold a tensor. Imports nothing."""

from __future__ import annotations

from collections import deque
from typing import Any

_INDEXED = (dict, list, deque)  # a tuple, which a tracer follows


def put(holder: Any, index: Any, value: Any) -> None:
    """Puts a value in a slot: an entry of a collection, or an attribute of any other object."""
    if isinstance(holder, _INDEXED):
        holder[index] = value
    else:
        setattr(holder, index, value)


def held(holder: Any, index: Any) -> Any:
    """Returns what is in a slot."""
    return holder[index] if isinstance(holder, _INDEXED) else getattr(holder, index)
