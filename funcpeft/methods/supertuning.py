r"""Super-Tuning: a sparse update at the entries of largest magnitude, with a low-rank one beside ("Supra").

.. math:: W' = W + \sum_{k} v_k \, E_{i_k} + \frac{\alpha}{r} B A

v (K,): trained values; i (K,): flat indices of the K = floor((1 - sparsity) in out) largest entries of the start's abs(W), in
that order, frozen; E_i: the matrix with a 1 at flat index i. A (r, in), B (out, r): with ``r`` only.

References:
    Super-Tuning, 2026, arXiv 2607.09287.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import rng
from funcpeft.context import Context
from funcpeft.method import Additive, Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class SuperTuning(Additive):
    """Sparse adaptation of the most (or least) important entries.

    Args:
        sparsity: Fraction of entries that are not trained.
        select_top: Whether the largest entries are trained; else the smallest.
        r: Rank of the low-rank update beside, ``None`` for none.
        lora_alpha: Numerator of its scaling; by default 2 r.
        lora_dropout: Probability with which elements of its input are dropped in training.
        init_weights: Whether the start is neutral; else v is N(0, 1) and B is drawn as A is.
        save_precomputed_indices: Whether checkpoints hold the indices; without them, reading finds them in the base again.
    """

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    peft_type: ClassVar[str] = "SUPERTUNING"
    keys: ClassVar[dict[str, str]] = {
        "v": "supertuning_values",
        "i": "supertuning_indices",
        "A": "supertuning_lora_A.weight",
        "B": "supertuning_lora_B.weight",
    }
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    leaf_names: ClassVar[tuple[str, ...]] = ("v", "i", "A", "B", "scaling")
    weight_free: ClassVar[bool] = True
    size: ClassVar[str] = "floor(in_ * out * (1 - sparsity)) + (r or 0) * (in_ + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.sparsity < 1, "sparsity", "in [0, 1)", self.sparsity)
        if self.r is not None:
            self.require_positive("r")
        alone = self.lora_alpha is not None and self.r is None
        self.require(not alone, "lora_alpha", "None without r", self.lora_alpha, "set r too")
        self.require_probability("lora_dropout")

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(sparsity=0.7), cls(sparsity=0.5, select_top=False, r=2, lora_dropout=0.25, save_precomputed_indices=False)

    def count(self, base: Base) -> int:
        """Returns the number of trained entries at a site."""
        return int(base.shape.numel() * (1 - self.sparsity))

    def check_site(self, base: Base) -> None:
        n, p = base.shape.numel(), self.lora_dropout
        self.require_at(self.count(base) > 0, base, f"sparsity must leave one of {n} entries to train", self.sparsity)
        self.require_at(base.met or not p, base, "lora_dropout must be 0 where no input meets the weight", p)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        n, (out, in_) = self.count(base), base.shape
        index = base.weight.abs().flatten().topk(n, largest=self.select_top).indices.to(torch.int32)
        leaves, consts = {"v": torch.zeros(n) if self.init_weights else rng.randn((n,), gen)}, {"i": index}
        if self.r is not None:
            for shape in ((self.r, in_), (out, self.r)):  # as the layers that peft makes and then resets
                rng.kaiming(shape, gen)
            leaves["A"] = rng.kaiming((self.r, in_), gen)
            leaves["B"] = torch.zeros(out, self.r) if self.init_weights else rng.kaiming((out, self.r), gen)
            alpha = 2 * self.r if self.lora_alpha is None else self.lora_alpha
            consts["scaling"] = torch.tensor(alpha / self.r, dtype=torch.float64)
        return leaves, consts

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        update = _scattered(leaves, base)
        return update + leaves["scaling"] * (leaves["B"] @ leaves["A"]) if "A" in leaves else update

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        v, y, (out, in_) = leaves["v"], base(x), base.shape
        if 4 * (x.numel() // in_) * v.shape[-1] > out * in_:  # then one dense product takes less than every entry per token
            y = y + base.map(x, _scattered(leaves, base))
        else:
            index = leaves["i"].long()
            met = x.to(v.dtype)[..., index % in_] * v
            y = y.to(torch.promote_types(y.dtype, v.dtype)).index_add(-1, index // in_, met)
        if "A" in leaves:
            low = base.map(context.dropout(x, self.lora_dropout), leaves["A"])
            y = y + leaves["scaling"] * F.linear(low, leaves["B"])
        return y

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        made = super().to_peft(base, leaves)
        return made if self.save_precomputed_indices else {k: t for k, t in made.items() if k != self.keys["i"]}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        """Raises ``ValueError`` unless indices are distinct ones of the weight."""
        leaves = super().from_peft(base, tensors)
        if base is not None and "i" in leaves:
            self.require_places(leaves["i"], self.keys["i"], base.shape.numel())
        return leaves

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Writes the default of ``lora_alpha`` out, as peft does."""
        alpha = 2 * self.r if self.r is not None and self.lora_alpha is None else self.lora_alpha
        return {**super().to_peft_config(leaves), "lora_alpha": alpha}


def _scattered(leaves: Leaves, base: Base) -> Tensor:
    v, shape = leaves["v"], base.shape
    return v.new_zeros(shape.numel()).scatter(0, leaves["i"].long(), v).view(shape)
