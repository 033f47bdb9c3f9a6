"""Many adapters in one tree: stack and unstack.

A stacked adapter has a leading member axis on every leaf. Ranks may differ: the rank axes are padded with zeros to the
largest, which is exact and stays so in training (both gradients of a padded pair are zero), and ``unstack`` cuts them back
by the ``rank`` that every site carries. Equal frozen leaves are kept once, as an expanded view. Imports tree, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors
from funcpeft.tree import Adapter, Adapters, Leaves, Tree, as_tuple, tree_map


def stack(adapters: Iterable[Adapters]) -> Any:
    """Stacks N adapters into one whose leaves have a leading axis of N.

    Args:
        adapters: What ``net.init`` made, N times; ranks and scalings may differ where the method declares its rank axes.

    Raises:
        ValueError: If there is none, or shapes differ along another axis than the rank's.
        TypeError: If paths, leaves or their dtypes differ.
    """
    given = [] if isinstance(adapters, Adapter) else list(adapters)
    if not given:
        found = "one Adapter" if isinstance(adapters, Adapter) else "an empty list"
        raise ValueError(errors.say("stack", "a list of at least one adapter is required", found))
    several = [as_tuple(a) for a in given]
    if len({len(s) for s in several}) > 1:
        raise TypeError(errors.say("stack", "every member must have as many adapters", sorted({len(s) for s in several})))
    made = tuple(_stack(group) for group in zip(*several, strict=True))
    return made if isinstance(given[0], tuple) else made[0]


def _stack(members: Sequence[Adapter]) -> Adapter:
    axes = dict(members[0].rank_axes)
    params = _stack_trees([m.params for m in members], axes, share=False)
    return Adapter(params, _stack_trees([m.consts for m in members], axes, share=True), members[0].rank_axes)


def _stack_trees(trees: Sequence[Tree], axes: dict[str, int], *, share: bool) -> Tree:
    first = trees[0]
    for t in trees[1:]:
        if t.keys() != first.keys() or any(t[p].keys() != first[p].keys() for p in first):
            odd = sorted(t.keys() ^ first.keys()) or sorted(p for p in first if t[p].keys() != first[p].keys())
            raise TypeError(
                errors.say("stack", "every member must have the same paths and leaves", f"a difference at {errors.listed(odd)}")
            )
    return {
        path: {name: _stack_leaf([t[path][name] for t in trees], path, name, axes.get(name), share) for name in leaves}
        for path, leaves in first.items()
    }


def _stack_leaf(leaves: list[Tensor], path: str, name: str, axis: int | None, share: bool) -> Tensor:
    dtypes = {t.dtype for t in leaves}
    if len(dtypes) > 1:
        found = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(errors.say(f"stack at {path!r}", f"leaf {name!r} must have one dtype", found, "name it in net.init"))
    shapes = {t.shape for t in leaves}
    if len(shapes) > 1:
        leaves = _pad(leaves, path, name, axis)
    if share and len(shapes) == 1 and all(t is leaves[0] or torch.equal(t, leaves[0]) for t in leaves[1:]):
        return leaves[0].clone().expand(len(leaves), *leaves[0].shape)
    return torch.stack(leaves)


def _pad(leaves: list[Tensor], path: str, name: str, axis: int | None) -> list[Tensor]:
    sizes = sorted({tuple(t.shape) for t in leaves})
    if axis is None or len({t.ndim for t in leaves}) > 1:
        raise ValueError(errors.say(f"stack at {path!r}", f"leaf {name!r} must have one shape, it has no rank axis", sizes))
    widest = max(t.shape[axis] for t in leaves)
    padded = [F.pad(t, [0, 0] * (-axis - 1) + [0, widest - t.shape[axis]]) for t in leaves]
    if len({t.shape for t in padded}) > 1:
        raise ValueError(errors.say(f"stack at {path!r}", f"leaf {name!r} may differ along its rank only", sizes))
    return padded


def members(adapter: Adapters) -> int:
    """Counts the members of a stacked adapter.

    Raises:
        ValueError: If the leaves have no common leading axis.
    """
    sizes: set[int] = set()
    for a in as_tuple(adapter):
        for tree in (a.params, a.consts):
            for leaves in tree.values():
                for t in leaves.values():
                    shape = t.shape
                    sizes.add(shape[0] if shape else 0)
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            errors.say("unstack", "every leaf must have the same leading axis", f"sizes {sorted(sizes)}", "make it with stack")
        )
    return sizes.pop()


def select(stacked: Adapters, index: Sequence[int] | Tensor) -> Any:
    """Returns the stack of some members, in the order given; a member may come several times.

    Args:
        stacked: What ``stack`` made of N adapters.
        index: Positions of members, in [0, N); a 1-d integer tensor may differ from call to call of a compiled function.

    Raises:
        ValueError: If a position is out of range, or there is none.
    """
    count = members(stacked)
    if not isinstance(index, Tensor):
        odd = [i for i in index if not 0 <= i < count]
        if odd or not len(index):
            raise ValueError(errors.say("select", f"positions must be in [0, {count})", odd or "none"))
    return picked(stacked, index, share=False)


def picked(stacked: Adapters, index: Sequence[int] | Tensor, *, share: bool = True) -> Any:
    """Does what ``select`` does without a check; with ``share`` leaves that all members share are views."""
    made = tuple(
        Adapter(_taken(a.params, index, share), _taken(a.consts, index, share), a.rank_axes) for a in as_tuple(stacked)
    )
    return made if isinstance(stacked, tuple) else made[0]


def narrowed(stacked: Adapters, start: int, stop: int) -> Any:
    """Returns the members from ``start`` on and before ``stop``, as views."""
    return _each(stacked, lambda t: t[start:stop])


def member(stacked: Adapters, i: int) -> Any:
    """Returns one member as it acts in a stack, as views: ranks stay padded."""
    return _each(stacked, lambda t: t[i])


def _each(stacked: Adapters, f: Callable[[Tensor], Tensor]) -> Any:
    made = tuple(a.replace(params=tree_map(f, a.params), consts=tree_map(f, a.consts)) for a in as_tuple(stacked))
    return made if isinstance(stacked, tuple) else made[0]


def _taken(tree: Tree, index: Sequence[int] | Tensor, share: bool) -> Tree:
    def take(t: Tensor) -> Tensor:
        if not t.stride(0):  # all members share it
            return (t[:1] if share else t[:1].clone()).expand(len(index), *t.shape[1:])
        return t.index_select(0, torch.as_tensor(index, device=t.device))

    return {path: {name: take(t) for name, t in leaves.items()} for path, leaves in tree.items()}


def unstack(adapter: Adapters) -> list[Any]:
    """Splits a stacked adapter into its members, ranks cut back; inverts ``stack`` bit for bit."""
    count = members(adapter)
    several = [[_member(a, i) for a in as_tuple(adapter)] for i in range(count)]
    return [tuple(s) if isinstance(adapter, tuple) else s[0] for s in several]


def _member(adapter: Adapter, index: int) -> Adapter:
    axes = dict(adapter.rank_axes)

    def cut(path: str, leaves: Leaves) -> Leaves:
        rank = adapter.consts.get(path, {}).get("rank")
        out: Leaves = {}
        for name, t in leaves.items():
            one = t[index]
            if rank is not None and name in axes:
                one = one.narrow(axes[name], 0, int(rank[index]))
            out[name] = one.clone()
        return out

    def tree(t: Tree) -> Tree:
        return {path: cut(path, leaves) for path, leaves in t.items()}

    return Adapter(tree(adapter.params), tree(adapter.consts), adapter.rank_axes)
