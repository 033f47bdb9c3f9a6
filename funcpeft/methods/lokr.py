r"""LoKr: a Kronecker product, the second factor of low rank.

.. math:: W' = W + s \, (W_1 \otimes W_2), \quad s = \alpha / r

W_1 (l, p), W_2 (k, q, kernel) with out = l k and in = p q. A factor is one leaf (``w1``, ``w2``), a product of two
(``w1a`` (l, r) and ``w1b`` (r, p); ``w2a`` (k, r) and ``w2b`` (r, q kernel)), or a Tucker product with the core ``t2`` (see
``loha``), whichever the rank makes smaller: which of them are there says which it is. A linear layer computes
W_1 X W_2^T with x reshaped to X (p, q), never the product itself.

The scaling is alpha / r even where no factor has rank r. A full W_2 of a one-dimensional convolution fills the update in
another order, as it does in peft, whose files it must read. peft keeps the ``w2a`` of a Tucker product transposed.

References:
    Yeh et al., Navigating Text-To-Image Customization (LyCORIS), 2023, arXiv 2309.14859.
    Edalati et al., KronA, 2022, arXiv 2212.10650.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Additive, FrozenDict, by_pattern
from funcpeft.methods.loha import keep_mask, kernel_of, rank_config, tucker
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_INITS = (True, False, "lycoris")


def factorization(dim: int, factor: int = -1) -> tuple[int, int]:
    """Splits ``dim`` in two: by ``factor`` if it divides, else the most even split whose smaller part is at most that.

    Example:
        >>> factorization(768), factorization(127), factorization(16, 8), factorization(12, 5)
        ((24, 32), (1, 127), (8, 2), (3, 4))
    """
    if factor > 0 and dim % factor == 0:
        return factor, dim // factor
    most = math.isqrt(dim) if factor == -1 else min(factor, math.isqrt(dim))
    small = max((d for d in range(1, most + 1) if dim % d == 0), default=1)
    return small, dim // small


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """Returns the Kronecker product of ``w1 (l, p)`` and ``w2 (k, q, *kernel)`` as a matrix ``(l k, p q kernel)``."""
    order = "lp,kqc->klqpc" if w2.ndim == 3 else "lp,kq...->lkpq..."  # a third axis alone: as torch.kron pads
    return torch.einsum(order, w1, w2).reshape(w1.shape[0] * w2.shape[0], -1)


@dataclass(frozen=True, kw_only=True)
class LoKr(Additive):
    """Low-rank Kronecker product adaptation.

    Args:
        r: Rank of factors that are products.
        alpha: Scaling is ``alpha / r``.
        rank_dropout: Probability with which a row of the update is dropped in training.
        module_dropout: Probability with which a call of a layer goes without its update in training.
        use_effective_conv2d: Whether a low-rank W_2 of a kernel larger than 1 is a Tucker product, of any dimension.
        decompose_both: Whether W_1 is a product too, where ``r`` is below half its larger side.
        decompose_factor: Size of W_1's sides where it divides, -1 for the most even split.
        rank_dropout_scale: Whether the rows that are kept are divided by their fraction.
        init_weights: ``True`` for W_1 = 0, ``"lycoris"`` for W_2 = 0, ``False`` for an update that is not zero.
        rank_pattern: Ranks by pattern of the module path; the first that matches wins.
        alpha_pattern: Values of ``alpha`` by pattern.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()

    peft_type: ClassVar[str] = "LOKR"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv"})
    keys: ClassVar[dict[str, str]] = {
        "w1": "lokr_w1",
        "w1a": "lokr_w1_a",
        "w1b": "lokr_w1_b",
        "w2": "lokr_w2",
        "w2a": "lokr_w2_a",
        "w2b": "lokr_w2_b",
        "t2": "lokr_t2",
    }
    leaf_names: ClassVar[tuple[str, ...]] = ("w1", "w1a", "w1b", "w2", "w2a", "w2b", "t2", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"w1a": -1, "w1b": -2, "w2a": -1, "w2b": -2}
    weight_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require(all(v > 0 for v in self.rank_pattern.values()), "rank_pattern", "positive ranks", dict(self.rank_pattern))
        self.require(0 <= self.rank_dropout < 1, "rank_dropout", "in [0, 1)", self.rank_dropout)
        self.require(0 <= self.module_dropout <= 1, "module_dropout", "in [0, 1]", self.module_dropout)
        factor = self.decompose_factor
        self.require(factor == -1 or factor > 0, "decompose_factor", "-1 or positive", factor)
        if self.init_weights not in _INITS:
            raise ValueError(errors.one_of(self.label, "init_weights", self.init_weights, _INITS))

    @classmethod
    def examples(cls) -> tuple[LoKr, ...]:
        """Returns full and decomposed factors, the effective form and ranks by pattern."""
        return (
            cls(r=8, alpha=3, rank_dropout=0.25, rank_dropout_scale=True),
            cls(r=1, decompose_both=True, decompose_factor=4),
            cls(r=1, use_effective_conv2d=True, init_weights="lycoris"),
            cls(r=1, rank_pattern={"second": 2}, alpha_pattern={"first": 5}, module_dropout=0.25),
        )

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r = by_pattern(self.rank_pattern, base.path, self.r)
        scaling = by_pattern(self.alpha_pattern, base.path, self.alpha) / r
        consts = {"scaling": torch.tensor(scaling, dtype=torch.float64), "rank": torch.tensor(r)}
        zero = {True: ("w1", "w1a"), "lycoris": ("w2", "w2b"), False: ()}[self.init_weights]
        params: Leaves = {}
        for name, shape in self._shapes(base, r).items():
            params[name] = torch.zeros(shape) if name in zero else rng.kaiming(shape, gen)
        return _transposed(params), consts

    def _shapes(self, base: Base, r: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a site's leaves in peft's layout and order of draws."""
        kernel = tuple(base.site.shape[2:])
        sides = base.site.shape[:2] if kernel else base.shape
        (rows, k), (cols, q) = (factorization(n, self.decompose_factor) for n in sides)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.decompose_both and r < max(rows, cols) / 2:
            shapes |= {"w1a": (rows, r), "w1b": (r, cols)}
        else:
            shapes |= {"w1": (rows, cols)}
        if r >= max(k, q) / 2:
            shapes |= {"w2": (k, q, *kernel)}
        elif self.use_effective_conv2d and kernel_of(base):
            core = (*kernel, 1) if len(kernel) == 1 else kernel  # peft's core has two axes at least
            shapes |= {"w2a": (r, k), "w2b": (r, q), "t2": (r, r, *core)}
        else:
            shapes |= {"w2a": (k, r), "w2b": (r, q * math.prod(kernel))}
        return shapes

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        return leaves["scaling"] * kronecker(*_factors(leaves))

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        keep = self._kept(leaves["scaling"], base, context)
        if base.kind.name in ("linear", "transposed"):
            w1, w2 = _factors(leaves)
            pieces = x.to(w1.dtype).unflatten(-1, (w1.shape[1], w2.shape[1]))
            update = leaves["scaling"] * (w1 @ (pieces @ w2.mT)).flatten(-2)
            return base(x) + (update if keep is None else update * keep)
        update = self.delta(leaves, base)
        return base(x) + base.map(x, update if keep is None else update * keep[:, None])

    def _kept(self, like: Tensor, base: Base, context: Context) -> Tensor | None:
        """Draws what every output's update is multiplied by; ``None`` for ones."""
        if not context.training:
            return None
        rows = keep_mask(context, self.rank_dropout, (base.shape[0],), like, 0)
        if self.rank_dropout_scale:
            fraction = rows.mean()
            rows = rows / torch.where(fraction > 0, fraction, 1.0)
        return rows * keep_mask(context, self.module_dropout, (), like, 1)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return super().to_peft(base, _transposed(leaves))

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return _transposed(super().from_peft(base, tensors))

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Derives ranks and alphas from the leaves."""
        return rank_config(super().to_peft_config(leaves), leaves)


def _factors(leaves: Leaves) -> tuple[Tensor, Tensor]:
    w1 = leaves["w1"] if "w1" in leaves else leaves["w1a"] @ leaves["w1b"]
    if "t2" in leaves:
        return w1, tucker(leaves["t2"], leaves["w2a"], leaves["w2b"])
    return w1, leaves["w2"] if "w2" in leaves else leaves["w2a"] @ leaves["w2b"]


def _transposed(leaves: Leaves) -> Leaves:
    """Turns the outer factor of a Tucker product, which peft keeps as ``(r, k)``."""
    return {name: t.mT.contiguous() if name == "w2a" and "t2" in leaves else t for name, t in leaves.items()}
