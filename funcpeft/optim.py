r"""Optimizers as pure functions: the state is a tree of tensors, and an update returns new trees.

A transform maps ``(grads, state, adapter)`` to ``(updates, state)``, and ``chain`` composes transforms. The step count and
every hyperparameter are tensors in the state, so neither recompiles a graph when it changes. A hyperparameter is a number,
an (N,) tensor or a schedule: a function of the 0-d step, from 0, made of tensor operations.

One state trains a population: with an (N,) hyperparameter, or ``init(adapter, members=N)``, every leaf of the state has one
entry per member, entry i acts on index i of the leading axis of every leaf of stacked adapters, and norms are per member.
``torch.func.vmap(opt.update)`` over such states and adapters gives the same.

Arithmetic is in a leaf's dtype, but at least in float32. The zeros of padded ranks stay zero, since their gradients are.
Updates are differentiable, in gradients and in hyperparameters. Imports transforms, schedules, tree, errors.

References:
    Loshchilov and Hutter, AdamW, 2019, arXiv 1711.05101, algorithm 2, and SGDR, 2017, arXiv 1608.03983, eq. (5).
    Pascanu et al., On the difficulty of training recurrent neural networks, 2013, arXiv 1211.5063, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.schedules import (
    Hyper,
    Schedule,
    constant,
    cosine,
    linear_warmup,
    warmup_cosine,
)
from funcpeft.transforms import (
    Memory,
    Optimizer,
    State,
    Transform,
    Values,
    broadcast,
    chain,
    fitted,
    params_of,
    wide,
)
from funcpeft.tree import Adapter, Adapters, as_tuple, tree_leaves, tree_map

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
    "hold",
    "linear_warmup",
    "lora_fa",
    "lora_plus",
    "riemannian",
    "sgd",
    "warmup_cosine",
]


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
        fit = fitted({**now, "descent": -now["lr"]})
        g = tree_map(lambda g, p: torch.addcmul(g, fit(g)["weight_decay"], wide(p)), grads, params_of(adapter))
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
    return _adamw_by(_adamw, lr, betas, eps, weight_decay)


def _adamw_by(rule: Any, lr: Hyper, betas: tuple[Hyper, Hyper], eps: Hyper, weight_decay: Hyper) -> Optimizer:
    hyper = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    valid = {"beta1": "[0, 1)", "beta2": "[0, 1)", "eps": "(0, inf)"}
    return Optimizer(Transform(name="adamw", hyper=hyper, rule=rule, memory=("m", "v"), valid=valid, descends=True))


def _adamw(grads: Any, memory: Memory, adapter: Adapters, now: Values, *, late: bool = False) -> tuple[Any, Memory]:
    """Makes a step; with ``late`` eps is added before the bias of v is corrected, and the parameters decay after the step."""
    root = (1 - now["beta2"] ** now["step"]).sqrt()  # both bias corrections go into the step size and eps
    decay = now["lr"] * now["weight_decay"]
    values = {"m": 1 - now["beta1"], "v": 1 - now["beta2"], "eps": now["eps"] * (1 if late else root), "shrink": -decay}
    descent = -now["lr"] * root / (1 - now["beta1"] ** now["step"])
    fit = fitted({**values, "descent": descent * (1 - decay) if late else descent})

    def move(m: Tensor, v: Tensor, p: Tensor) -> Tensor:
        # At 0 the root has no derivative, and v is 0 while a gradient is exactly 0: that of A in a fresh LoRA.
        deviation = v.clamp(min=torch.finfo(v.dtype).tiny).sqrt()
        along = fit(m)["descent"] * (m / (deviation + fit(v)["eps"]))
        return torch.addcmul(along, fit(m)["shrink"], wide(p))

    m = tree_map(lambda m, g: torch.lerp(m, g, fit(g)["m"]), memory["m"], grads)
    v = tree_map(lambda v, g: torch.lerp(v, g * g, fit(g)["v"]), memory["v"], grads)
    return tree_map(move, m, v, params_of(adapter)), {"m": m, "v": v}


def clip_by_global_norm(max_norm: Hyper) -> Optimizer:
    """Scales gradients down so that their norm over all leaves, of each member, is at most ``max_norm``; to be chained."""
    valid = {"max_norm": "[0, inf]"}
    return Optimizer(Transform(name="clip_by_global_norm", hyper={"max_norm": max_norm}, rule=_clip, valid=valid))


def _clip(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
    total = torch.func.vmap(_global_norm)(grads) if now["max_norm"].ndim else _global_norm(grads)
    fit = fitted({"scale": (now["max_norm"] / (total + 1e-6)).clamp(max=1.0)})
    return tree_map(lambda g: g * fit(g)["scale"], grads), memory


def _global_norm(grads: Any) -> Tensor:
    norms = [torch.linalg.vector_norm(g).double() for g in tree_leaves(grads)]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


# -- of low-rank factors ---------------------------------------------------------------------------------------------------


def hold(*names: str) -> Optimizer:
    """Leaves the leaves of these names where they are: after an optimizer in a chain it undoes decay and momentum too."""

    def rule(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
        return by_leaf(lambda one, path, name, g: torch.zeros_like(g) if name in names else g, adapter, grads), memory

    return Optimizer(Transform(name="hold", hyper={}, rule=rule))


def riemannian(reg: Hyper = 1e-2) -> Optimizer:
    r"""Preconditions the gradients of low-rank factors by each other, at every site that trains A and B; to be chained.

    .. math:: \nabla A \leftarrow (B^\top B + \rho I)^{-1} \nabla A, \qquad
       \nabla B \leftarrow \nabla B \, (A A^\top + \rho I)^{-1}

    A (\*lead, r, in), B (\*lead, out, r); leaves of these names that have other shapes are no such pair.

    Args:
        reg: :math:`\rho`, above 0: the damping, without which a fresh B of zeros has no inverse.

    References:
        Zhang and Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, 2024, arXiv 2402.02347, eq. (4).
    """

    def rule(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
        def turn(one: Adapter, path: str, name: str, g: Tensor) -> Tensor:
            pair = _pair(one.params[path])
            if pair is None or name not in ("A", "B"):
                return g
            a, b = pair
            if name == "A":
                return torch.linalg.solve(_damped(b.mT @ b, now["reg"]), g)
            return torch.linalg.solve(_damped(a @ a.mT, now["reg"]), g, left=False)

        return by_leaf(turn, adapter, grads), memory

    return Optimizer(Transform(name="riemannian", hyper={"reg": reg}, rule=rule, valid={"reg": "(0, inf)"}))


def lora_fa(lr: Hyper, betas: tuple[Hyper, Hyper] = (0.9, 0.999), eps: Hyper = 1e-6, weight_decay: Hyper = 0.0) -> Optimizer:
    r"""LoRA-FA: AdamW on B alone, with the gradient that is nearest to that of the whole update; A stays as it is drawn.

    .. math:: \nabla B \leftarrow s^{-2} \, \nabla B \, (A A^\top + 10^{-8} I)^{+}

    As in peft its AdamW adds eps to the running deviation before its bias is corrected, and decays after the step. Where A is
    moved from ``params`` to ``consts``, no gradient and no momentum is computed for it: the method's saving of memory.

    Args:
        lr: Step size.
        betas: As of ``adamw``.
        eps: See above.
        weight_decay: Likewise.

    References:
        Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for LLM Fine-tuning, 2023, arXiv 2308.03303.
        Wang et al., LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, 2024, arXiv 2407.18242, theorem 2.1 (the gradient).
    """

    def rule(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
        def turn(one: Adapter, path: str, name: str, g: Tensor) -> Tensor:
            leaves = one.leaves(path)
            pair = _pair(leaves) if name == "B" and "scaling" in leaves else None
            if pair is None:
                return g
            a, s = pair[0], leaves["scaling"].to(g.dtype)
            s = s.reshape(s.shape + (1,) * (g.ndim - s.ndim))
            # a pseudo-inverse: of rows that depend on each other an inverse would blow up what rounding leaves in g
            return g @ torch.linalg.pinv(_damped(a @ a.mT, torch.tensor(1e-8)), hermitian=True) / s**2

        return by_leaf(turn, adapter, grads), memory

    late = partial(_adamw, late=True)
    return chain(Transform(name="lora_fa", hyper={}, rule=rule), _adamw_by(late, lr, betas, eps, weight_decay), hold("A"))


def lora_plus(
    lr: Hyper,
    ratio: Hyper = 16.0,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    embeddings: tuple[str, ...] | list[str] = (),
    embedding_lr: Hyper = 1e-6,
    norms: tuple[str, ...] | list[str] = (),
) -> Optimizer:
    """LoRA+: AdamW with a larger step for B, and for vectors, than for the rest.

    Args:
        lr: Step size.
        ratio: How many times as large it is for leaves ``B`` and for vectors.
        betas: As of ``adamw``.
        eps: As of ``adamw``.
        weight_decay: As of ``adamw``, of all leaves but biases and what ``norms`` names.
        embeddings: Paths in the adapter of embeddings, whose leaves step by ``embedding_lr``.
        embedding_lr: Step size of those.
        norms: Paths in the adapter of normalization layers that are trained whole, whose vectors do not decay; peft 0.21.2 has
            those of ``torch.nn.LayerNorm`` here.

    Raises:
        ValueError: In an update, if a path of ``embeddings`` or ``norms`` is none of the adapter's.

    References:
        Hayou et al., LoRA+: Efficient Low Rank Adaptation of Large Models, 2024, arXiv 2402.12354, section 4.
    """

    def rule(grads: Any, memory: Memory, adapter: Adapters, now: Values) -> tuple[Any, Memory]:
        _require_paths({"embeddings": embeddings, "norms": norms}, adapter)
        fit = fitted({**now, "large": now["lr"] * now["ratio"]})

        def scale(one: Adapter, path: str, name: str, step: Tensor) -> Tensor:
            vector = step.ndim - now["lr"].ndim == 1
            if not (vector and ("bias" in path.rsplit(".", 1)[-1] or name == "bias" or _named(path, norms))):
                step = step - fit(step)["weight_decay"] * wide(one.params[path][name])
            rate = "embedding_lr" if _named(path, embeddings) else "large" if name == "B" or vector else "lr"
            return fit(step)[rate] * step

        return by_leaf(scale, adapter, grads), memory

    hyper = {"lr": lr, "ratio": ratio, "weight_decay": weight_decay, "embedding_lr": embedding_lr}
    return chain(adamw(1.0, betas, eps, 0.0), Transform(name="lora_plus", hyper=hyper, rule=rule))


def by_leaf(f: Callable[[Adapter, str, str, Tensor], Tensor], adapter: Adapters, grads: Any) -> Any:
    """Maps ``f(adapter, path, name, gradient)`` over a tree of gradients, or a tuple of them."""
    trees = grads if isinstance(grads, tuple) else (grads,)
    made = tuple(
        {path: {n: f(one, path, n, g) for n, g in leaves.items()} for path, leaves in tree.items()}
        for one, tree in zip(as_tuple(adapter), trees, strict=True)
    )
    return made if isinstance(grads, tuple) else made[0]


def _pair(leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Returns A ``(*lead, r, in)`` and B ``(*lead, out, r)`` of a low-rank product, ``None`` if these are none."""
    if not {"A", "B"} <= leaves.keys():
        return None
    a, b = wide(leaves["A"]), wide(leaves["B"])
    fits = a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]
    return (a, b) if fits else None


def _damped(gram: Tensor, reg: Tensor) -> Tensor:
    """Adds a multiple of the identity to matrices ``(..., r, r)``."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram + broadcast(reg, gram) * eye


def _named(path: str, names: tuple[str, ...] | list[str]) -> bool:
    """Whether a path, or the module whose parameter it is, is among names."""
    return path in names or path.rpartition(".")[0] in names


def _require_paths(given: Mapping[str, tuple[str, ...] | list[str]], adapter: Adapters) -> None:
    paths = [path for one in as_tuple(adapter) for path in one.params]
    for field, names in given.items():
        for name in names:
            if not any(_named(path, [name]) for path in paths):
                rule, remedy = f"{field} must be paths of the adapter", errors.nearest(name, paths)
                raise ValueError(errors.say("lora_plus", rule, repr(name), remedy))
