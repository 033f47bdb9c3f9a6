"""Dataclasses whose fields are frozen and checked: what a method's fields must be, and the errors that say so.

Every field is compared with its annotation, so that a config that was read or typed wrong fails at once, by name; rules beyond
a type are stated with ``require`` and its kin. Imports fields, errors.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.fields import described, finite, fits, freeze


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Returns the types of a class's fields; those that cannot be evaluated, as of a class in a function, are absent."""
    try:
        found = typing.get_type_hints(cls)
    except NameError:
        return {}
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


class Checked:
    """A base of frozen dataclasses: lists become tuples, dicts ``FrozenDict``, and every field is of its type and finite."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = freeze(getattr(self, f.name))
            object.__setattr__(self, f.name, value)
            hint = hints.get(f.name, Any)
            self.require(fits(value, hint), f.name, described(hint), value)
            self.require(finite(value), f.name, "finite and of at most 64 bits", value)

    @property
    def label(self) -> str:
        """Name of the object in messages."""
        return type(self).__name__.lower()

    def require(self, ok: bool, field: str, rule: str, found: object, remedy: str = "") -> None:
        """Raises ``ValueError`` naming the method and the field unless ``ok``."""
        if not ok:
            raise ValueError(errors.say(self.label, f"{field} must be {rule}", repr(found), remedy))

    def require_positive(self, *fields: str) -> None:
        """Raises ``ValueError`` unless these integers are positive."""
        for name in fields:
            v = getattr(self, name)
            self.require(v is not None and v > 0, name, "a positive integer", v)

    def require_probability(self, *fields: str) -> None:
        """Raises ``ValueError`` unless these fields are in [0, 1)."""
        for name in fields:
            v = getattr(self, name)
            self.require(0 <= v < 1, name, "in [0, 1)", v)

    def require_places(self, places: Tensor, name: str, below: int, *, distinct: bool = True) -> None:
        """Raises ``ValueError`` unless the last axis of what a file holds has whole numbers from 0, below a bound.

        Args:
            places: The numbers ``(..., n)``; of a floating type too.
            name: What the file calls them.
            below: The bound.
            distinct: Whether they must differ along the last axis.
        """
        wide = places.to(torch.float64 if places.is_floating_point() else torch.int64)
        outside = wide[(wide < 0) | (wide >= below) | (wide != wide.floor())]
        self.require(not len(outside), name, f"whole numbers from 0 to {below - 1}", outside[:1].tolist())
        if distinct:
            ordered = wide.sort(-1).values
            self.require(bool((ordered.diff(dim=-1) > 0).all()), name, "different from each other", "some twice")
