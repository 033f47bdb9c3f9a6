"""Families of methods beyond ``Additive``: what several share, one level deep. Imports method, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft.context import Context
from funcpeft.method import Additive
from funcpeft.tree import Leaves
from funcpeft.weights import Base


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to the dtype of a half-precision base, which is where peft makes what it then keeps in float32."""
    return t.to(dtype).to(t.dtype) if dtype in (torch.float16, torch.bfloat16) else t


@dataclass(frozen=True, kw_only=True)
class Factored(Additive):
    """The family ``W' = W + B A`` whose two factors are computed from the leaves: give ``pair``.

    Elements of the input are dropped in training, of an embedding those of the rows of A that its ids look up.
    """

    weight_free: ClassVar[bool | frozenset[str]] = True
    #: Name of the field that is the probability of dropping elements.
    dropout_field: ClassVar[str] = ""

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        """Computes A ``(rank, in)`` and B ``(out, rank)``."""
        raise TypeError(f"{type(self).__name__}: a factored method must define pair.")

    def check_site(self, base: Base) -> None:
        p = getattr(self, self.dropout_field, 0.0)
        self.require_at(base.met or not p, base, f"{self.dropout_field} must be 0 where no input meets the weight", p)
        groups = base.kind.groups
        self.require_at(groups == 1, base, "a convolution must have one group", groups, "leave the site out")

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        a, b = self.pair(leaves, base)
        return b @ a

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        (a, b), p = self.pair(leaves, base), getattr(self, self.dropout_field, 0.0)
        low = context.dropout(base.map(x, a), p) if base.takes_ids else base.map(context.dropout(x, p), a)
        return base(x) + base.over_out(low, lambda h: F.linear(h, b))
