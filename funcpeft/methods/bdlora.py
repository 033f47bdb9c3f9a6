r"""BD-LoRA: block-diagonal low-rank adaptation, for serving on several devices.

.. math:: W' = W + s \, B \, \mathrm{bd}(A) \quad \text{or} \quad W' = W + s \, \mathrm{bd}(B) \, A

bd(M): the block-diagonal matrix of the n row chunks of a stored factor: A (r, in / n), or B (out, r / n), whichever is
blocked at the site. Where a layer's inputs (or outputs) are split over n devices, each then holds its own block.

References:
    Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving, 2025, arXiv 2510.23346.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method, freeze
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_DEFAULTS: dict[str, Any] = {
    "target_modules_bd_a": None,
    "target_modules_bd_b": None,
    "nblocks": 1,
    "match_strict": True,
}


def blocked(m: Tensor, blocks: int) -> Tensor:
    """Returns the block-diagonal matrix ``(rows, blocks * columns)`` of the row chunks of ``m (rows, columns)``."""
    return torch.block_diag(*m.chunk(blocks))


def meet_blocked(h: Tensor, m: Tensor, blocks: int) -> Tensor:
    """Meets inputs ``(..., blocks * columns)`` with ``blocked(m)``, block by block."""
    return torch.einsum("...nc,nrc->...nr", h.unflatten(-1, (blocks, -1)), m.unflatten(0, (blocks, -1))).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class BDLoRA(LoRA):
    """Low-rank adaptation with one factor block-diagonal.

    Args:
        use_bdlora: ``target_modules_bd_a``: texts, of which a module's name holds one where A is blocked;
            ``target_modules_bd_b``: the same of B; ``nblocks``: number n of blocks; ``match_strict``: whether a target that
            neither names is an error, else it is plain LoRA.

    Other fields are those of ``LoRA``; ``init_lora_weights`` must be ``True``, ``lora_bias`` ``False``.
    """

    use_bdlora: Mapping[str, Any] | None = None

    peft_switch: ClassVar[str] = "use_bdlora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {}  # a blocked B has a share of the rank
    size: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = dict(self.use_bdlora or {})
        for name in given.keys() - _DEFAULTS.keys():
            raise ValueError(errors.one_of(self.label, "an entry of use_bdlora", name, _DEFAULTS))
        settled = {**_DEFAULTS, **given}
        n, a, b = settled["nblocks"], *(settled[f"target_modules_bd_{x}"] or () for x in "ab")
        self.require(isinstance(n, int) and n > 0, "nblocks of use_bdlora", "a positive integer", n)
        both = sorted(set(a) & set(b))
        self.require(not both, "use_bdlora", "such that no name is in both of its lists", both)
        self.require(self.init_lora_weights is True, "init_lora_weights", "True", self.init_lora_weights)
        self.require(not self.lora_bias, "lora_bias", "False", self.lora_bias)
        object.__setattr__(self, "use_bdlora", freeze(settled))

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        config = {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}
        return (cls(r=2, lora_alpha=3, lora_dropout=0.25, use_bdlora=config),)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        assert self.use_bdlora is not None
        return self.use_bdlora["nblocks"]

    def side(self, base: Base) -> str:
        """Returns which factor is blocked at a site: ``"A"``, ``"B"``, or ``""``."""
        assert self.use_bdlora is not None
        name = base.path.rpartition(".")[2]
        found = [x for x in "AB" if any(t in name for t in self.use_bdlora[f"target_modules_bd_{x.lower()}"] or ())]
        self.require_at(len(found) < 2, base, "use_bdlora must not block both factors", found)
        strict = self.use_bdlora["match_strict"]
        remedy = "name it in one of the lists, or set match_strict to False"
        self.require_at(bool(found) or not strict, base, "use_bdlora must say which factor is blocked", "neither", remedy)
        return found[0] if found else ""

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        (out, in_), r, n, side = base.shape, self.rank(base.path), self.blocks, self.side(base)
        for name, size in {"A": {"in": in_, "r": r}, "B": {"out": out, "r": r}}.get(side, {}).items():
            self.require_at(size % n == 0, base, f"nblocks of use_bdlora must divide {name} {size}", n)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        (out, in_), r, n, side = base.shape, self.rank(base.path), self.blocks, self.side(base)
        if side == "A":
            params["A"] = rng.kaiming((r, in_ // n), gen, a=0.0)
        elif side == "B":
            params["B"] = torch.zeros(out, r // n)
        return params, consts

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        a, b, side = leaves["A"], leaves["B"], self.side(base)
        a, b = blocked(a, self.blocks) if side == "A" else a, blocked(b, self.blocks) if side == "B" else b
        return leaves["scaling"] * (b @ a)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b, side = leaves["A"], leaves["B"], self.side(base)
        dropped = context.dropout(x, self.lora_dropout).to(a.dtype)
        low = meet_blocked(dropped, a, self.blocks) if side == "A" else F.linear(dropped, a)
        high = meet_blocked(low, b, self.blocks) if side == "B" else F.linear(low, b)
        return base(x) + leaves["scaling"] * high
