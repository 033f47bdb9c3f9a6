r"""DeLoRA: low-rank adaptation whose strength is decoupled from its angle.

.. math:: W' = W + B \, \mathrm{diag}(c) \, A \, \mathrm{diag}(w), \qquad
   c_k = \frac{\lambda / r}{\lVert A_k \rVert \, \lVert B^k \rVert}

A (r, in), B (out, r), lambda (1,): trained; w (in,): norms of the base's columns at the start, frozen. Norms of the rows of A
and columns of B below 1e-4 count as 1e-4. Each of the r terms has norm lambda / r before w, so lambda bounds the update.

References:
    Bini et al., Decoupling Angles and Strength in Low-rank Adaptation, 2025, arXiv 2503.18225, eq. (7) to (9).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.families import Factored
from funcpeft.method import FrozenDict, Method, by_pattern
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_SMALLEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeLoRA(Factored):
    """Low-rank adaptation of bounded norm.

    Args:
        r: Rank of the update.
        delora_lambda: Initial value of lambda.
        module_dropout: Probability with which elements of the adapter's input are dropped in training.
        rank_pattern: Ranks by pattern of the module path; the first that matches wins.
        lambda_pattern: Initial lambdas, likewise.
        init_weights: Whether B starts at 0; else it is drawn as A is.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"delora_only"`` those of the targets.
    """

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = FrozenDict()
    lambda_pattern: Mapping[str, float] = FrozenDict()
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "DELORA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, str]] = {"A": "delora_A", "B": "delora_B", "lambda": "delora_lambda", "w": "delora_w_norm"}
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "lambda", "w", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1}
    dropout_field: ClassVar[str] = "module_dropout"
    bias_only: ClassVar[str] = "delora_only"
    size: ClassVar[str] = "r * (in_ + out) + 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        ranks = self.rank_pattern.values()
        self.require(all(r > 0 for r in ranks), "rank_pattern", "positive ranks", tuple(ranks))
        self.require_probability("module_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, delora_lambda=3, module_dropout=0.25), cls(r=1, rank_pattern={"second": 3}, lambda_pattern={"first": 2})

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r, (out, in_) = by_pattern(self.rank_pattern, base.path, self.r), base.shape
        a = rng.kaiming((r, in_), gen)
        b = torch.zeros(out, r) if self.init_weights else rng.kaiming((out, r), gen)
        strength = float(by_pattern(self.lambda_pattern, base.path, self.delora_lambda))
        consts = {"w": base.weight.norm(dim=0), "rank": torch.tensor(r)}
        return {"A": a, "B": b, "lambda": torch.tensor([strength])}, consts

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        return leaves["A"] * leaves["w"], leaves["B"] * _scales(leaves)

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Derives ranks from the leaves; lambdas are trained, so the pattern is of their start alone."""
        ranks = {p: int(t["A"].shape[-2]) for p, t in leaves.items() if "A" in t}
        r = next(iter(ranks.values()))
        return {**super().to_peft_config(leaves), "r": r, "rank_pattern": {p: n for p, n in ranks.items() if n != r}}


def _scales(leaves: Leaves) -> Tensor:
    """Returns c ``(r,)``."""
    rows = _norm(leaves["A"], -1).clamp(min=_SMALLEST)
    columns = _norm(leaves["B"], -2).clamp(min=_SMALLEST)
    return leaves["lambda"] / (leaves["rank"].to(rows.dtype) * rows * columns)


def _norm(t: Tensor, dim: int) -> Tensor:
    """Returns norms whose gradient at zero, which the start has, is zero."""
    square = t.square().sum(dim)
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
