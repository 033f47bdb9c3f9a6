r"""LoHa: the Hadamard product of two low-rank updates.

.. math:: W' = W + s \, (A_1 B_1) \odot (A_2 B_2), \quad s = \alpha / r

A_i (out, r), B_i (r, in): leaves ``w1a w1b w2a w2b``; the update has rank up to r^2. Under ``use_effective_conv2d`` each
factor of a convolution with a kernel larger than 1 is a Tucker product instead, with a core T_i (r, r, kernel), leaves
``t1 t2``, and B_i (r, in):

.. math:: G_i[o, c, k] = \sum_{xy} T_i[x, y, k] \, A_i[o, x] \, B_i[y, c]

Differences from peft 0.21: there the gradients of A_1 and A_2 are wrong under ``use_effective_conv2d``, here they are those
of the formula; there an update of which every row is dropped is NaN, here it is zero. peft keeps that A_i transposed.

References:
    Hyeon-Woo et al., FedPara, 2021, arXiv 2108.06098, propositions 1 and 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.context import Context
from funcpeft.method import Additive, FrozenDict, by_pattern
from funcpeft.tree import Leaves
from funcpeft.weights import Base


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Multiplies the first two axes of ``core (x, y, *kernel)`` by ``a (out, x)`` and ``b (y, in)``: ``(out, in, *kernel)``."""
    return torch.einsum("xy...,ox,yc->oc...", core, a, b)


def kernel_of(base: Base) -> tuple[int, ...]:
    """Returns the kernel of a convolution that covers several positions, else ``()``."""
    kernel = tuple(base.site.shape[2:]) if base.kind.name == "conv" else ()
    return kernel if any(k != 1 for k in kernel) else ()


def keep_mask(context: Context, p: float, shape: tuple[int, ...], like: Tensor, slot: int) -> Tensor:
    """Draws ones, and zeros with probability ``p`` when training, in the dtype of ``like``."""
    ones = torch.ones(shape, dtype=like.dtype, device=like.device)
    return (context.dropout(ones, p, slot) > 0).to(like.dtype)


def rank_config(config: Mapping[str, Any], leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Returns peft's config with ranks and alphas as the constants of the leaves say them, patterns by whole path."""
    ranks = {p: int(t["rank"]) for p, t in leaves.items() if "rank" in t}
    alphas = {p: float(f"{float(leaves[p]['scaling']) * r:.6g}") for p, r in ranks.items()}
    alphas = {p: int(a) if a.is_integer() else a for p, a in alphas.items()}
    r, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    rank_pattern = {p: v for p, v in ranks.items() if v != r}
    return {
        **config,
        "r": r,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": {p: v for p, v in alphas.items() if v != alpha},
    }


@dataclass(frozen=True, kw_only=True)
class LoHa(Additive):
    """Low-rank Hadamard product adaptation.

    Args:
        r: Rank of each of the two factors.
        alpha: Scaling is ``alpha / r``.
        rank_dropout: Probability with which a row of the update is dropped in training; the rest is divided by the
            fraction that was kept.
        module_dropout: Probability with which a call of a layer goes without its update in training.
        use_effective_conv2d: Whether kernels larger than 1 are Tucker products, of any dimension.
        init_weights: ``True`` for a zero update; ``False`` for one that is not.
        rank_pattern: Ranks by pattern of the module path; the first that matches wins.
        alpha_pattern: Values of ``alpha`` by pattern.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()

    peft_type: ClassVar[str] = "LOHA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv"})
    keys: ClassVar[dict[str, str]] = {
        "w1a": "hada_w1_a",
        "w1b": "hada_w1_b",
        "w2a": "hada_w2_a",
        "w2b": "hada_w2_b",
        "t1": "hada_t1",
        "t2": "hada_t2",
    }
    size: ClassVar[str] = "2 * r * (in_ + out)"
    leaf_names: ClassVar[tuple[str, ...]] = ("w1a", "w1b", "w2a", "w2b", "t1", "t2", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"w1a": -1, "w1b": -2, "w2a": -1, "w2b": -2}
    weight_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require(all(v > 0 for v in self.rank_pattern.values()), "rank_pattern", "positive ranks", dict(self.rank_pattern))
        self.require(0 <= self.rank_dropout < 1, "rank_dropout", "in [0, 1)", self.rank_dropout)
        self.require(0 <= self.module_dropout <= 1, "module_dropout", "in [0, 1]", self.module_dropout)

    @classmethod
    def examples(cls) -> tuple[LoHa, ...]:
        """Returns the plain and the effective form, and ranks by pattern."""
        return (
            cls(r=2, alpha=3, rank_dropout=0.25, module_dropout=0.25),
            cls(r=2, use_effective_conv2d=True),
            cls(r=1, rank_pattern={"second": 3}, alpha_pattern={"first": 5}),
        )

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r = by_pattern(self.rank_pattern, base.path, self.r)
        scaling = by_pattern(self.alpha_pattern, base.path, self.alpha) / r
        consts = {"scaling": torch.tensor(scaling, dtype=torch.float64), "rank": torch.tensor(r)}
        kernel = kernel_of(base) if self.use_effective_conv2d else ()
        out, in_ = base.site.shape[:2] if kernel else base.shape
        params: Leaves = {}
        for i in "12":
            a = rng.kaiming((r, out), gen).T.contiguous() if kernel else rng.kaiming((out, r), gen)
            drawn = i == "1" or not self.init_weights
            params |= {f"w{i}a": a, f"w{i}b": rng.kaiming((r, in_), gen) if drawn else torch.zeros(r, in_)}
        for i in "12" if kernel else "":
            core = (*kernel, 1) if len(kernel) == 1 else kernel  # peft's core has two axes at least
            params[f"t{i}"] = rng.kaiming((r, r, *core), gen)
        return params, consts

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        return leaves["scaling"] * _factor(leaves, "1") * _factor(leaves, "2")

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        update = self.delta(leaves, base)
        if context.training:
            rows = keep_mask(context, self.rank_dropout, (update.shape[0], 1), update, 0)
            fraction = rows.mean()
            update = update * rows / torch.where(fraction > 0, fraction, 1.0)
            update = update * keep_mask(context, self.module_dropout, (), update, 1)
        return base(x) + base.map(x, update)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return super().to_peft(base, _transposed(leaves))

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return _transposed(super().from_peft(base, tensors))

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Derives ranks and alphas from the leaves."""
        return rank_config(super().to_peft_config(leaves), leaves)


def _factor(leaves: Leaves, i: str) -> Tensor:
    a, b = leaves[f"w{i}a"], leaves[f"w{i}b"]
    return tucker(leaves[f"t{i}"], a, b).flatten(1) if f"t{i}" in leaves else a @ b


def _transposed(leaves: Leaves) -> Leaves:
    """Turns the outer factors of Tucker products, which peft keeps as ``(r, out)``."""
    turned = ("w1a", "w2a") if "t1" in leaves else ()
    return {name: t.mT.contiguous() if name in turned else t for name, t in leaves.items()}
