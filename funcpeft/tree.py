"""Trees: the adapter node, and its registration with torch's pytree and optree.

An adapter is two trees ``{path: {leaf name: tensor}}``: ``params``, what is trained, and ``consts``, what is not. The path
is a site's, or a scope's for leaves that several sites share (``""`` is the whole method). Absent means an absent key,
never ``None``. Imports torch and optree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
import torch.utils._pytree as pytree
from torch import Tensor

Leaves = dict[str, Tensor]
Tree = dict[str, Leaves]

#: The optree namespace in which funcpeft's nodes are registered.
NAMESPACE = "funcpeft"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, or a stack of them: what is trained and what is not.

    Attributes:
        params: Trainable tensors, ``{path: {leaf name: tensor}}``; all floating point.
        consts: Frozen tensors of the same form: scalings, projections, indices.
        rank_axes: For each leaf whose size along one axis is the rank, that axis counted from the end. Static; what
            ``stack`` pads and ``unstack`` cuts.
    """

    params: Tree = field(default_factory=dict)
    consts: Tree = field(default_factory=dict)
    rank_axes: tuple[tuple[str, int], ...] = ()

    def replace(self, **changes: Any) -> Adapter:
        """Returns a copy with ``params`` and or ``consts`` replaced."""
        fields = {"params": self.params, "consts": self.consts, "rank_axes": self.rank_axes}
        unknown = changes.keys() - fields.keys()
        if unknown:
            raise TypeError(f"Adapter.replace: fields are params, consts and rank_axes, got {sorted(unknown)}.")
        return Adapter(**{**fields, **changes})

    def leaves(self, path: str) -> Leaves:
        """Returns the leaves at one path, trained and frozen together."""
        return {**self.consts.get(path, {}), **self.params.get(path, {})}

    def __repr__(self) -> str:
        count = sum(t.numel() for leaves in self.params.values() for t in leaves.values())
        sites = [p for p in self.params if p]
        return f"Adapter({count:,} trainable numbers at {len(sites)} paths)"


#: What ``net.init`` returns and a net takes: one adapter for one method, a tuple of them for a list of methods.
Adapters = Adapter | tuple[Adapter, ...]


def register(
    node: type, flatten: Callable[..., Any], unflatten: Callable[..., Any], names: Callable[[Any], tuple[str, ...]]
) -> None:
    """Registers a node type with torch's pytree and with optree.

    Args:
        node: The type.
        flatten: Gives ``(children, static)`` of an object; static is hashable.
        unflatten: Makes an object of ``(static, children)``.
        names: Gives the names of the children of an object, for paths.
    """

    def keyed(item: Any) -> Any:
        children, static = flatten(item)
        return [(pytree.GetAttrKey(n), child) for n, child in zip(names(item), children, strict=True)], static

    pytree.register_pytree_node(node, flatten, lambda children, static: unflatten(static, children), flatten_with_keys_fn=keyed)
    optree.register_pytree_node(node, lambda item: (*flatten(item), names(item)), unflatten, namespace=NAMESPACE)


register(
    Adapter,
    lambda a: ((a.params, a.consts), a.rank_axes),
    lambda axes, children: Adapter(children[0], children[1], axes),
    lambda a: ("params", "consts"),
)


torch.serialization.add_safe_globals([Adapter])


def tree_map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps a function over the tensors of trees of equal structure."""
    return optree.tree_map(f, tree, *rest, namespace=NAMESPACE)


def tree_leaves(tree: Any) -> list[Any]:
    """Lists the tensors of a tree in a fixed order (dict keys sorted)."""
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def as_tuple(adapter: Adapters) -> tuple[Adapter, ...]:
    """Returns the adapters as a tuple, whether one or several were given."""
    found = adapter if isinstance(adapter, tuple) else (adapter,)
    for one in found:
        if not isinstance(one, Adapter):
            raise TypeError(f"adapter: an Adapter or a tuple of them is required, got {type(one).__name__}.")
    return found


def copied(tree: Mapping[str, Leaves]) -> Tree:
    """Returns a tree of new dicts and cloned tensors, so that nothing aliases the argument."""
    return {path: {name: t.clone() for name, t in leaves.items()} for path, leaves in tree.items()}


def all_finite(t: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; ``True`` where a transform hides its values."""
    if not t.is_floating_point() or torch.compiler.is_compiling():
        return True
    try:
        return bool(torch.isfinite(t).all())
    except RuntimeError:  # under vmap a value cannot steer Python; the check is left to the caller outside
        return True


#: Stands for a tensor among the leaves of an output.
_TENSOR = object()


def map_members(f: Callable[..., tuple[list[Any], Any]], in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Any], Any]:
    """Runs a function under ``vmap`` whose output may hold other things than tensors.

    Args:
        f: Returns the leaves of its output and their tree (torch's pytree, of which ``None`` is a leaf).
        in_dims: As in ``torch.func.vmap``.
        args: Arguments of ``f``.

    Returns:
        The leaves, tensors with a leading axis and anything else as ``f`` returned it, and their tree.
    """
    spec: Any = None
    places: list[Any] = []

    def tensors_of(*args: Any) -> list[Tensor]:
        nonlocal spec, places
        leaves, spec = f(*args)
        places = [_TENSOR if isinstance(t, Tensor) else t for t in leaves]
        return [t for t in leaves if isinstance(t, Tensor)]

    made = iter(torch.func.vmap(tensors_of, in_dims=in_dims)(*args))
    return [next(made) if x is _TENSOR else x for x in places], spec
