r"""DoRA: weight-decomposed low-rank adaptation.

.. math:: W' = g \circ V, \quad V = W + s B A, \quad g = m / \lVert V \rVert

m (out,): the length that every row of W' gets, at the start that of V; A (r, in), B (out, r), s: as in LoRA; g scales rows.
The norm runs over all inputs of a row: for an embedding, whose matrix is (dim, vocab), over the vocabulary. It is a constant
to differentiation, as the paper advises, in ``merge`` too. With dropout, training computes
W x + b + (g - 1) W d + g s B A d with d the dropped input. A row of V that is zero stays zero (peft 0.21 divides by its norm
and gives NaN). Rows of W' have length m, whatever g was, so a merged weight alone does not say what W was.

References:
    Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, arXiv 2402.09353, eq. (5) and section 4.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft.context import Context
from funcpeft.method import Factor, Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Leaves
from funcpeft.weights import Base


def row_norm(weight: Tensor) -> Tensor:
    """Returns the Euclidean length of every row of a matrix ``(*lead, out, in)``."""
    return torch.linalg.vector_norm(weight, dim=-1)


def gain(m: Tensor, v: Tensor) -> Tensor:
    """Returns what scales the rows of ``v`` to the lengths ``m``; the norm is a constant to differentiation."""
    norm = row_norm(v.detach())
    return m / torch.where(norm > 0, norm, 1.0)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Low-rank adaptation of the direction of a weight, with the length of every row trained beside.

    Fields are those of ``LoRA``; ``lora_bias`` must be ``False``.
    """

    keys: ClassVar[dict[str, Any]] = {
        **LoRA.keys,
        "m": "lora_magnitude_vector",
        "embedding": {**LoRA.keys["embedding"], "m": "lora_magnitude_vector"},
    }
    kinds: ClassVar[frozenset[str]] = LoRA.kinds - {"raw"}
    peft_fixed: ClassVar[dict[str, Any]] = {**LoRA.peft_fixed, "use_dora": True}
    peft_switch: ClassVar[str] = "use_dora"
    size: ClassVar[str] = "r * (in_ + out) + out"
    leaf_names: ClassVar[tuple[str, ...]] = ("m", "A", "B", "A0", "B0", "scaling", "rank")
    additive: ClassVar[bool] = False
    weight_free: ClassVar[bool] = False
    waived: ClassVar[dict[str, str]] = {
        "unmerge": "rows of the merged weight have length m whatever the base's length was; keep the base params",
        "derivative": "the norm is a constant to differentiation, as the paper defines the gradient",
    }
    unmerge = Method.unmerge

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.lora_bias, "lora_bias", "False", self.lora_bias, "use LoRA, whose update may have a bias")

    @classmethod
    def examples(cls) -> tuple[DoRA, ...]:
        """Returns plain DoRA, one with dropout, and one that starts from factors of the base."""
        return cls(r=2, lora_alpha=3), cls(r=2, lora_dropout=0.25), cls(r=1, lora_alpha=3, init_lora_weights="pissa")

    def check_tie(self, site: Base, other: Base) -> None:
        rule, remedy = "the magnitude of an embedding has no counterpart at its tied head", "use LoRA, or do not tie"
        self.require_at(site.takes_ids == other.takes_ids, other, rule, None, remedy)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        weight = base.weight
        v = weight + self.delta({n: t.to(weight) for n, t in {**params, **consts}.items()}, base)
        return {**params, "m": row_norm(v)}, consts

    def gain(self, leaves: Leaves, base: Base) -> Tensor:
        """Computes g, one number per row."""
        return gain(leaves["m"], base.weight + self.delta(leaves, base))

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        g, y, bias = self.gain(leaves, base), base(x), base.bias
        dropped = x if base.takes_ids else context.dropout(x, self.lora_dropout)
        plain = y if dropped is x else base(dropped)
        if bias is not None:
            plain = base.over_out(plain, lambda h: h - bias)
        update = self.product(leaves, base, dropped)
        return y + base.over_out(plain, lambda h: (g - 1) * h) + base.over_out(update, lambda h: g * h)

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        per_length = gain(torch.ones_like(leaves["m"]), base.weight + self.delta(leaves, base))
        scaled = base.over_out(grad_out, lambda h: leaves["m"] * per_length * h)
        dropped, bias = x if base.takes_ids else context.dropout(x, self.lora_dropout), base.bias
        product = base.features_last(base(dropped) + self.product(leaves, base, dropped))
        product = product if bias is None else product - bias
        m = base.features_last(grad_out) * per_length * product
        return {**super().factors(leaves, base, x, scaled, context), "m": m}

    def merge(self, leaves: Leaves, base: Base) -> Base:
        v = base.weight + self.delta(leaves, base)
        return base.replace(weight=gain(leaves["m"], v)[..., None] * v)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        m = leaves["m"]
        if base.kind.name == "conv":
            m = m.reshape(1, -1, *(1 for _ in base.site.shape[2:]))
        return super().to_peft(base, {**leaves, "m": m})

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        leaves = super().from_peft(base, tensors)
        return {**leaves, "m": leaves["m"].flatten()}
