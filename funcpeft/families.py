"""Families of methods beyond ``Additive``: what several share, one level deep. Imports method, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from funcpeft.context import Context
from funcpeft.method import Additive
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class Factored(Additive):
    """The family ``W' = W + B A`` whose two factors are computed from the leaves: give ``pair``."""

    weight_free: ClassVar[bool | frozenset[str]] = True
    #: Name of the field that is the probability of dropping elements of the input.
    dropout_field: ClassVar[str] = ""

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        """Computes A ``(rank, in)`` and B ``(out, rank)``."""
        raise TypeError(f"{type(self).__name__}: a factored method must define pair.")

    def check_site(self, base: Base) -> None:
        p = getattr(self, self.dropout_field, 0.0)
        drops = base.met and not base.takes_ids
        self.require_at(drops or not p, base, f"{self.dropout_field} must be 0 where no float input meets the weight", p)

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        a, b = self.pair(leaves, base)
        return b @ a

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = self.pair(leaves, base)
        dropped = x if base.takes_ids else context.dropout(x, getattr(self, self.dropout_field, 0.0))
        return base(x) + base.over_out(base.map(dropped, a), lambda h: F.linear(h, b))
