r"""PSOFT: orthogonal fine-tuning in the principal subspace of the weight.

.. math:: W' = W + s B (R - I) A, \qquad R = \mathrm{diag}(b) R_0 \, \mathrm{diag}(a), \quad R_0 = (I + Q)(I - Q)^{-1}

A (r, in), B (out, r): from the r largest singular triplets of W, with s B A their sum, frozen; Q: skew-symmetric (r, r),
its strict upper triangle, row by row, is the leaf Q (r (r - 1) / 2,), or R_0 itself is the leaf without ``psoft_orth``; b,
a (r,): trained scales. R_0 may be the truncated series of its Cayley form. s = psoft_alpha / r cancels: A and B are divided
by it.

Files hold no A and B: they are of the base, and W' depends on the arbitrary signs of its singular vectors. Here they are
leaves (``consts``), so an adapter keeps its own; one that is read takes those that this machine's decomposition of the base
gives.

References:
    Wu et al., Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, 2025, arXiv 2505.11235, eq. (6) to (8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.families import Factored
from funcpeft.method import Method
from funcpeft.rotations import MOST_TERMS, cayley, cayley_series, skew
from funcpeft.tree import Leaves
from funcpeft.weights import Base

_STARTS, _SVDS = ("psoft_init", "pissa_init"), ("full", "lowrank")


@dataclass(frozen=True, kw_only=True)
class PSOFT(Factored):
    """Rotation of the principal components.

    Args:
        r: Number of components; at most min(in, out).
        psoft_alpha: Divides out; kept for files.
        psoft_dropout: Probability with which elements of the adapter's input are dropped in training.
        ab_svd_init: How singular values are shared: ``"psoft_init"``, B has them; ``"pissa_init"``, their roots are in both.
        psoft_svd: ``"full"``, or ``"lowrank"``: randomised.
        psoft_svd_lowrank_niter: Power iterations of the randomised decomposition.
        random_seed: Determines it.
        psoft_orth: Whether R_0 is orthogonal.
        psoft_mag_b: Whether rows of R_0 are scaled.
        psoft_mag_a: Whether columns of R_0 are scaled.
        use_cayley_neumann: Whether R_0 is the truncated series.
        num_cayley_neumann_terms: Its number of terms; three are the same as four.
        cayley_neumann_eps: Largest Frobenius norm of Q in the series, in (0, 1); ``None`` for no limit.
        init_weights: Whether the start is neutral; else Q is N(0, 0.1^2), or that is added to R_0.
    """

    r: int = 32
    psoft_alpha: int = 32
    psoft_dropout: float = 0.0
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "PSOFT"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, str]] = {"Q": "psoft_R.weight", "b": "psoft_R.vector_b", "a": "psoft_R.vector_a"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    leaf_names: ClassVar[tuple[str, ...]] = ("Q", "b", "a", "A", "B", "scaling")
    dropout_field: ClassVar[str] = "psoft_dropout"
    additive: ClassVar[bool] = False  # the factors are of the weight, so a second one is of another weight
    size: ClassVar[str] = "r * (r - 1) // 2 + 2 * r"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "psoft_svd_lowrank_niter")
        terms = self.num_cayley_neumann_terms
        self.require(0 < terms <= MOST_TERMS, "num_cayley_neumann_terms", f"from 1 to {MOST_TERMS}", terms)
        self.require(self.psoft_alpha > 0, "psoft_alpha", "positive", self.psoft_alpha)
        self.require_probability("psoft_dropout")
        for name, known in (("ab_svd_init", _STARTS), ("psoft_svd", _SVDS)):
            if getattr(self, name) not in known:
                raise ValueError(errors.one_of(self.label, name, getattr(self, name), known))
        eps = self.cayley_neumann_eps
        self.require(eps is None or 0 < eps < 1, "cayley_neumann_eps", "in (0, 1) or None", eps)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=3, psoft_dropout=0.25), cls(r=2, psoft_orth=False, psoft_mag_a=False, ab_svd_init="pissa_init")

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        self.require_at(self.r <= min(base.shape), base, f"r must be at most min(in, out) = {min(base.shape)}", self.r)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r = self.r
        if self.psoft_orth:
            q = torch.zeros(r * (r - 1) // 2) if self.init_weights else rng.normal((r * (r - 1) // 2,), gen, 0.1)
        else:
            q = torch.eye(r) if self.init_weights else torch.eye(r) + 0.1 * rng.randn((r, r), gen)
        scales = {n: torch.ones(r) for n, there in (("b", self.psoft_mag_b), ("a", self.psoft_mag_a)) if there}
        a, b = self._factors(base)
        consts = {"A": a, "B": b, "scaling": torch.tensor(self.psoft_alpha / r, dtype=torch.float64)}
        return {"Q": q, **scales}, consts

    def _factors(self, base: Base) -> tuple[Tensor, Tensor]:
        weight, r, s = base.weight.float(), self.r, self.psoft_alpha / self.r
        if self.psoft_svd == "full":
            u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            with rng.lent(rng.stream(self.random_seed).generator):
                u, values, v = torch.svd_lowrank(weight, q=r, niter=self.psoft_svd_lowrank_niter)
            vh = v.mT
        u, values, vh = u[:, :r], values[:r] / s, vh[:r]
        if self.ab_svd_init == "psoft_init":
            return vh.contiguous(), u @ torch.diag(values)
        root = torch.diag(values.sqrt())
        return root @ vh, u @ root

    def rotation(self, leaves: Leaves) -> Tensor:
        """Computes R ``(r, r)``."""
        q, r = leaves["Q"], leaves["A"].shape[-2]
        if self.psoft_orth:
            q = skew(q, r)
            if not self.use_cayley_neumann:
                q = cayley(-q)
            else:
                q = cayley_series(self._within(q), self.num_cayley_neumann_terms)
        q = leaves["b"][:, None] * q if "b" in leaves else q
        return q * leaves["a"] if "a" in leaves else q

    def _within(self, q: Tensor) -> Tensor:
        if self.cayley_neumann_eps is None:
            return q
        square = q.square().sum()
        beyond = square > self.cayley_neumann_eps**2
        norm = torch.where(beyond, square, 1).sqrt()  # the root has no derivative at 0
        return torch.where(beyond, q * (self.cayley_neumann_eps / (norm + 1e-12)), q)

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        turned = self.rotation(leaves)
        change = turned - torch.eye(turned.shape[0], dtype=turned.dtype, device=turned.device)
        return leaves["A"], leaves["scaling"] * (leaves["B"] @ change)
