"""A model and methods become a net: the site table, and init, apply and merge over the whole model.

Imports targets, functional, merging, methods that others are desugared to, weights, tree, errors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import EVAL, Context, from_inputs
from funcpeft.entries import (
    Entry,
    Expected,
    as_expected,
    entries_of,
    expected_of,
    fits,
    require_alive,
    require_known,
    require_needs,
    require_shapes,
    require_values,
)
from funcpeft.facts import ModelFacts
from funcpeft.fold import Stacked
from funcpeft.functional import Model, Params
from funcpeft.merging import MergeReport, Target, merge_params, unmerge_site
from funcpeft.method import Method, thaw
from funcpeft.quant.format import Format
from funcpeft.sitetable import net_table, shapes_of
from funcpeft.stacking import members
from funcpeft.targets import shape_only
from funcpeft.transforms import require_alike
from funcpeft.tree import Adapter, Adapters, Leaves, all_finite, as_tuple
from funcpeft.weights import Adapted, Base, Quantized, Site, dense


class Net:
    """A model with methods on it: static, hashable by identity; made by ``adapt``.

    ``net(params, adapter, *args, **kwargs)`` returns what the module's forward returns with the adapter applied.
    """

    def __init__(self, model: Model, methods: Sequence[Method], entries: Sequence[Entry]) -> None:
        self.model, self.methods, self.entries = model, tuple(methods), tuple(entries)
        self._shapes = [expected_of(self, e) for e in self.entries]
        self._stacked_shapes: dict[tuple[int, int], Expected] = {}
        self.plans: dict[str, Any] = {}  # how populations of this net are called, by form of the call: found once
        self._aliases: dict[str, list[str]] = {}
        for alias, key in model.ties.items():
            self._aliases.setdefault(key, []).append(alias)

    def __repr__(self) -> str:
        names = ", ".join(f"{type(e.method).__name__} at {len(e.sites)} sites" for e in self.entries)
        return f"Net({self.model.name}: {names})"

    def __str__(self) -> str:
        return net_table(self)

    def table(self, params: Params) -> str:
        """Returns the site table with a column that says how each weight is stored in these params."""
        self._check(params)
        return net_table(self, params)

    def __deepcopy__(self, memo: Any) -> Net:
        return self

    # -- adapters ------------------------------------------------------------------------------------------------------

    def init(self, params: Params, seed: int, *, dtype: torch.dtype | None = None, **needs: Any) -> Any:
        """Makes a fresh adapter.

        Args:
            params: The base; read by methods that start from it, never written.
            seed: Determines every draw; each site folds its path in, so other sites do not change its draw.
            dtype: Floating dtype of the leaves; by default the base's, but float32 on a half-precision base.
            needs: What a method's init needs beyond the base, by name.

        Returns:
            An ``Adapter``; a tuple of them, in order, if the net has several methods.
        """
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(errors.say("init", "seed must be an int", type(seed).__name__))
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(errors.say("init", "dtype must be a floating dtype", dtype))
        seeds = [seed if i == 0 else rng.fold_in(seed, "entry", i) for i in range(len(self.entries))]
        return self._init(params, seeds, dtype, needs)

    def _init(self, params: Params, seeds: Sequence[Any], dtype: torch.dtype | None, needs: Mapping[str, Any]) -> Any:
        self._check(params)
        require_needs([e.method for e in self.entries], needs)
        made: list[Adapter] = []
        for entry, seed in zip(self.entries, seeds, strict=True):
            bases = self.bases(entry, params)
            extra = {**needs, "facts": ModelFacts(self.model, params)} if entry.method.wraps else needs
            adapter = entry.method.init(bases, seed=seed, **extra)
            made.append(_cast(adapter, bases, self._half_or_not(params), dtype))
        self.model.prepare(self._expression_keys(params))
        self.prepare_stacked(params)
        return made[0] if len(made) == 1 else tuple(made)

    def bases(self, entry: Entry, params: Params) -> dict[str, Base]:
        """Returns the views of one entry's sites on the given params."""
        return {path: Base(s, self._leaf(params, s.weight), self._bias(params, s)) for path, s in entry.sites.items()}

    def _check(self, params: Params) -> None:
        if not isinstance(params, dict):
            found, remedy = type(params).__name__, "params come first, then the adapter"
            raise TypeError(errors.say("net", "params must be a dict of leaves", found, remedy))
        self.model.check(params)

    def _leaf(self, params: Mapping[str, Any], key: str) -> Any:
        return params[key] if key in params else params[self.model.ties[key]]

    def _bias(self, params: Mapping[str, Any], site: Site) -> Tensor | None:
        return None if site.bias is None else dense(self._leaf(params, site.bias))

    def _half_or_not(self, params: Params) -> tuple[torch.dtype, torch.device]:
        floats = [
            v for k, v in params.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in self.model.buffers
        ]
        first = floats[0] if floats else torch.empty(0)
        return first.dtype, first.device

    def _expression_keys(self, params: Params) -> frozenset[str]:
        keys = {k for k, v in params.items() if isinstance(v, Quantized)}
        for entry in self.entries:
            if not entry.method.takes_any:
                keys |= {key for site in entry.sites.values() for key in (site.weight, *self.bound_keys(entry.method, site))}
        return frozenset(keys)

    def prepare_stacked(self, params: Params, read: frozenset[str] = frozenset()) -> None:
        """Makes what a trace of a population's call needs; ``read`` are the paths of layers whose weight others read."""
        adapted = self.adapted_keys()
        keys = frozenset(k for k in adapted if self.model.site(k).path in read)
        self.model.prepare(self._expression_keys(params) | adapted, adapted, keys)

    def adapted_keys(self) -> frozenset[str]:
        """Returns the keys of all weights that the net adapts, replaced ones included."""
        sites = ((entry.method, site) for entry in self.entries for site in entry.sites.values())
        return frozenset(key for method, site in sites for key in (site.weight, *self.bound_keys(method, site)))

    def bound_keys(self, method: Method, site: Site) -> list[str]:
        """Lists the aliases of a site's weight that the method adapts with it, because it binds to the tensor."""
        return self._aliases.get(site.weight, []) if method.bound else []

    # -- the call --------------------------------------------------------------------------------------------------------

    def attach(self, params: Params, adapter: Adapters, context: Context = EVAL) -> Params:
        """Returns params in which every adapted weight is an expression; what the model is called with.

        Raises:
            TypeError: If the adapter was not made for this net; the message names the paths that differ.
        """
        self._check(params)
        if not isinstance(context, Context):
            found, remedy = type(context).__name__, "pass Context(training=True, seed=step)"
            raise TypeError(errors.say("net", "context must be a Context", found, remedy))
        require_values(self.methods, context)
        return self._attached(params, self._matched(adapter), context, stacked=False)

    def attach_stacked(self, params: Params, stacked: Adapters, context: Context = EVAL) -> Params:
        """Returns what ``attach`` does for a stack that ``members`` has checked: expressions of a population.

        Only ``funcpeft.population`` knows how to call the model with them.
        """
        self._check(params)
        return self._attached(params, as_tuple(stacked), context, stacked=True)

    def _attached(self, params: Params, given: Sequence[Adapter], context: Context, *, stacked: bool) -> Params:
        out = dict(params)
        for position, (entry, one) in enumerate(zip(self.entries, given, strict=True)):
            here = context.at(position)
            for path, site in entry.sites.items():
                self._place(out, entry.method, site, entry.leaves(one, path), here, stacked)
        return out

    def _place(self, out: Params, method: Method, site: Site, leaves: Leaves, context: Context, stacked: bool) -> None:
        key, before = site.weight, self._leaf(out, site.weight)
        value: Any
        if method.takes_any:
            value = leaves["value"].to(before.dtype)
            value = Stacked(value) if stacked else value
        else:
            value = Adapted(before, site, method, leaves, context)
        bound = self.bound_keys(method, site)
        for alias in self._aliases.get(key, []):
            if alias in bound and method.takes_any:
                out.pop(alias, None)  # what replaces the tensor does so for all that read it
                continue
            if alias not in out:  # the tensor's other readers keep the base, unless the method binds to the tensor
                out[alias] = before
            if alias in bound:
                other = self.model.site(alias)
                out[alias] = Adapted(out[alias], other, method, self.tied_leaves(method, leaves, site, other), context)
        out[key] = value

    def tied_leaves(self, method: Method, leaves: Leaves, site: Site, other: Site) -> Leaves:
        """Returns a site's leaves as they act on another module that reads its tensor."""
        return method.across_tie(leaves, Base(site, shape_only(site)), Base(other, shape_only(other)))

    def _matched(self, adapter: Adapters, members: int | None = None) -> tuple[Adapter, ...]:
        given = as_tuple(adapter)
        if len(given) != len(self.entries):
            want = ", ".join(type(e.method).__name__ for e in self.entries)
            raise TypeError(
                errors.say("adapter", f"one Adapter for each of ({want}) is required", f"{len(given)}", "make it with net.init")
            )
        for entry, one, shapes in zip(self.entries, given, self._shapes, strict=True):
            shared = entry.shared
            found = one.params.keys() | one.consts.keys()
            extra = sorted(found - entry.sites.keys() - shared)
            missing = sorted(p for p in entry.sites.keys() - found if not shared & found)
            if extra or missing:
                what = f"extra {errors.listed(extra)}" if extra else f"nothing at {errors.listed(missing)}"
                raise TypeError(
                    errors.say(
                        f"adapter for {entry.method.label}", "paths must be the net's sites", what, "make it with net.init"
                    )
                )
            expected = shapes if members is None else self._shapes_of(shapes, members)
            if not as_expected(one, expected):
                require_known(entry, one)
                require_shapes(entry.method.label, one, expected, members is not None)
        return given

    def members(self, stacked: Adapters) -> int:
        """Counts the members of a stack, and checks that it was made for this net.

        Raises:
            ValueError: If the leaves have no common leading axis.
            TypeError: If the adapters were not made for this net.
        """
        if isinstance(stacked, list):
            raise TypeError(errors.say("adapters", "a stack is required", "a list", "stack them with fp.stack"))
        first = next((t for one in as_tuple(stacked) for v in one.params.values() for t in v.values()), None)
        n = first.shape[0] if first is not None and first.ndim else 0
        usual = len(self._shapes) == len(as_tuple(stacked)) and n > 0
        pairs = zip(as_tuple(stacked), self._shapes, strict=False)
        if usual and all(as_expected(one, self._shapes_of(shapes, n)) for one, shapes in pairs):
            return n
        try:
            n = members(stacked)
        except ValueError as e:
            found, remedy = "leaves of unequal leading axes", "stack the adapters with fp.stack, one of them too"
            raise ValueError(errors.say("adapters", "a stack is required", found, remedy)) from e
        self._matched(stacked, n)
        return n

    def _shapes_of(self, shapes: Expected, members: int) -> Expected:
        """Returns the shapes of a stack's leaves."""
        key = id(shapes), members
        if key not in self._stacked_shapes:
            lead = torch.Size((members,))
            stacked = {p: {n: (lead + s, a) for n, (s, a) in leaves.items()} for p, leaves in shapes.items()}
            self._stacked_shapes[key] = stacked
        return self._stacked_shapes[key]

    def __call__(self, params: Params, adapter: Adapters, /, *args: Any, context: Context = EVAL, **kwargs: Any) -> Any:
        """Returns what the module's forward returns, with the adapter applied.

        Args:
            params: The base's leaves.
            adapter: What ``net.init`` made, or a tree of its form.
            args: The model's own positional inputs.
            context: Training flag and seed of the call.
            kwargs: The model's own keyword inputs.
        """
        return self._call("forward", params, adapter, args, kwargs, context)

    def call(
        self, method: str, params: Params, adapter: Adapters, /, *args: Any, context: Context = EVAL, **kwargs: Any
    ) -> Any:
        """Calls another method of the module, such as ``"generate"``, with the adapter applied."""
        return self._call(method, params, adapter, args, kwargs, context)

    def _call(self, name: str, params: Params, adapter: Adapters, args: Any, kwargs: Any, context: Context) -> Any:
        if isinstance(context, Context):  # else attach refuses it
            kwargs, mapped = from_inputs(kwargs)
            context = replace(context, values={**context.values, **mapped})  # a dict of this call's own
        try:
            attached = self.attach(params, adapter, context)
            return self.call_attached(name, attached, adapter, args, kwargs, context.values, context)
        except (KeyError, RuntimeError) as e:
            if not torch.compiler.is_compiling():
                self.explain(adapter, e)
            raise

    def call_attached(
        self,
        name: str,
        attached: Params,
        adapter: Adapters,
        args: Any,
        kwargs: Any,
        values: Any = None,
        context: Context = EVAL,
    ) -> Any:
        """Calls a method of the module with what ``attach`` returned; of ``adapter`` only leaves of the call are read.

        ``values`` is the dict that the contexts of ``attached`` hold, which methods of the call may set in between;
        ``context`` the one that methods of the call draw by.
        """
        if any(e.method.wraps for e in self.entries):
            return self._wrapped(name, attached, adapter, args, kwargs, values, context)
        return self.model(attached, *args, **kwargs) if name == "forward" else self.model.call(name, attached, *args, **kwargs)

    def _wrapped(
        self, name: str, attached: Params, adapter: Adapters, args: Any, kwargs: Any, values: Any, context: Context
    ) -> Any:
        own = tuple(n for e in self.entries if e.method.wraps for n in e.method.calls)
        if name not in ("forward", "generate", *own):
            raise ValueError(errors.one_of("net.call", "method", name, ("forward", "generate", *own)))
        if args:
            signature = inspect.signature(getattr(self.model.root, "forward" if name in own else name))
            kwargs = {**signature.bind_partial(*args).arguments, **kwargs}
        facts = ModelFacts(self.model, attached, values, context)
        call: Any = functools.partial(facts.call, name)
        for entry, one in zip(self.entries, as_tuple(adapter), strict=True):
            if entry.method.wraps:
                call = entry.method.wrap(one.leaves(""), call, name, facts)  # type: ignore[attr-defined]
        return call(**kwargs)

    def explain(self, adapter: Adapters, error: Exception) -> None:
        """Raises a ``TypeError`` that names the leaf, if the adapter's leaves are not those that init makes here."""
        for entry, one in zip(self.entries, as_tuple(adapter), strict=True):
            try:
                fresh = shapes_of(self, entry)
            except Exception:  # an init that needs values; the error to show is the first one
                continue
            axes = dict(fresh.rank_axes)
            for path in {**fresh.params, **fresh.consts}:
                want, given = fresh.leaves(path), one.leaves(path)
                for name, t in want.items():
                    found = tuple(given[name].shape) if name in given else f"only {sorted(given)}"
                    if name not in given or not fits(t.shape, given[name].shape, axes.get(name)):
                        rule = f"leaf {name!r} of {entry.method.label} must have shape {tuple(t.shape)}"
                        raise TypeError(errors.say(f"adapter at {path!r}", rule, found, "make it with net.init")) from error

    # -- terms of training -------------------------------------------------------------------------------------------------

    def penalty(self, adapter: Adapters, context: Context = EVAL) -> Tensor:
        """Sums the regularisers of the net's methods over an adapter: a 0-d tensor, zero for methods without one.

        Never part of a call's output; add it to the loss yourself.
        """
        given = self._matched(adapter)
        context = replace(context, values={})
        parts = [e.method.penalty(one, context.at(i)) for i, (e, one) in enumerate(zip(self.entries, given, strict=True))]
        return functools.reduce(torch.add, parts)  # a method without one gives a zero on the CPU

    def project_grads(self, params: Params, grads: Any, adapter: Adapters) -> Any:
        """Returns gradients as the net's methods want them stepped; unchanged for methods that do not say.

        Args:
            params: The base's leaves.
            grads: Gradients of ``adapter.params``, as ``value_and_grad`` returns them; a tuple for several methods.
            adapter: The adapter they are of.

        Raises:
            TypeError: If the gradients do not have the paths, leaves and shapes of ``adapter.params``.
        """
        require_alike("grads", grads, tuple(a.params for a in adapter) if isinstance(adapter, tuple) else adapter.params)
        trees = grads if isinstance(grads, tuple) else (grads,)
        made: list[Any] = []
        for entry, one, tree in zip(self.entries, self._matched(adapter), trees, strict=True):
            bases = self.bases(entry, params)
            new = {
                p: entry.method.project_grads(g, entry.leaves(one, p), bases[p]) if p in bases else g for p, g in tree.items()
            }
            made.append(new)
        return tuple(made) if isinstance(grads, tuple) else made[0]

    # -- merging ---------------------------------------------------------------------------------------------------------

    def merge(
        self,
        params: Params,
        adapter: Adapters,
        *,
        target: str | Format = "dense",
        min_realised: float | None = 0.9,
        below: str = "raise",
        dtype: torch.dtype | None = None,
    ) -> tuple[Params, MergeReport]:
        """Merges an adapter into weights.

        Args:
            params: The base's leaves.
            adapter: What ``net.init`` made, or a tree of its form.
            target: How merged weights are stored. ``"dense"``: as tensors, also where the base is quantized.
                ``"requantize"``: a quantized base's weights on their own grid, which cannot drift. ``"refit"``: in their
                format with scales estimated anew. A format such as ``Int8()``: every merged weight in that format.
            min_realised: Storing a weight as codes can round a small update away; less than this fraction of it surviving at
                a site is an error. ``None`` for no limit; then the report alone says it.
            below: ``"raise"``, or ``"dense"`` to leave the weights of such sites dense, with a note in the report.
            dtype: dtype of every floating parameter of the result (buffers keep theirs, and of codes it is what they decode
                to); by default each keeps its own. Sums are taken in float64 and rounded once.

        Returns:
            ``(params, report)``: params for ``model(...)``, in which untouched leaves are shared with the argument, and what
            rounding did at every site. The argument is not changed, and keeping it is the exact undo.

        Raises:
            CannotRequantizeError: If the format of a quantized base cannot be made from a weight.
            LostUpdateError: If less than ``min_realised`` of the update survives at a site; the message names it.
            NoMergedFormError: If a method has no merged form.
            TypeError: If the adapter was not made for this net; the message names the path and the leaf.
            ValueError: If a merged weight is not finite, or ``target`` or ``below`` is none of the above.
        """
        how = Target(target, min_realised, below, dtype)
        for entry in self.entries:
            _require_merged_form(entry.method)
        self._require_finite(adapter)
        attached = self.attach(params, adapter)
        attached = {k: v for k, v in attached.items() if k in params or k not in self._kept_ties()}
        try:
            merged, report = merge_params(params, attached, self.model.ties, how)
        except (KeyError, RuntimeError) as e:
            self.explain(adapter, e)
            raise
        self.model.prepare(frozenset(k for k, v in merged.items() if isinstance(v, Quantized)))
        return merged if dtype is None else self._in_dtype(merged, dtype), report

    def unmerge(self, params: Params, adapter: Adapters) -> Params:
        """Takes an adapter out of merged params by inverting its formula; exact up to rounding, unlike keeping the base.

        Raises:
            NoMergedFormError: If the formula of a method does not invert.
        """
        self._check(params)
        for entry in self.entries:
            _require_merged_form(entry.method)
        out = dict(params)
        for entry, one in reversed(list(zip(self.entries, self._matched(adapter), strict=True))):
            for path, site in entry.sites.items():
                for here in (site, *(self.model.site(a) for a in self.bound_keys(entry.method, site) if a in params)):
                    before, bias = self._leaf(out, here.weight), self._bias(out, here)
                    leaves = entry.leaves(one, path)
                    leaves = leaves if here is site else self.tied_leaves(entry.method, leaves, site, here)
                    out[here.weight], back = unmerge_site(entry.method, leaves, here, dense(before), bias)
                    if bias is None or back is None or here.bias is None:
                        continue
                    if here.bias in out or not torch.equal(back, bias):  # else its owner's tensor serves it too
                        out[here.bias] = back
        return out

    def _kept_ties(self) -> set[str]:
        """Returns the aliases of tied tensors that no method unties, so that one merged tensor serves all its modules."""
        bound: set[str] = set()
        untied: set[str] = set()
        for entry in self.entries:
            for site in entry.sites.values():
                through = bound if entry.method.bound else untied
                through.update(self._aliases.get(site.weight, ()), {site.weight} & self.model.ties.keys())
        return bound - untied

    def _in_dtype(self, params: Params, dtype: torch.dtype) -> Params:
        def cast(key: str, v: Any) -> Any:
            if isinstance(v, Quantized):  # what it decodes to; no code changes
                return v.to(dtype=dtype)
            floating = isinstance(v, Tensor) and v.is_floating_point() and key not in self.model.buffers
            return v.to(dtype) if floating else v

        return {k: cast(k, v) for k, v in params.items()}

    def _require_finite(self, adapter: Adapters) -> None:
        for one in self._matched(adapter):
            for path, leaves in (*one.params.items(), *one.consts.items()):
                for name, t in leaves.items():
                    if not all_finite(t):
                        raise ValueError(
                            errors.say(
                                f"adapter at {path!r}",
                                f"leaf {name!r} must be finite",
                                "NaN or infinity",
                                "it was probably trained with too large a step",
                            )
                        )


def _require_merged_form(method: Method) -> None:
    if not method.merges:
        rule = "the method acts on the call and has no merged form"
        raise errors.NoMergedFormError(errors.say(method.label, rule, None, "keep it as an adapter"))


def _cast(
    adapter: Adapter, bases: Mapping[str, Base], default: tuple[torch.dtype, torch.device], dtype: torch.dtype | None
) -> Adapter:
    """Gives the leaves their dtype and device: the base's, but at least float32, unless a dtype is named."""

    def place(path: str, t: Tensor) -> Tensor:
        base = bases.get(path) or next(iter(bases.values()), None)
        of, device = (base.dtype, base.device) if base is not None else default
        wanted = dtype or torch.promote_types(of, torch.float32)
        return t.to(device=device, dtype=wanted if t.is_floating_point() else t.dtype)

    def tree(t: Mapping[str, Leaves]) -> dict[str, Leaves]:
        return {path: {n: place(path, v) for n, v in leaves.items()} for path, leaves in t.items()}

    return adapter.replace(params=tree(adapter.params), consts=tree(adapter.consts))


def adapt(model: Model, method: Method | Sequence[Method]) -> Net:
    """Chooses the sites of one method, or of several that nest, and returns the net.

    Args:
        model: What ``functionalize`` returned.
        method: A method; a list nests them, the first innermost, at the same or at different sites. ``modules_to_save``,
            ``bias`` and ``trainable_token_indices`` become further entries after it.

    Raises:
        NoMatchError: If a target rule matches nothing; the message names the nearest paths.
        ValueError: If a field does not fit a site; the message names the site and the valid values.
        TypeError: If a target is of a kind that the method does not take.
    """
    if not isinstance(model, Model):
        raise TypeError(errors.say("adapt", "a Model is required", type(model).__name__, "call functionalize(module) first"))
    methods: list[Any] = list(method) if isinstance(method, list | tuple) else [method]
    if not methods:
        raise ValueError(errors.say("adapt", "a method is required", "an empty list"))
    entries: list[Entry] = []
    for one in methods:
        if not isinstance(one, Method):
            raise TypeError(
                errors.say("adapt", "a method is required", type(one).__name__, "pass an instance such as LoRA(r=8)")
            )
        _require_replicated(model, one)
        entries += entries_of(model, one)
    require_alive(entries)
    net = Net(model, methods, entries)
    for entry in entries:
        for site in entry.sites.values():
            for key in net.bound_keys(entry.method, site):
                other = model.site(key)
                entry.method.check_tie(Base(site, shape_only(site)), Base(other, shape_only(other)))
    return net


def _require_replicated(model: Model, method: Method) -> None:
    """Raises ``ValueError`` if a method is for a model of other layers than this one."""
    wanted, found = getattr(method, "layer_replication", None), getattr(model.root, "layer_replication", None)
    if wanted is not None and wanted != found:
        rule, remedy = (
            f"layer_replication={thaw(wanted)} needs a model with these layers",
            "functionalize(replicate_layers(...))",
        )
        raise ValueError(errors.say(method.label, rule, thaw(found), remedy))


def peft_init(net: Net, params: Params, seed: int, **needs: Any) -> Any:
    """Makes the adapter that peft makes after ``torch.manual_seed(seed)``, bit for bit where peft's recipe is known.

    Sites draw from one stream in module order, so the draws depend on which other sites there are; use ``net.init`` unless
    parity is the point. ``needs`` is what init takes beyond the base. On a half-precision base the values are rounded to the
    base's dtype, as peft's are.
    """
    shared = rng.stream(seed)
    made = as_tuple(net._init(params, [shared] * len(net.entries), None, needs))
    rounded: list[Adapter] = []
    for entry, one in zip(net.entries, made, strict=True):
        dtypes = {path: site.dtype for path, site in entry.sites.items()}

        def through(path: str, t: Tensor, dtypes: Mapping[str, torch.dtype] = dtypes) -> Tensor:
            half = dtypes.get(path, torch.float32)
            return t.to(half).to(t.dtype) if t.is_floating_point() and half.itemsize < 4 else t

        params_ = {path: {n: through(path, t) for n, t in leaves.items()} for path, leaves in one.params.items()}
        rounded.append(one.replace(params=params_))
    return rounded[0] if len(rounded) == 1 else tuple(rounded)
