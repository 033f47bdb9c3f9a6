r"""PVeRA: probabilistic VeRA, whose low-rank activations are drawn.

.. math:: (\mu, v) = d \odot A_{:, :in} x, \quad z = \mu + \epsilon \odot e^{v / 2}, \quad
   y = W x + b \odot B_{:out} z, \qquad W' = W + \mathrm{diag}(b) B_{:out} \mathrm{diag}(d_{:r}) A_{:r, :in}

A (2r, largest in), B (largest out, r): frozen and random, shared by all sites, as in VeRA; b (out,), d (2r,): trained; epsilon:
N(0, 1), drawn in training, and in evaluation with ``sample_at_inference``. Else z is mu, which is also what is merged.

References:
    PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, 2025, arXiv 2512.07703.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.families import rounded
from funcpeft.method import Additive, Method
from funcpeft.tree import Leaves, Tree
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class PVeRA(Additive):
    """Low-rank adaptation by shared random factors, trained vectors and noise.

    Args:
        r: Rank of the update; d has twice as many entries.
        projection_prng_key: Determines A and B.
        save_projection: Whether checkpoints hold A and B; without them, reading draws them again.
        pvera_dropout: Probability with which elements of the adapter's input are dropped in training.
        d_initial: Initial value of d.
        init_weights: Whether b starts at 0 and d at ``d_initial``; else b is 1 and d is N(0, 1).
        sample_at_inference: Whether z is drawn in evaluation too; the call then needs ``Context(seed=...)``, or this field's
            companion ``generator_seed``, since a draw without a seed would not be a function.
        generator_seed: Seed of the draws of calls whose context has none.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"pvera_only"`` those of the targets.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    pvera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    sample_at_inference: bool = False
    generator_seed: int | None = None
    bias: str = "none"

    peft_type: ClassVar[str] = "PVERA"
    keys: ClassVar[dict[str, str]] = {"b": "pvera_lambda_b", "d": "pvera_lambda_d"}
    shared_keys: ClassVar[dict[str, str]] = {"A": "pvera_A", "B": "pvera_B"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("b", "d", "A", "B")
    weight_free: ClassVar[bool] = True
    depends_on_sites: ClassVar[bool] = True
    bias_only: ClassVar[str] = "pvera_only"
    size: ClassVar[str] = "out + 2 * r"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require_probability("pvera_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, pvera_dropout=0.25), cls(r=1, save_projection=False, projection_prng_key=5)

    def check_site(self, base: Base) -> None:
        p = self.pvera_dropout
        self.require_at(base.met or not p, base, "pvera_dropout must be 0 where no input meets the weight", p)

    def init_shared(self, sites: Mapping[str, Base], seed: int | rng.Stream) -> tuple[Tree, Tree]:
        shapes, dtype = [base.shape for base in sites.values()], next(iter(sites.values())).dtype
        gen = rng.stream(self.projection_prng_key).generator
        a = rng.kaiming((2 * self.r, max(s[-1] for s in shapes)), gen, a=0.0)
        b = rng.kaiming((max(s[-2] for s in shapes), self.r), gen, a=0.0)
        return {}, {"": {"A": rounded(a, dtype), "B": rounded(b, dtype)}}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        b, d = torch.ones(base.shape[-2]), rng.randn((2 * self.r,), gen)
        if self.init_weights:
            b, d = torch.zeros_like(b), torch.full_like(d, self.d_initial)
        return {"b": b, "d": d}, {}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        out, in_ = base.shape
        return (leaves["b"][:, None] * leaves["B"][:out]) @ (leaves["d"][:, None] * leaves["A"])[: self.r, :in_]

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        out, in_ = base.shape
        low = leaves["d"] * base.map(context.dropout(x, self.pvera_dropout), leaves["A"][:, :in_])
        z, log_variance = low.split(self.r, -1)
        if context.training or self.sample_at_inference:
            z = z + self._noise(z, base, context) * (0.5 * log_variance).exp()
        return base(x) + leaves["b"] * (z @ leaves["B"][:out].mT)

    def _noise(self, like: Tensor, base: Base, context: Context) -> Tensor:
        if context.seed is not None:
            return context.gaussian(like, slot=1)
        if self.generator_seed is None:
            rule, remedy = "sample_at_inference needs a seed", "pass Context(seed=step), or set generator_seed"
            raise ValueError(errors.say(f"{self.label} at {base.path!r}", rule, None, remedy))
        return rng.gaussian(like, rng.key(self.generator_seed, base.site.salt))
