r"""HRA: Householder reflection adaptation.

.. math:: W' = W H_1 H_2 \cdots H_r, \qquad H_k = I - 2 u_k u_k^\top, \quad u_k = U_k / \lVert U_k \rVert

U (in, r): one vector per reflection, trained; pairs of equal vectors make the start neutral, so r should be even. The chain
is one product with matrices of r columns,

.. math:: H_1 \cdots H_r = I - \hat U T^{-1} \hat U^\top, \qquad
   T = \tfrac12 I + \mathrm{striu}(\hat U^\top \hat U)

where the columns of U^ are u_k. With ``apply_GS`` the vectors are made orthogonal first, Q = orth(U), and W' = W (I - 2 Q Q^T).
Inputs are reflected before they meet the base, so the weight is not made dense, unless a kernel covers several positions.

References:
    Yuan et al., Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, 2024,
    arXiv 2405.17484, eq. (5) and (6).
    Schreiber and Van Loan, A Storage-Efficient WY Representation for Products of Householder Transformations, 1989 (T).
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
from funcpeft.weights import Base, wide


@dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """Orthogonal adaptation by a chain of reflections.

    Args:
        r: Number of reflections; even for a neutral start.
        apply_GS: Whether the vectors are made orthogonal before they reflect. Gram and Schmidt's rule is not defined at the
            neutral start, whose vectors are equal in pairs; the start is then of different vectors, and not neutral.
        init_weights: Whether vectors come in equal pairs; else all are drawn apart.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"hra_only"`` those of the targets.
    """

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "HRA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv"})
    keys: ClassVar[dict[str, str]] = {"U": "hra_u"}
    leaf_names: ClassVar[tuple[str, ...]] = ("U",)
    weight_free: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    bias_only: ClassVar[str] = "hra_only"
    size: ClassVar[str] = "r * in_"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=4), cls(r=2, apply_GS=True)

    @property
    def neutral(self) -> bool:
        return not self.apply_GS

    @property
    def paired(self) -> bool:
        """Whether the start is of equal pairs."""
        return self.init_weights and self.r % 2 == 0 and not self.apply_GS

    def check_site(self, base: Base) -> None:
        in_ = base.shape[-1]
        self.require_at(in_ > 1, base, "a reflection needs at least 2 features", in_, "leave the site out")
        groups = base.kind.groups
        self.require_at(groups == 1, base, "reflections need a convolution of one group", groups, "leave the site out")
        if self.apply_GS:
            self.require_at(self.r <= in_, base, f"with apply_GS r must be at most in = {in_}", self.r)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        in_ = base.shape[-1]
        if self.paired:
            return {"U": rng.kaiming((in_, self.r // 2), gen).repeat_interleave(2, dim=1)}, {}
        return {"U": rng.kaiming((in_, self.r), gen)}, {}

    def reflected(self, h: Tensor, u: Tensor, *, back: bool = False) -> Tensor:
        """Returns rows ``h (..., in)`` times H_r ... H_1, which is what inputs meet, or times H_1 ... H_r."""
        if self.apply_GS:
            q = torch.linalg.qr(u).Q  # spans what Gram and Schmidt's vectors do, and signs cancel
            return h - 2 * (h @ q) @ q.mT
        u = u / u.norm(dim=-2, keepdim=True)
        t = torch.triu(u.mT @ u, 1) + 0.5 * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        t = t if back else t.mT
        return h - (h @ u) @ torch.linalg.solve_triangular(t, u.mT, upper=back)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if base.channels != base.shape[-1]:  # a kernel's patches overlap, so they cannot be reflected in the input
            return super().apply(leaves, base, x, context)
        u = wide(leaves["U"])
        x = x.to(torch.promote_types(x.dtype, u.dtype))
        return base(base.over_in(x, lambda h: self.reflected(h, u)))

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        """Raises ``ValueError`` if a vector is zero: it has no direction to reflect along."""
        leaves = super().from_peft(base, tensors)
        norms = leaves["U"].norm(dim=-2)
        self.require(bool((norms > 0).all()), self.keys["U"], "vectors that are not zero", f"norms {norms.tolist()}")
        return leaves

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=self.reflected(base.weight, leaves["U"], back=True))

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=self.reflected(base.weight, leaves["U"]))
