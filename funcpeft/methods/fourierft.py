r"""FourierFT: an update that is the inverse Fourier transform of a sparse spectrum.

.. math:: W' = W + s \, \mathrm{Re}(\mathcal{F}^{-1}(F)), \quad F_{u_k v_k} = c_k

c (n_frequency,): trained coefficients; (u_k, v_k): frequencies drawn from ``random_loc_seed`` alone, kept as the flat index
u in + v; F (out, in): zero elsewhere; s: scaling. A fresh adapter is not neutral: c is N(0, 1), so small only since the
inverse transform divides by out * in.

Applied to x without the matrix where the matrix is large, since the transform is one of columns, then of rows:
s Re(F^-1(scatter(c gather(F^-1(x), v), u))). All in float32 or wider; peft 0.21 transforms in float32 whatever the base is.

References:
    Gao et al., Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, 2024, arXiv 2405.03003, eq. (2) to (4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.context import Context
from funcpeft.method import Additive, FrozenDict, by_pattern
from funcpeft.tree import Leaves
from funcpeft.weights import Base, wide

# From this many entries on, transforming x is cheaper than making the matrix: on one CPU core, forward and backward of
# 512 rows took 39 ms with the matrix and 24 ms without at 768 x 768, 157 and 37 at 768 x 3072, but 3 and 9 at 256 x 256.
_LARGE = 2**18


def frequencies(out: int, in_: int, n: int, seed: int) -> Tensor:
    """Draws ``n`` different places of an ``(out, in)`` matrix, as flat indices."""
    return torch.randperm(out * in_, generator=rng.stream(seed).generator, device="cpu")[:n].clone()


def transform(c: Tensor, index: Tensor, out: int, in_: int) -> Tensor:
    """Returns the real part of the inverse transform of a spectrum that is ``c`` at flat indices and 0 elsewhere."""
    spectrum = torch.zeros(out * in_, dtype=c.dtype, device=c.device).scatter(0, index, c)
    return torch.fft.ifft2(spectrum.reshape(out, in_)).real


def product(x: Tensor, c: Tensor, index: Tensor, out: int) -> Tensor:
    """Returns ``x @ transform(c, index).T`` without making the matrix; ``x`` is ``(*batch, in)``."""
    in_ = x.shape[-1]
    picked = torch.fft.ifft(x)[..., index % in_] * c
    spectrum = torch.zeros(*x.shape[:-1], out, dtype=picked.dtype, device=x.device).index_add(-1, index // in_, picked)
    return torch.fft.ifft(spectrum).real


@dataclass(frozen=True, kw_only=True)
class FourierFT(Additive):
    """Adaptation by a sparse spectrum.

    Args:
        n_frequency: Number of trained coefficients; at most ``out * in``.
        scaling: What multiplies the update.
        random_loc_seed: Determines the frequencies, the same at all sites of one shape.
        n_frequency_pattern: Numbers of coefficients by pattern of the module path; the first that matches wins.
        init_weights: Whether coefficients start at 0; else N(0, 1).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"fourier_only"`` those of the targets.
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] = FrozenDict()
    init_weights: bool = False
    bias: str = "none"

    peft_type: ClassVar[str] = "FOURIERFT"
    keys: ClassVar[dict[str, str]] = {"c": "fourierft_spectrum"}
    size: ClassVar[str] = "n_frequency"
    leaf_names: ClassVar[tuple[str, ...]] = ("c", "index", "scaling")
    weight_free: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False
    bias_only: ClassVar[str] = "fourier_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        for n in (self.n_frequency, *self.n_frequency_pattern.values()):
            self.require(n > 0, "n_frequency", "a positive integer", n)
        self.require(self.bias in ("none", "all", self.bias_only), "bias", f"'none', 'all' or {self.bias_only!r}", self.bias)

    @classmethod
    def examples(cls) -> tuple[FourierFT, ...]:
        """Returns an update of few frequencies and one whose number follows a pattern."""
        few = cls(n_frequency=1, scaling=3.0)
        return few, cls(n_frequency=4, scaling=20.0, n_frequency_pattern={"second": 2}, init_weights=True)

    def count(self, path: str) -> int:
        """Returns the number of coefficients at a site."""
        return by_pattern(self.n_frequency_pattern, path, self.n_frequency)

    def check_site(self, base: Base) -> None:
        n, entries = self.count(base.path), base.shape.numel()
        self.require_at(n <= entries, base, f"n_frequency must be at most out * in = {entries}", n, "see n_frequency_pattern")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        out, in_ = base.shape
        c = rng.randn((self.count(base.path),), gen)
        index = frequencies(out, in_, len(c), self.random_loc_seed)
        consts = {"index": index, "scaling": torch.tensor(self.scaling, dtype=torch.float64)}
        return {"c": torch.zeros_like(c) if self.init_weights else c}, consts

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        return leaves["scaling"] * transform(wide(leaves["c"]), leaves["index"], *base.shape)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if base.shape.numel() < _LARGE:
            return super().apply(leaves, base, x, context)
        c = wide(leaves["c"])
        return base(x) + leaves["scaling"] * product(x.to(c.dtype), c, leaves["index"], base.shape[0])
