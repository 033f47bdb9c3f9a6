r"""DEFT: decompositional efficient fine-tuning, which removes a subspace of outputs and injects new content.

.. math:: W' = W - Q T^\top W + s Q R \quad \text{(DEFT)}, \qquad W' = W - Q T^\top W \quad \text{(PaRa)}

P (out, r): trained, from which Q = P and T = relu(P), or Q = T = the orthonormal factor of P's QR decomposition; R (r, in):
trained, T^T W / s at the start, which makes it neutral; s = alpha / r, or 1. T^T W meets an input as T^T (W x), so W is
never made dense.

References:
    DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025.
    Chen et al., PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction, ICLR 2025, eq. (4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_DECOMPOSITIONS = ("relu", "qr")


@dataclass(frozen=True, kw_only=True)
class DEFT(Method):
    """Adaptation by removing and injecting a subspace of outputs.

    Args:
        r: Rank of the subspace; at most out is used.
        decomposition_method: How T comes from P: ``"relu"`` or ``"qr"``.
        init_scale: Scales the deviation 0.02 of R where the start is not neutral.
        alpha: Numerator of the scaling s; ``None`` (or 0) for s = 1.
        para: Whether there is no R: PaRa, which is never neutral.
        deft_dropout: Probability with which elements of the input of R are dropped in training.
        init_weights: Whether R starts so that the model does not change; else N(0, (0.02 init_scale)^2).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"deft_only"`` those of the targets.
    """

    r: int = 8
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "DEFT"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, str]] = {"P": "deft_P", "R": "deft_R"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    leaf_names: ClassVar[tuple[str, ...]] = ("P", "R", "scaling")
    weight_free: ClassVar[bool] = True
    bias_only: ClassVar[str] = "deft_only"
    size: ClassVar[str] = "min(r, out) * (in_ + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        if self.decomposition_method not in _DECOMPOSITIONS:
            raise ValueError(errors.one_of(self.label, "decomposition_method", self.decomposition_method, _DECOMPOSITIONS))
        self.require_probability("deft_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, deft_dropout=0.25, alpha=3), cls(r=1, decomposition_method="qr")

    @property
    def neutral(self) -> bool:
        return not self.para

    def check_site(self, base: Base) -> None:
        groups = base.kind.groups
        self.require_at(groups == 1, base, "a convolution must have one group", groups, "leave the site out")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        out, in_ = base.shape
        r = min(self.r, out)
        p, s = rng.normal((out, r), gen, 0.02), self.alpha / r if self.alpha else 1.0
        consts = {"scaling": torch.tensor(s, dtype=torch.float64)}
        if self.para:
            return {"P": p}, consts
        if not self.init_weights:
            return {"P": p, "R": rng.normal((r, in_), gen, 0.02 * self.init_scale)}, consts
        wide = p.to(device=base.device, dtype=base.weight.dtype)
        return {"P": wide, "R": self.pair(wide)[1].mT @ base.weight / s}, consts

    def pair(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Q and T ``(out, r)``."""
        if self.decomposition_method == "relu":
            return p, F.relu(p)
        q = torch.linalg.qr(p).Q
        return q, q

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        q, t = self.pair(leaves["P"])
        y, b = base(x).to(q.dtype), None if base.bias is None else base.bias.to(q.dtype)
        low = base.over_out(y, lambda h: -((h if b is None else h - b) @ t))
        if "R" in leaves:
            low = low + leaves["scaling"] * self._injected(leaves["R"], base, x, context)
        return y + base.over_out(low, lambda h: h @ q.mT)

    def _injected(self, r: Tensor, base: Base, x: Tensor, context: Context) -> Tensor:
        if base.takes_ids:
            return context.dropout(base.map(x, r), self.deft_dropout)
        return base.map(context.dropout(x, self.deft_dropout), r)

    def merge(self, leaves: Leaves, base: Base) -> Base:
        q, t = self.pair(leaves["P"])
        low = -(t.mT @ base.weight)
        if "R" in leaves:
            low = low + leaves["scaling"] * leaves["R"]
        return base.replace(weight=base.weight + q @ low)
