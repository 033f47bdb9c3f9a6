r"""OSF: orthogonal subspace fine-tuning, which trains the small singular directions of the weight and keeps the large ones.

.. math:: W' = W + U \, \mathrm{diag}(S) V - U_0 \, \mathrm{diag}(S_0) V_0

U (out, m - k), S (m - k,), V (m - k, in): trained, from the singular triplets of W beyond the k largest, of m = min(in,
out); U0, S0, V0: those at the start, frozen, so the difference does not depend on the arbitrary signs of singular vectors.
``project_grads`` takes from the gradients of U and V what lies along the k preserved directions.

References:
    Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, 2025, arXiv 2504.07097,
    eq. (3) to (5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
    keys: ClassVar[dict[str, str]] = {
        "U": "osf_svd_params.U_low",
        "S": "osf_svd_params.S_low",
        "V": "osf_svd_params.V_low",
    }
    peft_fixed: ClassVar[dict[str, Any]] = {"target_svd_config": None}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    leaf_names: ClassVar[tuple[str, ...]] = ("U", "S", "V", "U0", "S0", "V0")
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

    def preserved(self, base: Base) -> int:
        """Returns k at a site."""
        m, pattern = min(base.shape), self.rank_pattern or FrozenDict()
        rank = next((v for key, v in pattern.items() if self.names_site(key, base.path)), self.effective_rank)
        if rank is None:
            return m // 2
        return min(m, rank if isinstance(rank, int) else int(m * rank))

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        weight, k = base.weight, self.preserved(base)
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        first = {"U0": u[:, k:], "S0": s[k:], "V0": vh[k:]}
        first = {name: t.to(base.dtype).to(weight.dtype).contiguous() for name, t in first.items()}
        if self.init_weights:
            return {name[0]: t.clone() for name, t in first.items()}, first
        return {name[0]: rng.normal(tuple(t.shape), gen) for name, t in first.items()}, first

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        a = torch.cat([leaves["V"], leaves["V0"]])
        return a, torch.cat([leaves["U"] * leaves["S"], -leaves["U0"] * leaves["S0"]], 1)

    def project_grads(self, grads: Leaves, leaves: Leaves, base: Base) -> Leaves:
        """Takes from the gradients of U and V what lies along preserved directions: all but the span of U0, and of V0.

        Where U (or V) has all directions of its space, what is not preserved is the span of U0 itself; elsewhere the
        preserved directions are those of the base, W - U0 diag(S0) V0.
        """
        high = base.weight - (leaves["U0"] * leaves["S0"]) @ leaves["V0"]
        u, _, vh = torch.linalg.svd(high.float(), full_matrices=False)
        k = min(base.shape) - leaves["S"].shape[0]
        u, v = u[:, :k].to(grads["U"].dtype), vh[:k].to(grads["V"].dtype)
        return {**grads, "U": grads["U"] - u @ (u.mT @ grads["U"]), "V": grads["V"] - (grads["V"] @ v.mT) @ v}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Writes patterns as whole paths, whose meaning does not depend on their order."""
        ranks = {p: min(len(v["U"]), v["V"].shape[1]) - len(v["S"]) for p, v in leaves.items() if "S" in v}
        pattern = {f"^{re.escape(p)}$": k for p, k in ranks.items()} if self.rank_pattern else None
        return {**super().to_peft_config(leaves), "rank_pattern": pattern}
