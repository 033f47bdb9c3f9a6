r"""Lily: low-rank factors shared across layers, mixed by a router.

.. math:: h = A x, \quad p = \mathrm{mean}(\mathrm{softmax}(R h)), \quad y = W x + b + s \Bigl( \sum_e p_e B_e \Bigr)^\top h

A (r, in): shared by ``stride_A`` consecutive layers of a group; B (E, r, out): E experts, shared by a whole group; R (E,
r): router of each layer. A group is the layers of one shape that one entry of ``target_modules`` matched. The mean is over
every leading axis, positions and rows of the batch alike, so what a row becomes depends on the rows beside it: there is no
merged form, and rows of one batch cannot be routed to several members.

References:
    Zhong et al., Low-Rank Interconnected Adaptation across Layers, 2024, arXiv 2407.09946, eq. (4) to (6).
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
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class Lily(Method):
    """Low-rank adaptation interconnected across layers.

    Args:
        r: Rank.
        stride_A: Number of consecutive layers of a group that share one A.
        num_B: Number E of experts.
        scaling: What multiplies the update.
        init_weights: Whether B starts at 0; else it is drawn as A is.
    """

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    peft_type: ClassVar[str] = "LILY"
    keys: ClassVar[dict[str, str]] = {"A": "lily_A.weight", "B": "lily_B.weight", "R": "lily_router.weight"}
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "R", "scaling")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -2, "R": -1}
    weight_free: ClassVar[bool] = True
    depends_on_sites: ClassVar[bool] = True
    size: ClassVar[str] = "num_B * r"
    size_shared: ClassVar[str] = ""
    mixes_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "stride_A")
        self.require(self.num_B > 1, "num_B", "an integer of at least 2", self.num_B)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(r=2, num_B=3, scaling=1.5),)

    def scopes(self, sites: Mapping[str, Base]) -> Mapping[str, tuple[str, ...]]:
        seen: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for path, base in sites.items():
            seen.setdefault((self._entry(path), tuple(base.site.shape)), []).append(path)
        made: dict[str, tuple[str, ...]] = {}
        for paths in seen.values():
            for i, path in enumerate(paths):
                leader = paths[i // self.stride_A * self.stride_A]
                made[path] = (f"B of {paths[0]}", f"A of {leader}")
        return {path: made[path] for path in sites}

    def _entry(self, path: str) -> str:
        """Returns the entry of ``target_modules`` that matched a path; the longest of several, whatever their order."""
        rule = self.target_modules
        if not isinstance(rule, tuple):
            return rule if isinstance(rule, str) and rule.lower() != "all-linear" else path if rule else path.rpartition(".")[2]
        return max((e for e in rule if path == e or path.endswith(f".{e}")), key=len, default=path)

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        params: Tree = {}
        consts: Tree = {}
        for path, base in sites.items():
            drawn = self._draw(base, rng.generator(seed, path))
            for scope in self.scopes(sites)[path]:  # a leader's draw is the one that stays
                params.setdefault(scope, {scope[0]: drawn[scope[0]]})
            params[path], consts[path] = {"R": drawn["R"]}, {"scaling": torch.tensor(self.scaling, dtype=torch.float64)}
        return Adapter(params, consts, tuple(sorted(self.rank_axes.items())))

    def _draw(self, base: Base, gen: Any) -> Leaves:
        (out, in_), r, e = base.shape, self.r, self.num_B
        for shape in ((r, in_), (e * r, out), (e, r)):  # as the layers that peft makes and then resets
            rng.kaiming(shape, gen)
        a, router = rng.kaiming((r, in_), gen), rng.kaiming((e, r), gen)
        b = torch.zeros(e * r, out) if self.init_weights else rng.kaiming((e * r, out), gen)
        return {"A": a, "B": b.view(e, r, out), "R": router}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        h = base.map(x, leaves["A"])
        weights = torch.softmax(h @ leaves["R"].mT, -1).reshape(-1, leaves["R"].shape[0]).mean(0)
        return base(x) + leaves["scaling"] * (h @ torch.einsum("e,ero->ro", weights, leaves["B"]))

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return super().to_peft(base, {**leaves, "B": leaves["B"].flatten(0, 1)})

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        leaves = super().from_peft(base, tensors)
        return {**leaves, "B": leaves["B"].unflatten(0, (self.num_B, -1))}
