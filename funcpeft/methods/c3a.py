r"""C3A: circular convolution adaptation.

.. math:: \Delta_{pB + j,\, qB + i} = K_{p,\, q,\, (i - j) \bmod B} / n, \qquad W' = W + \Delta

The update is a grid of circulant blocks of size B; K (out / B, in / B, B): their first rows, trained; n: number of input
features. A product with the update is a circular correlation of each block, computed by the fast Fourier transform.

References:
    Chen et al., Parameter-Efficient Fine-Tuning via Circular Convolution, 2024, arXiv 2407.19342, eq. (7) and section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Additive, FrozenDict, Method, by_pattern
from funcpeft.tree import Leaves
from funcpeft.weights import Base, wide

_INITS = ("xavier_uniform", "gaussian", "kaiming_uniform", True, False)


@dataclass(frozen=True, kw_only=True)
class C3A(Additive):
    """Adaptation by block-circulant updates.

    Args:
        block_size: Size B of the blocks; must divide in and out.
        block_size_pattern: Block sizes by pattern of the module path; the first that matches wins.
        init_weights: ``"xavier_uniform"`` (or False), ``"gaussian"``, ``"kaiming_uniform"``, or True for zeros: the only
            neutral one.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"c3a_only"`` those of the targets.
    """

    block_size: int = 256
    block_size_pattern: Mapping[str, int] = FrozenDict()
    init_weights: bool | str = "xavier_uniform"
    bias: str = "none"

    peft_type: ClassVar[str] = "C3A"
    keys: ClassVar[dict[str, str]] = {"K": "c3a_kernel"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("K",)
    weight_free: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False
    bias_only: ClassVar[str] = "c3a_only"
    size: ClassVar[str] = "in_ * out // block_size"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("block_size")
        sizes = self.block_size_pattern.values()
        self.require(all(b > 0 for b in sizes), "block_size_pattern", "positive sizes", tuple(sizes))
        if self.init_weights not in _INITS:
            raise ValueError(errors.one_of(self.label, "init_weights", self.init_weights, _INITS))
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(block_size=2), cls(block_size=3, block_size_pattern={"second": 1}, init_weights=True)

    def block(self, path: str) -> int:
        """Returns the block size at a site."""
        return by_pattern(self.block_size_pattern, path, self.block_size)

    def check_site(self, base: Base) -> None:
        b, (out, in_) = self.block(base.path), base.shape
        common = math.gcd(out, in_)
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        rule, remedy = f"block_size must divide in {in_} and out {out}", f"use one of {divisors}, see block_size_pattern"
        self.require_at(common % b == 0, base, rule, b, remedy)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        b, (out, in_) = self.block(base.path), base.shape
        shape = (out // b, in_ // b, b)
        match self.init_weights:
            case True:
                return {"K": torch.zeros(shape)}, {}
            case "gaussian":
                return {"K": rng.normal(shape, gen)}, {}
            case "kaiming_uniform":
                return {"K": rng.uniform(shape, gen, math.sqrt(1.0 / in_))}, {}
            case _:
                return {"K": rng.uniform(shape, gen, math.sqrt(3.0) * math.sqrt(2.0 / (in_ + out)))}, {}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        k = leaves["K"]
        p, q, b = k.shape
        step = torch.arange(b, device=k.device)
        index = (step[None, :] - step[:, None]) % b  # [j, i] -> (i - j) mod B
        return k[..., index].permute(0, 2, 1, 3).reshape(p * b, q * b) / base.shape[-1]

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        k = wide(leaves["K"])
        _, q, b = k.shape
        blocks = torch.fft.rfft(x.to(k.dtype).unflatten(-1, (q, b)))
        met = torch.einsum("...qf,pqf->...pf", blocks, torch.fft.rfft(k).conj())
        return base(x) + torch.fft.irfft(met, n=b).flatten(-2) / base.shape[-1]
