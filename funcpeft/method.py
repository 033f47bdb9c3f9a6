"""The method contract: read this first.

A method is a frozen dataclass of pure functions over the ``Base`` view of a layer: ``init`` makes the leaves, ``apply``
computes the adapted layer's output, ``merge`` returns the effective weight and bias, ``unmerge`` inverts it where the
formula does. It knows no module, no file and no batch. Its class variables say its facts, and the laws check them.

To write one: subclass ``Method`` (or ``Additive`` if all it does is add a matrix), state the formula in the docstring,
give ``init_site`` and ``merge`` (or ``delta``), and hand an instance to ``funcpeft.testing.check_method``. Without an
``apply`` of its own, a method meets the merged weight. Imports weights, checked, rng, tree, errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.checked import Checked
from funcpeft.context import EVAL, Context
from funcpeft.fields import FrozenDict, by_pattern, freeze, pattern_matches, thaw
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base, cast_leaves

__all__ = ["Additive", "Factor", "Facts", "FrozenDict", "Method", "by_pattern", "freeze", "pattern_matches", "thaw"]

#: What a class changes its formula by; forms of an older formula that it inherits do not count then.
_FORMULA = frozenset({"apply", "delta", "merge", "product"})


#: What ``Method.factors`` gives of a leaf: two factors of its gradient, or the terms of a vector's.
Factor = Tensor | tuple[Tensor, Tensor]


class Facts(Protocol):
    """What a method of the call may know of the model: numbers of its config, and its embedding."""

    token_dim: int
    num_layers: int
    num_attention_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    encoder_decoder: bool
    embed: Callable[[Tensor], Tensor]
    dtype: Any
    device: Any
    values: Mapping[str, Tensor]

    def held(self, cache: Any) -> int:
        """Counts the tokens of the input that a key-value cache holds; zero if there is none."""
        ...

    def cache(self, layers: list[tuple[Tensor, Tensor]]) -> Any:
        """Makes the model's own key-value cache from one ``(key, value)`` pair per layer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Method(Checked):
    """The contract. Fields are those every method shares; peft's names and meaning.

    Args:
        target_modules: Which modules to adapt: names or dotted suffixes, a regular expression that must match whole
            paths, ``"all-linear"``, or ``None`` for the architecture's default (see ``funcpeft.targets``).
        exclude_modules: Names, suffixes or a regular expression of modules to leave out; wins over targets.
        layers_to_transform: Layer indices to keep, with a list of targets.
        layers_pattern: Names of the layer lists in which those indices count.
        modules_to_save: Names of modules whose parameters are trained in full beside the method.
    """

    target_modules: tuple[str, ...] | list[str] | str | None = None
    exclude_modules: tuple[str, ...] | list[str] | str | None = None
    layers_to_transform: tuple[int, ...] | list[int] | int | None = None
    layers_pattern: tuple[str, ...] | list[str] | str | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None

    #: peft's name of the method, ``""`` if it has none.
    peft_type: ClassVar[str] = ""
    #: The layer kinds it takes.
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    #: From leaf names to peft's keys after the module path; ``{kind: ...}`` entries override per layer kind.
    keys: ClassVar[Mapping[str, Any]] = {}
    #: From names of shared leaves to peft's keys after ``base_model.``, in which ``{scope}`` stands for the scope.
    shared_keys: ClassVar[Mapping[str, str]] = {}
    #: Leaves whose size along an axis, counted from the end, is the rank.
    rank_axes: ClassVar[Mapping[str, int]] = {}
    #: Fields of peft's config that this method does not have, with the only value it can stand for.
    peft_fixed: ClassVar[Mapping[str, Any]] = {}
    #: A field of peft's config that is set in this method's files alone, for variants that share a ``peft_type``.
    peft_switch: ClassVar[str] = ""
    #: Fields of this class that a file of peft implies, with the values.
    peft_implied: ClassVar[Mapping[str, Any]] = {}
    #: Fields of this class that peft's config does not have.
    peft_lacks: ClassVar[tuple[str, ...]] = ()
    #: Whether merging twice equals merging the sum of the updates.
    additive: ClassVar[bool] = False
    #: Whether ``apply`` avoids the dense base weight: at all kinds of layers, or those named.
    weight_free: ClassVar[bool | frozenset[str]] = False
    #: Whether a fresh adapter changes nothing.
    identity_at_init: ClassVar[bool] = True
    #: Whether its leaves depend on which other sites there are.
    depends_on_sites: ClassVar[bool] = False
    #: Whether what it computes for a row depends on the other rows of the call, so that rows cannot be routed to members.
    mixes_rows: ClassVar[bool] = False
    #: Whether it replaces every parameter of a target, whatever the module's class.
    takes_any: ClassVar[bool] = False
    #: Whether it adapts the tensor itself, hence also the other modules that a tied weight belongs to.
    binds_ties: ClassVar[bool] = False
    #: Every name a leaf at a site may have; what an adapter is checked against when a call fails.
    leaf_names: ClassVar[tuple[str, ...]] = ()
    #: For methods that replace parameters: what stands between module and parameter in peft's keys.
    file_infix: ClassVar[str] = ""
    #: peft's keys that a file may lack; what init makes then stands.
    optional_keys: ClassVar[tuple[str, ...]] = ()
    #: What ``init`` takes beyond the base, by name; all of it may be absent where a file is read (``inference_mode``).
    needs: ClassVar[tuple[str, ...]] = ()
    #: Those of ``needs`` that a file does not hold either, so that they are given where one is read.
    file_needs: ClassVar[tuple[str, ...]] = ()
    #: Values of the call that ``apply`` or ``wrap`` read (``Context.values``).
    context_names: ClassVar[tuple[str, ...]] = ()
    #: Further calls that ``wrap`` knows, beside ``"forward"`` and ``"generate"``; of the forward's inputs.
    calls: ClassVar[tuple[str, ...]] = ()
    #: Whether peft keeps it in the model's modules although it has no sites here.
    injected: ClassVar[bool] = False
    #: The value of ``bias`` that trains the targets' biases, for methods that have the field.
    bias_only: ClassVar[str] = ""
    #: Trainable numbers at a linear layer: a Python expression over ``out``, ``in_`` and the fields; ``""`` if there is none.
    size: ClassVar[str] = ""
    #: Trainable numbers that all sites share, likewise, without ``out`` and ``in_``.
    size_shared: ClassVar[str] = "0"
    #: Laws that cannot hold, each with the reason.
    waived: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _FORMULA & vars(cls).keys() and "apply_rows" not in vars(cls):  # the batched form is of the formula beside it
            cls.apply_rows = Method.apply_rows

    # -- the pure functions ------------------------------------------------------------------------------------------

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Makes the leaves at all sites of the method; the default draws site by site, after the shared leaves."""
        params, consts = self.init_shared(sites, seed)
        for path, base in sites.items():
            trained, frozen = self.init_site(base, rng.generator(seed, path))
            if trained:
                params[path] = trained
            if frozen:
                consts[path] = frozen
        return Adapter(params, consts, tuple(sorted(self.rank_axes.items())))

    def init_shared(self, sites: Mapping[str, Base], seed: int | rng.Stream) -> tuple[Tree, Tree]:
        """Makes the leaves that sites share, by scope: trained, frozen."""
        return {}, {}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        """Makes the leaves of one site: trained, frozen. Draws from ``gen`` in peft's order."""
        raise TypeError(f"{type(self).__name__}: a method must define init_site or init.")

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        """Computes the adapted layer's output; by default it meets the merged weight."""
        return self.merge(cast_leaves(leaves, base.precision), base).meet(x)

    def apply_rows(self, groups: Sequence[tuple[Leaves, Context]], base: Base, x: Tensor, layout: Any) -> Tensor:
        """Computes the adapted layer's output for the rows of many members: ``apply`` under ``vmap``, group by group.

        A method may give the same formula in batched products instead, which takes a fraction of the time on small inputs;
        the law ``many`` compares the two.

        Args:
            groups: ``(leaves, context)`` of each group, with a leading axis of its members on the leaves, and on the seed
                if there is one per member.
            base: The layer, which all members share.
            x: Inputs ``(rows, ...)``, or with several entries per row on the first axis.
            layout: Which rows are whose (``fold.Layout``).
        """
        parts = layout.cut(x, 0)
        outs = [self._mapped(leaves, base, p, context) for (leaves, context), p in zip(groups, parts, strict=False)]
        return layout.joined([*outs, base(parts[-1])] if layout.rest else outs, 0)

    def _mapped(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        several = 0 if isinstance(context.seed, Tensor) and context.seed.ndim else None

        def one(leaves: Leaves, seed: Any, values: Any, x: Tensor) -> Tensor:
            return self.apply(leaves, base, x, replace(context, seed=seed, values=values))

        in_dims = (0, several, 0 if context.values else None, 0)
        return torch.func.vmap(one, in_dims=in_dims)(leaves, context.seed, dict(context.values), x)

    def merge(self, leaves: Leaves, base: Base) -> Base:
        """Returns the base with the effective weight and bias."""
        raise errors.NoMergedFormError(
            errors.say(f"{self.label} at {base.path!r}", "the method has no merged form", None, "keep it as an adapter")
        )

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        """Returns the base from an effective weight and bias, where the formula inverts."""
        raise errors.NoMergedFormError(
            errors.say(f"{self.label} at {base.path!r}", "merging does not invert", None, "keep the base params instead")
        )

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        """Gives the gradients of trained leaves at one meeting with an input, in factors that keep examples apart.

        Optional; exact where it is given, and pure. What it leaves out has no closed form here (``funcpeft.perexample``).

        Args:
            leaves: The leaves, as ``apply`` gets them.
            base: The layer, as ``apply`` gets it.
            x: The layer's input, examples first.
            grad_out: The gradient of what ``apply`` returned for ``x``.
            context: As ``apply`` gets it, so draws are the same.

        Returns:
            By leaf name, for the B examples and T positions in one or several axes:

            - a pair ``(left (B, T, rows), right (B, T, cols))``: an example's gradient is ``left.T @ right`` of its own, in
              the shape of the leaf; integer ``right (B, T)`` are ids that stand for one-hot rows;
            - a tensor ``(B, T, n)`` whose sum over positions is the gradient of a vector leaf ``(n,)``.
        """
        return {}

    def penalty(self, adapter: Adapter, context: Context = EVAL) -> Tensor:
        """Computes the method's regulariser of a whole adapter, a 0-d tensor; users add it to their loss themselves."""
        return torch.zeros(())

    def project_grads(self, grads: Leaves, leaves: Leaves, base: Base) -> Leaves:
        """Returns the gradients of one site's trained leaves as the method wants them stepped; by default as they are."""
        return grads

    def derived(self, leaves: Leaves, base: Base) -> Leaves:
        """Returns frozen leaves of a site that follow from the base and other leaves; made anew once a file is read."""
        return {}

    def scopes(self, sites: Mapping[str, Base]) -> Mapping[str, tuple[str, ...]]:
        """Says, by site, in which scopes its shared leaves live."""
        return {path: ("",) for path in sites}

    def across_tie(self, leaves: Leaves, site: Base, other: Base) -> Leaves:
        """Returns the leaves as they act on another module that reads the site's tensor; see ``bound``.

        An embedding's matrix is the transpose of the one that its tied head has.
        """
        return leaves

    def check_tie(self, site: Base, other: Base) -> None:
        """Raises ``ValueError`` if ``across_tie`` has no answer for two modules; shapes only, before any work."""

    def call_leaves(self, leaves: Leaves) -> Leaves:
        """Returns what ``wrap`` reads, made of the leaves; ``wrap`` takes it with a leading axis of rows too."""
        return leaves

    @staticmethod
    def names_site(key: str, path: str) -> bool:
        """Whether a key of the method's patterns names a path."""
        return pattern_matches(key, path)

    def check_site(self, base: Base) -> None:
        """Raises ``ValueError`` if the method's fields do not fit a site; shapes only, before any work."""

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor | float:
        """Bounds how much ``unmerge`` amplifies the largest error of an entry of the merged weight."""
        return 1.0

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        """Returns small instances, one per variant of the formula, on which the laws are checked."""
        return (cls(),)

    def completed(self, needs: Mapping[str, Any]) -> Self:
        """Returns the method of a file with the fields that the given ``file_needs`` decide.

        Raises ``ValueError`` for what a file cannot be read without.
        """
        return self

    def as_written(self, shapes: Mapping[str, torch.Size]) -> Self:
        """Returns the method of a file with the fields that its tensors decide, where peft's configs do not say the truth.

        Args:
            shapes: Shapes of the file's tensors, by module path and peft's key.
        """
        return self

    def sample_needs(self, sites: Mapping[str, Base], seed: int) -> dict[str, Any]:
        """Returns made-up ``needs`` of ``init``, for the laws."""
        return {}

    def sample_values(self, rows: int) -> dict[str, Tensor]:
        """Returns made-up values of a call on so many rows, for the laws."""
        return {}

    def resolve(self, default: Callable[[str, str], Any]) -> Self:
        """Returns the method with fields filled that depend on the architecture.

        ``default(family, field)`` looks up the default targets of a peft type for this model; it is ``None`` where the
        model has no architecture's name.
        """
        return self

    # -- as data -----------------------------------------------------------------------------------------------------

    @property
    def neutral(self) -> bool:
        """Whether a fresh adapter of this variant changes nothing; by default as the class says of all."""
        return self.identity_at_init

    @property
    def merges(self) -> bool:
        """Whether the method has a merged form."""
        return type(self).merge is not Method.merge

    def merges_at(self, base: Base) -> bool:
        """Whether there is a merged form at a site; ``merge`` refuses the others."""
        return self.merges

    @property
    def unmerges(self) -> bool:
        """Whether merging inverts."""
        return type(self).unmerge is not Method.unmerge

    @property
    def factored(self) -> bool:
        """Whether ``factors`` is given, by no class above one that changes what ``apply`` computes."""
        for cls in type(self).__mro__:
            if "factors" in vars(cls):
                return cls is not Method
            if _FORMULA & vars(cls).keys():
                return False
        return False

    @property
    def wraps(self) -> bool:
        """Whether the method wraps the call."""
        return hasattr(self, "wrap")

    @property
    def bound(self) -> bool:
        """Whether it adapts a tied tensor itself, hence all the modules that read it."""
        return self.binds_ties or bool(getattr(self, "ensure_weight_tying", False))

    @property
    def sited(self) -> bool:
        """Whether the method acts at sites; prompts do not."""
        return bool(self.kinds)

    def lean(self, kind: str) -> bool:
        """Whether ``apply`` avoids the dense base weight at layers of a kind."""
        return self.weight_free if isinstance(self.weight_free, bool) else kind in self.weight_free

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON-able values, with the method's name under ``"method"``."""
        fields = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"method": type(self).__name__, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Makes the method from ``to_dict``'s result; unknown fields are refused by name."""
        names = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in data.items() if k != "method"}
        for name in given.keys() - names:
            raise TypeError(errors.say(cls.__name__, "fields must be known", repr(name), errors.nearest(name, names)))
        return cls(**given)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        """Returns one site's tensors under peft's keys (after the module path).

        Args:
            base: The layer, of which only static facts are known; ``None`` for a call's leaves.
            leaves: The leaves at the site and those that it shares.
        """
        keys = self._keys(base)
        return {keys[name]: t for name, t in leaves.items() if name in keys}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        """Inverts ``to_peft``."""
        names = {key: name for name, key in self._keys(base).items()}
        return {names[key]: t for key, t in tensors.items()}

    def to_peft_shared(self, scope: str, leaves: Leaves) -> dict[str, Tensor]:
        """Returns the tensors of one scope under peft's keys (after ``base_model.``)."""
        keys = self._shared_keys(scope)
        return {keys[name]: t for name, t in leaves.items() if name in keys}

    def from_peft_shared(self, scope: str, tensors: Mapping[str, Tensor]) -> Leaves:
        """Inverts ``to_peft_shared``."""
        names = {key: name for name, key in self._shared_keys(scope).items()}
        return {names[key]: t for key, t in tensors.items()}

    def _shared_keys(self, scope: str) -> dict[str, str]:
        kept = getattr(self, "save_projection", True)
        return {name: key.replace("{scope}", scope) for name, key in self.shared_keys.items()} if kept else {}

    def _keys(self, base: Base | None) -> dict[str, str]:
        own = self.keys.get(base.kind.name) if base is not None else None
        chosen = own if isinstance(own, Mapping) else self.keys
        return {name: key for name, key in chosen.items() if isinstance(key, str)}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Returns peft's config fields of this method, for the leaves (trained and frozen, by path) that are saved."""
        fields = {f.name: thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for name in self.peft_lacks:
            if fields.pop(name, None):
                raise ValueError(
                    errors.say(f"save_peft of {self.label}", f"peft has no field {name!r}", repr(getattr(self, name)))
                )
        return {**fields, **thaw(freeze(self.peft_fixed))}

    def require_bias(self) -> None:
        """Raises ``ValueError`` unless ``bias`` says which biases are trained."""
        bias: Any = getattr(self, "bias", "none")
        self.require(bias in ("none", "all", self.bias_only), "bias", f"'none', 'all' or {self.bias_only!r}", bias)

    def require_at(self, ok: bool, base: Base, rule: str, found: object, remedy: str = "") -> None:
        """Raises ``ValueError`` naming the method and the site unless ``ok``."""
        if not ok:
            raise ValueError(errors.say(f"{self.label} at {base.path!r}", rule, found, remedy))


@dataclass(frozen=True, kw_only=True)
class Additive(Method):
    """The family ``W' = W + delta``: give ``delta``; bias untouched."""

    additive: ClassVar[bool] = True

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        """Computes the update ``(*lead, out, in)``."""
        raise TypeError(f"{type(self).__name__}: an additive method must define delta.")

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        """Adds the product with the update to the base's output."""
        return base(x) + base.map(x, self.delta(leaves, base))

    def merge(self, leaves: Leaves, base: Base) -> Base:
        """Adds the update."""
        return base.replace(weight=base.weight + self.delta(leaves, base))

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        """Subtracts the update."""
        return base.replace(weight=base.weight - self.delta(leaves, base))
