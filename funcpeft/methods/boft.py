r"""BOFT: orthogonal butterfly fine-tuning.

.. math:: W' = \mathrm{diag}(s) \, W M^\top, \qquad M = O_{F-1} \cdots O_1 O_0, \qquad
   O_f = P_f \, \mathrm{diag}(Q_{f,1}, \dots, Q_{f,N}) \, P_f^\top

Q_{f, j} = (I - S)(I + S)^{-1} (H, H), with S = (R - R^T) / 2: rotations of blocks of the leaf R (F, N, H, H), which is trained;
s (out,): trained; H: block size; N: number of blocks; F: butterfly factors. P_f orders features so that the blocks of factor f
join features that are H 2^f / 2 apart. Inputs are turned factor by factor before they meet the base, so the weight is not
made dense, unless a kernel covers several positions.

Differences from peft 0.21: there F is 1 wherever its CUDA extension does not compile, and a convolution must be square.

References:
    Liu et al., Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, 2023, arXiv 2311.06243, eq. (2) to (4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.rotations import cayley, rotate
from funcpeft.tree import Leaves
from funcpeft.weights import Base, wide


def butterfly(h: Tensor, size: int, factor: int, *, back: bool = False) -> Tensor:
    """Reorders the last axis so that what a factor's blocks of ``size`` join is consecutive, or back.

    Chunks of ``size * 2^factor`` features are cut into half-blocks; the j-th one of a chunk's first half comes to stand beside
    the j-th one of its second half.
    """
    if factor == 0:
        return h
    pair = (2**factor, 2) if back else (2, 2**factor)
    return h.unflatten(-1, (-1, *pair, size // 2)).transpose(-3, -2).flatten(-4)


@dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """Orthogonal fine-tuning by a product of sparse rotations.

    Args:
        boft_block_size: Size H of the blocks, or 0 if their number is given.
        boft_block_num: Number N of blocks, or 0 if their size is given.
        boft_n_butterfly_factor: Number F of factors; 1 is block-diagonal.
        boft_dropout: Fraction of the blocks of one factor, drawn anew at each call, that do not turn in training.
        init_weights: Whether the start is neutral; else R is N(0, 0.1^2) and s is N(1, 0.1^2).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"boft_only"`` those of the targets.
    """

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "BOFT"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv"})
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    leaf_names: ClassVar[tuple[str, ...]] = ("R", "s")
    weight_free: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    bias_only: ClassVar[str] = "boft_only"
    size: ClassVar[str] = "boft_n_butterfly_factor * in_ * boft_block_size + out"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("boft_block_size", "boft_block_num"):
            v = getattr(self, name)
            self.require(v >= 0, name, "a non-negative integer", v)
        sizes = (self.boft_block_size, self.boft_block_num)
        rule = "such that exactly one of boft_block_size and boft_block_num is not 0"
        self.require(sum(n != 0 for n in sizes) == 1, "boft_block_size", rule, sizes)
        self.require_positive("boft_n_butterfly_factor")
        self.require_probability("boft_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (
            cls(boft_block_size=2, boft_n_butterfly_factor=2, boft_dropout=0.5),
            cls(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=3),
        )

    def blocks(self, base: Base) -> tuple[int, int]:
        """Returns the number and the size of the blocks at a site."""
        dim = base.shape[-1]
        if self.boft_block_size:
            return dim // self.boft_block_size, self.boft_block_size
        return self.boft_block_num, dim // self.boft_block_num

    def check_site(self, base: Base) -> None:
        dim, (count, size), factors = base.shape[-1], self.blocks(base), self.boft_n_butterfly_factor
        name = "boft_block_size" if self.boft_block_size else "boft_block_num"
        divisors = [d for d in range(1, dim + 1) if dim % d == 0]
        remedy = f"use one of {divisors[:12]}" + (", ..." if len(divisors) > 12 else "")
        self.require_at(count * size == dim and count > 0, base, f"{name} must divide in {dim}", getattr(self, name), remedy)
        if factors > 1:
            fits = size % 2 == 0 and factors <= count.bit_length() and count % 2 ** (factors - 1) == 0
            rule = f"{factors} factors need blocks of even size and a number of them that 2^{factors - 1} divides"
            self.require_at(fits, base, rule, f"{count} of size {size}")
        groups = base.kind.groups
        self.require_at(groups == 1, base, "a rotation mixes features: groups must be 1", groups, "leave the site out")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        count, size = self.blocks(base)
        shape, out = (self.boft_n_butterfly_factor, count, size, size), base.shape[-2]
        if self.init_weights:
            return {"R": torch.zeros(shape), "s": torch.ones(out)}, {}
        return {"R": rng.normal(shape, gen, 0.1), "s": rng.normal((out,), gen, 0.1, 1.0)}, {}

    def turned(self, h: Tensor, q: Tensor, *, back: bool = False) -> Tensor:
        """Returns rows ``h (..., in)`` times M, or times M^T."""
        size = q.shape[-1]
        for f in range(len(q)) if back else reversed(range(len(q))):
            h = butterfly(rotate(butterfly(h, size, f), q[f].mT if back else q[f]), size, f, back=True)
        return h

    def rotations(self, leaves: Leaves, context: Context | None = None) -> Tensor:
        """Returns Q ``(F, N, H, H)``, some of them neutral in training."""
        r = wide(leaves["R"])
        q = cayley((r - r.mT) / 2)
        dropped = int(self.boft_dropout * q.shape[1])
        if context is None or not context.training or not dropped:
            return q
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        ones = torch.ones(q.shape[:2], dtype=q.dtype, device=q.device)
        ranks = context.uniform(ones, 0).argsort(-1).argsort(-1)  # a random order of the blocks of every factor
        chosen = context.uniform(ones[:, 0], 1).argmax() == torch.arange(len(q), device=q.device)
        return torch.where((chosen[:, None] & (ranks < dropped))[..., None, None], eye, q)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        q, s = self.rotations(leaves, context), leaves["s"]
        if base.channels != base.shape[-1]:  # a kernel's patches overlap, so they cannot be turned in the input
            return self._changed(base, q, s).meet(x)
        x = x.to(torch.promote_types(x.dtype, q.dtype))
        y, b = base(base.over_in(x, lambda h: self.turned(h, q))).to(s.dtype), base.bias
        return base.over_out(y, lambda h: s * h if b is None else s * h + (1 - s) * b)

    def _changed(self, base: Base, q: Tensor, s: Tensor) -> Base:
        return base.replace(weight=s[:, None] * self.turned(base.weight, q, back=True))

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return self._changed(base, self.rotations(leaves).to(base.precision), leaves["s"])

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        q = self.rotations(leaves).to(base.precision)
        return base.replace(weight=self.turned(base.weight / leaves["s"][:, None], q))

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        return math.sqrt(base.shape[-1]) * (1 / leaves["s"]).abs().max().clamp(min=1)

    def as_written(self, shapes: Mapping[str, torch.Size]) -> Self:
        """Takes the number of factors from the tensors: without a GPU peft makes one, whatever the config says."""
        found = {s[0] for k, s in shapes.items() if k.endswith(".boft_R")}
        return replace(self, boft_n_butterfly_factor=found.pop()) if len(found) == 1 else self

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        return {"boft_R": leaves["R"], "boft_s": leaves["s"][None] if base.kind.name == "conv" else leaves["s"][:, None]}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return {"R": tensors["boft_R"], "s": tensors["boft_s"].flatten()}
