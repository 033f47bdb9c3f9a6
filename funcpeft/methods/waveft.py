r"""WaveFT: an update that is sparse in a wavelet basis.

.. math:: W' = W + s \, \mathrm{crop}(\mathrm{IDWT}(C)), \qquad C_{i_k} = c_k

c (n,): trained coefficients; i: their places in an (out, in) matrix, drawn from ``random_loc_seed`` alone and never saved;
s: scaling. C is padded by the length of the wavelet's filter and made even; its quarters are the averages and the details
of one level of the inverse discrete wavelet transform in two dimensions. Without ``use_idwt`` the update is s C itself.

The filters are computed: of ``db`` and ``sym`` by factoring the half-band polynomial, of ``coif`` by Newton's method.

References:
    Bilican et al., Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, 2025, arXiv 2505.12532, eq. (4), (5).
    Daubechies, Ten Lectures on Wavelets, 1992, sections 6.1, 6.4 (``db``) and 8.1.1 (``sym``).
    Daubechies, Orthonormal Bases of Compactly Supported Wavelets II, SIAM J. Math. Anal. 24, 1993, section 3 (``coif``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Additive, FrozenDict, Method, by_pattern
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base

#: Which roots of the least asymmetric filters lie outside the unit circle, in the order of their moduli inside it.
_OUTSIDE = ("", "", "0", "0", "01", "10", "101", "100", "0101", "0110", "10101")
FAMILIES = (*(f"db{n}" for n in range(1, 11)), *(f"sym{n}" for n in range(2, 11)), *(f"coif{n}" for n in range(1, 6)))


@functools.cache
def synthesis(family: str) -> tuple[float, ...]:
    """Returns the low-pass filter of an orthogonal wavelet's inverse transform, one of ``FAMILIES``."""
    name = family.rstrip("0123456789")
    order = int(family.removeprefix(name))
    taps = _coiflet(order) if name == "coif" else _daubechies(order, _OUTSIDE[order] if name == "sym" else "")
    return tuple(math.sqrt(2) * t / sum(taps) for t in taps)


def _daubechies(order: int, outside: str) -> list[float]:
    """Factors P(y) (1 - y)^N, P(y) = sum_k C(N - 1 + k, k) y^k, y = (2 - z - 1/z) / 4: half of the roots z, in pairs."""
    import numpy as np

    b = 1 - 2 * np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))]).astype(complex)
    z = b - np.sqrt(b * b - 1)  # z + 1/z = 2 b
    inside = sorted((v for v in np.where(abs(z) < 1, z, 1 / z) if v.imag >= 0), key=abs)
    kept = [1 / v if flag == "1" else v for v, flag in zip(inside, outside or "0" * order, strict=False)]
    pairs = [v for u in kept for v in ((u, u.conjugate()) if u.imag else (u,))]
    return np.poly([*pairs, *[-1] * order]).real.tolist()


def _coiflet(order: int) -> list[float]:
    """Solves for f in m(w) = cos^2K(w/2) (P(s) + s^K f(w)), s = sin^2(w/2), f of 2K terms: |m(w)|^2 + |m(w + pi)|^2 = 1.

    Since c^K P(s) + s^K P(c) = 1 for c = 1 - s, the condition has a factor s^K c^K, which is left out.
    """
    import numpy as np

    terms = np.arange(2 * order)

    def parts(w: Any) -> tuple[Any, ...]:
        c, s = np.cos(w / 2) ** 2, np.sin(w / 2) ** 2
        p = sum(math.comb(order - 1 + k, k) * s**k for k in range(order))
        return c**order, s**order, p, np.exp(-1j * w * terms)

    w, f = (np.arange(2 * order)[:, None] + 0.5) * np.pi / (4 * order), np.zeros((2 * order, 1))
    for _ in range(20):
        off, slope = -2 * parts(w)[2] * parts(w + np.pi)[2], 0
        for c, s, p, waves in (parts(w), parts(w + np.pi)):
            v = waves @ f
            off = off + c * (2 * p * v.real + s * abs(v) ** 2)
            slope = slope + 2 * c * (p * waves.real + s * (v.conj() * waves).real)
        f = f - np.linalg.solve(slope, off)
    c, s, p, waves = parts(2 * np.pi * np.arange(6 * order)[:, None] / (6 * order))
    return np.roll(np.fft.ifft((c * (p + s * (waves @ f)))[:, 0]).real, 2 * order).tolist()


def inverse_transform(coefficients: Tensor, low: Tensor) -> Tensor:
    """Inverts one level of the two-dimensional wavelet transform.

    Args:
        coefficients: ``(2h, 2w)``: averages, and details along columns, rows and both, by quarter.
        low: Low-pass filter ``(l,)``, l even.

    Returns:
        ``(2h - l + 2, 2w - l + 2)``.
    """
    lo = low.to(coefficients.dtype)
    hi = lo.flip(0) * torch.tensor([1.0, -1.0], dtype=lo.dtype, device=lo.device).repeat(len(low) // 2)
    filters = torch.stack([torch.outer(a, b) for b in (lo, hi) for a in (lo, hi)])[:, None]
    h, w = (n // 2 for n in coefficients.shape)
    quarters = torch.stack([coefficients[:h, :w], coefficients[:h, w:], coefficients[h:, :w], coefficients[h:, w:]])
    cut = len(low) - 2
    return F.conv_transpose2d(quarters[None], filters, stride=2, padding=cut)[0, 0]


@dataclass(frozen=True, kw_only=True)
class WaveFT(Additive):
    """Adaptation by a few wavelet coefficients.

    Args:
        n_frequency: Number n of coefficients at a site; at most ``out * in``.
        scaling: What multiplies the update.
        wavelet_family: An orthogonal wavelet: ``"db1"`` to ``"db10"``, ``"sym2"`` to ``"sym10"``, ``"coif1"`` to ``"coif5"``.
        use_idwt: Whether coefficients are of wavelets; else of single entries.
        random_loc_seed: Determines the places, the same at all sites of one shape.
        n_frequency_pattern: Numbers of coefficients by pattern of the module path; the first that matches wins.
        proportional_parameters: Whether sites get numbers in proportion to their size, n on average.
        init_weights: Whether coefficients start at 0; else N(0, 0.01^2).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"waveft_only"`` those of the targets.
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] = FrozenDict()
    proportional_parameters: bool = False
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "WAVEFT"
    keys: ClassVar[dict[str, str]] = {"c": "waveft_spectrum"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    leaf_names: ClassVar[tuple[str, ...]] = ("c", "index", "scaling", "low")
    weight_free: ClassVar[bool] = True
    depends_on_sites: ClassVar[bool] = True
    bias_only: ClassVar[str] = "waveft_only"
    size: ClassVar[str] = "n_frequency"

    def __post_init__(self) -> None:
        super().__post_init__()
        for n in (self.n_frequency, *self.n_frequency_pattern.values()):
            self.require(n > 0, "n_frequency", "a positive integer", n)
        if self.wavelet_family not in FAMILIES:
            raise ValueError(errors.one_of(self.label, "wavelet_family", self.wavelet_family, FAMILIES))
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        db2 = cls(n_frequency=3, wavelet_family="db2", n_frequency_pattern={"second": 2})
        return cls(n_frequency=1, scaling=3.0), db2, cls(n_frequency=2, use_idwt=False)

    def check_site(self, base: Base) -> None:
        if not self.proportional_parameters:
            n = by_pattern(self.n_frequency_pattern, base.path, self.n_frequency)
            self._require_room(base, n, "see n_frequency_pattern")

    def _require_room(self, base: Base, n: int, remedy: str) -> None:
        entries = base.shape.numel()
        self.require_at(n <= entries, base, f"n_frequency must be at most out * in = {entries}", n, remedy)

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        total = sum(base.shape.numel() for base in sites.values())
        params, consts = {}, {}
        for path, base in sites.items():
            n = by_pattern(self.n_frequency_pattern, path, self.n_frequency)
            if self.proportional_parameters:
                n = max(1, round(base.shape.numel() / total * (self.n_frequency * len(sites))))
                self._require_room(base, n, "its share of all numbers is that; lower n_frequency")
            gen = rng.generator(seed, path)
            params[path] = {"c": torch.zeros(n) if self.init_weights else 0.01 * rng.randn((n,), gen)}
            order = torch.randperm(base.shape.numel(), generator=rng.stream(self.random_loc_seed).generator, device="cpu")
            consts[path] = {"index": order[:n].clone(), "scaling": torch.tensor(self.scaling, dtype=torch.float64)}
            if self.use_idwt:
                consts[path]["low"] = torch.tensor(synthesis(self.wavelet_family), dtype=torch.float64)
        return Adapter(params, consts)

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        (out, in_), c, index = base.shape, leaves["c"], leaves["index"]
        if not self.use_idwt:
            return leaves["scaling"] * c.new_zeros(out * in_).scatter(0, index, c).view(out, in_)
        low = leaves["low"]
        rows, columns = (n + len(low) - 2 + (n + len(low)) % 2 for n in (out, in_))
        row, column = index // in_ + (rows - out) // 2, index % in_ + (columns - in_) // 2
        whole = inverse_transform(c.new_zeros(rows * columns).scatter(0, row * columns + column, c).view(rows, columns), low)
        top, left = (whole.shape[0] - out) // 2, (whole.shape[1] - in_) // 2
        return leaves["scaling"] * whole[top : top + out, left : left + in_]

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        if self.use_idwt:
            return super().apply(leaves, base, x, context)
        c, index, in_ = leaves["c"], leaves["index"], base.shape[-1]
        y = base(x)
        met = leaves["scaling"] * x.to(c.dtype)[..., index % in_] * c
        return y.to(torch.promote_types(y.dtype, c.dtype)).index_add(-1, index // in_, met)
