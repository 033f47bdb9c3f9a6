r"""MiSS: matrix shard sharing, one block for all shards of the input.

.. math:: W'[o, j] = W[o, j] + D[j \bmod r, o]

D (r, out): an input is cut into pieces of r features (padded with zeros), and their sum meets D. ``init_weights`` chooses
the variant: ``"mini"`` repeats the columns of D (r, mini_r), D[:, o mod mini_r]; ``"bat"`` has one block D_a (r, r) for
every r outputs, and multiplies as well: with W cut into blocks W_ac (r, r),

.. math:: W'_{ac} = W_{ac} (I + D_a) + D_a

Differences from peft 0.21: there "bat" ignores ``miss_dropout``, here the update's input is dropped in every variant.

References:
    Kang and Yin, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure (first titled Bone),
    2024, arXiv 2409.15371.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_INITS = (True, False, "bat", "mini")


def shard_sum(x: Tensor, r: int) -> Tensor:
    """Sums the consecutive pieces of ``r`` features of the last axis, padded with zeros to a multiple of ``r``."""
    return F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)


@dataclass(frozen=True, kw_only=True)
class MiSS(Method):
    """Matrix shard sharing.

    Args:
        r: Number of features in a shard, at most the layer's inputs.
        miss_dropout: Probability with which elements of the update's input are dropped in training.
        mini_r: Number of columns of D in the variant ``"mini"``; divides the layer's outputs.
        init_weights: The variant, and its start: ``True`` (zero), ``False`` (uniform), ``"bat"``, ``"mini"`` (zero).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"MiSS_only"`` those of the targets.
    """

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | str = True
    bias: str = "none"

    peft_type: ClassVar[str] = "MISS"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    keys: ClassVar[dict[str, str]] = {"D": "miss_block"}
    size: ClassVar[str] = "r * out"
    leaf_names: ClassVar[tuple[str, ...]] = ("D",)
    bias_only: ClassVar[str] = "MiSS_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "mini_r")
        self.require(0 <= self.miss_dropout < 1, "miss_dropout", "in [0, 1)", self.miss_dropout)
        adds = self.init_weights != "bat"  # facts of the variant: two add a matrix, "bat" multiplies the weight
        object.__setattr__(self, "additive", adds)
        object.__setattr__(self, "weight_free", adds)
        self.require(self.bias in ("none", "all", self.bias_only), "bias", f"'none', 'all' or {self.bias_only!r}", self.bias)
        if self.init_weights not in _INITS:
            raise ValueError(errors.one_of(self.label, "init_weights", self.init_weights, _INITS))

    @classmethod
    def examples(cls) -> tuple[MiSS, ...]:
        """Returns the three variants."""
        return cls(r=2, miss_dropout=0.25), cls(r=2, init_weights="bat"), cls(r=3, mini_r=2, init_weights="mini")

    def check_site(self, base: Base) -> None:
        out, in_ = base.shape
        self.require_at(self.r <= in_, base, f"r must be at most the {in_} input features", self.r)
        if self.init_weights == "mini":
            divides = f"mini_r must divide the {out} output features"
            self.require_at(out % self.mini_r == 0, base, divides, self.mini_r, f"use a divisor ({errors.divisors(out)})")
        if self.init_weights == "bat":
            divides = f"r must divide both sides of a weight of shape {(out, in_)}"
            remedy = f"use a common divisor ({errors.divisors(math.gcd(out, in_))})"
            self.require_at(out % self.r == 0 and in_ % self.r == 0, base, divides, self.r, remedy)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        out, r = base.shape[0], self.r
        shape = {"bat": (out // r, r, r), "mini": (r, self.mini_r)}.get(str(self.init_weights), (r, out))
        return {"D": rng.kaiming(shape, gen) if self.init_weights is False else torch.zeros(shape)}, {}

    def update(self, leaves: Leaves, base: Base) -> Tensor:
        """Computes W' - W, ``(out, in)``; in the variant "bat" it depends on W."""
        d, (out, in_) = leaves["D"], base.shape
        if self.init_weights == "bat":
            return _multiplied(base.weight, d) + _repeated(d, in_)
        tall = d.repeat(1, out // d.shape[1]).mT
        return tall.repeat(1, -(-in_ // d.shape[0]))[:, :in_]

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        d, dropping = leaves["D"], bool(context.training and self.miss_dropout)
        if self.init_weights == "bat":
            if not dropping:
                return super().apply(leaves, base, x, context)
            return base(x) + base.map(context.dropout(x, self.miss_dropout), self.update(leaves, base))
        sums = shard_sum(context.dropout(x, self.miss_dropout).to(d.dtype), d.shape[0]) @ d
        return base(x) + sums.repeat(*(1 for _ in sums.shape[1:]), base.shape[0] // d.shape[1])

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=base.weight + self.update(leaves, base))

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        if self.init_weights != "bat":
            return base.replace(weight=base.weight - self.update(leaves, base))
        d = leaves["D"].to(base.precision)
        return base.replace(weight=_multiplied(base.weight - _repeated(d, base.shape[1]), _inverse(d)))

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        return _inverse(leaves["D"]).abs().sum(-2).amax() if self.init_weights == "bat" else 1.0


def _multiplied(weight: Tensor, blocks: Tensor) -> Tensor:
    """Multiplies every block of ``r`` rows of a weight, cut into ``(r, r)`` pieces, by its own ``blocks (out / r, r, r)``."""
    pieces = weight.unflatten(1, (-1, blocks.shape[-1])).unflatten(0, (-1, blocks.shape[-1]))
    return torch.einsum("apck,aks->apcs", pieces, blocks).reshape(weight.shape)


def _repeated(blocks: Tensor, in_: int) -> Tensor:
    """Stacks blocks ``(out / r, r, r)`` along the rows and repeats them along the columns: ``(out, in)``."""
    return blocks.flatten(0, 1).repeat(1, in_ // blocks.shape[-1])


def _inverse(d: Tensor) -> Tensor:
    return torch.linalg.inv(d + torch.eye(d.shape[-1], dtype=d.dtype, device=d.device))
