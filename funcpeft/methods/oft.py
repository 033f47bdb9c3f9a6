r"""OFT: orthogonal fine-tuning, a rotation of blocks of input features.

.. math:: W' = W \, \mathrm{diag}(R_1, \dots, R_n)^\top, \quad R_j = (I - Q_j)(I + Q_j)^{-1}
    \text{ or } I + 2 \sum_{k=1}^{t-2} Q_j^k + Q_j^{t-1}

Q_j (b, b): skew-symmetric, its strict upper triangle, row by row, is row j of the leaf Q (n, b(b - 1) / 2); R_j: rotation of
features (j - 1) b to j b, as x_j R_j. b: block size; n: number of blocks, 1 if all share one; t: number of terms. An
embedding rotates the vectors it looks up, E' = E diag(R). COFT scales each Q_j to the norm eps / sqrt(n) at most.

The series approximates (I + Q)(I - Q)^{-1}, the inverse of the exact form: the same leaf rotates in opposite directions
under the two settings, as it does in peft, and three terms are the same as four.

Differences from peft 0.21: there a block size that does not divide is replaced, here it is an error (``nearest_divisor``
restores peft's rule); there COFT overwrites the leaf, here the projection is part of the function, and of its gradient;
there ``module_dropout`` does nothing, here it works as documented; there a convolution with a kernel larger than 1
computes something else than what it merges, here both are the merged weight, of any kernel and dilation.

References:
    Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, arXiv 2306.07280.
    Qiu et al., Orthogonal Finetuning Made Scalable, 2025, arXiv 2506.19847: input side and truncated series.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.rotations import MOST_TERMS, cayley, cayley_series, rotate, skew, within
from funcpeft.tree import Leaves
from funcpeft.weights import Base, wide


def nearest_divisor(size: int, dim: int) -> int:
    """Returns the divisor of ``dim`` nearest to ``size``, the smaller of two equally near."""
    divisors = [d for d in range(1, dim + 1) if dim % d == 0]
    distances = [abs(d - size) for d in divisors]
    return divisors[distances.index(min(distances))]


@dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """Orthogonal fine-tuning.

    Args:
        r: Number of blocks; 0 if ``oft_block_size`` says it.
        oft_block_size: Size of a block; 0 if ``r`` says it. Exactly one of the two is nonzero.
        module_dropout: Probability with which a block is replaced by the identity in training.
        coft: Whether rotations stay near the identity (COFT).
        eps: Radius of COFT: the norm of a Q is at most ``eps / sqrt(number of blocks in the leaf)``.
        block_share: Whether all blocks of a layer are one.
        use_cayley_neumann: Whether R is the truncated series; else the exact Cayley transform.
        num_cayley_neumann_terms: Number of terms of the series.
        init_weights: ``True`` for Q = 0; ``False`` for N(0, 0.1^2).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"oft_only"`` those of the targets.
        nearest_divisor: Whether a size that does not divide a layer's features is replaced by the nearest divisor, as
            peft does; else it is an error.
    """

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init_weights: bool = True
    bias: str = "none"
    nearest_divisor: bool = False

    peft_type: ClassVar[str] = "OFT"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, Any]] = {"Q": "oft_R.weight", "embedding": {"Q": "oft_embedding_R.weight"}}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    #: What peft's config means without saying so: fields to set when one is read.
    peft_implied: ClassVar[dict[str, Any]] = {"nearest_divisor": True}
    leaf_names: ClassVar[tuple[str, ...]] = ("Q",)
    weight_free: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "embedding"})
    bias_only: ClassVar[str] = "oft_only"
    #: Of blocks by size that are not shared.
    size: ClassVar[str] = "in_ * (oft_block_size - 1) // 2"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "oft_block_size", "num_cayley_neumann_terms"):
            value = getattr(self, name)
            self.require(value >= 0, name, "a non-negative integer", value)
        both = f"r={self.r}, oft_block_size={self.oft_block_size}"
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                errors.say(self.label, "exactly one of r and oft_block_size must be nonzero", both, "set the other to 0")
            )
        terms = self.num_cayley_neumann_terms
        self.require(0 < terms <= MOST_TERMS, "num_cayley_neumann_terms", f"from 1 to {MOST_TERMS}", terms)
        self.require(0 <= self.module_dropout < 1, "module_dropout", "in [0, 1)", self.module_dropout)
        self.require(self.eps > 0, "eps", "positive", self.eps)
        self.require(self.bias in ("none", "all", self.bias_only), "bias", f"'none', 'all' or {self.bias_only!r}", self.bias)

    @classmethod
    def examples(cls) -> tuple[OFT, ...]:
        """Returns the series and the exact rotation, one shared block, blocks by number, and the constrained form."""
        return (
            cls(oft_block_size=2, module_dropout=0.25),
            cls(oft_block_size=3, use_cayley_neumann=False),
            cls(oft_block_size=4, block_share=True, num_cayley_neumann_terms=3),
            cls(oft_block_size=0, r=2, use_cayley_neumann=False),
            cls(oft_block_size=2, coft=True, eps=0.1, use_cayley_neumann=False),
        )

    def block_size(self, base: Base) -> int:
        """Returns the size of a block at a site."""
        dim = _turned(base)
        wanted = self.oft_block_size or self.r
        fitting = nearest_divisor(wanted, dim) if self.nearest_divisor else wanted
        return fitting if self.oft_block_size else dim // fitting

    def check_site(self, base: Base) -> None:
        dim, name = _turned(base), "oft_block_size" if self.oft_block_size else "r"
        value = getattr(self, name)
        fits = self.nearest_divisor or dim % value == 0
        remedy = f"use a divisor ({errors.divisors(dim)}) or leave the site out of target_modules"
        self.require_at(fits, base, f"{name} must divide the {dim} features that are rotated", value, remedy)
        size = self.block_size(base)
        self.require_at(size > 1 or self.nearest_divisor, base, "a block must have at least 2 features to rotate", size)
        groups = base.kind.groups
        self.require_at(groups == 1, base, "a rotation mixes features: groups must be 1", groups, "leave the site out")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        size = self.block_size(base)
        shape = (1 if self.block_share else _turned(base) // size, size * (size - 1) // 2)
        return {"Q": torch.zeros(shape) if self.init_weights else rng.normal(shape, gen, 0.1)}, {}

    def project(self, leaves: Leaves, base: Base) -> Leaves:
        """Returns the leaves with which ``apply`` computes: those of COFT lie in a ball, all others are free."""
        q = leaves["Q"]
        return {**leaves, "Q": within(q, self.eps / q.shape[-2] ** 0.5)} if self.coft else leaves

    def rotation(self, leaves: Leaves, base: Base) -> Tensor:
        """Computes the blocks R ``(n, b, b)``, in float32 or wider; ``(1, b, b)`` if they are shared."""
        q = skew(wide(self.project(leaves, base)["Q"]), self.block_size(base))
        return cayley_series(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        blocks = self._dropped(self.rotation(leaves, base), base, context)
        if base.takes_ids:
            return rotate(base(x), blocks)
        if base.channels == base.shape[-1]:
            return base(base.over_in(x, lambda h: rotate(h, blocks)))
        return _turn(base, blocks).meet(x)

    def _dropped(self, blocks: Tensor, base: Base, context: Context) -> Tensor:
        if not context.training or not self.module_dropout:
            return blocks
        count, size = _turned(base) // blocks.shape[-1], blocks.shape[-1]
        eye = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
        ones = torch.ones(count, 1, 1, dtype=blocks.dtype, device=blocks.device)
        return torch.where(context.dropout(ones, self.module_dropout) > 0, blocks, eye)

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return _turn(base, self.rotation(leaves, base))

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return _turn(base, self._inverse(leaves, base))

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        inverse = self._inverse(leaves, base).abs()
        return torch.maximum(inverse.sum(-1).amax(), inverse.sum(-2).amax())

    def _inverse(self, leaves: Leaves, base: Base) -> Tensor:
        blocks = self.rotation(leaves, base)
        return torch.linalg.inv(blocks) if self.use_cayley_neumann else blocks.mT

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Leaves out ``nearest_divisor``, which is how peft reads every size."""
        return {k: v for k, v in super().to_peft_config(leaves).items() if k != "nearest_divisor"}


def _turned(base: Base) -> int:
    """Counts the features that are rotated: the inputs of the matrix, or the outputs of an embedding."""
    return base.shape[-2] if base.takes_ids else base.shape[-1]


def _turn(base: Base, blocks: Tensor) -> Base:
    """Returns the base with the matrix that rotating by ``blocks`` and then meeting the base amounts to."""
    blocks, weight = blocks.to(base.precision), base.weight
    return base.replace(weight=rotate(weight.mT, blocks).mT if base.takes_ids else rotate(weight, blocks.mT))
