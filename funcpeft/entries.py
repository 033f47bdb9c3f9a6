"""Entries: the methods of a net with their sites, and what an adapter for them must look like.

A method's fields for whole modules, biases and tokens become further entries. Imports targets, facts, sitetable, methods that
others are desugared to, weights, tree, errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from funcpeft import errors, targets
from funcpeft.context import Context
from funcpeft.facts import ModelFacts
from funcpeft.functional import Model
from funcpeft.method import Method
from funcpeft.methods.full import Full
from funcpeft.methods.trainabletokens import TrainableTokens
from funcpeft.sitetable import shapes_of
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base, Site

if TYPE_CHECKING:
    from funcpeft.adapt import Net


@dataclass(frozen=True, eq=False)
class Entry:
    """One method of a net with its sites; ``role`` says which field of another method it was made from, if any."""

    method: Method
    sites: dict[str, Site]
    role: str = "method"

    #: Scopes of the shared leaves of every site, and all of them; those of a method that wraps the call are at ``""``.
    scopes: Mapping[str, tuple[str, ...]] = field(init=False)
    shared: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        scopes = self.method.scopes({p: Base(s, targets.shape_only(s)) for p, s in self.sites.items()})
        shared = {s for p in self.sites for s in scopes.get(p, ())} | ({""} if self.method.wraps else set())
        object.__setattr__(self, "scopes", scopes)
        object.__setattr__(self, "shared", frozenset(shared))

    def leaves(self, adapter: Adapter, path: str) -> Leaves:
        """Returns an adapter's leaves at a site, those of its scopes included."""
        found: Leaves = {}
        for scope in self.scopes.get(path, ()):
            found |= adapter.leaves(scope)
        return found | adapter.leaves(path)


def require_alive(entries: Sequence[Entry]) -> None:
    """Raises ``ValueError`` where a weight that one method adapts is replaced whole by a later one."""
    adapted: dict[str, Method] = {}
    for entry in entries:
        for site in entry.sites.values():
            if entry.method.takes_any and site.weight in adapted and not adapted[site.weight].takes_any:
                before = adapted[site.weight].label
                rule = f"must not replace the weight that {before} adapts before it"
                raise ValueError(
                    errors.say(f"{entry.method.label} at {site.path!r}", rule, None, "put it first, or leave the site out")
                )
            adapted[site.weight] = entry.method


def entries_of(model: Model, method: Method) -> Iterator[Entry]:
    """Yields a method's own entry, then those that its fields for whole modules, biases and tokens become."""
    method = resolved(model, method)
    if method.wraps and hasattr(method, "check_model"):
        method.check_model(ModelFacts(model, {}))  # type: ignore[attr-defined]
    yield Entry(method, targets.sites_of(model, method) if method.sited else {})
    if method.modules_to_save:
        full = Full(target_modules=method.modules_to_save, ensure_weight_tying=getattr(method, "ensure_weight_tying", False))
        yield Entry(full, targets.sites_of(model, full), "modules_to_save")
    bias = getattr(method, "bias", "none")
    if bias != "none":
        keys = bias_keys(model, method)
        if not keys:
            raise errors.NoMatchError(errors.say(method.label, "bias must find a bias to train", "none", "use bias='none'"))
        full = Full(target_modules=(), target_parameters=keys, ensure_weight_tying=True)  # peft trains them where they are
        yield Entry(full, targets.sites_of(model, full), "bias")
    tokens = getattr(method, "trainable_token_indices", None)
    if tokens:
        rules = tokens if isinstance(tokens, Mapping) else {None: tokens}
        yield from _token_entries(model, method, rules)


def _token_entries(model: Model, method: Method, rules: Mapping[Any, Any]) -> Iterator[Entry]:
    """Yields an entry for every embedding whose rows are trained; two ends of a tie are one, whose rows must then agree."""
    seen: dict[str, Any] = {}
    for name, rows in rules.items():
        one = TrainableTokens(target_modules=None if name is None else (name,), token_indices=rows)
        sites = targets.sites_of(model, one)
        for path in sites:
            if seen.get(path, rows) != rows:
                rule = "modules that share a tensor must train the same rows of it"
                raise ValueError(
                    errors.say(f"{method.label} at {path!r}", rule, f"{seen[path]} and {rows}", "name one of them")
                )
        if not sites.keys() <= seen.keys():
            yield Entry(one, {p: s for p, s in sites.items() if p not in seen}, "trainable_token_indices")
        seen |= dict.fromkeys(sites, rows)


def resolved(model: Model, method: Method) -> Method:
    """Returns a method with the fields filled that depend on the architecture."""
    known = getattr(model.config, "model_type", None)
    return method.resolve(lambda family, field: targets.default_targets(model, family, method.label, field) if known else None)


def bias_keys(model: Model, method: Method) -> tuple[str, ...]:
    """Lists the biases that the ``bias`` of a resolved method trains: all, or those of its targets."""
    if method.bias == "all":  # type: ignore[attr-defined]
        saved = method.modules_to_save or ()  # those are trained whole already
        keys = tuple(
            k
            for k in model.shapes
            if k not in model.buffers and k.rsplit(".", 1)[-1] == "bias" and not targets.under(saved, k.rpartition(".")[0])
        )
    else:
        own = [s.bias for s in targets.sites_of(model, method).values() if s.bias is not None]
        keys = tuple(dict.fromkeys(model.ties.get(key, key) for key in own))
    return keys


def require_needs(methods: Sequence[Method], needs: Mapping[str, object]) -> None:
    """Raises ``TypeError`` for something that no method's init takes: it would be ignored in silence."""
    known = {"facts", "inference_mode", *(name for m in methods for name in m.needs)}
    for name in needs.keys() - known:
        own = sorted(known - {"facts", "inference_mode"})
        rule = f"init of {', '.join(m.label for m in methods)} takes {own or 'nothing'} beyond the base"
        raise TypeError(errors.say("init", rule, repr(name), errors.nearest(name, own)))


def require_values(methods: Sequence[Method], context: Context) -> None:
    """Raises ``ValueError`` for a value of the call that no method reads."""
    if context.values:
        known = sorted({name for m in methods for name in m.context_names})
        for name in context.values.keys() - set(known):
            rule = f"values must be those that the net's methods read, {known}"
            raise ValueError(errors.say("context", rule, repr(name), errors.nearest(name, known)))


Expected = dict[str, dict[str, tuple[torch.Size, int | None]]]


def expected_of(net: Net, entry: Entry) -> Expected:
    """Returns shape and rank axis of every leaf that init makes, by path; nothing where init needs values or data."""
    try:
        fresh = shapes_of(net, entry)
    except Exception:  # an init that cannot run on shapes alone; its leaves are checked by name only
        return {}
    axes = dict(fresh.rank_axes)
    paths = {**fresh.params, **fresh.consts}
    return {p: {n: (t.shape, axes.get(n)) for n, t in fresh.leaves(p).items()} for p in paths}


def as_expected(adapter: Adapter, expected: Expected) -> bool:
    """Whether leaves are exactly those that init makes: the usual case, in one pass."""
    if not expected:
        return False
    params, consts, found = adapter.params, adapter.consts, 0
    for path, leaves in expected.items():
        for tree in (params, consts):
            here = tree.get(path)
            if here is None:
                continue
            found += len(here)
            for name, t in here.items():
                want = leaves.get(name)
                if want is None or t.shape != want[0]:
                    return False
    paths = params.keys() | consts.keys()
    return found == sum(map(len, expected.values())) and paths <= expected.keys()


def require_shapes(label: str, adapter: Adapter, expected: Expected, stacked: bool) -> None:
    """Raises ``TypeError`` for the first leaf whose shape would broadcast rather than fit."""
    for path, leaves in expected.items():
        for tree in (adapter.params, adapter.consts):
            for name, t in tree.get(path, {}).items():
                want = leaves.get(name)
                if want is None or t.shape == want[0] or fits(want[0], t.shape, want[1]):
                    continue
                shape = want[0]
                rule, found = f"leaf {name!r} of {label} must have shape {tuple(shape)}", tuple(t.shape)
                remedy = "make it with net.init"
                if t.shape[1:] == shape or (t.ndim == len(shape) + 1 and fits(shape, t.shape[1:], want[1])):
                    remedy = "a stack goes through apply_many or torch.func.vmap, or take one of unstack(adapter)"
                elif stacked and (t.shape == shape[1:] or fits(shape[1:], t.shape, want[1])):
                    remedy = "stack the adapters"
                raise TypeError(errors.say(f"adapter at {path!r}", rule, found, remedy))


def fits(shape: torch.Size, found: torch.Size, rank_axis: int | None) -> bool:
    """Whether two shapes agree but for the rank."""
    free = None if rank_axis is None else len(shape) + rank_axis
    return len(found) == len(shape) and all(i == free or a == b for i, (a, b) in enumerate(zip(shape, found, strict=True)))


def require_known(entry: Entry, adapter: Adapter) -> None:
    """Raises ``TypeError`` if a site has a leaf that its method has no name for: it would be ignored in silence."""
    cls = type(entry.method)
    known = frozenset(vars(cls).get("leaf_names", ()))  # a subclass may add leaves without naming them anew
    for path in entry.sites if known else ():
        odd = sorted((adapter.params.get(path, {}).keys() | adapter.consts.get(path, {}).keys()) - known)
        if odd:
            where, rule = f"adapter at {path!r}", f"leaves must be those of {entry.method.label}, {sorted(known)}"
            raise TypeError(errors.say(where, rule, errors.listed(odd), "make it with net.init"))
