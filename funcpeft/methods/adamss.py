r"""AdaMSS: adaptive multi-subspace tuning, a low-rank pair for each cluster of output rows.

.. math:: [W' \mid b'] = [W \mid b] + \Delta, \qquad \Delta_j = B_j \, A_{k(j)} N

N (R, in + 1), or (R, in) without a bias: right singular vectors of [W | b], frozen; k(j): the cluster of output row j, by
K-means of the rows of the left singular vectors; A (K, r, R): per cluster, B (out, r): rows of each output, trained. A
cluster of fewer than r rows uses as many of the r. Files hold N, A and B but not the clusters, which reading finds in the
base again.

``asa_init``, ``asa_update``, ``asa_freeze`` and ``asa_hold`` are the schedule that freezes unimportant clusters, as pure
functions of a state.

References:
    AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025, openreview 8ZdWmpYxT0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.families import rounded
from funcpeft.method import Method
from funcpeft.tree import Adapter, Leaves, Tree, tree_map
from funcpeft.weights import Base

#: State of the schedule that freezes clusters: ``step``, trees ``mean`` and ``deviation``, and ``kept`` by path.
Importance = dict[str, Any]

#: The seed of the clustering, which peft fixes.
_CLUSTERS_SEED = 123456789


def clusters(rows: Tensor, count: int) -> Tensor:
    """Returns the cluster of each row ``(n,)`` by K-means of scikit-learn."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise ImportError(errors.say("adamss", "its start needs scikit-learn", None, "pip install 'funcpeft[adamss]'")) from e
    options: dict[str, Any] = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": _CLUSTERS_SEED}
    means = KMeans(n_clusters=min(count, len(rows)), **options)
    return torch.from_numpy(means.fit_predict(rows.detach().cpu().float().numpy())).long()


@dataclass(frozen=True, kw_only=True)
class AdaMSS(Method):
    """Low-rank adaptation of clusters of rows.

    Args:
        r: Number R of singular directions that are kept; at most min(out, in + 1) is used.
        num_subspaces: Number K of clusters; at most out is used.
        subspace_rank: Rank r of each.
        init_weights: ``"orthogonal"``: B starts at 0; ``None``: N(0, 0.01^2). A starts from the rows of its cluster.
        use_dynamic_rank: Whether a cluster's rank counts its singular values above ``svd_threshold`` times the largest.
        svd_threshold: See there.
        random_seed: Determines the randomised decomposition.
        use_asa: Whether checkpoints say that clusters are frozen by importance; see ``asa_update``.
        asa_target_subspaces: Number of clusters of the model that stay trained at the end.
        init_warmup: Step at which freezing starts.
        final_warmup: Step at which it ends.
        mask_interval: Steps between decisions.
        asa_importance_beta: Decay of the mean importance.
        asa_uncertainty_beta: Decay of its mean deviation.
        asa_schedule_exponent: Exponent of the schedule.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: bool | str | None = "orthogonal"
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0

    peft_type: ClassVar[str] = "ADAMSS"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding"})
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "N", "rows", "cluster", "ranks")
    weight_free: ClassVar[bool] = True
    size: ClassVar[str] = "subspace_rank * (min(num_subspaces, out) * min(r, out, in_ + 1) + out)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval")
        start = None if self.init_weights is False else self.init_weights
        object.__setattr__(self, "init_weights", start)
        self.require(start in (None, "orthogonal"), "init_weights", "'orthogonal' or None", start)
        order = (self.init_warmup, self.final_warmup)
        self.require(order[0] < order[1], "init_warmup", "before final_warmup", order)
        self.require(self.asa_schedule_exponent > 0, "asa_schedule_exponent", "positive", self.asa_schedule_exponent)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(r=3, num_subspaces=2),)

    def check_site(self, base: Base) -> None:
        groups = base.kind.groups
        self.require_at(groups == 1, base, "a convolution must have one group", groups, "leave the site out")

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        whole = base.weight if base.bias is None else torch.cat([base.weight, base.bias[:, None]], 1)
        rank = min(self.r, *whole.shape)
        if whole.is_meta:  # clusters are found from values; their number is known
            return self._shapes(base, rank, whole.shape[1])
        with rng.lent(rng.stream(self.random_seed).generator):
            u, _, v = torch.svd_lowrank(whole.float(), q=rank, niter=2)
        cluster, order = clusters(u, self.num_subspaces).sort(stable=True)
        dtype = torch.promote_types(base.dtype, torch.float32)
        a, b, ranks = [], [], []
        for index in order.split(torch.bincount(cluster).tolist()):
            rows = u.contiguous()[index]
            with rng.lent(gen):
                start = self._start(rows)
                drawn = torch.zeros if self.init_weights else torch.randn
                second = 0.01 * drawn(len(rows), len(start), dtype=base.dtype)
            missing = self._most(base) - len(start)
            ranks.append(len(start))
            a.append(F.pad(start, (0, 0, 0, missing)))
            b.append(F.pad(second.to(dtype), (0, missing)))
        n = rounded(v.mT, base.dtype).contiguous()
        consts = {"N": n, "rows": order, "cluster": cluster, "ranks": torch.tensor(ranks)}
        return {"A": torch.stack(a), "B": torch.cat(b)}, consts

    def _shapes(self, base: Base, rank: int, columns: int) -> tuple[Leaves, Leaves]:
        out, dtype = base.shape[0], torch.promote_types(base.dtype, torch.float32)
        count = min(self.num_subspaces, out)
        most = self._most(base)
        trained = {"A": torch.empty(count, most, rank), "B": torch.empty(out, most, dtype=dtype)}
        found = {"N": torch.empty(rank, columns, dtype=base.dtype), "ranks": torch.empty(count, dtype=torch.int64)}
        return trained, {**found, "rows": torch.arange(out), "cluster": torch.arange(out)}

    def _most(self, base: Base) -> int:
        """Returns the rank to which all clusters are padded: no cluster has more rows than the weight."""
        return min(self.subspace_rank, base.shape[0])

    def _start(self, rows: Tensor) -> Tensor:
        """Returns the first A ``(rank, R)`` of a cluster from its rows of the left singular vectors."""
        gram = rows @ rows.mT
        rank = min(len(rows), self.subspace_rank)
        if self.use_dynamic_rank:
            s = torch.svd_lowrank(gram, q=min(gram.shape), niter=2)[1]
            rank = max(1, min(int((s > self.svd_threshold * s[0]).sum()), self.subspace_rank, len(s)))
        directions = torch.svd_lowrank(gram, q=min(len(gram), rank), niter=2)[0][:, :rank]
        return torch.linalg.qr(rows.mT @ directions).Q.mT

    def _spread(self, leaves: Leaves) -> Tensor:
        """Returns B by cluster ``(K, out, r)``, outputs grouped by cluster: rows of other clusters are zero."""
        count, rank = leaves["A"].shape[:2]
        mine = leaves["cluster"] == torch.arange(count, device=leaves["cluster"].device)[:, None]
        there = torch.arange(rank, device=leaves["ranks"].device) < leaves["ranks"][:, None]
        return torch.where(mine[..., None] & there[:, None], leaves["B"], 0)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        n, spread, in_ = leaves["N"], self._spread(leaves), base.shape[-1]

        def update(low: Tensor) -> Tensor:
            low = low if base.bias is None else low + n[:, in_]
            grouped = torch.einsum("...i,kri,kor->...o", low, leaves["A"], spread)
            return torch.zeros_like(grouped).index_add(-1, leaves["rows"], grouped)

        return base(x) + base.over_out(base.map(x, n[:, :in_]), update)

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return self._shifted(leaves, base, 1)

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return self._shifted(leaves, base, -1)

    def _shifted(self, leaves: Leaves, base: Base, sign: int) -> Base:
        grouped = sign * torch.einsum("kor,krj,ji->oi", self._spread(leaves), leaves["A"], leaves["N"])
        update, in_ = torch.zeros_like(grouped).index_add(0, leaves["rows"], grouped), base.shape[-1]
        bias = None if base.bias is None else base.bias + update[:, in_]
        return base.replace(weight=base.weight + update[:, :in_], bias=bias)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        made, ranks = {"adamss_newB": leaves["N"]}, leaves["ranks"].tolist()
        pieces = leaves["B"].split(torch.bincount(leaves["cluster"], minlength=len(ranks)).tolist())
        for k, (rank, b) in enumerate(zip(ranks, pieces, strict=True)):
            made |= {f"adamss_A.{k}": leaves["A"][k, :rank], f"adamss_B.{k}": b[:, :rank]}
        return made

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        assert base is not None
        rank, count = self._most(base), (len(tensors) - 1) // 2
        a = [tensors[f"adamss_A.{k}"] for k in range(count)]
        b = [tensors[f"adamss_B.{k}"] for k in range(count)]
        return {
            "N": tensors["adamss_newB"],
            "A": torch.stack([F.pad(t, (0, 0, 0, rank - len(t))) for t in a]),
            "B": torch.cat([F.pad(t, (0, rank - t.shape[1])) for t in b]),
        }

    # -- freezing by importance --------------------------------------------------------------------------------------------

    def asa_init(self, adapter: Adapter) -> Importance:
        """Returns the state of a schedule that has seen no step: no importance, every cluster trained."""
        zeros = tree_map(torch.zeros_like, adapter.params)
        kept = {p: torch.ones(v["A"].shape[-3], dtype=torch.bool, device=v["A"].device) for p, v in adapter.params.items()}
        step = torch.zeros((), dtype=torch.int64, device=next(iter(kept.values())).device)
        return {"step": step, "mean": zeros, "deviation": tree_map(torch.clone, zeros), "kept": kept}

    def asa_update(self, grads: Tree, state: Importance, adapter: Adapter) -> Importance:
        """Returns the state after one step's gradients: importance, and at every ``mask_interval`` steps which clusters stay.

        Importance of an entry is abs(parameter * gradient); a cluster's score is the mean over its A, plus that over its B, of
        mean importance times mean deviation. Scores of all sites compete, and a frozen cluster never comes back.
        """
        step = state["step"]
        active = (step >= self.init_warmup) & (step <= self.final_warmup)
        beta, gamma = self.asa_importance_beta, self.asa_uncertainty_beta

        def deviated(p: Tensor, g: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
            return torch.where(active, gamma * deviation + (1 - gamma) * ((p * g).abs() - mean).abs(), deviation)

        def meant(p: Tensor, g: Tensor, mean: Tensor) -> Tensor:
            return torch.where(active, beta * mean + (1 - beta) * (p * g).abs(), mean)

        frozen = self.asa_freeze(grads, state, adapter)
        deviation = tree_map(deviated, adapter.params, frozen, state["mean"], state["deviation"])
        mean = tree_map(meant, adapter.params, frozen, state["mean"])
        decides = active & (step % self.mask_interval == 0)
        kept = self._kept(mean, deviation, state["kept"], adapter, step)
        made = {p: torch.where(decides, kept[p], old) for p, old in state["kept"].items()}
        mean, deviation = (tree_map(lambda t: torch.where(decides, 0, t), tree) for tree in (mean, deviation))
        return {"step": step + 1, "mean": mean, "deviation": deviation, "kept": made}

    def asa_freeze(self, tree: Tree, state: Importance, adapter: Adapter) -> Tree:
        """Returns gradients, or steps, that are zero for the clusters that the schedule has frozen."""
        return self._where_kept(tree, tree_map(torch.zeros_like, tree), state, adapter)

    def asa_hold(self, moved: Adapter, state: Importance, adapter: Adapter) -> Adapter:
        """Returns a stepped adapter with frozen clusters as they were in ``adapter``.

        For optimizers whose momentum or weight decay moves what has no gradient.
        """
        return moved.replace(params=self._where_kept(moved.params, adapter.params, state, adapter))

    def budget(self, step: Tensor | int, count: int) -> Tensor:
        """Returns how many of the model's ``count`` clusters stay trained after a choice at a step."""
        first, last, least = self.init_warmup, self.final_warmup, self.asa_target_subspaces
        left = (1 - (torch.as_tensor(step) - first).double() / (last - first)).clamp(0, 1) ** self.asa_schedule_exponent
        return (least + (count - least) * left).floor().long().clamp(1, count)

    def _where_kept(self, tree: Tree, otherwise: Tree, state: Importance, adapter: Adapter) -> Tree:
        made: Tree = {}
        for path, leaves in tree.items():
            kept, cluster, other = state["kept"][path], adapter.consts[path]["cluster"], otherwise[path]
            a = torch.where(kept[..., None, None], leaves["A"], other["A"])
            made[path] = {"A": a, "B": torch.where(kept[cluster][..., None], leaves["B"], other["B"])}
        return made

    def _kept(self, mean: Tree, deviation: Tree, kept: Mapping[str, Tensor], adapter: Adapter, step: Tensor) -> Leaves:
        scores = {p: self._scores(mean[p], deviation[p], adapter.consts[p]) for p in mean}
        whole = torch.cat([torch.where(kept[p], s, -torch.inf) for p, s in scores.items()])
        limit = whole.sort(descending=True).values.take(self.budget(step, len(whole)) - 1)
        return {p: kept[p] & (s >= limit) for p, s in scores.items()}

    def _scores(self, mean: Leaves, deviation: Leaves, consts: Leaves) -> Tensor:
        """Returns the score of every cluster ``(K,)``; entries beyond a cluster's rank do not count."""
        ranks, cluster = consts["ranks"], consts["cluster"]
        a = (mean["A"] * deviation["A"]).sum((-2, -1)) / (ranks * mean["A"].shape[-1])
        rows = (mean["B"] * deviation["B"]).sum(-1)
        sizes = torch.zeros_like(a).index_add(0, cluster, torch.ones_like(rows))
        return a + torch.zeros_like(a).index_add(0, cluster, rows) / (ranks * sizes)
