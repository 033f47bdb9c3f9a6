r"""VeRA: vector-based random matrix adaptation.

.. math:: W' = W + \mathrm{diag}(b) \, B_{:out} \, \mathrm{diag}(d) \, A_{:, :in}

A (r, largest in), B (largest out, r): frozen and random, shared by all sites, of which each takes the leading slices;
b (out,), d (r,): trained. A and B are drawn from ``projection_prng_key`` alone, not from the seed of ``init``, so adapters of
one net differ in b and d only. Their entries are U(+-sqrt(6 / columns)), rounded to the base's dtype as peft does.

References:
    Kopiczko et al., VeRA: Vector-based Random Matrix Adaptation, 2023, arXiv 2310.11454, eq. (2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.context import Context
from funcpeft.method import Additive, Factor
from funcpeft.tree import Leaves, Tree
from funcpeft.weights import Base


def projections(r: int, in_: int, out: int, prng_key: int) -> tuple[Tensor, Tensor]:
    """Draws A ``(r, in)``, then B ``(out, r)``, in float32 from a generator of their own."""
    gen = rng.stream(prng_key).generator
    return rng.kaiming((r, in_), gen, a=0.0), rng.kaiming((out, r), gen, a=0.0)


@dataclass(frozen=True, kw_only=True)
class VeRA(Additive):
    """Low-rank adaptation by shared random factors and trained vectors.

    Args:
        r: Rank of the update, which is the length of d.
        projection_prng_key: Determines A and B.
        save_projection: Whether checkpoints hold A and B; without them, reading draws them again.
        vera_dropout: Probability with which elements of the adapter's input are dropped in training.
        d_initial: Initial value of d.
        init_weights: Whether b starts at 0 and d at ``d_initial``; else b is 1 and d is N(0, 1).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"vera_only"`` those of the targets.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "VERA"
    keys: ClassVar[dict[str, str]] = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    shared_keys: ClassVar[dict[str, str]] = {"A": "vera_A", "B": "vera_B"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    rank_axes: ClassVar[dict[str, int]] = {"d": -1, "A": -2, "B": -1}
    size: ClassVar[str] = "out + r"
    leaf_names: ClassVar[tuple[str, ...]] = ("b", "d", "A", "B", "rank")
    weight_free: ClassVar[bool] = True
    depends_on_sites: ClassVar[bool] = True
    bias_only: ClassVar[str] = "vera_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require(0 <= self.vera_dropout < 1, "vera_dropout", "in [0, 1)", self.vera_dropout)
        self.require(self.bias in ("none", "all", self.bias_only), "bias", f"'none', 'all' or {self.bias_only!r}", self.bias)

    @classmethod
    def examples(cls) -> tuple[VeRA, ...]:
        """Returns one with dropout, and one whose checkpoints leave the projections to the key."""
        return cls(r=3, vera_dropout=0.25), cls(r=2, save_projection=False, projection_prng_key=5)

    def check_site(self, base: Base) -> None:
        if not base.met:
            p = self.vera_dropout
            self.require_at(not p, base, "vera_dropout must be 0 where no input meets the weight", p)

    def init_shared(self, sites: Mapping[str, Base], seed: int | rng.Stream) -> tuple[Tree, Tree]:
        shapes = [base.shape for base in sites.values()]
        in_, out = max(s[-1] for s in shapes), max(s[-2] for s in shapes)
        dtype = next(iter(sites.values())).dtype
        a, b = projections(self.r, in_, out, self.projection_prng_key)
        if dtype.itemsize < 4:
            a, b = a.to(dtype).float(), b.to(dtype).float()
        return {}, {"": {"A": a, "B": b, "rank": torch.tensor(self.r)}}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        b, d = torch.ones(base.shape[-2]), rng.randn((self.r,), gen)
        if self.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, self.d_initial)
        return {"b": b, "d": d}, {"rank": torch.tensor(self.r)}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        a, b = _slices(leaves, base)
        return (leaves["b"][:, None] * b) @ (leaves["d"][:, None] * a)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = _slices(leaves, base)
        low = leaves["d"] * base.map(context.dropout(x, self.vera_dropout), a)
        return base(x) + leaves["b"] * (low @ b.mT)

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        a, b = _slices(leaves, base)
        low = base.map(context.dropout(x, self.vera_dropout), a)
        return {"b": grad_out * ((leaves["d"] * low) @ b.mT), "d": low * ((grad_out * leaves["b"]) @ b)}


def _slices(leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
    out, in_ = base.shape[-2:]
    return leaves["A"][:, :in_], leaves["B"][:out]
