"""Transforms of gradients and chains of them: the parts that optimizers are made of. See ``optim``. Imports schedules, tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.schedules import evaluate, hyperparameter
from funcpeft.tree import Adapters, as_tuple, register, tree_leaves, tree_map

Memory = dict[str, Any]
Values = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class State:
    """The state of an optimizer; every tensor has a leading axis of N if it is per member.

    Attributes:
        step: Updates made so far, int64.
        hyper: For each transform of the chain its hyperparameters, float64 tensors or schedules of such.
        memory: For each transform its trees of the form of the gradients, such as momenta.
    """

    step: Tensor
    hyper: dict[str, dict[str, Any]]
    memory: dict[str, Memory]


register(
    State,
    lambda s: ((s.step, s.hyper, s.memory), None),
    lambda _, children: State(*children),
    lambda s: ("step", "hyper", "memory"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """One transform of a chain: a name, its key in the state, and a rule.

    Args:
        hyper: Hyperparameters by name, and ``valid`` the intervals they must be in, ``"[0, inf)"`` where none is named.
        rule: ``rule(grads, memory, adapter, now) -> (updates, memory)``, pure; ``now`` holds the hyperparameters at this
            step, each 0-d or (N,), and under ``"step"`` the number of this step, from 1. ``broadcast`` fits them to a leaf.
        memory: Names of its trees, which start at zero.
        descends: Whether the updates are steps to add to ``params``, not gradients.

    Example:
        >>> def sign(grads, memory, adapter, now):
        ...     return tree_map(lambda g: broadcast(now["size"], g) * g.sign(), grads), memory
        >>> from funcpeft.optim import sgd
        >>> chain(Transform(name="sign", hyper={"size": 2.0}, rule=sign), sgd(0.1))
        Optimizer(sign, sgd)
    """

    name: str
    hyper: Mapping[str, Any]
    rule: Callable[[Any, Memory, Adapters, Values], tuple[Any, Memory]]
    memory: tuple[str, ...] = ()
    valid: Mapping[str, str] = field(default_factory=dict)
    descends: bool = False

    def __post_init__(self) -> None:
        made = {k: hyperparameter(f"{self.name}: {k}", v, self.valid.get(k, "[0, inf)")) for k, v in self.hyper.items()}
        object.__setattr__(self, "hyper", made)


class Optimizer:
    """A chain of transforms: itself a transform when called, an optimizer by ``init`` and ``update``; made by ``chain``."""

    def __init__(self, *transforms: Transform) -> None:
        self.transforms: dict[str, Transform] = {}
        for t in transforms:
            again = sum(t.name == s.name for s in self.transforms.values())
            self.transforms[f"{t.name}_{again + 1}" if again else t.name] = t

    def __repr__(self) -> str:
        return f"Optimizer({', '.join(self.transforms)})"

    def init(self, adapter: Adapters, members: int | None = None) -> State:
        """Makes the state for an adapter.

        Args:
            adapter: An adapter or a tuple of them, stacked if the state is to be per member; read for shapes only.
            members: N, for a state per member though no hyperparameter differs between members. Without it and without
                (N,) hyperparameters a stacked adapter is one adapter to the optimizer, with one norm.

        Raises:
            ValueError: If hyperparameters and leaves are not all of N members.
            TypeError: If ``adapter`` is no adapter.
        """
        params = params_of(adapter)
        leaves, given = tree_leaves(params), {key: t.hyper for key, t in self.transforms.items()}
        shape = _member_shape(leaves, tree_leaves(given), members)
        device = leaves[0].device if leaves else torch.device("cpu")
        hyper = tree_map(lambda t: t.to(device).expand(shape).clone(), given)
        zeros = lambda: tree_map(lambda t: torch.zeros_like(wide(t)), params)  # noqa: E731
        memory = {key: {name: zeros() for name in t.memory} for key, t in self.transforms.items()}
        return State(torch.zeros(shape, dtype=torch.int64, device=device), hyper, memory)

    def __call__(self, grads: Any, state: State, adapter: Adapters) -> tuple[Any, State]:
        """Maps ``(grads, state, adapter)`` to ``(updates, state)``; raises as ``update`` does."""
        if not isinstance(state, State) or state.hyper.keys() != self.transforms.keys():
            found = sorted(state.hyper) if isinstance(state, State) else type(state).__name__
            raise TypeError(
                errors.say("optim", f"a State of {sorted(self.transforms)} is required", found, "make it with init")
            )
        params = params_of(adapter)
        require_alike("grads", grads, params)
        updates, count, memory = tree_map(wide, grads), state.step + 1, {}
        for key, t in self.transforms.items():
            for name, tree in state.memory[key].items():
                require_alike(f"{key}: {name} of the state", tree, params)
            now = {k: evaluate(f"{key}: {k}", h, state.step) for k, h in state.hyper[key].items()}
            updates, memory[key] = t.rule(updates, state.memory[key], adapter, {**now, "step": count})
        return updates, State(count, state.hyper, memory)

    def update(self, grads: Any, state: State, adapter: Adapters) -> tuple[Any, State]:
        """Makes one step and returns ``(adapter, state)`` after it; nothing given is changed, dtypes stay.

        Args:
            grads: A tree of the form of ``adapter.params``; a tuple of them for a tuple of adapters.
            state: What ``init`` or the last ``update`` returned.
            adapter: The adapter to step from.

        Raises:
            TypeError: If ``grads`` or ``state`` do not have the paths, leaves and shapes of ``adapter.params``.
            ValueError: If not exactly one transform of the chain turns gradients into steps.
        """
        if sum(t.descends for t in self.transforms.values()) != 1:
            raise ValueError(errors.say("optim.update", "the chain must hold one optimizer such as sgd or adamw", repr(self)))
        updates, state = self(grads, state, adapter)
        moved = tree_map(lambda p, u: (p + u).to(p.dtype), params_of(adapter), updates)
        if isinstance(adapter, tuple):
            return tuple(one.replace(params=p) for one, p in zip(adapter, moved, strict=True)), state
        return adapter.replace(params=moved), state


def chain(*parts: Optimizer | Transform) -> Optimizer:
    """Composes transforms, the first applied first; chains in chains are flattened.

    Example:
        >>> from funcpeft.optim import adamw, clip_by_global_norm, warmup_cosine
        >>> chain(clip_by_global_norm(1.0), adamw(lr=warmup_cosine(1e-3, warmup=10, steps=100)))
        Optimizer(clip_by_global_norm, adamw)
    """
    return Optimizer(*(t for p in parts for t in (p.transforms.values() if isinstance(p, Optimizer) else (p,))))


def broadcast(value: Tensor, leaf: Tensor) -> Tensor:
    """Shapes a hyperparameter, 0-d or (N,), to act on the leading axis of a leaf, in the leaf's dtype and device."""
    return value.reshape(value.shape + (1,) * ((leaf.ndim - 1) * value.ndim)).to(device=leaf.device, dtype=leaf.dtype)


def fitted(values: Values) -> Callable[[Tensor], Values]:
    """Broadcasts values once for all leaves of a kind: for a small adapter that is most of an update's time."""
    made: dict[Any, Values] = {}

    def fit(leaf: Tensor) -> Values:
        kind = (leaf.ndim, leaf.dtype, leaf.device)
        if kind not in made:
            made[kind] = {name: broadcast(value, leaf) for name, value in values.items()}
        return made[kind]

    return fit


def wide(t: Tensor) -> Tensor:
    """Returns a leaf in float32 or wider, the precision in which updates are computed."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def params_of(adapter: Adapters) -> Any:
    """Returns the trained trees of an adapter, or of a tuple of them."""
    params = tuple(one.params for one in as_tuple(adapter))
    return params if isinstance(adapter, tuple) else params[0]


def _member_shape(leaves: list[Tensor], hyper: list[Tensor], members: int | None) -> tuple[int, ...]:
    counts = {t.shape[0] for t in hyper if t.ndim} | (set() if members is None else {members})
    if len(counts) > 1 or any(n < 1 for n in counts):
        required = "members and every (N,) hyperparameter must agree on N, at least 1"
        raise ValueError(errors.say("optim.init", required, sorted(counts)))
    for t in leaves:
        if counts and (not t.ndim or t.shape[0] not in counts):
            required = f"every leaf must have a leading axis of {counts.pop()} members"
            raise ValueError(errors.say("optim.init", required, f"shape {tuple(t.shape)}", "stack the adapters"))
    return tuple(counts)


def require_alike(what: str, tree: Any, params: Any) -> None:
    """Raises ``TypeError`` unless a tree has the paths, leaves and shapes of trained leaves, or a tuple of such trees."""
    found, wanted = (t if isinstance(t, tuple) else (t,) for t in (tree, params))
    if isinstance(tree, tuple) != isinstance(params, tuple) or not all(isinstance(t, Mapping) for t in found):
        raise TypeError(errors.say(what, "a tree of the form of adapter.params is required", type(tree).__name__))
    if _shapes(found) != _shapes(wanted):
        odd = sorted({str(k[1:]) for k, _ in _shapes(found).items() ^ _shapes(wanted).items()})
        raise TypeError(errors.say(what, "paths, leaves and shapes must be those of adapter.params", f"a difference at {odd}"))


def _shapes(trees: tuple[Any, ...]) -> dict[tuple[int, str, str], tuple[int, ...]]:
    return {
        (i, path, n): tuple(t.shape) for i, tree in enumerate(trees) for path, leaves in tree.items() for n, t in leaves.items()
    }
