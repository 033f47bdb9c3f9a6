r"""KaSA: knowledge-aware singular-value adaptation.

.. math:: W' = W - U_r S_r V_r^\top + s \, B \, \mathrm{diag}(d) \, A

A (r, in), B (out, r), d (r,): trained; U_r S_r V_r^T: the r smallest singular triplets of W, which the method takes away as
noise, so a fresh adapter changes the model a little. They are frozen leaves here, U (out, r) times S and V (r, in), and the
base stays as it is: ``unmerge`` brings W back. They are found again where a file is read; in a base from which they were
taken already, as peft leaves it, they are zero up to rounding. Dropout acts on the input of A alone.

``penalty`` is the regulariser, summed over sites:

.. math:: \beta \|d\|^2 + \gamma \, (\|B^\top B - I\|_F + \|A A^\top - I\|_F)

References:
    Wang et al., KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, 2024, arXiv 2412.06071,
    eq. (4), (6) and (9) to (11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import EVAL, Context
from funcpeft.method import FrozenDict, Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base

_WEIGHTS = {"beta": 1e-4, "gamma": 1e-3}


@dataclass(frozen=True, kw_only=True)
class KaSA(LoRA):
    """Low-rank adaptation in place of a weight's smallest singular directions.

    Args:
        kasa_config: Weights of the regulariser: ``beta`` (1e-4) of d, ``gamma`` (1e-3) of the factors.

    Other fields are those of ``LoRA``, whose ``init_lora_weights`` must be one of draws.
    """

    kasa_config: Mapping[str, Any] | None = None

    peft_switch: ClassVar[str] = "kasa_config"
    kinds: ClassVar[frozenset[str]] = LoRA.kinds - {"raw"}
    keys: ClassVar[dict[str, Any]] = {
        **LoRA.keys,
        "d": "lora_diag",
        "embedding": {**LoRA.keys["embedding"], "d": "lora_diag"},
    }
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "d", "U", "V", "bias", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1, "d": -1, "U": -1, "V": -2}
    additive: ClassVar[bool] = False  # what is taken away is of the weight, so a second one is of another weight
    identity_at_init: ClassVar[bool] = False
    size: ClassVar[str] = "r * (in_ + out + 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = dict(self.kasa_config or {})
        for name in given.keys() - _WEIGHTS.keys():
            raise ValueError(errors.one_of(self.label, "an entry of kasa_config", name, _WEIGHTS))
        settled = {**_WEIGHTS, **given}
        fits = all(isinstance(v, int | float) and v >= 0 for v in settled.values())
        self.require(fits, "kasa_config", "of non-negative numbers", settled)
        object.__setattr__(self, "kasa_config", FrozenDict(settled))
        drawn = isinstance(self.init_lora_weights, bool) or self.init_lora_weights in ("gaussian", "orthogonal")
        self.require(drawn, "init_lora_weights", "True, False, 'gaussian' or 'orthogonal'", self.init_lora_weights)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(r=1, lora_alpha=3, lora_dropout=0.25, rank_pattern={"second": 2}),)

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        r, least = self.rank(base.path), min(base.shape)
        self.require_at(r < least, base, f"r must be below min(in, out) = {least}, or nothing of the weight is left", r)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        r = self.rank(base.path)
        u, s, vh = torch.linalg.svd(base.weight, full_matrices=False)
        tail = {"U": (u[:, -r:] * s[-r:]).contiguous(), "V": vh[-r:].contiguous()}
        return {**params, "d": rng.randn((r,), gen)}, {**consts, **tail}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        return leaves["scaling"] * ((leaves["B"] * leaves["d"]) @ leaves["A"]) - leaves["U"] @ leaves["V"]

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        dropped = x if base.takes_ids else context.dropout(x, self.lora_dropout)
        s, b, d, bias = leaves["scaling"], leaves["B"], leaves["d"], leaves.get("bias")
        update = base.over_out(base.map(dropped, leaves["A"]), lambda h: F.linear(d * h, b, bias))
        tail = base.over_out(base.map(x, leaves["V"]), lambda h: F.linear(h, leaves["U"]))
        return base(x) + s * update - tail

    def penalty(self, adapter: Adapter, context: Context = EVAL) -> Tensor:
        assert self.kasa_config is not None
        total = torch.zeros(())
        for path, v in adapter.params.items():
            a, b, d = v["A"], v["B"], v["d"]
            # in a stack the rank may be padded with zeros, which are no rows or columns to be orthonormal
            one = torch.diag((torch.arange(d.shape[0], device=d.device) < adapter.consts[path]["rank"]).to(d.dtype))
            far = torch.linalg.vector_norm(b.mT @ b - one) + torch.linalg.vector_norm(a @ a.mT - one)
            total = total + self.kasa_config["beta"] * d.square().sum() + self.kasa_config["gamma"] * far
        return total
