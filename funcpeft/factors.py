"""Factors of gradients: from the meetings of one forward and backward to what every example contributes.

``Tape`` is what the taps of a call share: a tapped method notes its input, and turns the gradient of its output into factors
(``Method.factors``) as soon as that is known. ``Grads`` and ``Norms`` are what becomes of them. Imports adapt, method,
weights, tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.context import Context
from funcpeft.method import Factor, Method
from funcpeft.tree import Leaves, Tree
from funcpeft.weights import Adapted, Base, Site, wide

#: What takes a trained leaf, a factor of its gradient, and how many of them there will be.
Add = Callable[[Tensor, Factor, int], None]


class NoClosedFormError(Exception):
    """Says where and why a call has no closed form; never leaves the package."""


class Tape:
    """Notes who meets which inputs during one call, and hands on the factors of trained leaves in its backward.

    Args:
        where: The function in whose name messages speak.
        examples: How many there are; they lead the first axis of every input.
        trained: The trained leaves by ``id``.
        add: What takes the factors; ``None`` notes inputs only.
    """

    def __init__(self, where: str, examples: int = 1, trained: dict[int, Tensor] | None = None, add: Add | None = None) -> None:
        self.where, self.examples, self._trained, self._add = where, examples, trained or {}, add
        self.open = True
        self.root = torch.zeros((), requires_grad=add is not None)
        self._inputs: list[tuple[str, Method, Tensor, int]] = []
        self._meetings: dict[int, int] = {}

    def refuse(self, path: str, method: Method, why: str) -> NoClosedFormError:
        """Makes the error that says why a site has no closed form."""
        rule = f"the gradients of examples have no closed form, {why}"
        return NoClosedFormError(errors.say(f"{self.where}: {method.label} at {path!r}", rule, None, "use method='vmap'"))

    def met(self, method: Method, leaves: Leaves, base: Base, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """Notes a meeting, and returns the output with a hook that makes factors of its gradient."""
        self._inputs.append((base.path, method, x.detach(), _version(x)))
        names = {name: id(t) for name, t in leaves.items() if id(t) in self._trained}
        add = self._add
        if add is None or not names or not torch.is_grad_enabled():
            return y
        for key in names.values():
            self._meetings[key] = self._meetings.get(key, 0) + 1
        held = [x.detach()]
        base = base.unmade()  # what apply made dense is not kept until backward
        y = y if y.requires_grad else y + self.root  # so that backward comes here

        def hook(grad: Tensor) -> None:
            found = method.factors(leaves, base, held.pop(), grad, context)
            for name, key in names.items():
                if name not in found:
                    raise self.refuse(base.path, method, f"the method gives none of {name!r}")
                add(self._trained[key], _flat(found[name], self.examples), self._meetings[key])

        y.register_hook(hook)
        return y

    def close(self) -> None:
        """Ends the forward: later meetings are not noted.

        Raises:
            NoClosedFormError: If an input was overwritten after its layer had met it.
        """
        self.open = False
        for path, method, x, version in self._inputs:
            if _version(x) != version:
                raise self.refuse(path, method, "since the model overwrites the layer's input")

    def release(self, first: Tape | None) -> None:
        """Lets go of the inputs, once it is sure that their first axis is that of the examples, or of them and positions.

        Args:
            first: The tape of a call with the first example alone: such an axis is as many times shorter there. Where it
                has positions too, the values say whether examples come first.

        Raises:
            NoClosedFormError: If the first axis of an input is another one.
        """
        for i, (path, method, x, _) in enumerate(self._inputs if first is not None else ()):
            one = first._inputs[i][2] if first is not None and i < len(first._inputs) else x
            apart = x.shape[:1] == (self.examples * one.shape[0],) if one.ndim else False
            if not (apart and x.shape[1:] == one.shape[1:] and (one.shape[0] == 1 or _close(x[: one.shape[0]], one))):
                found = f"of shape {tuple(x.shape)}, is not that of the {self.examples} examples"
                raise self.refuse(path, method, f"since the first axis of its input, {found}")
        self._inputs = []


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two inputs are one up to the rounding of batches of different sizes, far less than what tells tokens apart."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = torch.linalg.vector_norm(wide(b))
    return bool(torch.linalg.vector_norm(wide(a) - wide(b)) <= torch.finfo(a.dtype).eps ** 0.5 * scale)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tap(Method):
    """Stands for a method during a call and notes what it meets."""

    inner: Method = field(default_factory=Method)
    tape: Any = None

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        y = self.inner.apply(leaves, base, x, context)
        return self.tape.met(self.inner, leaves, base, x, y, context) if self.tape.open else y

    def merge(self, leaves: Leaves, base: Base) -> Base:
        if self.tape.open:
            raise self.tape.refuse(base.path, self.inner, "since something else than its layer reads the weight")
        return self.inner.merge(leaves, base)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Direct(Method):
    """A layer whose own ``weight`` or ``bias`` is trained: they are in the base already."""

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        return base(x)

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        pair = (x, grad_out) if base.kind.name == "transposed" else (grad_out, x)
        return {"weight": pair, "bias": grad_out}

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return base


def tapped(expr: Any, tape: Tape, site: Site | None = None, direct: Leaves | None = None) -> Any:
    """Returns a weight in which every method is tapped.

    Args:
        expr: The weight.
        tape: What notes the meetings.
        site: The layer's static facts.
        direct: Trained tensors that are the layer's own ``weight`` or ``bias``, if any.
    """
    if isinstance(expr, Adapted):
        return replace(expr, base=tapped(expr.base, tape, site, direct), method=_Tap(inner=expr.method, tape=tape))
    if site is None or not direct:
        return expr
    return Adapted(expr, site, _Tap(inner=_Direct(), tape=tape), direct)


def own_tensors(net: Net) -> dict[str, tuple[str, str]]:
    """Returns, by key of a weight or bias of a linear layer, the key of its weight and which of the two it is."""
    sites = [net.model.site(k) for k in (*net.model.shapes, *net.model.ties) if k not in net.model.buffers]
    linear = [s for s in sites if s.met and s.kind.name in ("linear", "transposed")]
    weights = {s.weight: (s.weight, "weight") for s in linear}
    return weights | {s.bias: (s.weight, "bias") for s in linear if s.bias is not None}


# -- products ----------------------------------------------------------------------------------------------------------------


def _flat(factor: Factor, examples: int) -> Factor:
    """Returns a factor with its positions in one axis, in float32 or wider."""
    if isinstance(factor, Tensor):
        return wide(factor).reshape(examples, -1, factor.shape[-1])
    left, right = factor
    left = wide(left).reshape(examples, -1, left.shape[-1])
    if right.is_floating_point():
        dtype = torch.promote_types(left.dtype, right.dtype)
        return left.to(dtype), right.to(dtype).reshape(*left.shape[:2], -1)
    return left, right.to(torch.int64).reshape(left.shape[:2])


def product(factor: Factor, shape: torch.Size) -> Tensor:
    """Returns the gradients ``(B, *shape)`` of a leaf of that shape."""
    if isinstance(factor, Tensor):
        return factor.sum(1).reshape(-1, *shape)
    left, right = factor
    if right.is_floating_point():
        return (left.mT @ right).reshape(-1, *shape)
    examples, _, rows = left.shape
    zeros = left.new_zeros(examples, rows, shape[1:].numel())
    return zeros.scatter_add(2, right[:, None].expand(-1, rows, -1), left.mT).reshape(-1, *shape)


def joined(factors: list[Factor]) -> Factor | None:
    """Returns one factor for several meetings, side by side along positions; ``None`` if they are of several forms."""
    if len(factors) == 1:
        return factors[0]
    pairs = [f for f in factors if not isinstance(f, Tensor)]
    terms = [f for f in factors if isinstance(f, Tensor)]
    if pairs and not terms and len({right.ndim for _, right in pairs}) == 1:
        return torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs], 1)
    return torch.cat(terms, 1) if terms and not pairs else None


def squared_norms(factor: Factor, shape: torch.Size) -> Tensor:
    """Returns the squared norms ``(B,)`` of the gradients of a leaf of that shape, by the cheaper of two forms."""
    if not isinstance(factor, Tensor):
        left, right = factor
        positions, rows = left.shape[1:]
        columns = shape.numel() // rows
        if right.is_floating_point():
            # T (rows + cols) < rows cols: fewer operations than the gradient takes; T^2 < rows cols follows, fewer numbers
            if positions * (rows + columns) < rows * columns:
                return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
        elif positions * positions < rows * columns:
            return ((left @ left.mT) * (right[:, :, None] == right[:, None, :])).sum((1, 2))
    return _squares(product(factor, shape))


def _squares(grads: Tensor) -> Tensor:
    return grads.reshape(grads.shape[0], -1).square().sum(1)


# -- what becomes of factors -------------------------------------------------------------------------------------------------


class Grads:
    """Sums the gradients of every example over meetings."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._found: dict[int, Tensor] = {}

    def add(self, leaf: Tensor, factor: Factor, meetings: int) -> None:
        """Takes one factor of a leaf's gradient."""
        grad, before = product(factor, leaf.shape), self._found.get(id(leaf))
        self._found[id(leaf)] = grad if before is None else before + grad

    def result(self, trees: tuple[Tree, ...]) -> tuple[Tree, ...]:
        """Returns the gradients in the form of the trees of leaves."""

        def of(leaf: Tensor) -> Tensor:
            found = self._found.pop(id(leaf), None)
            return leaf.new_zeros(self._examples, *leaf.shape) if found is None else found.to(leaf.dtype)

        return tuple({path: {n: of(t) for n, t in leaves.items()} for path, leaves in tree.items()} for tree in trees)


class Norms:
    """Sums squared norms over leaves, each as soon as the last of its factors is there."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self._waiting: dict[int, tuple[Tensor, list[Factor]]] = {}
        self._found: list[Tensor] = []

    def add(self, leaf: Tensor, factor: Factor, meetings: int) -> None:
        """Takes one factor of a leaf's gradient; several meetings add up before the norm."""
        _, factors = self._waiting.setdefault(id(leaf), (leaf, []))
        factors.append(factor)
        if len(factors) == meetings:
            self._finish(*self._waiting.pop(id(leaf)))

    def _finish(self, leaf: Tensor, factors: list[Factor]) -> None:
        one = joined(factors)
        if one is None:
            self._found.append(_squares(torch.stack([product(f, leaf.shape) for f in factors]).sum(0)))
        else:
            self._found.append(squared_norms(one, leaf.shape))

    def result(self, trees: tuple[Tree, ...]) -> Tensor:
        """Returns the norms ``(B,)`` over all leaves together."""
        for leaf, factors in self._waiting.values():  # those with a meeting that the losses do not depend on
            self._finish(leaf, factors)
        like = next((wide(t) for tree in trees for leaves in tree.values() for t in leaves.values()), torch.zeros(()))
        return torch.stack([like.new_zeros(self._examples), *self._found]).sum(0).clamp(min=0).sqrt()
