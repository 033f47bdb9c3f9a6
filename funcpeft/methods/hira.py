r"""HiRA: Hadamard high-rank adaptation, a low-rank change relative to the weight.

.. math:: W' = W \odot (1 + B A)

A (r, in), B (out, r); the product is of entries, so the update can have full rank. Input by input it is a sum of r calls of the
base, x (W o B A)^T = sum_k B_k o ((x o A_k) W^T), made as one call on r scaled copies of x: no weight is made dense for it.
Where the weight is a plain tensor anyway, and copies are many, x meets W o B A instead, which takes r times fewer products;
so it does where a kernel covers several positions. An embedding needs the rows that it looks up alone.

Differences from peft 0.21: there ``rank_pattern`` is ignored, and on an embedding that scales what it looks up the update is
not scaled with it.

References:
    Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, 2025,
    ICLR, openreview TwJrTz9cRS, eq. (3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import FrozenDict, Method, by_pattern
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_INITS = (True, False, "gaussian")
#: Rows up to which a product takes as long as reading the weight does.
_FEW = 64


@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """Adaptation by a low-rank factor of every entry.

    Args:
        r: Rank of the relative change.
        hira_dropout: Probability with which elements of the adapter's input are dropped in training.
        init_weights: True; ``"gaussian"`` (A is N(0, 1 / r^2)); or False, a start that changes the model.
        rank_pattern: Ranks by pattern of the module path; the first that matches wins.
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str = True
    rank_pattern: Mapping[str, int] = FrozenDict()

    peft_type: ClassVar[str] = "HIRA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, Any]] = {
        "A": "hira_A",
        "B": "hira_B",
        "embedding": {"A": "hira_embedding_A", "B": "hira_embedding_B"},
    }
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1}
    weight_free: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "embedding"})
    size: ClassVar[str] = "r * (in_ + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        ranks = self.rank_pattern.values()
        self.require(all(r > 0 for r in ranks), "rank_pattern", "positive ranks", tuple(ranks))
        self.require_probability("hira_dropout")
        if self.init_weights not in _INITS:
            raise ValueError(errors.one_of(self.label, "init_weights", self.init_weights, _INITS))

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, hira_dropout=0.25), cls(r=1, rank_pattern={"second": 3}, init_weights="gaussian")

    def check_site(self, base: Base) -> None:
        groups = base.kind.groups
        self.require_at(groups == 1, base, "a convolution must have one group", groups, "leave the site out")
        if base.takes_ids:
            p = self.hira_dropout
            self.require_at(not p, base, "hira_dropout must be 0 where inputs are ids", p)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r, (out, in_) = by_pattern(self.rank_pattern, base.path, self.r), base.shape
        kernel = tuple(base.site.shape[2:]) if base.kind.name == "conv" else ()
        shape = (r, in_ // math.prod(kernel), *kernel)
        a, b = rng.randn(shape, gen), rng.randn((out, r), gen)
        if self.init_weights is not False and base.takes_ids:
            a, b = torch.zeros_like(a), rng.normal((out, r), gen)
        elif self.init_weights is not False:
            gaussian = self.init_weights == "gaussian" and not kernel
            a, b = rng.normal(shape, gen, 1 / r) if gaussian else rng.kaiming(shape, gen), torch.zeros_like(b)
        return {"A": a.flatten(1), "B": b}, {"rank": torch.tensor(r)}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        a, b = leaves["A"], leaves["B"]
        if base.takes_ids:
            return base(x) * (1 + base.map(x, a) @ b.mT)
        dropped, copies = context.dropout(x, self.hira_dropout), a.shape[0] * (x.numel() // x.shape[-1])
        if base.kind.name == "conv" or (base.stored is not None and copies > _FEW):
            return base(x) + base.map(dropped, base.weight * (b @ a))
        met = base(dropped[None] * a.view(a.shape[0], *(1,) * (x.ndim - 1), -1).to(dropped.dtype)).to(b.dtype)
        met = met if base.bias is None else met - base.bias.to(b.dtype)
        return base(x) + torch.einsum("r...o,or->...o", met, b)

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=base.weight * (1 + leaves["B"] @ leaves["A"]))

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=base.weight / (1 + leaves["B"] @ leaves["A"]))

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        return (1 / (1 + leaves["B"] @ leaves["A"])).abs().max().clamp(min=1)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        if base.kind.name == "conv":
            kernel = base.site.shape[2:]
            a, b = leaves["A"], leaves["B"]
            leaves = {"A": a.reshape(a.shape[0], -1, *kernel), "B": b.reshape(*b.shape, *(1 for _ in kernel))}
        return super().to_peft(base, leaves)

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return {name: t.flatten(1) for name, t in super().from_peft(base, tensors).items()}

    def as_written(self, shapes: Mapping[str, torch.Size]) -> Self:
        """Takes ranks from the tensors: peft lists ``rank_pattern`` in its files, and ignores it."""
        ranks = {k.rpartition(".")[0]: s[0] for k, s in shapes.items() if k.endswith((".hira_A", ".hira_embedding_A"))}
        if all(by_pattern(self.rank_pattern, path, self.r) == r for path, r in ranks.items()):
            return self
        return replace(self, rank_pattern=ranks)

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Derives ranks from the leaves."""
        ranks = {p: int(t["A"].shape[-2]) for p, t in leaves.items() if "A" in t}
        r = next(iter(ranks.values()))
        return {**super().to_peft_config(leaves), "r": r, "rank_pattern": {p: n for p, n in ranks.items() if n != r}}
