r"""GraLoRA: granular low-rank adaptation, a grid of small low-rank blocks.

.. math:: \Delta_{j, q} = s \, (A_q[:, j r/k : (j + 1) r/k] \; B_j[q r/k : (q + 1) r/k, :])^\top,
   \qquad W' = W + \Delta + s B_g A_g, \qquad s = \alpha / (r + h)

The update is cut into k x k blocks of (out / k, in / k), each of rank r / k; A (k, in / k, r): of each column of blocks;
B (k, r, out / k): of each row of blocks. Ag (h, in), Bg (out, h): a plain low-rank update beside, if ``hybrid_r`` is h > 0.

References:
    Jung et al., GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, 2025, arXiv 2505.20355, eq. (7).
"""

from __future__ import annotations

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
class GraLoRA(Additive):
    """Adaptation by a grid of low-rank blocks.

    Args:
        r: Rank summed over a row of blocks; a multiple of ``gralora_k``.
        hybrid_r: Rank h of the plain low-rank update beside; 0 for none.
        alpha: Numerator of the scaling.
        gralora_k: Number k of blocks along each side; must divide in and out.
        gralora_dropout: Probability with which elements of the adapter's input are dropped in training.
        init_weights: Whether the update starts at 0; else B is drawn as A is.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"gralora_only"`` those of the targets.
    """

    r: int = 32
    hybrid_r: int = 0
    alpha: float = 64
    gralora_k: int = 2
    gralora_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "GRALORA"
    keys: ClassVar[dict[str, str]] = {
        "A": "gralora_A",
        "B": "gralora_B",
        "Ag": "gralora_A_general.weight",
        "Bg": "gralora_B_general.weight",
    }
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "Ag", "Bg", "scaling")
    weight_free: ClassVar[bool] = True
    bias_only: ClassVar[str] = "gralora_only"
    size: ClassVar[str] = "(r + hybrid_r) * (in_ + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "gralora_k")
        self.require(self.hybrid_r >= 0, "hybrid_r", "a non-negative integer", self.hybrid_r)
        self.require(self.r % self.gralora_k == 0, "r", f"a multiple of gralora_k = {self.gralora_k}", self.r)
        self.require_probability("gralora_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=4, gralora_k=2, alpha=6, gralora_dropout=0.25), cls(r=3, gralora_k=3, hybrid_r=2, alpha=4)

    def check_site(self, base: Base) -> None:
        k, (out, in_) = self.gralora_k, base.shape
        self.require_at(in_ % k == 0 and out % k == 0, base, f"gralora_k must divide in {in_} and out {out}", k)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        k, r, h, (out, in_) = self.gralora_k, self.r, self.hybrid_r, base.shape
        a, b = [], []
        for _ in range(k):
            a.append(rng.kaiming((r, in_ // k), gen).T)
            b.append(torch.zeros(r, out // k) if self.init_weights else rng.kaiming((out // k, r), gen).T)
        leaves = {"A": torch.stack(a), "B": torch.stack(b)}
        if h:
            for shape in ((h, in_), (out, h)):  # as the layers that peft makes and then resets
                rng.kaiming(shape, gen)
            leaves["Ag"] = rng.kaiming((h, in_), gen)
            leaves["Bg"] = torch.zeros(out, h) if self.init_weights else rng.kaiming((out, h), gen)
        return leaves, {"scaling": torch.tensor(self.alpha / (r + h), dtype=torch.float64)}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        a, b = _cut(leaves)
        blocks = torch.einsum("qijs,jqso->joqi", a, b)
        update = blocks.flatten(2).flatten(0, 1)
        if "Ag" in leaves:
            update = update + leaves["Bg"] @ leaves["Ag"]
        return leaves["scaling"] * update

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = _cut(leaves)
        p, k = self.gralora_dropout, a.shape[0]
        dropped = context.dropout(x, p).to(a.dtype).unflatten(-1, (k, -1))
        low = torch.einsum("...qi,qijs->...jqs", dropped, a)
        y = torch.einsum("...jqs,jqso->...jo", low, b).flatten(-2)
        if "Ag" in leaves:
            y = y + F.linear(F.linear(context.dropout(x, p, slot=1).to(a.dtype), leaves["Ag"]), leaves["Bg"])
        return base(x) + leaves["scaling"] * y


def _cut(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """Returns the factors by block: A ``(q, in / k, j, r / k)``, B ``(j, q, r / k, out / k)``."""
    a, b = leaves["A"], leaves["B"]
    k = a.shape[0]
    share = a.shape[-1] // k
    return a.unflatten(-1, (k, share)), b.unflatten(1, (k, share))
