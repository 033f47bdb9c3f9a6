r"""Optimizers as pure functions: the state is a tree of tensors, and an update returns new trees.

A transform maps ``(grads, state, adapter)`` to ``(updates, state)``, and ``chain`` composes transforms. The step count and
every hyperparameter are tensors in the state, so neither recompiles a graph when it changes.

One state trains a population. Where a hyperparameter is given as an (N,) tensor, or ``init`` is told ``members=N``, every
leaf of the state has one entry per member. It goes with stacked adapters: entry i acts on index i of the leading axis of
every leaf, and norms are per member. ``torch.func.vmap(opt.update)`` over such states and adapters gives the same.

A hyperparameter may also be a schedule, a function of the 0-d step tensor made of tensor operations; steps count from 0.
Arithmetic is in a leaf's dtype, but at least in float32. The zeros of padded ranks stay zero, since their gradients are.
Updates are differentiable, in gradients and hyperparameters. Imports tree, errors.

References:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, arXiv 1711.05101, algorithms 1 and 2.
    Loshchilov and Hutter, SGDR, 2017, arXiv 1608.03983, eq. (5). Pascanu et al., 2013, arXiv 1211.5063, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.tree import Adapters, as_tuple, register, tree_leaves, tree_map

Rule = Callable[[Any, dict[str, Any], Adapters, dict[str, Tensor]], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A hyperparameter that depends on the step: ``formula(step, **values)``.

    Args:
        formula: Pure tensor operations on a 0-d step and 0-d values, with a 0-d result.
        values: The schedule's own hyperparameters, numbers or (N,) tensors; they are leaves of the optimizer's state.
    """

    formula: Callable[..., Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, step: Tensor) -> Tensor:
        return self.formula(step, **self.values)


#: What a hyperparameter may be: a number, an (N,) tensor, a schedule.
Hyper = float | Tensor | Schedule | Callable[[Tensor], Tensor]


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
    memory: dict[str, dict[str, Any]]


register(Schedule, lambda s: ((s.values,), s.formula), lambda formula, children: Schedule(formula, *children))
register(State, lambda s: ((s.step, s.hyper, s.memory), None), lambda _, children: State(*children))


@dataclass(frozen=True, kw_only=True, eq=False)
class Transform:
    """One transform of a chain, as a rule.

    Args:
        name: Its key in the state.
        hyper: Hyperparameters by name.
        rule: ``rule(grads, memory, adapter, now) -> (updates, memory)``, pure; ``now`` holds the hyperparameters at this
            step, each 0-d or (N,), and under ``"step"`` the number of this step, from 1. ``broadcast`` fits them to a leaf.
        memory: Names of its trees, which start at zero.
        valid: The interval that a hyperparameter must be in; ``"[0, inf)"`` where none is named.
        descends: Whether the updates are steps to add to ``params``, not gradients.

    Example:
        >>> def sign(grads, memory, adapter, now):
        ...     return tree_map(lambda g: broadcast(now["size"], g) * g.sign(), grads), memory
        >>> chain(Transform(name="sign", hyper={"size": 2.0}, rule=sign), sgd(0.1))
        Optimizer(sign(size), sgd(lr, weight_decay))
    """

    name: str
    hyper: Mapping[str, Any]
    rule: Rule
    memory: tuple[str, ...] = ()
    valid: Mapping[str, str] = field(default_factory=dict)
    descends: bool = False

    def __post_init__(self) -> None:
        hyper = {key: self._checked(key, value) for key, value in self.hyper.items()}
        object.__setattr__(self, "hyper", hyper)

    def _checked(self, key: str, value: Hyper) -> Tensor | Schedule:
        where = f"{self.name}: {key}"
        if callable(value) and not isinstance(value, Tensor):
            schedule = value if isinstance(value, Schedule) else Schedule(value)
            return Schedule(
                schedule.formula, {k: _number(f"{where}: {k}", v, "[-inf, inf]") for k, v in schedule.values.items()}
            )
        return _number(where, value, self.valid.get(key, "[0, inf)"))

    def at(self, hyper: Mapping[str, Any], step: Tensor) -> dict[str, Tensor]:
        """Returns the values that hyperparameters have at a step."""
        return {k: _evaluate(f"{self.name}: {k}", h, step) if isinstance(h, Schedule) else h for k, h in hyper.items()}

    def check_start(self, hyper: Mapping[str, Any], step: Tensor) -> None:
        """Raises if a schedule starts with an invalid value."""
        for key, value in self.at(hyper, step).items():
            _number(f"{self.name}: {key} at step 0", value, self.valid.get(key, "[0, inf)"))


class Optimizer:
    """A chain of transforms: as a whole a transform when called, an optimizer by ``init`` and ``update``.

    Made by ``sgd``, ``adamw``, ``clip_by_global_norm`` and ``chain``.
    """

    def __init__(self, *transforms: Transform) -> None:
        self.transforms: dict[str, Transform] = {}
        for t in transforms:
            again = sum(t.name == s.name for s in self.transforms.values())
            self.transforms[f"{t.name}_{again + 1}" if again else t.name] = t

    def __repr__(self) -> str:
        return f"Optimizer({', '.join(f'{key}({", ".join(t.hyper)})' for key, t in self.transforms.items())})"

    def init(self, adapter: Adapters, members: int | None = None) -> State:
        """Makes the state for an adapter.

        Args:
            adapter: An adapter or a tuple of them, stacked if the state is to be per member; read for shapes only.
            members: N, for a state per member though no hyperparameter differs between members. Without it and without
                (N,) hyperparameters a stacked adapter is one adapter to the optimizer, with one norm.

        Raises:
            ValueError: If hyperparameters and leaves are not all of N members, or a schedule starts with an invalid value.
            TypeError: If ``adapter`` is no adapter, or ``members`` no int.
        """
        leaves = tree_leaves(_params(adapter))
        shape = self._member_shape(leaves, members)
        device = leaves[0].device if leaves else torch.device("cpu")
        step = torch.zeros(shape, dtype=torch.int64, device=device)
        hyper = tree_map(lambda t: t.to(device).expand(shape).clone(), {key: t.hyper for key, t in self.transforms.items()})
        memory: dict[str, dict[str, Any]] = {}
        for key, t in self.transforms.items():
            t.check_start(hyper[key], step)
            memory[key] = {name: tree_map(lambda p: torch.zeros_like(_wide(p)), _params(adapter)) for name in t.memory}
        return State(step, hyper, memory)

    def _member_shape(self, leaves: list[Tensor], members: int | None) -> tuple[int, ...]:
        if members is not None and (isinstance(members, bool) or not isinstance(members, int)):
            raise TypeError(errors.say("optim.init", "members must be an int or None", type(members).__name__))
        hyper = {f"{key}.{name}": h for key, t in self.transforms.items() for name, h in t.hyper.items()}
        counts = {name: t.shape[0] for name, h in hyper.items() for t in tree_leaves(h) if t.ndim}
        counts |= {} if members is None else {"members": members}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise ValueError(errors.say("optim.init", "hyperparameters must be for one number of members, at least 1", counts))
        shape = tuple(set(counts.values()))
        odd = [tuple(t.shape) for t in leaves if tuple(t.shape[:1]) != shape] if shape else []
        if odd:
            required = f"every leaf must have a leading axis of {shape[0]} members"
            raise ValueError(errors.say("optim.init", required, f"shape {odd[0]}", "stack the adapters"))
        return shape

    def __call__(self, grads: Any, state: State, adapter: Adapters) -> tuple[Any, State]:
        """Maps ``(grads, state, adapter)`` to ``(updates, state)``; raises as ``update`` does."""
        params = _params(adapter)
        _require_alike("grads", grads, params)
        if not isinstance(state, State) or state.hyper.keys() != self.transforms.keys():
            found = sorted(state.hyper) if isinstance(state, State) else type(state).__name__
            raise TypeError(
                errors.say("optim", f"a State of {sorted(self.transforms)} is required", found, "make it with init")
            )
        count, memory = state.step + 1, {}
        updates = tree_map(_wide, grads)
        for key, t in self.transforms.items():
            for name, tree in state.memory[key].items():
                _require_alike(f"{key}: {name} of the state", tree, params)
            now = {**t.at(state.hyper[key], state.step), "step": count}
            updates, memory[key] = t.rule(updates, state.memory[key], adapter, now)
        return updates, State(count, state.hyper, memory)

    def update(self, grads: Any, state: State, adapter: Adapters) -> tuple[Any, State]:
        """Makes one step; nothing given is changed.

        Args:
            grads: A tree of the form of ``adapter.params``; a tuple of them for a tuple of adapters.
            state: What ``init`` or the last ``update`` returned.
            adapter: The adapter to step from.

        Returns:
            ``(adapter, state)`` after the step; ``params`` keep their dtypes.

        Raises:
            TypeError: If ``grads`` or ``state`` do not have the adapter's paths and leaves.
            ValueError: If shapes differ from the adapter's, or not exactly one transform makes steps of gradients.
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
        >>> opt = chain(clip_by_global_norm(1.0), adamw(lr=warmup_cosine(1e-3, warmup=10, steps=100)))
        >>> opt.update
        <bound method Optimizer.update of Optimizer(clip_by_global_norm(max_norm), adamw(lr, beta1, beta2, eps, weight_decay))>
    """
    return Optimizer(*(t for p in parts for t in (p.transforms.values() if isinstance(p, Optimizer) else (p,))))


def sgd(lr: Hyper, momentum: Hyper = 0.0, nesterov: bool = False, weight_decay: Hyper = 0.0) -> Optimizer:
    r"""Stochastic gradient descent.

    .. math:: g \leftarrow g + \lambda p, \quad v \leftarrow \mu v + g, \quad p \leftarrow p - \eta v

    Args:
        lr: Step size :math:`\eta`.
        momentum: :math:`\mu`; where it is the number 0 there is no velocity v, nor a leaf for :math:`\mu`.
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
    still = isinstance(momentum, int | float) and momentum == 0
    if nesterov and still:
        raise ValueError(errors.say("sgd", "nesterov needs a momentum above 0", momentum))

    def rule(grads: Any, memory: dict[str, Any], adapter: Adapters, now: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
        along = tree_map(lambda g, p: g + broadcast(now["weight_decay"], g) * p, grads, _params(adapter))
        if not still:
            memory = {"velocity": tree_map(lambda v, g: broadcast(now["momentum"], g) * v + g, memory["velocity"], along)}
            ahead = lambda g, v: g + broadcast(now["momentum"], g) * v if nesterov else v  # noqa: E731
            along = tree_map(ahead, along, memory["velocity"])
        return tree_map(lambda g: -broadcast(now["lr"], g) * g, along), memory

    hyper = {"lr": lr, "weight_decay": weight_decay} | ({} if still else {"momentum": momentum})
    return Optimizer(Transform(name="sgd", hyper=hyper, rule=rule, memory=() if still else ("velocity",), descends=True))


def _adamw(grads: Any, memory: dict[str, Any], adapter: Adapters, now: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    b1, b2, step = now["beta1"], now["beta2"], now["step"]
    m = tree_map(lambda m, g: m + broadcast(1 - b1, g) * (g - m), memory["m"], grads)
    v = tree_map(lambda v, g: broadcast(b2, g) * v + broadcast(1 - b2, g) * g * g, memory["v"], grads)
    size, root = now["lr"] / (1 - b1**step), (1 - b2**step).sqrt()

    def move(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
        # The square root has no derivative at 0, where v is as long as a gradient is exactly 0: A of a fresh LoRA.
        zero = v == 0
        deviation = torch.where(zero, 0.0, torch.where(zero, 1.0, v).sqrt()) / broadcast(root, v)
        return (
            -broadcast(size, m) * (m / (deviation + broadcast(now["eps"], v)))
            - broadcast(now["lr"] * now["weight_decay"], m) * p
        )

    return tree_map(move, m, v, _params(adapter)), {"m": m, "v": v}


def adamw(lr: Hyper, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-8, weight_decay: Hyper = 0.01) -> Optimizer:
    r"""AdamW.

    .. math:: p \leftarrow p - \eta \left( \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda p \right)

    with the bias-corrected means of gradients, :math:`\hat m`, and of their squares, :math:`\hat v`.

    Args:
        lr: Step size :math:`\eta`.
        betas: Decay rates of the two means, in [0, 1).
        eps: :math:`\epsilon`, above 0.
        weight_decay: :math:`\lambda`, decoupled from the gradient.

    Example:
        >>> adamw(lr=torch.tensor([1e-3, 1e-2]))  # two members
        Optimizer(adamw(lr, beta1, beta2, eps, weight_decay))
    """
    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    valid = {"beta1": "[0, 1)", "beta2": "[0, 1)", "eps": "(0, inf)"}
    return Optimizer(Transform(name="adamw", hyper=hyper, rule=_adamw, memory=("m", "v"), valid=valid, descends=True))


def clip_by_global_norm(max_norm: Hyper) -> Optimizer:
    """Scales gradients down so that their norm over all leaves, of each member, is at most ``max_norm``; to be chained.

    Example:
        >>> chain(clip_by_global_norm(1.0), sgd(lr=0.1))
        Optimizer(clip_by_global_norm(max_norm), sgd(lr, weight_decay))
    """
    valid = {"max_norm": "[0, inf]"}
    return Optimizer(Transform(name="clip_by_global_norm", hyper={"max_norm": max_norm}, rule=_clip, valid=valid))


def _clip(grads: Any, memory: dict[str, Any], adapter: Adapters, now: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    limit = now["max_norm"]
    total = torch.func.vmap(_global_norm)(grads) if limit.ndim else _global_norm(grads)
    scale = (limit / (total.to(limit.device) + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * broadcast(scale, g), grads), memory


def _global_norm(grads: Any) -> Tensor:
    norms = [torch.linalg.vector_norm(g).double() for g in tree_leaves(grads)]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])) if norms else torch.zeros(())


def constant(value: float | Tensor) -> Schedule:
    """Schedules one value for all steps."""
    return Schedule(_constant, {"value": _number("constant: value", value)})


def _constant(step: Tensor, value: Tensor) -> Tensor:
    return value.clone()


def linear_warmup(peak: float | Tensor, steps: float | Tensor) -> Schedule:
    """Schedules a line from 0 at step 0 to ``peak`` at step ``steps``, and ``peak`` from there on."""
    values = {"peak": _number("linear_warmup: peak", peak), "steps": _number("linear_warmup: steps", steps, "(0, inf)")}
    return Schedule(_linear_warmup, values)


def _linear_warmup(step: Tensor, peak: Tensor, steps: Tensor) -> Tensor:
    return peak * (step / steps).clamp(max=1.0)


def cosine(peak: float | Tensor, steps: float | Tensor, end: float | Tensor = 0.0) -> Schedule:
    """Schedules half a cosine from ``peak`` at step 0 down to ``end`` at step ``steps``, and ``end`` from there on."""
    return warmup_cosine(peak, 0, steps, end)


def warmup_cosine(peak: float | Tensor, warmup: float | Tensor, steps: float | Tensor, end: float | Tensor = 0.0) -> Schedule:
    """Schedules ``linear_warmup(peak, warmup)``, then half a cosine down to ``end`` at step ``steps``, warmup included.

    Example:
        >>> schedule = warmup_cosine(peak=1.0, warmup=2, steps=6)
        >>> [round(float(schedule(torch.tensor(step))), 2) for step in range(8)]
        [0.0, 0.5, 1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """
    given = {"peak": peak, "warmup": warmup, "steps": steps, "end": end}
    values = {k: _number(f"cosine: {k}", v, "(0, inf)" if k == "steps" else "[0, inf)") for k, v in given.items()}
    if not _holds(values["warmup"] < values["steps"]):
        raise ValueError(errors.say("cosine", f"warmup must be below steps {steps}", warmup))
    return Schedule(_warmup_cosine, values)


def _warmup_cosine(step: Tensor, peak: Tensor, warmup: Tensor, steps: Tensor, end: Tensor) -> Tensor:
    progress = ((step - warmup) / (steps - warmup)).clamp(0.0, 1.0)
    falling = end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * progress))
    return torch.where(step < warmup, peak * step / warmup.clamp(min=1.0), falling)


def broadcast(value: Tensor, leaf: Tensor) -> Tensor:
    """Shapes a hyperparameter, 0-d or (N,), to act on the leading axis of a leaf, in the leaf's dtype and device."""
    return value.reshape(value.shape + (1,) * (leaf.ndim - 1) * value.ndim).to(device=leaf.device, dtype=leaf.dtype)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _params(adapter: Adapters) -> Any:
    params = tuple(one.params for one in as_tuple(adapter))
    return params if isinstance(adapter, tuple) else params[0]


def _evaluate(where: str, schedule: Schedule, step: Tensor) -> Tensor:
    def one(step: Tensor, schedule: Schedule) -> Tensor:
        value = schedule(step)
        if not isinstance(value, Tensor) or value.ndim:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(errors.say(where, "a schedule must return a 0-d tensor", found))
        return value.double()

    return torch.func.vmap(one)(step, schedule) if step.ndim else one(step, schedule)


def _holds(condition: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    try:
        return bool(condition.all())
    except RuntimeError:  # under vmap a value cannot steer Python
        return True


def _number(where: str, value: Any, interval: str = "[0, inf)") -> Tensor:
    """Checks a hyperparameter and makes it a float64 tensor, 0-d or (N,)."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(errors.say(where, "a number, an (N,) tensor or a schedule is required", type(value).__name__))
    t = torch.as_tensor(value, dtype=torch.float64)
    if t.ndim > 1:
        raise ValueError(errors.say(where, "a tensor must be 0-d or (N,), one value per member", f"shape {tuple(t.shape)}"))
    low, high = map(float, interval[1:-1].split(","))
    above = t >= low if interval[0] == "[" else t > low
    if not _holds(above & (t <= high if interval[-1] == "]" else t < high)):
        raise ValueError(errors.say(where, f"must be in {interval}", value))
    return t


def _require_alike(what: str, tree: Any, params: Any) -> None:
    """Raises unless a tree has the paths, leaves and shapes of ``params``."""
    found, wanted = _named(what, tree), _named("params", params)
    if found.keys() != wanted.keys() or isinstance(tree, tuple) != isinstance(params, tuple):
        odd = errors.listed(sorted(found.keys() ^ wanted.keys())) if found.keys() ^ wanted.keys() else type(tree).__name__
        raise TypeError(errors.say(what, "paths and leaves must be those of adapter.params", f"a difference: {odd}"))
    for name, t in found.items():
        if t.shape != wanted[name].shape:
            shape = tuple(wanted[name].shape)
            raise ValueError(
                errors.say(f"{what} at {name!r}", f"shape must be {shape}", tuple(t.shape), "call init for this adapter")
            )


def _named(what: str, tree: Any) -> dict[str, Tensor]:
    parts = tree if isinstance(tree, tuple) else (tree,)
    for part in parts:
        if not isinstance(part, Mapping):
            raise TypeError(errors.say(what, "a tree of the form of adapter.params is required", type(part).__name__))
    return {f"{i}:{path}.{n}": t for i, part in enumerate(parts) for path, leaves in part.items() for n, t in leaves.items()}
