r"""BEFT: bias-efficient fine-tuning, a trained vector added to the output.

.. math:: b' = b + v

v (out,): trained, zero at the start. The paper trains it at the value projections of attention, which are the default
targets. A layer without a bias is refused: there would be nothing to merge into.

References:
    BEFT: Bias-Efficient Fine-Tuning of Language Models, 2025, arXiv 2509.15974.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class BEFT(Method):
    """Adaptation of biases.

    Args:
        init_weights: Whether v starts at 0; else N(0, 1).
    """

    init_weights: bool = True

    peft_type: ClassVar[str] = "BEFT"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv"})
    keys: ClassVar[dict[str, str]] = {"v": "beft_bias"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    leaf_names: ClassVar[tuple[str, ...]] = ("v",)
    additive: ClassVar[bool] = True
    weight_free: ClassVar[bool] = True
    size: ClassVar[str] = "out"

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(),)

    def check_site(self, base: Base) -> None:
        self.require_at(base.site.bias is not None, base, "a target must have a bias", None, "leave the site out")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        v = rng.randn((base.shape[-2],), gen)
        return {"v": torch.zeros_like(v) if self.init_weights else v}, {}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        return base.over_out(base(x), lambda y: y + leaves["v"])

    def merge(self, leaves: Leaves, base: Base) -> Base:
        assert base.bias is not None
        return base.replace(bias=base.bias + leaves["v"])

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        assert base.bias is not None
        return base.replace(bias=base.bias - leaves["v"])

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return {"beft_bias": leaves["v"][None]}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return {"v": tensors["beft_bias"][0]}
