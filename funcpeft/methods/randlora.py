r"""RandLoRA: full-rank updates by scaled sums of random low-rank products.

.. math:: \Gamma = \frac{\alpha}{r} \tilde B \tilde A, \quad \tilde A_{k n + b} = \lambda_{k b} \, \gamma_b \odot A_k, \quad
   \tilde B_{:, b r + k} = B_{:, b, k}, \qquad W' = W + \Gamma \text{ (or } \Gamma^\top \text{ if in > out)}

A (r, 1, m), B (M, n, r): frozen and random, shared by all sites, which take leading slices, with m and M the smaller and larger
of in and out (of the whole model for the shared ones) and n = ceil(m / r) bases; lambda (r, n), gamma (n, m): trained. Rows of
the one factor and columns of the other count k and b in different orders, as they do in peft and its files.

References:
    Albert et al., RandLoRA: Full-rank parameter-efficient fine-tuning of large models, 2025, arXiv 2502.00987, eq. (4).
    Achlioptas, Database-friendly random projections, 2003, section 1 (the sparse bases).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.families import Factored, rounded
from funcpeft.method import Method
from funcpeft.tree import Leaves, Tree
from funcpeft.weights import Base


def dense_bases(r: int, small: int, large: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws A ``(r, 1, small)`` and B ``(large, n, r)``, in bfloat16 as peft does."""
    count = math.ceil(small / r)
    a = _kaiming_half((r, 1, small), gen)
    return a, torch.cat([_kaiming_half((large, 1, r), gen) for _ in range(count)], 1)


def sparse_bases(r: int, small: int, large: int, sparsity: float, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws bases whose entries are -1 and 1 with probability 1 / (2 sparsity) each, else 0."""
    a = torch.rand((r, 1, small), generator=gen)
    b = torch.rand((large, math.ceil(small / r), r), generator=gen)
    a, b = ((t > 1 - 1 / (2 * sparsity)).float() - (t < 1 / (2 * sparsity)).float() for t in (a, b))
    return a, b


def _kaiming_half(shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=gen)


@dataclass(frozen=True, kw_only=True)
class RandLoRA(Factored):
    """Full-rank adaptation by shared random bases and trained scales.

    Args:
        r: Rank of each basis; a smaller one trains more numbers.
        projection_prng_key: Determines A and B.
        save_projection: Whether checkpoints hold A and B (under every layer too, as peft writes them).
        sparse: Whether bases are sparse, a third of their entries.
        very_sparse: Whether they are sparser still, one in sqrt(m); wins over ``sparse``.
        randlora_dropout: Probability with which elements of the adapter's input are dropped in training.
        randlora_alpha: Numerator of the scaling.
        init_weights: Whether lambda starts at 0 and gamma at 1 / max(n, m); else N(0, 1) and 1 / M.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"randlora_only"`` those of the targets.
    """

    r: int = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    randlora_alpha: float = 640
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "RANDLORA"
    keys: ClassVar[dict[str, str]] = {
        "lambda": "randlora_lambda",
        "gamma": "randlora_gamma",
        "A": "randlora_A",
        "B": "randlora_B",
    }
    shared_keys: ClassVar[dict[str, str]] = {"A": "randlora_A", "B": "randlora_B"}
    optional_keys: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("lambda", "gamma", "A", "B", "scaling")
    dropout_field: ClassVar[str] = "randlora_dropout"
    depends_on_sites: ClassVar[bool] = True
    bias_only: ClassVar[str] = "randlora_only"
    size: ClassVar[str] = "ceil(min(in_, out) / r) * (r + min(in_, out))"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require_probability("randlora_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        sparse = cls(r=3, randlora_alpha=2, sparse=True, save_projection=False, projection_prng_key=3)  # of no zero products
        return cls(r=2, randlora_alpha=3, randlora_dropout=0.25), sparse

    def init_shared(self, sites: Mapping[str, Base], seed: int | rng.Stream) -> tuple[Tree, Tree]:
        sizes, dtype = [b.shape for b in sites.values()], next(iter(sites.values())).dtype
        out, in_ = (max(s[axis] for s in sizes) for axis in (-2, -1))
        small, large, gen = min(out, in_), max(out, in_), rng.stream(self.projection_prng_key).generator
        if next(iter(sites.values())).device.type == "meta":  # there is nothing to draw
            count = math.ceil(small / self.r)
            return {}, {"": {"A": torch.empty(self.r, 1, small), "B": torch.empty(large, count, self.r)}}
        with torch.device("cpu"):
            if self.sparse or self.very_sparse:
                sparsity = math.sqrt(small) if self.very_sparse else 3
                bases = sparse_bases(self.r, small, large, sparsity, gen)
            else:
                bases = dense_bases(self.r, small, large, gen)
        if any(bool((t == t.flatten()[0]).all()) for t in bases):  # their deviation is 0, or none
            rule, remedy = "entries of the bases must not all be equal", "change r or projection_prng_key"
            raise ValueError(errors.say(self.label, rule, f"those of key {self.projection_prng_key}", remedy))
        return {}, {"": {name: rounded((t / t.std()).float(), dtype) for name, t in zip("AB", bases, strict=True)}}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        small, large = min(base.shape), max(base.shape)
        count = math.ceil(small / self.r)
        drawn, gamma = rng.randn((self.r, count), gen), torch.full((count, small), 1 / large)
        if self.init_weights:
            drawn, gamma = torch.zeros_like(drawn), torch.full_like(gamma, 1 / max(gamma.shape))
        return {"lambda": drawn, "gamma": gamma}, {"scaling": torch.tensor(self.randlora_alpha / self.r, dtype=torch.float64)}

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        out, in_ = base.shape
        small, large, count = min(out, in_), max(out, in_), leaves["gamma"].shape[-2]
        scaled = leaves["lambda"][..., None] * leaves["gamma"] * leaves["A"][..., :small]
        a, b = scaled.flatten(0, 1), leaves["scaling"] * leaves["B"][:large, :count].flatten(1)
        return (a, b) if in_ <= out else (b.mT, a.mT)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        made = super().to_peft(base, leaves)
        return made if self.save_projection else {k: t for k, t in made.items() if k not in self.optional_keys}
