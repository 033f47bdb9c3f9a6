r"""BEFT: bias-efficient fine-tuning, a trained vector added to the output.

.. math:: b' = b + v

v (out,): trained, zero at the start. The paper trains it at the value projections of attention, which are the default
targets. At a layer without a bias there is nothing to merge into: it is adapted, and a merge refused.

References:
    BEFT: Bias-Efficient Fine-Tuning of Language Models, 2025, arXiv 2509.15974.
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

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        v = rng.randn((base.shape[-2],), gen)
        return {"v": torch.zeros_like(v) if self.init_weights else v}, {}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        return base.over_out(base(x), lambda y: y + leaves["v"])

    def merges_at(self, base: Base) -> bool:
        return base.site.bias is not None

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(bias=self._bias(base) + leaves["v"])

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(bias=self._bias(base) - leaves["v"])

    def _bias(self, base: Base) -> Tensor:
        if base.bias is None:
            rule, remedy = "merging needs a layer with a bias", "keep it as an adapter"
            raise errors.NoMergedFormError(errors.say(f"{self.label} at {base.path!r}", rule, None, remedy))
        return base.bias

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return {"beft_bias": leaves["v"][None]}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return {"v": tensors["beft_bias"][0]}
