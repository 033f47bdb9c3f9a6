r"""OSF: orthogonal subspace fine-tuning, which trains the small singular directions of the weight and keeps the large ones.

.. math:: W' = W + U \, \mathrm{diag}(S) V - U_0 \, \mathrm{diag}(S_0) V_0

U (out, m - k), S (m - k,), V (m - k, in): trained, from the singular triplets of W beyond the k largest, of m = min(in,
out); U0, S0, V0: those at the start, frozen, so the difference does not depend on the arbitrary signs of singular vectors.
``project_grads`` takes from the gradients of U and V what lies along the k preserved directions. Where U has all directions
of its space (out <= in) what then remains is the span of U0; elsewhere the preserved ones are kept, U_high (out, k). The same
holds for V0 and V_high (k, in). Files hold U, S and V; the rest is made of the base again.

References:
    Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, 2025, arXiv 2504.07097,
    eq. (3) to (5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.families import Factored
from funcpeft.method import FrozenDict, Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class OSF(Factored):
    """Fine-tuning of the orthogonal complement of the main directions.

    Without ``target_modules`` it adapts every linear layer of a model whose architecture has no default.

    Args:
        effective_rank: Number k of directions that are preserved: an integer, a fraction of m as a float in (0, 1], or
            ``None`` for half of them.
        rank_pattern: The same by regular expressions that are searched in the module path; the first that is found wins.
        init_weights: Whether the start is neutral; else U, S and V are N(0, 1).
    """

    effective_rank: int | float | None = None
    rank_pattern: Mapping[str, Any] | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "OSF"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, str]] = {
        "U": "osf_svd_params.U_low",
        "S": "osf_svd_params.S_low",
        "V": "osf_svd_params.V_low",
    }
    peft_fixed: ClassVar[dict[str, Any]] = {"target_svd_config": None}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    leaf_names: ClassVar[tuple[str, ...]] = ("U", "S", "V", "U0", "S0", "V0", "U_high", "V_high")
    additive: ClassVar[bool] = False  # the factors are of the weight, so a second one is of another weight
    size: ClassVar[str] = "(min(in_, out) - min(effective_rank, min(in_, out))) * (in_ + out + 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            self._check(rank)

    def _check(self, rank: Any) -> None:
        fraction = isinstance(rank, float) and 0 < rank <= 1
        whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
        rule = "None, a positive integer or a fraction in (0, 1]"
        self.require(rank is None or fraction or whole, "effective_rank", rule, rank)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(effective_rank=1), cls(rank_pattern={"sec": 0.25})

    @staticmethod
    def names_site(key: str, path: str) -> bool:
        return re.search(key, path) is not None

    def resolve(self, default: Callable[[str, str], Any]) -> Self:
        if self.target_modules is not None:
            return self
        try:
            known = default(self.peft_type, "target_modules")
        except ValueError:
            known = None
        return self if known else replace(self, target_modules="all-linear")

    def check_site(self, base: Base) -> None:
        super().check_site(base)
        rule = f"effective_rank must preserve one direction or more of {min(base.shape)}"
        self.require_at(self.preserved(base) > 0, base, rule, 0, "give a larger rank, or leave the site out")

    def preserved(self, base: Base) -> int:
        """Returns k at a site."""
        m, pattern = min(base.shape), self.rank_pattern or FrozenDict()
        rank = next((v for key, v in pattern.items() if self.names_site(key, base.path)), self.effective_rank)
        if rank is None:
            return m // 2
        return min(m, rank if isinstance(rank, int) else int(m * rank))

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        weight, k, (out, in_) = base.weight, self.preserved(base), base.shape
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        start = {"U": u[:, k:], "S": s[k:], "V": vh[k:]}
        high = {**({"U_high": u[:, :k]} if out > in_ else {}), **({"V_high": vh[:k]} if in_ > out else {})}
        start, high = ({n: t.to(base.dtype).to(weight.dtype).contiguous() for n, t in d.items()} for d in (start, high))
        consts = {**{n + "0": t for n, t in start.items()}, **high}
        if self.init_weights:
            return {n: t.clone() for n, t in start.items()}, consts
        return {n: rng.normal(tuple(t.shape), gen) for n, t in start.items()}, consts

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        a = torch.cat([leaves["V"], leaves["V0"]])
        return a, torch.cat([leaves["U"] * leaves["S"], -leaves["U0"] * leaves["S0"]], 1)

    def project_grads(self, grads: Leaves, leaves: Leaves, base: Base) -> Leaves:
        """Takes from the gradients of U and V what lies along preserved directions."""
        high = leaves["V_high"].mT if "V_high" in leaves else None
        v = _free(grads["V"].mT, leaves["V0"].mT, high).mT
        return {**grads, "U": _free(grads["U"], leaves["U0"], leaves.get("U_high")), "V": v}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Writes patterns as whole paths, whose meaning does not depend on their order."""
        ranks = {p: min(len(v["U"]), v["V"].shape[1]) - len(v["S"]) for p, v in leaves.items() if "S" in v}
        pattern = {f"^{re.escape(p)}$": k for p, k in ranks.items()} if self.rank_pattern else None
        return {**super().to_peft_config(leaves), "rank_pattern": pattern}


def _free(columns: Tensor, start: Tensor, high: Tensor | None) -> Tensor:
    """Returns the part of columns outside the span of ``high``, or in that of ``start`` where the two fill the space."""
    q = (start if high is None else high).to(columns.dtype)
    part = q @ (q.mT @ columns)
    return part if high is None else columns - part
