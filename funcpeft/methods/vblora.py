r"""VB-LoRA: low-rank factors composed of vectors of one bank.

.. math:: \text{piece} = \sum_{k \in \mathrm{top}_K(l)} \mathrm{softmax}(l_{\mathrm{top}_K})_k \, V_k, \qquad W' = W + B A

V (N, L): the bank, trained, of all sites. Rows of A (r, in) and columns of B (out, r) are cut into pieces of L numbers, and
each piece is a mixture of the K vectors with the largest logits: LA (r, in / L, N), LB (out / L, r, N), trained. Files of
``save_only_topk_weights`` hold the K indices and weights alone: what was not among them is then far below, for good.

References:
    Li et al., VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, 2024, arXiv 2405.15179, eq. (2) to (4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.families import Factored, rounded
from funcpeft.method import Method
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base

#: The logit of a vector that a file does not mention: its weight is 0 in every floating format, and it is finite.
ABSENT = -1e4


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Factored):
    """Low-rank adaptation from a vector bank.

    Args:
        r: Rank of the updates.
        num_vectors: Number N of vectors in the bank.
        vector_length: Length L of each; must divide in and out.
        topk: Number K of vectors in a mixture.
        save_only_topk_weights: Whether checkpoints hold only the K weights of each piece; smaller, and not to be trained on.
        vblora_dropout: Probability with which elements of the adapter's input are dropped in training.
        init_vector_bank_bound: The bank starts as U(+-bound).
        init_logits_std: Logits start as N(0, std^2). The start changes the model a little.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"vblora_only"`` those of the targets.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    bias: str = "none"

    peft_type: ClassVar[str] = "VBLORA"
    keys: ClassVar[dict[str, str]] = {"LA": "vblora_logits_A", "LB": "vblora_logits_B"}
    shared_keys: ClassVar[dict[str, str]] = {"V": "vblora_vector_bank"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    leaf_names: ClassVar[tuple[str, ...]] = ("V", "LA", "LB")
    dropout_field: ClassVar[str] = "vblora_dropout"
    identity_at_init: ClassVar[bool] = False
    bias_only: ClassVar[str] = "vblora_only"
    size: ClassVar[str] = "r * num_vectors * (in_ + out) // vector_length"
    size_shared: ClassVar[str] = "num_vectors * vector_length"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "num_vectors", "vector_length", "topk")
        self.require(self.topk <= self.num_vectors, "topk", f"at most num_vectors = {self.num_vectors}", self.topk)
        for name in ("init_vector_bank_bound", "init_logits_std"):
            self.require(getattr(self, name) >= 0, name, "non-negative", getattr(self, name))
        self.require_probability("vblora_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, num_vectors=5, vector_length=2, vblora_dropout=0.25), cls(r=1, num_vectors=4, vector_length=3, topk=3)

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        (out, in_), length = base.shape, self.vector_length
        common = math.gcd(out, in_)
        remedy = f"use one of {[d for d in range(1, common + 1) if common % d == 0][:12]}"
        self.require_at(common % length == 0, base, f"vector_length must divide in {in_} and out {out}", length, remedy)

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        params: Tree = {}
        for path, base in sites.items():  # peft draws the bank anew at every site, and the last one stays
            bank = rng.uniform((self.num_vectors, self.vector_length), rng.generator(seed, ""), self.init_vector_bank_bound)
            params[""] = {"V": rounded(bank, base.dtype) if isinstance(seed, rng.Stream) else bank}
            params[path] = self.init_site(base, rng.generator(seed, path))[0]
        return Adapter(params)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        (out, in_), n, length = base.shape, self.num_vectors, self.vector_length
        a = rng.normal((self.r, in_ // length, n), gen, self.init_logits_std)
        return {"LA": a, "LB": rng.normal((out // length, self.r, n), gen, self.init_logits_std)}, {}

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        a, b = (self._mixed(leaves[name], leaves["V"]) for name in ("LA", "LB"))
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Returns the pieces ``(..., L)`` of logits ``(..., N)``."""
        top = logits.topk(self.topk, dim=-1)
        return (torch.softmax(top.values, -1)[..., None] * bank[top.indices]).sum(-2)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        if not self.save_only_topk_weights:
            return super().to_peft(base, leaves)
        made: dict[str, Tensor] = {}
        for name, key in self.keys.items():
            top = leaves[name].topk(self.topk, dim=-1)
            made[f"{key}_topk_indices"] = top.indices.to(_smallest(self.num_vectors))
            made[f"{key}_topk_weights"] = torch.softmax(top.values, -1)[..., :-1].contiguous()
        return made

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        if not self.save_only_topk_weights:
            return super().from_peft(base, tensors)
        return {
            name: self._logits(key, tensors[f"{key}_topk_indices"], tensors[f"{key}_topk_weights"])
            for name, key in self.keys.items()
        }

    def _logits(self, key: str, index: Tensor, weights: Tensor) -> Tensor:
        """Inverts the softmax; raises ``ValueError`` unless indices are distinct ones of the bank and weights are a share."""
        self.require_places(index, f"{key}_topk_indices", self.num_vectors)
        whole = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        least = -self.topk * torch.finfo(weights.dtype).eps  # of a sum that was rounded
        shares = bool((whole >= least).all())
        self.require(shares, f"{key}_topk_weights", "shares of 1", f"one of {whole.min().item():g}")
        logits = whole.clamp(min=torch.finfo(torch.float32).tiny).log()
        absent = torch.full((*index.shape[:-1], self.num_vectors), ABSENT, dtype=logits.dtype, device=logits.device)
        return absent.scatter(-1, index.long(), logits)


def _smallest(n: int) -> torch.dtype:
    """Returns the integer type in which peft keeps indices below ``n``."""
    if n < 2**8:
        return torch.uint8
    return torch.int16 if n < 2**15 else torch.int32 if n < 2**31 else torch.int64
