r"""Optimizers as pure functions: the state is a tree of tensors, and an update returns new trees.

A transform maps ``(grads, state, adapter)`` to ``(updates, state)``, and ``chain`` composes transforms. The step count and
every hyperparameter are tensors in the state, so neither recompiles a graph when it changes. A hyperparameter is a number,
an (N,) tensor or a schedule: a function of the 0-d step, from 0, made of tensor operations.

One state trains a population: with an (N,) hyperparameter, or ``init(adapter, members=N)``, every leaf of the state has one
entry per member, entry i acts on index i of the leading axis of every leaf of stacked adapters, and norms are per member.
``torch.func.vmap(opt.update)`` over such states and adapters gives the same.

Arithmetic is in a leaf's dtype, but at least in float32. The zeros of padded ranks stay zero, since their gradients are.
Updates are differentiable, in gradients and in hyperparameters. Imports schedules, tree, errors.

References:
    Loshchilov and Hutter, AdamW, 2019, arXiv 1711.05101, algorithm 2, and SGDR, 2017, arXiv 1608.03983, eq. (5).
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013, arXiv 1211.5063, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.schedules import (
    Hyper,
    Schedule,
    constant,
    cosine,
    evaluate,
    hyperparameter,
    linear_warmup,
    warmup_cosine,
)
from funcpeft.tree import Adapters, as_tuple, register, tree_leaves, tree_map

__all__ = [
    "Optimizer",
    "Schedule",
    "State",
    "Transform",
    "adamw",
    "broadcast",
    "chain",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "linear_warmup",
    "sgd",
    "warmup_cosine",
]

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
        params = _params(adapter)
        leaves, given = tree_leaves(params), {key: t.hyper for key, t in self.transforms.items()}
        shape = _member_shape(leaves, tree_leaves(given), members)
        device = leaves[0].device if leaves else torch.device("cpu")
        hyper = tree_map(lambda t: t.to(device).expand(shape).clone(), given)
        zeros = lambda: tree_map(lambda t: torch.zeros_like(_wide(t)), params)  # noqa: E731
        memory = {key: {name: zeros() for name in t.memory} for key, t in self.transforms.items()}
        return State(torch.zeros(shape, dtype=torch.int64, device=device), hyper, memory)

    def __call__(self, grads: Any, state: State, adapter: Adapters) -> tuple[Any, State]:
        """Maps ``(grads, state, adapter)`` to ``(updates, state)``; raises as ``update`` does."""
        if not isinstance(state, State) or state.hyper.keys() != self.transforms.keys():
            found = sorted(state.hyper) if isinstance(state, State) else type(state).__name__
            raise TypeError(
                errors.say("optim", f"a State of {sorted(self.transforms)} is required", found, "make it with init")
            )
        params = _params(adapter)
        _require_alike("grads", grads, params)
        updates, count, memory = tree_map(_wide, grads), state.step + 1, {}
        for key, t in self.transforms.items():
            for name, tree in state.memory[key].items():
                _require_alike(f"{key}: {name} of the state", tree, params)
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
        moved = tree_map(lambda p, u: (p + u).to(p.dtype), _params(adapter), updates)
        if isinstance(adapter, tuple):
            return tuple(one.replace(params=p) for one, p in zip(adapter, moved, strict=True)), state
        return adapter.replace(params=moved), state


def chain(*parts: Optimizer | Transform) -> Optimizer:
    """Composes transforms, the first applied first; chains in chains are flattened.

    Example:
        >>> chain(clip_by_global_norm(1.0), adamw(lr=warmup_cosine(1e-3, warmup=10, steps=100)))
        Optimizer(clip_by_global_norm, adamw)
    """
    return Optimizer(*(t for p in parts for t in (p.transforms.values() if isinstance(p, Optimizer) else (p,))))


def sgd(lr: Hyper, momentum: Hyper = 0.0, nesterov: bool = False, weight_decay: Hyper = 0.0) -> Optimizer:
    r"""Stochastic gradient descent.

    .. math:: g \leftarrow g + \lambda p, \quad v \leftarrow \mu v + g, \quad p \leftarrow p - \eta v

    Args:
        lr: Step size :math:`\eta`.
        momentum: :math:`\mu`.
        nesterov: Whether the step is along :math:`g + \mu v`.
        weight_decay: :math:`\lambda`, coupled to the gradient.

    Example:
        >>> from funcpeft.tree import Adapter
        >>> adapter, grads = Adapter({"layer": {"A": torch.ones(2)}}), {"layer": {"A": torch.tensor([1.0, 2.0])}}
        >>> opt = sgd(lr=0.5)
        >>> adapter, state = opt.update(grads, opt.init(adapter), adapter)
        >>> adapter.params["layer"]["A"], state.step
        (tensor([0.5000, 0.0000]), tensor(1))
    """
    if nesterov and not isinstance(momentum, Tensor) and momentum == 0:
        raise ValueError(errors.say("sgd", "nesterov needs a momentum above 0", momentum))

    def rule(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
        fit = _fitted({**now, "descent": -now["lr"]})
        g = tree_map(lambda g, p: torch.addcmul(g, fit(g)["weight_decay"], _wide(p)), grads, _params(adapter))
        v = tree_map(lambda v, g: torch.addcmul(g, fit(g)["momentum"], v), memory["velocity"], g)
        along = tree_map(lambda v, g: torch.addcmul(g, fit(g)["momentum"], v), v, g) if nesterov else v
        return tree_map(lambda t: fit(t)["descent"] * t, along), {"velocity": v}

    hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    return Optimizer(Transform(name="sgd", hyper=hyper, rule=rule, memory=("velocity",), descends=True))


def adamw(lr: Hyper, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.01) -> Optimizer:
    r"""AdamW.

    .. math:: p \leftarrow p - \eta \left( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda p \right)

    with the bias-corrected running means of gradients, :math:`\hat m`, and of their squares, :math:`\hat v`.

    Args:
        lr: Step size :math:`\eta`.
        betas: Decay rates of the two means, in [0, 1).
        eps: :math:`\epsilon`, above 0.
        weight_decay: :math:`\lambda`, decoupled from the gradient.
    """
    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    valid = {"beta1": "[0, 1)", "beta2": "[0, 1)", "eps": "(0, inf)"}
    return Optimizer(Transform(name="adamw", hyper=hyper, rule=_adamw, memory=("m", "v"), valid=valid, descends=True))


def _adamw(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
    root = (1 - now["beta2"] ** now["step"]).sqrt()  # both bias corrections go into the step size and eps
    values = {
        "m": 1 - now["beta1"],
        "v": 1 - now["beta2"],
        "eps": now["eps"] * root,
        "shrink": -now["lr"] * now["weight_decay"],
    }
    fit = _fitted({**values, "descent": -now["lr"] * root / (1 - now["beta1"] ** now["step"])})

    def move(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
        # At 0 the root has no derivative, and v is 0 while a gradient is exactly 0: that of A in a fresh LoRA.
        deviation = v.clamp(min=torch.finfo(v.dtype).tiny).sqrt()
        along = fit(m)["descent"] * (m / (deviation + fit(v)["eps"]))
        return torch.addcmul(along, fit(m)["shrink"], _wide(p))

    m = tree_map(lambda m, g: torch.lerp(m, g, fit(g)["m"]), memory["m"], grads)
    v = tree_map(lambda v, g: torch.lerp(v, g * g, fit(g)["v"]), memory["v"], grads)
    return tree_map(move, m, v, _params(adapter)), {"m": m, "v": v}


def clip_by_global_norm(max_norm: Hyper) -> Optimizer:
    """Scales gradients down so that their norm over all leaves, of each member, is at most ``max_norm``; to be chained."""
    valid = {"max_norm": "[0, inf]"}
    return Optimizer(Transform(name="clip_by_global_norm", hyper={"max_norm": max_norm}, rule=_clip, valid=valid))


def _clip(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
    total = torch.func.vmap(_global_norm)(grads) if now["max_norm"].ndim else _global_norm(grads)
    fit = _fitted({"scale": (now["max_norm"] / (total + 1e-6)).clamp(max=1.0)})
    return tree_map(lambda g: g * fit(g)["scale"], grads), memory


def _global_norm(grads: Any) -> Tensor:
    norms = [torch.linalg.vector_norm(g).double() for g in tree_leaves(grads)]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def broadcast(value: Tensor, leaf: Tensor) -> Tensor:
    """Shapes a hyperparameter, 0-d or (N,), to act on the leading axis of a leaf, in the leaf's dtype and device."""
    return value.reshape(value.shape + (1,) * ((leaf.ndim - 1) * value.ndim)).to(device=leaf.device, dtype=leaf.dtype)


def _fitted(values: Values) -> Callable[[Tensor], Values]:
    """Broadcasts values once for all leaves of a kind: for a small adapter that is most of an update's time."""
    made: dict[Any, Values] = {}

    def fit(leaf: Tensor) -> Values:
        kind = (leaf.ndim, leaf.dtype, leaf.device)
        if kind not in made:
            made[kind] = {name: broadcast(value, leaf) for name, value in values.items()}
        return made[kind]

    return fit


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _params(adapter: Adapters) -> Any:
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


def _require_alike(what: str, tree: Any, params: Any) -> None:
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
