r"""LoRA: low-rank adaptation.

.. math:: W' = W + s B A, \quad s = \alpha / r \text{ or } \alpha / \sqrt r

A (r, in), B (out, r); s: scaling, with the square root under ``use_rslora``. At leading axes (experts) A is (E, r, in)
and B (E, out, r). Where A and B start from factors of W or of data whose product is not zero (PiSSA, OLoRA, CorDA, LoRA-GA),
the update is measured from those first factors, kept in ``consts``, so the base stays as it is: W' = W + s (B A - B0 A0).
LoftQ starts on a quantized base Q from the factors of what quantization lost, W - Q, so that Q + s B A is near the original
W; peft 0.21 leaves out s, right for s = 1 only. ``funcpeft.lorainits`` has the formulas.

A file of peft holds A and B. First factors that do not follow from W alone are written into them, as plain LoRA of twice the
rank: [B, -B0] [A; A0]. A site to which EVA gives no rank is written as a pair of zeros, which stays zero in training.

References:
    Hu et al., LoRA, 2021, arXiv 2106.09685, eq. (3). Kalajdzievski, rsLoRA, 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, lorainits, lowrank, rng
from funcpeft.context import Context
from funcpeft.method import Additive, Factor, FrozenDict, Method, by_pattern
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class LoRA(Additive):
    """Low-rank adaptation.

    Args:
        r: Rank of the update.
        lora_alpha: Scaling is ``lora_alpha / r``.
        lora_dropout: Probability with which elements of the adapter's input are dropped in training.
        use_rslora: Whether scaling is ``lora_alpha / sqrt(r)``.
        rank_pattern: Ranks by pattern of the module path; the first that matches wins.
        alpha_pattern: Values of ``lora_alpha`` by pattern.
        init_lora_weights: How A and B start. From draws: ``True`` (A uniform, B zero), ``False`` (both uniform),
            ``"gaussian"``, ``"orthogonal"``. From the weight: ``"pissa"``, ``"pissa_niter_N"`` (by N iterations of a
            randomised decomposition), ``"olora"``, ``"mica"`` (B frozen), and ``"loftq"``, which needs the dense params:
            ``net.init(quantized, seed, weights=dense)``. From data: ``"eva"`` and ``"corda"`` need ``statistics=`` of
            ``funcpeft.calibrate``, ``"lora_ga"`` needs ``gradients=`` of ``funcpeft.weight_gradients``. None changes the base.
        eva_config: Options of ``"eva"``, which shares the sum of all ranks out among the sites: ``rho`` (largest rank of a
            site, in units of its own), ``tau`` (cosine from which a direction counts as settled), ``use_label_mask`` and
            ``label_mask_value`` (tokens left out), ``whiten`` (whether A is divided by the root of the singular values),
            ``adjust_scaling_factors`` (whether alpha grows with the rank). Layers that are not linear start as with ``True``.
        corda_config: Options of ``"corda"``: ``corda_method`` (``"ipm"`` trains the parts of W that matter most for the
            inputs, ``"kpm"`` the least), ``use_float16_for_covariance`` (covariances in the inputs' dtype). The files and
            switches of peft's have no meaning here: a tree of statistics is saved as any other.
        lora_ga_config: Options of ``"lora_ga"``: ``direction``, ``scale`` and ``stable_gamma``.
        lora_bias: Whether the update has a bias of its own, scaled as the update is.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"lora_only"`` those of the targets.
        target_parameters: Names or suffixes of matrix parameters to adapt that no layer meets, such as fused experts.
        trainable_token_indices: Rows of the input embedding to train beside, or ``{module name: rows}``.
        ensure_weight_tying: Whether what acts on a tied embedding acts on its head too, by the same leaves; likewise for
            ``modules_to_save``.
        layer_replication: The ``[start, end)`` ranges of which ``replicate_layers`` made the model; checked, not done here.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = FrozenDict()
    alpha_pattern: Mapping[str, float] = FrozenDict()
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    bias: str = "none"
    target_parameters: tuple[str, ...] | list[str] | None = None
    trainable_token_indices: tuple[int, ...] | list[int] | Mapping[str, Any] | None = None
    ensure_weight_tying: bool = False
    layer_replication: tuple[tuple[int, int], ...] | list[tuple[int, int]] | None = None
    eva_config: Mapping[str, Any] | None = None
    corda_config: Mapping[str, Any] | None = None
    lora_ga_config: Mapping[str, Any] | None = None

    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv", "embedding", "raw"})
    keys: ClassVar[dict[str, Any]] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    }
    peft_fixed: ClassVar[dict[str, Any]] = {
        "fan_in_fan_out": False,
        "use_dora": False,
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "use_qalora": False,
    }
    size: ClassVar[str] = "r * (in_ + out)"
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "A0", "B0", "bias", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1, "A0": -2, "B0": -1}
    weight_free: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("weights", "statistics", "gradients")
    bias_only: ClassVar[str] = "lora_only"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require(all(v > 0 for v in self.rank_pattern.values()), "rank_pattern", "positive ranks", dict(self.rank_pattern))
        self.require(0 <= self.lora_dropout < 1, "lora_dropout", "in [0, 1)", self.lora_dropout)
        self.require(self.bias in ("none", "all", self.bias_only), "bias", f"'none', 'all' or {self.bias_only!r}", self.bias)
        self._settle_init()
        fits = not self.lora_bias or isinstance(self.init_lora_weights, bool)
        self.require(fits, "lora_bias", "False with this init_lora_weights", self.init_lora_weights, "use True or False")

    def _settle_init(self) -> None:
        """Checks the init and its options, and fills those that are left out."""
        init = self.init_lora_weights.lower() if isinstance(self.init_lora_weights, str) else self.init_lora_weights
        if lorainits.key_of(init) is None:
            raise ValueError(errors.one_of(self.label, "init_lora_weights", self.init_lora_weights, lorainits.TABLE))
        object.__setattr__(self, "init_lora_weights", init)
        alphas, measured = (self.lora_alpha, *self.alpha_pattern.values()), lorainits.row_of(init).measured
        self.require(not measured or min(alphas) > 0, "lora_alpha", f"positive with init {init!r}", min(alphas))
        alone = init != "mica" or not self.peft_switch
        self.require(alone, "init_lora_weights", "another one than 'mica', a variant by itself", init, "use LoRA, or True")
        for name in lorainits.OPTIONS:
            given = getattr(self, f"{name}_config")
            if given is not None or init == name:
                object.__setattr__(self, f"{name}_config", lorainits.options(self.label, name, given))
        files = [v for k, v in (self.corda_config or {}).items() if k.endswith("_file") and v is not None]
        remedy = "save the tree that calibrate returns, and pass it to net.init"
        self.require(init != "corda" or not files, "corda_config", "without files", files, remedy)

    @property
    def statistic(self) -> str:
        """What ``funcpeft.calibrate`` collects for the init at every site, ``""`` if it needs nothing."""
        row = lorainits.row_of(self.init_lora_weights)
        return row.entry if row.need == "statistics" else ""

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (
            cls(r=2, lora_alpha=3, lora_dropout=0.25),
            cls(r=4, use_rslora=True, init_lora_weights="eva", eva_config={"rho": 1.0}),
            cls(r=1, init_lora_weights="mica"),
            cls(r=1, lora_alpha=3, init_lora_weights="pissa"),
            cls(r=2, lora_alpha=1, init_lora_weights="olora"),
            cls(r=3, lora_bias=True),
            cls(r=1, rank_pattern={"second": 3}, alpha_pattern={"first": 5}),
        )

    def rank(self, path: str) -> int:
        """Returns the rank at a site."""
        return by_pattern(self.rank_pattern, path, self.r)

    def scaling(self, path: str) -> float:
        """Returns the scaling at a site."""
        r, alpha = self.rank(path), by_pattern(self.alpha_pattern, path, self.lora_alpha)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def check_site(self, base: Base) -> None:
        r, (out, in_) = self.rank(base.path), base.shape[-2:]
        kind = base.kind.name
        self.require_at(
            base.kind.groups == 1,
            base,
            "a grouped convolution has no merged form: groups must be 1",
            base.kind.groups,
            "leave the site out",
        )
        self._check_init(base, r, min(out, in_))
        if self.lora_bias:
            self.require_at(kind in ("linear", "transposed", "conv"), base, "lora_bias takes layers with a bias", kind)
            self.require_at(
                base.site.bias is not None, base, "lora_bias needs a layer that has a bias", None, "leave the site out"
            )
        if not base.met or base.takes_ids:
            self.require_at(
                not self.lora_dropout, base, "lora_dropout must be 0 where no float input meets the weight", self.lora_dropout
            )

    def _check_init(self, base: Base, r: int, least: int) -> None:
        init, row = self.init_lora_weights, lorainits.row_of(self.init_lora_weights)
        if init == "orthogonal":
            self.require_at(r % 2 == 0, base, "init 'orthogonal' needs an even rank", r)
        if row.kinds is not None:
            takes = f"init {init!r} takes linear layers" + (" and embeddings" if "embedding" in row.kinds else "")
            self.require_at(base.kind.name in row.kinds, base, takes, base.kind.name, "use init_lora_weights=True")
        if row.entry == "covariance":
            rule = "init 'corda' takes layers that meet their inputs themselves"
            self.require_at(base.met, base, rule, None, "leave the site out")
        if row.share:
            limit = "min(out, in)" if row.share == 1 else f"min(out, in) / {row.share}"
            self.require_at(r * row.share <= least, base, f"rank must be at most {limit} = {least // row.share}", r)

    def completed(self, needs: Mapping[str, Any]) -> Self:
        if not lorainits.row_of(self.init_lora_weights).rebuilt:
            rule = f"init {self.init_lora_weights!r} measures the update from first factors, which its file does not hold"
            remedy = "let peft write it with path_initial_model_for_weight_conversion"
            raise errors.CheckpointError(errors.say(self.label, rule, None, remedy))
        return self

    def as_written(self, shapes: Mapping[str, torch.Size]) -> Self:
        """Takes ranks from the tensors where peft has cut factors of the weight short: one has no more than min(out, in)."""
        ranks, alphas = dict[str, int](), dict[str, float]()
        for key, shape in shapes.items() if lorainits.row_of(self.init_lora_weights).share else ():
            path, end, _ = key.partition(".lora_A.weight")
            if end and shape[0] < self.rank(path):
                ranks[path] = shape[0]
                alphas[path] = self.scaling(path) * (math.sqrt(shape[0]) if self.use_rslora else shape[0])
        if not ranks:
            return self
        old = {key: value for key, value in self.rank_pattern.items() if key not in ranks}  # the first key that matches wins
        older = {key: value for key, value in self.alpha_pattern.items() if key not in alphas}
        return replace(self, rank_pattern={**ranks, **old}, alpha_pattern={**alphas, **older})

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        name, row = self.init_lora_weights, lorainits.row_of(self.init_lora_weights)
        reads, values = bool(needs.get("inference_mode")), any(base.device.type != "meta" for base in sites.values())
        if row.need and values and not (reads and needs.get(row.need) is None):
            ranks = {path: self.rank(path) for path in sites}
            sites = lorainits.informed(self.label, name, sites, ranks, needs, self.eva_config)
        return super().init(sites, seed=seed, **needs)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        row = lorainits.row_of(self.init_lora_weights)
        given: Mapping[str, Any] = getattr(base, "given", {})
        r = given.get("rank", self.rank(base.path))
        s = self.scaling(base.path) if r == self.rank(base.path) else self._scaling_at(base.path, r)
        consts: Leaves = {"scaling": torch.tensor(s, dtype=torch.float64), "rank": torch.tensor(r)}
        params = self._draw(base, r, s, gen)
        if row.measured:
            consts |= {"A0": params["A"].clone(), "B0": params["B"].clone()}
        if not row.trains_b:
            consts["B"] = params.pop("B")
        return params, consts

    def _scaling_at(self, path: str, r: int) -> float:
        """Returns the scaling at a site with a rank that EVA gave it; alpha may grow with the rank."""
        assert self.eva_config is not None
        part = max(r, 1) / self.rank(path)
        grown = part if self.eva_config["adjust_scaling_factors"] else 1.0
        return self.scaling(path) * grown / (math.sqrt(part) if self.use_rslora else part)

    def _draw(self, base: Base, r: int, s: float, gen: Any) -> Leaves:
        *lead, out, in_ = base.shape
        if base.takes_ids:
            return self._draw_embedding(base, r, s, gen)
        many = math.prod(lead)
        kernel = tuple(base.site.shape[2:]) if base.kind.name == "conv" else ()
        shape_a, shape_b = (many * r, in_ // math.prod(kernel), *kernel), (out, many * r)
        a, b = rng.kaiming(shape_a, gen), rng.kaiming(shape_b, gen)  # as the layers that peft makes and then resets
        leaves: Leaves = {}
        if self.lora_bias:
            leaves["bias"] = rng.uniform((out,), gen, 1 / math.sqrt(many * r))
            if self.init_lora_weights is True:
                leaves = {k: torch.zeros_like(v) for k, v in leaves.items()}
        a, b = self._start(base, r, s, gen, a, b)
        a = a.flatten(1)
        if lead:  # peft keeps A expert-major and B rank-major in two flat matrices
            a, b = a.reshape(*lead, r, in_), b.reshape(out, r, many).permute(2, 0, 1).reshape(*lead, out, r)
        return {"A": a.contiguous(), "B": b.contiguous(), **leaves}

    def _draw_embedding(self, base: Base, r: int, s: float, gen: Any) -> Leaves:
        dim, vocab = base.shape
        a, b = rng.randn((r, vocab), gen), rng.randn((dim, r), gen)
        if not lorainits.row_of(self.init_lora_weights).trains_b:
            a, b = self._start(base, r, s, gen, a, b)
        elif self.init_lora_weights is not False:
            a, b = torch.zeros_like(a), rng.normal((dim, r), gen)
        return {"A": a, "B": b}

    def _start(self, base: Base, r: int, s: float, gen: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first factors, given those that a layer of torch draws; without the data of an init, just these."""
        name, given = self.init_lora_weights, getattr(base, "given", {})
        config = getattr(self, f"{name}_config", None) or lorainits.options_in(name)
        return lorainits.row_of(name).factors(lorainits.Start(base, r, s, gen, a, b, given, config))

    def sample_needs(self, sites: Mapping[str, Base], seed: int) -> dict[str, Any]:
        return lorainits.samples(self.init_lora_weights, sites, seed)

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        update = leaves["B"] @ leaves["A"]
        if "A0" in leaves:
            update = update - leaves["B0"] @ leaves["A0"]
        return leaves["scaling"] * update

    def product(self, leaves: Leaves, base: Base, x: Tensor) -> Tensor:
        """Computes ``x`` times the update, factor by factor."""
        y = base.over_out(base.map(x, leaves["A"]), lambda h: F.linear(h, leaves["B"], leaves.get("bias")))
        if "A0" in leaves:
            y = y - base.over_out(base.map(x, leaves["A0"]), lambda h: F.linear(h, leaves["B0"]))
        return leaves["scaling"] * y

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        dropped = x if base.takes_ids else context.dropout(x, self.lora_dropout)
        return base(x) + self.product(leaves, base, dropped)

    def apply_rows(self, groups: Sequence[tuple[Leaves, Context]], base: Base, x: Tensor, layout: Any) -> Tensor:
        """Sums the base's output and the members' updates by batched products."""
        first, context = groups[0]
        kind, a, b = base.site.kind, first["A"], first["B"]
        lean = kind.name in ("linear", "transposed") and "A0" not in first and "bias" not in first
        if not lean or (context.training and self.lora_dropout):
            return super().apply_rows(groups, base, x, layout)
        updates = [(leaves["A"], leaves["B"], leaves["scaling"]) for leaves, _ in groups]
        stored = base.stored
        if stored is not None and lowrank.fits(x, stored[0], a, b):
            rows, sizes = self._rows(x, layout)
            y = lowrank.low_rank(rows, kind.matrix(stored[0]), stored[1], updates, sizes)
            return y if rows is x else y.view(*x.shape[:-1], y.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        y = base(x)
        parts = layout.cut(y.reshape(-1, y.shape[-1]), 0)
        for i, ((a, b, s), x_) in enumerate(zip(updates, layout.cut(rows, 0), strict=False)):
            hidden = (torch.bmm(a, x_.to(a.dtype).mT) * s.to(b.dtype).view(-1, 1, 1)).mT
            same = parts[i].dtype == b.dtype
            parts[i] = torch.baddbmm(parts[i], hidden, b.mT) if same else parts[i] + torch.bmm(hidden, b.mT)
        if layout.rest:
            parts[-1] = parts[-1].to(parts[0].dtype)
        return layout.joined(parts, 0).view(y.shape)

    def _rows(self, x: Tensor, layout: Any) -> tuple[Tensor, Any]:
        """Returns inputs and group sizes as ``lowrank`` takes them."""
        if layout.single:
            n = layout.groups[0][0]
            return x if x.ndim == 3 and x.shape[0] == n else x.reshape(n, -1, x.shape[-1]), layout.groups
        rows = x.reshape(-1, x.shape[-1])
        return rows, tuple([(n, count * (rows.shape[0] // layout.rows)) for n, count in layout.groups])

    def across_tie(self, leaves: Leaves, site: Base, other: Base) -> Leaves:
        if site.takes_ids == other.takes_ids:
            return leaves
        return {**leaves, "A": leaves["B"].mT, "B": leaves["A"].mT}  # the head's matrix is the embedding's transpose

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return self._shift(leaves, base, 1)

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        return self._shift(leaves, base, -1)

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        if getattr(base.kind, "scale_grad_by_freq", False):  # it counts ids of all examples together
            return {}
        a, b = leaves["A"], leaves["B"]
        dropped = x if base.takes_ids else context.dropout(x, self.lora_dropout)
        g = (leaves["scaling"] * base.features_last(grad_out)).to(b.dtype)
        low, met = g @ b, base.columns(dropped, a)
        if (padding := getattr(base.kind, "padding_idx", None)) is not None:  # the layer gives its row no gradient
            low = torch.where((x == padding)[..., None], 0, low)
        return {"A": (low, met), "B": (g, base.features_last(base.map(dropped, a))), "bias": g}

    def _shift(self, leaves: Leaves, base: Base, sign: int) -> Base:
        bias = base.bias
        if "bias" in leaves and bias is not None:
            bias = bias + sign * leaves["scaling"] * leaves["bias"]
        return base.replace(weight=base.weight + sign * self.delta(leaves, base), bias=bias)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        a, b = lorainits.in_file(self.init_lora_weights, leaves)
        if a.ndim == 3:  # experts: A expert-major, B rank-major, each in one flat matrix
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        elif base.kind.name == "conv":
            kernel = base.site.shape[2:]
            a, b = a.reshape(a.shape[0], -1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        return super().to_peft(base, {**leaves, "A": a, "B": b})

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        assert base is not None
        leaves = super().from_peft(base, tensors)
        a, b = leaves["A"].flatten(1), leaves["B"].flatten(1)
        if len(base.shape) == 3:
            many = base.shape[0]
            a, b = a.reshape(many, -1, a.shape[1]), b.reshape(b.shape[0], -1, many).permute(2, 0, 1)
        return {**leaves, "A": a.contiguous(), "B": b.contiguous()}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Derives ranks and alphas from the leaves; patterns are whole paths, whose meaning does not depend on order."""
        ranks = {p: lorainits.in_file(self.init_lora_weights, t)[0].shape[-2] for p, t in leaves.items() if "A" in t}
        alphas = {p: float(leaves[p]["scaling"]) * (math.sqrt(r) if self.use_rslora else r) for p, r in ranks.items()}
        config = super().to_peft_config(leaves)
        r = _commonest(ranks.values())
        alpha = _commonest(_rounded(a) for a in alphas.values())
        if not lorainits.row_of(self.init_lora_weights).kept:  # the leaves hold all
            config |= {"init_lora_weights": True, **dict.fromkeys((f"{n}_config" for n in lorainits.OPTIONS), None)}
        return {
            **config,
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {p: n for p, n in ranks.items() if n != r},
            "alpha_pattern": {p: _rounded(a) for p, a in alphas.items() if _rounded(a) != alpha},
        }


def _rounded(alpha: float) -> float:
    """Undoes the rounding of alpha / r where alpha was a short decimal."""
    short = float(f"{alpha:.6g}")
    return int(short) if short.is_integer() else short


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
