r"""What inits of LoRA need of data: statistics of the inputs of layers, and gradients of their weights, as plain trees.

``calibrate`` streams batches through the base, whose weights show their inputs x (rows of X) on the way; no hook is set and
nothing outlives the call. It collects, by site,

.. math:: C = \frac{1}{n} \sum_{i=1}^n \tilde X_i^T \tilde X_i, \quad \tilde X_i = X_i / |\max X_i|

over the n meetings (CorDA), or the leading principal directions of all rows by incremental principal component analysis, until
they have settled (EVA). ``weight_gradients`` returns the mean gradient of a loss (LoRA-GA).

Imports batches, gradients, adapt, targets, functional, fold, lorainits.

References:
    Yang et al., CorDA, 2024, arXiv 2406.05223, section 3.2. Paischer et al., EVA, 2024, arXiv 2410.07170, algorithm 1.
    Ross et al., Incremental Learning for Robust Visual Tracking, 2008. Wang et al., LoRA-GA, 2024, arXiv 2407.05000.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from funcpeft import errors, targets
from funcpeft.adapt import Net
from funcpeft.batches import Batch, as_batch
from funcpeft.fold import FIRST, Folded, Layout
from funcpeft.functional import Model, Params
from funcpeft.gradients import value_and_grad
from funcpeft.lorainits import is_linear, shared_ranks
from funcpeft.method import Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Adapter, Tree, tree_map
from funcpeft.weights import Base, Site, wide

_CALIBRATE, _GRADIENTS = "calibrate", "weight_gradients"
#: All rows are those of one member: the weight meets them as they are, and shows them.
_ALONE = Layout(((1, 1),))


def calibrate(
    model: Model | Net,
    params: Params,
    batches: Iterable[Any],
    method: Method | None = None,
    *,
    target_modules: Any = "all-linear",
    inputs: Sequence[str] | None = None,
    mask: str | Callable[[Batch], Tensor | None] | None = "auto",
    settle: bool = True,
    limit: int = 1000,
    progress: bool | None = None,
) -> Tree:
    """Collects statistics of the inputs of linear layers, for ``net.init(params, seed, statistics=...)``.

    Args:
        model: The model, or a net, whose methods and sites are then taken.
        params: The base's leaves, dense or stored; not changed. The model runs without an adapter.
        batches: Mappings, tuples or tensors; of a tuple the model takes the first. For EVA they are read again and again, so
            an iterator is kept in memory.
        method: What the statistics are for: a ``LoRA`` that starts with ``"eva"`` or ``"corda"``. Without one, covariances.
        target_modules: Which layers, without a method.
        inputs: Names of the tensors of a batch that the model takes, by default all but ``"labels"``.
        mask: Which rows of inputs count: a function from a batch to a boolean tensor; ``"auto"``: those where
            ``attention_mask`` is not zero and, for EVA with ``use_label_mask``, ``labels`` are not ``label_mask_value``;
            ``None``: all.
        settle: For EVA, whether to go on until the directions that get a rank change by no more than cosine ``tau`` from one
            batch to the next; else every batch is read once.
        limit: Most batches that are read for that.
        progress: Whether to show a bar on stderr; by default on a terminal.

    Returns:
        By site path ``{"covariance": (in, in)}``, or ``{"components": (k, in), "singular": (k,), "explained": (k,)}``: the
        directions, their singular values, and the fractions of the variance along them.

    Raises:
        ImportError: If scikit-learn is not there, for EVA.
        TypeError: If the model, a batch or ``mask`` is of another kind.
        ValueError: If there is no batch, a layer is met by no input or by one that is not finite, a mask does not fit an
            input, no method needs statistics, or directions have not settled in time; the message names the site.

    Note:
        Layers with equal inputs in the first batch (queries, keys and values) share one analysis. Batches with fewer rows
        than directions are put together. A direction's sign is free, so its cosine is taken without it. Cost: the
        covariance of a layer has in^2 entries, and a step of the analysis decomposes a matrix of the rows of one batch.

    Example:
        >>> import torch
        >>> from funcpeft import LoRA, adapt, functionalize
        >>> model, params = functionalize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)))
        >>> net = adapt(model, LoRA(r=1, target_modules=["0", "1"], init_lora_weights="corda"))
        >>> batches = [torch.randn(6, 4) for _ in range(3)]
        >>> statistics = calibrate(net, params, batches, progress=False)
        >>> statistics["1"]["covariance"].shape
        torch.Size([8, 8])
        >>> net.init(params, seed=0, statistics=statistics)
        Adapter(21 trainable numbers at 2 paths)
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(errors.say(_CALIBRATE, "limit must be a positive int", repr(limit)))
    if mask not in ("auto", None) and not callable(mask):
        raise TypeError(errors.say(_CALIBRATE, "mask must be a function of a batch, 'auto' or None", repr(mask)))
    whole, chosen = _chosen(_CALIBRATE, model, method, target_modules)
    collected: list[tuple[Any, dict[str, Site]]] = [(m, sites) for m, sites in chosen if getattr(m, "statistic", "")]
    _require_batches(_CALIBRATE, batches)
    if not collected:
        found = ", ".join(f"{m.label} with {getattr(m, 'init_lora_weights', None)!r}" for m, _ in chosen)
        raise ValueError(errors.say(_CALIBRATE, "a method whose init needs statistics is required", found))
    if isinstance(batches, Iterator) and (len(collected) > 1 or collected[0][0].statistic == "components"):
        batches = list(batches)  # they are read more than once
    stream = _Stream(whole, params, inputs, mask, progress)
    statistics: Tree = {}
    for one, sites in collected:
        if one.statistic == "components":
            made = _components(stream, sites, batches, one, settle, limit)
        else:
            made = _covariances(stream, sites, batches, one)
        for path, entries in made.items():
            statistics[path] = {**statistics.get(path, {}), **entries}
    return statistics


def weight_gradients(
    model: Model | Net,
    params: Params,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    method: Method | None = None,
    *,
    target_modules: Any = "all-linear",
    inputs: Sequence[str] | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Returns the mean gradient of a loss in the weights of linear layers, for ``net.init(params, seed, gradients=...)``.

    Args:
        model: The model, or a net, whose sites are then taken.
        params: The base's leaves, those of the targets dense; not changed. The model runs in eval mode, without an adapter.
        loss_fn: ``loss_fn(output, batch)`` returns the 0-d loss of a batch.
        batches: Mappings, tuples or tensors; of a tuple the model takes the first.
        method: Whose targets are taken.
        target_modules: Which layers, without a method.
        inputs: Names of the tensors of a batch that the model takes, by default all but ``"labels"``.
        progress: Whether to show a bar on stderr; by default on a terminal.

    Returns:
        By site path the matrix ``(out, in)``, in float32 or wider.

    Raises:
        TypeError: If a weight is not dense, or the model, a batch or the loss is of another kind.
        ValueError: If there is no batch, the loss is not a 0-d tensor, or a gradient is not finite.

    Example:
        >>> import torch
        >>> from funcpeft import functionalize
        >>> model, params = functionalize(torch.nn.Sequential(torch.nn.Linear(4, 2)))
        >>> batches = [(torch.ones(3, 4), torch.zeros(3, 2))]
        >>> found = weight_gradients(model, params, lambda out, batch: out.sum(), batches, target_modules=["0"], progress=False)
        >>> found["0"]
        tensor([[3., 3., 3., 3.],
                [3., 3., 3., 3.]])
    """
    whole, chosen = _chosen(_GRADIENTS, model, method, target_modules)
    _require_batches(_GRADIENTS, batches)
    sites = {path: site for _, own in chosen for path, site in own.items()}
    leaves = {site.weight: {"weight": _dense(whole, params, site)} for site in sites.values()}
    untied = {a: params[key] for a, key in whole.ties.items() if a not in params and (a in leaves or key in leaves)}

    def loss(weights: Adapter, batch: Batch) -> Tensor:
        now = {key: one["weight"] for key, one in weights.params.items()}
        args, kwargs = _arguments(_GRADIENTS, batch, inputs)
        return loss_fn(whole({**params, **untied, **now}, *args, **kwargs), batch)

    total, count, f = None, 0, value_and_grad(loss)
    for given in tqdm(batches, desc=_GRADIENTS, unit="batch", disable=None if progress is None else not progress):
        grads = tree_map(wide, f(Adapter(leaves), as_batch(_GRADIENTS, given))[1])
        total = grads if total is None else tree_map(torch.add, total, grads)
        count += 1
    if total is None:
        raise ValueError(errors.say(_GRADIENTS, "at least one batch is required", "none"))
    for path, site in sites.items():
        if not total[site.weight]["weight"].isfinite().all():
            raise ValueError(errors.say(f"{_GRADIENTS} at {path!r}", "gradients must be finite", "NaN or infinity"))
    return {path: site.kind.matrix(total[site.weight]["weight"] / count).contiguous() for path, site in sites.items()}


# -- the model that shows its inputs -----------------------------------------------------------------------------------------


def _chosen(where: str, model: Any, method: Method | None, rule: Any) -> tuple[Model, list[tuple[Method, dict[str, Site]]]]:
    """Returns the model, and the methods with the linear layers that they target."""
    if isinstance(model, Net):
        if method is not None:
            raise ValueError(errors.say(where, "a net has its methods", method.label, "pass net.model, or leave method out"))
        pairs = [(e.method, e.sites) for e in model.entries if e.role == "method"]
        whole = model.model
    elif isinstance(model, Model):
        plain = LoRA(r=1, target_modules=rule, init_lora_weights="corda" if where == _CALIBRATE else "pissa")
        own = plain if method is None else method
        pairs, whole = [(own, targets.sites_of(model, own))], model
    else:
        remedy = "call functionalize(module) first"
        raise TypeError(errors.say(where, "a Model or a Net is required", type(model).__name__, remedy))
    linear = [
        (m, {p: s for p, s in sites.items() if is_linear(Base(s, None)) and (s.met or where != _CALIBRATE)})
        for m, sites in pairs
    ]
    return whole, linear


def _require_batches(where: str, batches: Any) -> None:
    if not isinstance(batches, Iterable) or isinstance(batches, str | Mapping | Tensor):
        remedy = "put a single batch in a list"
        raise TypeError(errors.say(where, "batches must be a list or an iterator of them", type(batches).__name__, remedy))


def _dense(model: Model, params: Params, site: Site) -> Tensor:
    leaf = params.get(site.weight, params.get(model.ties.get(site.weight, site.weight)))
    if not isinstance(leaf, Tensor):
        rule, remedy = "gradients are those of dense weights", "call dequantize first"
        raise TypeError(errors.say(f"{_GRADIENTS} at {site.path!r}", rule, type(leaf).__name__, remedy))
    return leaf


def _arguments(where: str, batch: Batch, inputs: Sequence[str] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns what the model takes of a batch."""
    if not isinstance(batch, dict):
        return (batch[:1] if isinstance(batch, tuple) else (batch,)), {}
    names = [n for n in batch if n != "labels"] if inputs is None else inputs
    for name in names:
        if name not in batch:
            hint = errors.nearest(name, map(str, batch))
            raise errors.NameMissingError(errors.say(where, "inputs must be names of a batch's tensors", repr(name), hint))
    return (), {n: batch[n] for n in names}


@dataclass(frozen=True)
class _Stream:
    """Runs the base on batches, and shows the rows that count of the inputs of some layers."""

    model: Model
    params: Params
    inputs: Sequence[str] | None
    mask: Any
    progress: bool | None

    def bar(self, batches: Iterable[Any], total: int | None = None) -> Any:
        """Returns a bar over batches."""
        hidden = None if self.progress is None else not self.progress
        return tqdm(batches, desc=_CALIBRATE, unit="batch", total=total, disable=hidden)

    def show(self, given: Any, sites: Mapping[str, Site], method: Method, see: Callable[[str, Tensor], None]) -> None:
        """Calls the model, and ``see`` with path and rows at every meeting of these layers with an input."""
        batch = as_batch(_CALIBRATE, given)
        keep = self._keep(batch, method)

        def observe(path: str, x: Tensor | None) -> None:
            if x is not None:
                see(path, _rows(path, x.detach(), keep))

        watched = dict(self.params)
        for site in sites.values():
            weight = watched.get(site.weight, watched.get(self.model.ties.get(site.weight, site.weight)))
            for alias, key in self.model.ties.items():  # other readers of a tied tensor are not watched
                if key == site.weight:
                    watched.setdefault(alias, weight)
            watched[site.weight] = Folded((weight,), weight, _ALONE, FIRST, observe)
        args, kwargs = _arguments(_CALIBRATE, batch, self.inputs)
        with torch.no_grad():
            self.model(watched, *args, **kwargs)

    def _keep(self, batch: Batch, method: Method) -> Tensor | None:
        if self.mask != "auto":
            found = None if self.mask is None else self.mask(batch)
            if found is not None and not isinstance(found, Tensor):
                raise TypeError(errors.say(_CALIBRATE, "mask must return a boolean tensor or None", type(found).__name__))
            return found
        if not isinstance(batch, dict):
            return None
        keep = batch["attention_mask"] != 0 if "attention_mask" in batch else None
        config = (getattr(method, "eva_config", None) or {}) if getattr(method, "statistic", "") == "components" else {}
        if config.get("use_label_mask") and "labels" in batch:
            labelled = batch["labels"] != config["label_mask_value"]
            keep = labelled if keep is None else keep & labelled
        return keep


def _rows(path: str, x: Tensor, keep: Tensor | None) -> Tensor:
    """Returns the rows of an input that count: ``(rows, in)``."""
    rows = x.reshape(-1, x.shape[-1])
    if keep is None:
        return rows
    if keep.numel() != len(rows):
        rule, remedy = f"a mask of shape {tuple(keep.shape)} must have one entry per row of the input", "pass mask=None"
        raise ValueError(errors.say(f"{_CALIBRATE} at {path!r}", rule, f"shape {tuple(x.shape)}", remedy))
    return rows[keep.reshape(-1).to(torch.bool)]


def _require_finite(path: str, rows: Tensor, rule: str = "an input must be finite") -> None:
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(errors.say(f"{_CALIBRATE} at {path!r}", rule, "NaN or infinity"))


def _require_met(sites: Mapping[str, Site], met: Iterable[str], count: int) -> None:
    if not count:
        raise ValueError(errors.say(_CALIBRATE, "at least one batch is required", "none"))
    unmet = sorted(sites.keys() - set(met))
    if unmet:
        rule, remedy = "every layer must be met by an input", "add batches, or leave these layers out"
        raise ValueError(errors.say(_CALIBRATE, rule, f"none at {errors.listed(unmet)}", remedy))


# -- covariances -------------------------------------------------------------------------------------------------------------


def _covariances(stream: _Stream, sites: Mapping[str, Site], batches: Iterable[Any], method: Method) -> Tree:
    config = getattr(method, "corda_config", None) or {}
    total: dict[str, Tensor] = {}
    meetings: dict[str, int] = {}

    def see(path: str, rows: Tensor) -> None:
        if not len(rows):
            return
        x = rows if config.get("use_float16_for_covariance") else wide(rows)
        x = x / x.max().abs()
        _require_finite(path, x, "an input must be finite, and its largest entry not zero")
        total[path] = x.T @ x + total[path] if path in total else x.T @ x
        meetings[path] = meetings.get(path, 0) + 1

    count = 0
    for batch in stream.bar(batches):
        stream.show(batch, sites, method, see)
        count += 1
    _require_met(sites, total, count)
    return {path: {"covariance": t / meetings[path]} for path, t in total.items()}


# -- principal directions ----------------------------------------------------------------------------------------------------


class _Analysis:
    """The leading principal directions of the rows seen so far, and how far they moved at the last step."""

    def __init__(self, count: int) -> None:
        try:
            from sklearn.decomposition import IncrementalPCA
        except ImportError as e:
            rule, remedy = "EVA's directions need scikit-learn", "pip install 'funcpeft[eva]'"
            raise ImportError(errors.say(_CALIBRATE, rule, None, remedy)) from e
        self.pca: Any = IncrementalPCA(n_components=count)
        self.count, self.waiting = count, []
        self.cosines, self.dtype = torch.zeros(count), torch.float32

    @property
    def found(self) -> bool:
        """Whether there are directions."""
        return hasattr(self.pca, "components_")

    def add(self, rows: Tensor) -> None:
        """Takes further rows; they wait until there are as many as directions."""
        import numpy as np

        self.waiting = [*self.waiting, wide(rows).cpu()]
        self.dtype = self.waiting[-1].dtype  # scikit-learn widens what it has seen
        if sum(map(len, self.waiting)) < self.count:
            return
        before = torch.from_numpy(self.pca.components_) if self.found else None
        with np.errstate(all="ignore"):  # of inputs without variance
            self.pca.partial_fit(torch.cat(self.waiting).numpy())
        self.waiting = []
        if before is not None:
            self.cosines = (torch.from_numpy(self.pca.components_) * before).sum(1).abs()

    def entries(self, device: torch.device) -> dict[str, Tensor]:
        """Returns directions, singular values and fractions of the variance."""
        names = {"components": "components_", "singular": "singular_values_", "explained": "explained_variance_ratio_"}
        return {
            n: torch.nan_to_num(torch.tensor(getattr(self.pca, a), dtype=self.dtype, device=device)) for n, a in names.items()
        }


def _components(
    stream: _Stream, sites: Mapping[str, Site], batches: Iterable[Any], method: Any, settle: bool, limit: int
) -> Tree:
    config, ranks = method.eva_config, {path: method.rank(path) for path in sites}
    first = next(iter(batches), None)
    leaders = {} if first is None else _leaders(stream, sites, first, method)
    _require_met(sites, leaders, 0 if first is None else 1)
    groups = {leader: [p for p, one in leaders.items() if one == leader] for leader in leaders.values()}
    most = {path: min(round(r * config["rho"]), _width(sites[path])) for path, r in ranks.items()}
    found = {leader: _Analysis(max(most[p] for p in group)) for leader, group in groups.items()}

    def see(path: str, rows: Tensor) -> None:
        _require_finite(path, rows)
        found[path].add(rows)

    open_, bar = set(found), stream.bar(_cycled(batches, limit) if settle else batches)
    for batch in bar:
        stream.show(batch, {p: sites[p] for p in open_}, method, see)
        if settle and all(one.found for one in found.values()):
            explained = {p: found[leader].entries(torch.device("cpu"))["explained"] for p, leader in leaders.items()}
            shared = shared_ranks(explained, ranks, config["rho"])
            needed = {leader: max(shared[p] for p in group) for leader, group in groups.items()}
            open_ = {p for p, one in found.items() if not bool((one.cosines[: needed[p]] >= config["tau"]).all())}
            bar.set_postfix_str(f"{len(found) - len(open_)}/{len(found)} settled", refresh=False)
            if not open_:
                break
    few = [p for p, one in found.items() if not one.found]
    if few:
        rule, remedy = "a layer needs as many rows of inputs as directions", "add batches, or lower r or eva_config's rho"
        raise ValueError(errors.say(_CALIBRATE, rule, f"fewer at {errors.listed(few)}", remedy))
    if settle and open_:
        rule = f"directions must settle to cosine {config['tau']} within {limit} batches"
        remedy = "raise limit, lower eva_config's tau, or pass settle=False"
        raise ValueError(errors.say(_CALIBRATE, rule, f"others at {errors.listed(sorted(open_))}", remedy))
    return {path: found[leaders[path]].entries(_device(stream.params, site)) for path, site in sites.items()}


def _device(params: Params, site: Site) -> torch.device:
    leaf = params.get(site.weight)
    return torch.device("cpu") if leaf is None else leaf.device


def _width(site: Site) -> int:
    return site.kind.matrix(torch.empty(site.shape, device="meta")).shape[-1]


def _cycled(batches: Iterable[Any], limit: int) -> Iterator[Any]:
    """Yields batches over and over, at most so many."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), limit)


def _leaders(stream: _Stream, sites: Mapping[str, Site], batch: Any, method: Method) -> dict[str, str]:
    """Returns, by site, the first site whose inputs in a batch are the same."""
    marks: dict[str, bytes] = {}

    def see(path: str, rows: Tensor) -> None:
        _require_finite(path, rows)
        values = wide(rows).cpu().contiguous().numpy()
        marks.setdefault(path, hashlib.blake2b(repr(values.shape).encode() + values.tobytes()).digest())

    stream.show(batch, sites, method, see)
    first: dict[bytes, str] = {}
    return {path: first.setdefault(marks[path], path) for path in sites if path in marks}
