r"""AdaLoRA: low-rank adaptation in singular form, whose ranks are allocated by importance.

.. math:: W' = W + \frac{\alpha}{n + 10^{-5}} \, B \, \mathrm{diag}(E) \, A

A (r, in), E (r, 1), B (out, r): trained; n: ``init_r``, for good. A and B are kept near orthogonal by a regulariser that
``penalty`` returns, the mean over all factors of the Frobenius norms of A A^T - I and B^T B - I times ``orth_reg_weight``.

A triplet is an entry of E with its row of A and column of B. ``allocate_init`` and ``allocate_update`` are the allocator,
pure: of every parameter it keeps a mean of its sensitivity abs(p * gradient) and of that mean's error; their product is its
importance, a triplet's is that of its E plus the means over its A and B, and as the budget of all sites together shrinks,
the entries of E of the least important triplets are set to 0. They may grow again until the last phase, in which the choice
is fixed.

References:
    Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, 2023, arXiv 2303.10512, eq. (3),
    (6) to (9), (11), and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import EVAL, Context
from funcpeft.families import Factored
from funcpeft.method import FrozenDict, Method
from funcpeft.transforms import require_alike
from funcpeft.tree import Adapter, Leaves, Tree, tree_map
from funcpeft.weights import Base

#: State of the allocator: ``step``, trees ``mean`` and ``deviation`` like the params, and ``kept`` triplets by path.
Allocation = dict[str, Any]

_E = ".lora_E"


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Factored):
    """Low-rank adaptation with ranks by importance.

    Args:
        target_r: Mean rank at the end.
        init_r: Rank at the start, of every site.
        tinit: Steps before ranks shrink.
        tfinal: Steps at the end in which the choice is fixed.
        deltaT: Steps between choices.
        beta1: Decay of the mean sensitivity.
        beta2: Decay of its mean error.
        orth_reg_weight: Weight of the regulariser.
        total_step: Number of steps of the training; must be given.
        lora_alpha: Numerator of the scaling; ``init_r`` where it is not positive.
        lora_dropout: Probability with which elements of the adapter's input are dropped in training.
        init_lora_weights: Whether the start is neutral, A and B N(0, 0.02^2) and E zero; else all are N(0, 1).
        r: Not used, as in peft.
        rank_pattern: The triplets that were kept, ``{path + ".lora_E": booleans}``; a result of training (``pruned``).
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"lora_only"`` those of the targets.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True
    r: int = 8
    rank_pattern: Mapping[str, Any] | None = None
    bias: str = "none"

    peft_type: ClassVar[str] = "ADALORA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    keys: ClassVar[dict[str, str]] = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False, "megatron_core": "megatron.core", "qalora_group_size": 16}
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "E", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "E": -2, "B": -1}
    dropout_field: ClassVar[str] = "lora_dropout"
    bias_only: ClassVar[str] = "lora_only"
    size: ClassVar[str] = "init_r * (in_ + out + 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("target_r", "init_r", "deltaT", "total_step")
        for name in ("beta1", "beta2"):
            self.require(0 < getattr(self, name) < 1, name, "in (0, 1)", getattr(self, name))
        self.require(self.orth_reg_weight >= 0, "orth_reg_weight", "non-negative", self.orth_reg_weight)
        self.require(self.tinit >= 0 and self.tfinal >= 0, "tinit", "non-negative, as tfinal", (self.tinit, self.tfinal))
        assert self.total_step is not None
        rule = f"before total_step - tfinal = {self.total_step - self.tfinal}"
        self.require(self.tinit < self.total_step - self.tfinal, "tinit", rule, self.tinit)
        self.require(self.target_r <= self.init_r, "target_r", f"at most init_r = {self.init_r}", self.target_r)
        self.require_probability("lora_dropout")
        self.require_bias()
        for key, kept in (self.rank_pattern or {}).items():
            fits = isinstance(kept, tuple) and len(kept) == self.init_r and all(type(k) is bool for k in kept)
            name, rule = f"rank_pattern[{key!r}]", f"a list of init_r = {self.init_r} booleans, under a path with {_E!r}"
            self.require(fits and key.endswith(_E), name, rule, kept)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(init_r=3, target_r=1, total_step=10, lora_alpha=3, lora_dropout=0.25),)

    @staticmethod
    def names_site(key: str, path: str) -> bool:
        return key.removesuffix(_E) == path

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        r, (out, in_) = self.init_r, base.shape
        a, e, b = rng.randn((r, in_), gen), rng.randn((r, 1), gen), rng.randn((out, r), gen)
        rng.randn((1,), gen)  # as peft draws the number of ranks before it sets it
        if self.init_lora_weights:
            a, e, b = rng.normal((r, in_), gen, 0.02), torch.zeros_like(e), rng.normal((out, r), gen, 0.02)
        kept = (self.rank_pattern or FrozenDict()).get(base.path + _E)
        if kept is not None:
            index = torch.tensor([i for i, k in enumerate(kept) if k], dtype=torch.int64)
            a, e, b = a[index], e[index], b[:, index]
        alpha = self.lora_alpha if self.lora_alpha > 0 else r
        consts = {"scaling": torch.tensor(alpha / (r + 1e-5), dtype=torch.float64), "rank": torch.tensor(len(a))}
        return {"A": a, "E": e, "B": b.contiguous()}, consts

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        return leaves["A"] * leaves["E"], leaves["scaling"] * leaves["B"]

    def penalty(self, adapter: Adapter, context: Context = EVAL) -> Tensor:
        """Computes the orthogonality term of all factors, weighted; the zeros of padded ranks do not count."""
        norms: list[Tensor] = []
        for path, leaves in adapter.params.items():
            for gram in (leaves["A"] @ leaves["A"].mT, leaves["B"].mT @ leaves["B"]):
                there = torch.arange(gram.shape[-1], device=gram.device) < adapter.consts[path]["rank"]
                norms.append(_norm(gram - torch.diag_embed(there.to(gram.dtype))))
        return self.orth_reg_weight * torch.stack(norms).mean()

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Writes the pattern; a site whose rank is not the pattern's gets one of its first triplets, which reads as well."""
        given, whole = self.rank_pattern or {}, (True,) * self.init_r
        ranks = {p: len(v["E"]) for p, v in leaves.items() if "E" in v}
        first = {p: tuple(i < r for i in range(self.init_r)) for p, r in ranks.items()}
        pattern = {p: kept if sum(kept := given.get(p + _E, whole)) == ranks[p] else first[p] for p in ranks}
        dropped = self.rank_pattern is not None or any(kept != whole for kept in pattern.values())
        config = super().to_peft_config(leaves)
        return {**config, "rank_pattern": {p + _E: list(kept) for p, kept in pattern.items()} if dropped else None}

    # -- the allocator -----------------------------------------------------------------------------------------------------

    def budget(self, step: Tensor | int, sites: int) -> Tensor:
        """Returns how many triplets of so many sites remain after a step: cubic from ``init_r`` to ``target_r`` each."""
        assert self.total_step is not None
        step = torch.as_tensor(step)
        first, last = self.init_r * sites, self.target_r * sites
        left = 1 - (step - self.tinit).double() / (self.total_step - self.tfinal - self.tinit)
        between = ((first - last) * left**3 + last).floor()
        late = torch.where(step > self.total_step - self.tfinal, last, between)
        return torch.where(step <= self.tinit, first, late).long()

    def allocate_init(self, adapter: Adapter) -> Allocation:
        """Returns the state of an allocator that has seen no step."""
        zeros = tree_map(torch.zeros_like, adapter.params)
        kept = {p: torch.ones_like(v["E"][..., 0], dtype=torch.bool) for p, v in adapter.params.items()}
        step = torch.zeros((), dtype=torch.int64, device=next(iter(kept.values())).device)
        return {"step": step, "mean": zeros, "deviation": tree_map(torch.clone, zeros), "kept": kept}

    def allocate_update(self, grads: Tree, state: Allocation, adapter: Adapter) -> tuple[Adapter, Allocation]:
        """Returns the adapter with unimportant triplets set to zero, and the next state.

        To be called once a step, after the optimizer's, with the gradients of that step. The first call is step 0. Raises
        ``TypeError`` if gradients or state are of another adapter.
        """
        require_alike("grads", grads, adapter.params)
        require_alike("the allocator's state", state["mean"], adapter.params)
        step, last = state["step"], (self.total_step or 0) - self.tfinal
        learns, chooses = step < last, (step > self.tinit) & (step < last) & (step % self.deltaT == 0)
        mean = tree_map(
            lambda p, g, m: torch.where(learns, self.beta1 * m + (1 - self.beta1) * (p * g).abs(), m),
            adapter.params,
            grads,
            state["mean"],
        )
        deviation = tree_map(
            lambda p, g, m, d: torch.where(learns, self.beta2 * d + (1 - self.beta2) * ((p * g).abs() - m).abs(), d),
            adapter.params,
            grads,
            mean,
            state["deviation"],
        )
        chosen = self._chosen(mean, deviation, self.budget(step, len(adapter.params)))
        again = chooses | (step == last)
        kept = {p: torch.where(again, chosen[p], old) for p, old in state["kept"].items()}
        masks = again | (step > last)
        params = {p: {**v, "E": torch.where(masks & ~kept[p][..., None], 0, v["E"])} for p, v in adapter.params.items()}
        return adapter.replace(params=params), {"step": step + 1, "mean": mean, "deviation": deviation, "kept": kept}

    def _chosen(self, mean: Tree, deviation: Tree, budget: Tensor) -> Leaves:
        """Returns, by path, which triplets ``(r,)`` are among the ``budget`` most important of all sites."""
        scores: Leaves = {}
        for path in mean:
            s = {n: mean[path][n] * deviation[path][n] for n in ("A", "B", "E")}
            scores[path] = s["E"][..., 0] + (s["A"].mean(-1) + s["B"].mean(-2))
        whole = torch.cat(list(scores.values())).sort().values
        if not len(whole):  # nothing is left to drop
            return {p: s.to(torch.bool) for p, s in scores.items()}
        dropped = (len(whole) - budget).clamp(0, len(whole))
        limit = torch.where(dropped > 0, whole.take((dropped - 1).clamp(min=0)), -torch.inf)
        return {p: s > limit for p, s in scores.items()}

    def pruned(self, adapter: Adapter, state: Allocation) -> tuple[AdaLoRA, Adapter]:
        """Returns the method and the adapter without the triplets that the allocator has dropped, as files hold them.

        The net of the pruned adapter is another: ``adapt(model, method)``. A site may be left with none. Raises
        ``ValueError`` for a stack.
        """
        stacked = [p for p, v in adapter.params.items() if v["E"].ndim != 2]
        if stacked:
            rule, remedy = "members are pruned apart, as their ranks differ", "unstack the adapter and the state"
            raise ValueError(errors.say(self.label, rule, f"a stack at {errors.listed(stacked)}", remedy))
        kept = {p: state["kept"][p] for p in adapter.params}
        params = {p: {"A": v["A"][kept[p]], "E": v["E"][kept[p]], "B": v["B"][:, kept[p]]} for p, v in adapter.params.items()}
        consts = {p: {**v, "rank": kept[p].sum()} for p, v in adapter.consts.items()}
        pattern = {p + _E: tuple(k.tolist()) for p, k in kept.items()}
        return replace(self, rank_pattern=pattern), adapter.replace(params=params, consts=consts)


def _norm(t: Tensor) -> Tensor:
    """Returns the Frobenius norm, with derivative zero at zero."""
    square = t.square().sum()
    zero = square == 0
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())
