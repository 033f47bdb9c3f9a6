r"""TinyLoRA: a handful of trained numbers that mix random matrices between singular factors of the weight.

.. math:: W' = W + B \Bigl( \sum_{k=1}^{u} v_k P_k \Bigr) A, \qquad A = \sqrt{S_r} V_r^\top, \quad B = U_r \sqrt{S_r}

v (u,): trained, one for a group of sites; P (u, r, r): random, N(0, 1 / r), from ``projection_seed`` plus the site's number;
A (r, in), B (out, r): of the r largest singular triplets of W, frozen, and saved since their signs are arbitrary. An
embedding's factors act on the vectors that it looks up.

References:
    Learning to Reason in 13 Parameters, 2026, arXiv 2602.04118. Balazy et al., LoRA-XS, 2024, arXiv 2405.17604 (the factors).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.families import Factored
from funcpeft.method import Method
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base

_GROUP = "group "


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Factored):
    """Low-rank adaptation by very few numbers.

    Args:
        r: Rank of the factors; at most min(in, out) is used.
        u: Length of v.
        weight_tying: How many sites share one v: 0, none; 1, all. Between, ``round(L (1 - weight_tying))`` groups of L sites.
        projection_seed: Determines P.
        save_projection: Whether checkpoints hold P; without it, reading draws it again.
        init_v_bound: Bound of ``init_weights="uniform"``.
        tinylora_dropout: Probability with which elements of the adapter's input are dropped in training; of an embedding,
            those of the rows of B that it looks up.
        init_weights: True: v starts at 0; ``"uniform"``: U(+-bound). peft's False leaves v uninitialised: files may say so,
            but ``init`` refuses it.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"tinylora_only"`` those of the targets.
    """

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    init_weights: bool | str = True
    bias: str = "none"

    peft_type: ClassVar[str] = "TINYLORA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "embedding"})
    keys: ClassVar[dict[str, str]] = {"A": "tinylora_A", "B": "tinylora_B", "P": "tinylora_P"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    optional_keys: ClassVar[tuple[str, ...]] = ("tinylora_P",)
    leaf_names: ClassVar[tuple[str, ...]] = ("v", "A", "B", "P")
    dropout_field: ClassVar[str] = "tinylora_dropout"
    depends_on_sites: ClassVar[bool] = True
    bias_only: ClassVar[str] = "tinylora_only"
    size: ClassVar[str] = "0"
    size_shared: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "u")
        self.require(0 <= self.weight_tying <= 1, "weight_tying", "in [0, 1]", self.weight_tying)
        self.require_probability("tinylora_dropout")
        if self.init_weights not in (True, False, "uniform"):
            raise ValueError(errors.one_of(self.label, "init_weights", self.init_weights, (True, False, "uniform")))
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, u=3, tinylora_dropout=0.25), cls(r=1, u=2, weight_tying=1.0, save_projection=False)

    def group(self, index: int, count: int) -> int:
        """Returns the group of a site among ``count``; the last group takes what is left over."""
        groups = max(1, round(count * (1 - self.weight_tying)))
        return min(index // max(1, count // groups), groups - 1)

    def scopes(self, sites: Mapping[str, Base]) -> Mapping[str, tuple[str, ...]]:
        return {path: (f"{_GROUP}{self.group(i, len(sites))}",) for i, path in enumerate(sites)}

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        drawn = self.init_weights is not False or bool(needs.get("inference_mode"))
        self.require(drawn, "init_weights", "True or 'uniform' where v is not read from a file", self.init_weights)
        return super().init(sites, seed=seed, **needs)

    def init_shared(self, sites: Mapping[str, Base], seed: int | rng.Stream) -> tuple[Tree, Tree]:
        made: Tree = {}
        for path, (scope,) in self.scopes(sites).items():
            if scope not in made:
                dtype = sites[path].dtype if isinstance(seed, rng.Stream) else torch.float32  # peft draws in the base's
                v, bound = torch.zeros(self.u, dtype=dtype), self.init_v_bound
                if self.init_weights == "uniform":
                    v.uniform_(-bound, bound, generator=rng.generator(seed, scope))
                made[scope] = {"v": v}
        return made, {}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        weight = base.weight.mT if base.takes_ids else base.weight
        u, s, vh = (t.to(base.dtype) for t in torch.linalg.svd(weight.float(), full_matrices=False))
        r = min(self.r, *weight.shape)
        root = s[:r].sqrt()
        p = rng.normal((self.u, r, r), rng.stream(self.projection_seed + base.index).generator, 1.0 / r**0.5)
        made = {"A": root[:, None] * vh[:r], "B": u[:, :r] * root, "P": p.to(base.dtype)}
        return {}, {name: t.to(weight.dtype).contiguous() for name, t in made.items()}

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        a, b, mixed = leaves["A"], leaves["B"], torch.einsum("u,urs->rs", leaves["v"], leaves["P"])
        return (b.mT, (mixed @ a).mT) if base.takes_ids else (a, b @ mixed)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        made = super().to_peft(base, leaves)
        return made if self.save_projection else {k: t for k, t in made.items() if k != self.keys["P"]}

    def to_peft_shared(self, scope: str, leaves: Leaves) -> dict[str, Tensor]:
        return {f"tinylora_v.{scope.removeprefix(_GROUP)}": leaves["v"]}

    def from_peft_shared(self, scope: str, tensors: Mapping[str, Tensor]) -> Leaves:
        return {"v": next(iter(tensors.values()))}
