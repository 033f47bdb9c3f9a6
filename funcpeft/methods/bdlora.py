r"""BD-LoRA: block-diagonal low-rank adaptation, for serving on several devices.

.. math:: W' = W + s \, B \, \mathrm{bd}(A) \quad \text{or} \quad W' = W + s \, \mathrm{bd}(B) \, A

bd(M): the block-diagonal matrix of the n row chunks of a stored factor: A (r, in / n), or B (out, r / n), whichever is
blocked at the site. Where a layer's inputs (or outputs) are split over n devices, each then holds its own block.

Leaves have the blocks as an axis, so that members of a stack may differ in rank: A is (n, r / n, in / n) with B
(n, out, r / n), cut along the rank; or A (n, r / n, in) with B (n, out / n, r / n). In files they are as above.

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
from funcpeft.fields import fits, freeze
from funcpeft.method import Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_DEFAULTS: dict[str, Any] = {
    "target_modules_bd_a": None,
    "target_modules_bd_b": None,
    "nblocks": 1,
    "match_strict": True,
}


@dataclass(frozen=True, kw_only=True)
class BDLoRA(LoRA):
    """Low-rank adaptation with one factor block-diagonal.

    Args:
        use_bdlora: ``target_modules_bd_a``: texts, of which a module's path holds one where A is blocked;
            ``target_modules_bd_b``: the same of B; ``nblocks`` (1): number n of blocks; ``match_strict`` (True): whether a
            target that neither names is an error, else it is plain LoRA.

    Other fields are those of ``LoRA``; ``lora_bias`` must be ``False``, and ``init_lora_weights`` ``True``, ``False`` or
    ``"gaussian"``, with which the factor starts that is not blocked; a blocked A is uniform, a blocked B zero.
    """

    use_bdlora: Mapping[str, Any] | None = None

    peft_switch: ClassVar[str] = "use_bdlora"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "scaling", "rank")
    size: ClassVar[str] = ""  # depends on which factor is blocked

    def __post_init__(self) -> None:
        super().__post_init__()
        given = dict(self.use_bdlora or {})
        for name in given.keys() - _DEFAULTS.keys():
            raise ValueError(errors.one_of(self.label, "an entry of use_bdlora", name, _DEFAULTS))
        settled = {**_DEFAULTS, **given}
        n, a, b = settled["nblocks"], *(settled[f"target_modules_bd_{x}"] or () for x in "ab")
        self.require(type(n) is int and n > 0, "nblocks of use_bdlora", "a positive integer", n)
        lists = all(fits(names, tuple[str, ...]) for names in (a, b))
        self.require(lists, "use_bdlora", "such that what names modules are lists of names", (a, b))
        both = sorted(set(a) & set(b))
        self.require(not both, "use_bdlora", "such that no name is in both of its lists", both)
        drawn = isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"
        self.require(drawn, "init_lora_weights", "True, False or 'gaussian'", self.init_lora_weights)
        self.require(not self.lora_bias, "lora_bias", "False", self.lora_bias)
        object.__setattr__(self, "use_bdlora", freeze(settled))

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        config = {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "nblocks": 2}
        return (cls(r=2, lora_alpha=3, lora_dropout=0.25, rank_pattern={"second": 4}, use_bdlora=config),)

    def side(self, path: str) -> str:
        """Returns which factor is blocked at a site: ``"A"``, ``"B"``, or ``""``."""
        assert self.use_bdlora is not None
        return "".join(x for x in "AB" if any(t in path for t in self.use_bdlora[f"target_modules_bd_{x.lower()}"] or ()))

    def blocks(self, path: str) -> int:
        """Returns the number of blocks at a site."""
        assert self.use_bdlora is not None
        return self.use_bdlora["nblocks"] if self.side(path) else 1

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        assert self.use_bdlora is not None
        (out, in_), r, n, side = base.shape, self.rank(base.path), self.blocks(base.path), self.side(base.path)
        self.require_at(len(side) < 2, base, "use_bdlora must not block both factors", repr(base.path), "name it in one list")
        remedy = "name it in one of the lists, or set match_strict to False"
        fits = bool(side) or not self.use_bdlora["match_strict"]
        self.require_at(fits, base, "use_bdlora must say which factor is blocked", "neither", remedy)
        for name, size in {"in" if side == "A" else "out": in_ if side == "A" else out, "r": r}.items():
            self.require_at(size % n == 0, base, f"nblocks of use_bdlora must divide {name} {size}", n)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        params, consts = super().init_site(base, gen)
        (out, in_), r, n, side = base.shape, self.rank(base.path), self.blocks(base.path), self.side(base.path)
        if side == "A":
            params["A"] = rng.kaiming((r, in_ // n), gen, a=0.0)
        elif side == "B":
            params["B"] = torch.zeros(out, r // n)
        return {**params, **self._cut(params, base.path)}, {**consts, "rank": torch.tensor(r // n)}

    def _cut(self, leaves: Leaves, path: str) -> Leaves:
        """Returns the factors of a file with the blocks as an axis."""
        a, b, n = leaves["A"], leaves["B"], self.blocks(path)
        b = b.unflatten(1, (n, -1)).movedim(1, 0) if self.side(path) == "A" else b.unflatten(0, (n, -1))
        return {"A": a.unflatten(0, (n, -1)).clone(), "B": b.clone(memory_format=torch.contiguous_format)}

    def _whole(self, leaves: Leaves, path: str) -> Leaves:
        """Inverts ``_cut``."""
        b = leaves["B"]
        return {"A": leaves["A"].flatten(0, 1), "B": _side_by_side(b) if self.side(path) == "A" else b.flatten(0, 1)}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        a, update = leaves["A"], leaves["B"] @ leaves["A"]
        return leaves["scaling"] * (update.flatten(0, 1) if a.shape[-1] == base.shape[-1] else _side_by_side(update))

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = leaves["A"], leaves["B"]
        x_ = context.dropout(x, self.lora_dropout).to(a.dtype)
        if a.shape[-1] == base.shape[-1]:
            low = F.linear(x_, a.flatten(0, 1)).unflatten(-1, (a.shape[0], -1))
            update = torch.einsum("...nr,nor->...no", low, b).flatten(-2)
        else:
            low = torch.einsum("...ni,nri->...nr", x_.unflatten(-1, (a.shape[0], -1)), a).flatten(-2)
            update = F.linear(low, _side_by_side(b))
        return base(x) + leaves["scaling"] * update

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        return super().to_peft(base, {**leaves, **self._whole(leaves, base.path)})

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        assert base is not None
        leaves = super().from_peft(base, tensors)
        return {**leaves, **self._cut(leaves, base.path)}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        return super().to_peft_config({p: {**t, **self._whole(t, p)} if "A" in t else t for p, t in leaves.items()})


def _side_by_side(blocks: Tensor) -> Tensor:
    """Returns blocks ``(n, rows, columns)`` as one matrix ``(rows, n * columns)``."""
    return blocks.movedim(0, 1).flatten(1)
