r"""Full: selected parameters trained in full, no matter what their module computes.

.. math:: W' = V

V: the trained tensor, a copy of W at the start. It is what ``modules_to_save`` and ``bias`` of other methods become.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Trains parameters themselves.

    Args:
        target_parameters: Names or dotted suffixes of parameters, beside or instead of the modules in ``target_modules``,
            of which every parameter is taken.
        ensure_weight_tying: Whether every module that reads a tied tensor gets the trained one; else its target alone.
    """

    target_parameters: tuple[str, ...] | list[str] | None = None
    ensure_weight_tying: bool = False

    kinds: ClassVar[frozenset[str]] = frozenset({"vector"})
    takes_any: ClassVar[bool] = True
    keys: ClassVar[dict[str, str]] = {"value": ""}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        return {"value": base.weight.clone()}, {}

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=leaves["value"])
