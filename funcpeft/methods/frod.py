r"""FRoD: full-rank adaptation by a basis that layers share and sparse rotations of it.

.. math:: W' = U (S + \mathrm{diag}\, \lambda) V^\top

V (in, in): basis of a category, the layers that play one role, from all their weights; U (out, in): columns of W V^{-T}
divided by their norms, frozen; lambda (in,): trained, those norms at the start, so that W' = W; S (in, in): sparse, its
values s trained, its places off the diagonal drawn per category. V is the right singular vectors of the stacked weights, or
R^T times the eigenvectors of the mean of the (Q_l^T Q_l + alpha I)^{-1}, with Q, R their QR decomposition and Q_l the rows
of layer l.

W' replaces W: a call meets no base weight. Files hold V and no U, which is made of the base and the V that is read.

References:
    Full-Rank Efficient Fine-Tuning with Rotational Degrees, AAAI 2026, doi 10.1609/aaai.v40i31.39813.
    Ponnapalli et al., A Higher-Order Generalized Singular Value Decomposition, 2011, eq. (2) to (4) (the basis).
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

_SCOPE = "category "


def category_of(path: str) -> str:
    """Returns the role of a module: the last two components of its path, or the last where the one before is a number."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-2:] == ["output", "dense"] and len(parts) > 2 and parts[-3] == "attention":
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def layer_of(path: str, otherwise: int) -> int:
    """Returns the number of a module's layer: that after ``layers``, else the first, else the given one."""
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(p) for p in (*after, *parts) if p.isdigit()), otherwise)


def basis(weights: list[Tensor], alpha: float) -> Tensor:
    """Returns V ``(in, in)`` for the weights ``(out, in)`` of one category, in float32."""
    stacked = torch.cat(weights)
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True).Vh.mT
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    total = torch.zeros_like(eye)
    for rows in q.split([w.shape[0] for w in weights]):
        total = total + torch.linalg.inv(rows.mT @ rows + alpha * eye)
    return r.mT @ torch.linalg.eigh(total / len(weights)).eigenvectors


def places(size: int, rate: float, gen: torch.Generator) -> Tensor:
    """Draws different places off the diagonal of a square matrix, ``(2, count)``."""
    free = size * size - size
    count = min(int(size * size * rate), free)
    count = max(1, count) if rate > 0 and free else count
    if not count:
        return torch.empty(2, 0, dtype=torch.int64, device="cpu")
    drawn = torch.randperm(free, generator=gen, device="cpu")[:count]
    row, rest = drawn // (size - 1), drawn % (size - 1)
    return torch.stack([row, rest + (rest >= row)])  # the diagonal is skipped


@dataclass(frozen=True, kw_only=True)
class FRoD(Method):
    """Full-rank adaptation by rotations.

    Args:
        projection_prng_key: Determines the places of S.
        save_projection: Whether checkpoints hold V and the places; without them, reading makes them of the base again.
        sparse_rate: Fraction of the entries of S that are trained, in [0, 1].
        regularization_alpha: Ridge of the inverses that V is made of.
        frod_dropout: Probability with which elements of the adapter's input are dropped in training; the base's part is
            then of the undropped input.
        init_weights: Whether the start is neutral; else s is N(0, 0.1^2) and lambda is moved by as much.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"frod_only"`` those of the targets.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    frod_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"

    peft_type: ClassVar[str] = "FROD"
    keys: ClassVar[dict[str, str]] = {"lambda": "frod_lambda_l", "s": "frod_lambda_s_values"}
    peft_fixed: ClassVar[dict[str, Any]] = {
        "fan_in_fan_out": False,
        "progressbar": True,
        "runtime_offload_base_weight": False,
    }
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("lambda", "s", "U", "V", "places")
    weight_free: ClassVar[bool] = True
    depends_on_sites: ClassVar[bool] = True
    bias_only: ClassVar[str] = "frod_only"
    size: ClassVar[str] = "in_ + min(in_ * in_ - in_, max(ceil(sparse_rate), floor(in_ * in_ * sparse_rate)))"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.sparse_rate <= 1, "sparse_rate", "in [0, 1]", self.sparse_rate)
        self.require(self.regularization_alpha >= 0, "regularization_alpha", "non-negative", self.regularization_alpha)
        self.require_probability("frod_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(sparse_rate=0.3, frod_dropout=0.25), cls(sparse_rate=0.1, save_projection=False)

    def scopes(self, sites: Mapping[str, Base]) -> Mapping[str, tuple[str, ...]]:
        return {path: (_SCOPE + category_of(path),) for path in sites}

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        consts: Tree = self._shared(sites)
        params: Tree = {}
        for path, base in sites.items():
            shared = consts[_SCOPE + category_of(path)]
            u, norms = _directions(base, shared["V"])
            s = torch.zeros(shared["places"].shape[1])
            if not self.init_weights:
                gen = rng.generator(seed, path)
                s = rng.normal(tuple(s.shape), gen, 0.1)
                norms = norms + 0.1 * rng.randn(tuple(norms.shape), gen)
            params[path], consts[path] = {"lambda": norms, "s": s}, {"U": u}
        return Adapter(params, consts)

    def _shared(self, sites: Mapping[str, Base]) -> Tree:
        layers: dict[str, dict[int, Base]] = {}
        for number, (path, base) in enumerate(sites.items()):
            layers.setdefault(category_of(path), {})[layer_of(path, number)] = base
        made, gen = {}, rng.stream(self.projection_prng_key).generator
        for name in sorted(layers):
            bases = [base for _, base in sorted(layers[name].items())]
            v = basis([base.weight.float() for base in bases], self.regularization_alpha)
            made[_SCOPE + name] = {"V": v.to(bases[0].dtype).contiguous(), "places": places(len(v), self.sparse_rate, gen)}
        return made

    def derived(self, leaves: Leaves, base: Base) -> Leaves:
        return {"U": _directions(base, leaves["V"])[0]}

    def core(self, leaves: Leaves) -> Tensor:
        """Returns S + diag(lambda) ``(in, in)``."""
        n, (row, column) = leaves["lambda"].shape[0], leaves["places"]
        s = leaves["s"].new_zeros(n * n).scatter(0, row * n + column, leaves["s"]).view(n, n)
        return s + torch.diag(leaves["lambda"])

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        u, v = leaves["U"], leaves["V"]
        if context.training and self.frod_dropout:
            h = context.dropout(x, self.frod_dropout)
            bias = 0 if base.bias is None else base.bias
            return base(x) + self._turned(leaves, h.to(v.dtype) @ v) @ u.mT - (base(h) - bias)
        y = self._turned(leaves, x.to(v.dtype) @ v) @ u.mT
        return y if base.bias is None else y + base.bias

    def _turned(self, leaves: Leaves, z: Tensor) -> Tensor:
        row, column = leaves["places"]
        turned = torch.zeros_like(z).index_add(-1, row, z[..., column] * leaves["s"])
        return turned + z * leaves["lambda"]

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base.replace(weight=leaves["U"] @ self.core(leaves) @ leaves["V"].mT)

    def to_peft_shared(self, scope: str, leaves: Leaves) -> dict[str, Tensor]:
        if not self.save_projection:
            return {}
        name, n = scope.removeprefix(_SCOPE), leaves["V"].shape[0]
        size = torch.tensor([n, n], device=leaves["places"].device)
        found = {"V": leaves["V"], "s_indices": leaves["places"], "s_size": size}
        return {f"frod_{part}.{name}": t for part, t in found.items()}

    def from_peft_shared(self, scope: str, tensors: Mapping[str, Tensor]) -> Leaves:
        """Raises ``ValueError`` unless the places are distinct ones off the diagonal, of a matrix as large as V."""
        found = {key.split(".")[0].removeprefix("frod_"): t for key, t in tensors.items()}
        places, n = found["s_indices"], found["V"].shape[0]
        self.require(found["s_size"].tolist() == [n, n], "frod_s_size", f"that of V, {[n, n]}", found["s_size"].tolist())
        self.require_places(places, "frod_s_indices", n, distinct=False)
        self.require_places(places[0].long() * n + places[1].long(), "frod_s_indices", n * n)
        self.require(not (places[0] == places[1]).any(), "frod_s_indices", "off the diagonal", "some on it")
        return {"V": found["V"], "places": places}


def _directions(base: Base, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns U ``(out, in)`` and the norms lambda ``(in,)`` of W V^{-T}, rounded to float32 from float64."""
    weight, wide = base.weight.double(), v.double()
    try:
        columns = torch.linalg.solve(wide, weight.mT).mT
    except RuntimeError:  # a singular basis
        columns = weight @ torch.linalg.pinv(wide, rtol=1e-6).mT
    norms = columns.norm(dim=0)
    there = norms > 1e-12
    return torch.where(there, columns / torch.where(there, norms, 1), 0).float(), norms.float()
