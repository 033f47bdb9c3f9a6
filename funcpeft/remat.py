"""Rematerialization: a pure function that keeps its inputs for the backward pass, and is computed a second time there.

``torch.utils.checkpoint`` does not work inside ``torch.func``. Here one autograd function stands for the call, and its
derivative is another call of the same kind, of the pullback, so derivatives of every order recompute too. The rule for
``vmap`` folds the axis into the function and leaves the recomputation outside, hence every function runs, the first time and
again, below all transforms and by plain autograd. Imports errors.

References:
    Chen, Xu, Zhang, Guestrin, Training Deep Nets with Sublinear Memory Cost, 2016, arXiv 1604.06174, section 4.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.autograd import forward_ad

from funcpeft import errors

_Tensors = Sequence[Tensor]
_Dims = tuple[int | None, ...]


def remat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of the same values that keeps its arguments, and no intermediate, for the backward pass.

    The backward pass computes ``fn`` again, so a chain of n such functions holds n inputs and the intermediates of one. It
    works at any depth of ``torch.func.grad``, ``vmap``, ``jacrev`` and of itself, for derivatives of any order.

    Args:
        fn: ``fn(*args, **kwargs)``, pure: its result is determined by its arguments, and it writes none of them. Arguments
            and result are trees in torch's pytree of tensors and anything else. Every tensor that a gradient flows to is in
            an argument; a draw is a function of a seed that is one.

    Returns:
        The function. It calls ``fn`` and does nothing else where nothing would be kept or where reverse mode is not alone:
        without grad mode, without a tensor that requires a gradient, in forward mode, under ``torch.compile`` (whose
        partitioner decides what is kept).

    Raises:
        TypeError: If ``fn`` is not callable.
        ValueError: By the function returned, if the result depends on a tensor that requires a gradient, or that a transform
            wraps, and that is no argument; in the backward pass, if ``fn`` then returns tensors of other number or shape.

    Note:
        ``fn`` gets containers of its own: what it does to a list or to a cache in an argument is not seen outside. Floating
        results require a gradient when an argument does, even those that do not depend on one; one that is a view of an
        argument cannot be written in place. Autocast is as in the first call. Tensors of a transform that are no argument are
        looked for in closures, defaults, partial functions, modules and trees; held by another object they are constants.

    Example:
        >>> import torch
        >>> from funcpeft.remat import remat
        >>> def block(params, x):
        ...     return x + torch.tanh(x @ params["w"])
        >>> params = {"w": 2 * torch.eye(2)}
        >>> torch.func.grad(lambda p: remat(block)(p, torch.ones(1, 2)).sum())(params)
        {'w': tensor([[0.0707, 0.0707],
                [0.0707, 0.0707]])}
    """
    if not callable(fn):
        raise TypeError(errors.say("remat", "fn must be callable", type(fn).__name__))

    @functools.wraps(fn)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _reverse_only():
            return fn(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if torch._C._are_functorch_transforms_active():
            at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and (x.requires_grad or _wrapped(x))]
            if at:
                _require_arguments(fn)
        else:
            at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not at:
            return fn(*args, **kwargs)
        tensors = [leaves[i] for i in at]
        call = _Call(fn, leaves, at, spec)
        return call.result(_apply(call, tensors), tensors)

    return recomputed


def _wrapped(t: Tensor) -> bool:
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]  # absent from the stubs of torch 2.13
    return functorch.is_functorch_wrapped_tensor(t)


def _reverse_only() -> bool:
    """Whether reverse mode is at work, and forward mode is not.

    torch 2.13 has no public way to ask for forward mode; if the private one goes, it fails with torch's own error.
    """
    recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return recorded and getattr(forward_ad, "_current_level", -1) < 0


class _Function(abc.ABC):
    """A function of tensors to a tuple of tensors; what can be mapped and recomputed.

    Attributes:
        frozen: The other tensors that it reads; no transform and no gradient concerns them.
    """

    frozen: list[Tensor]

    @abc.abstractmethod
    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs."""

    def mapped(self, info: Any, dims: _Dims, tensors: _Tensors) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Applies the function over the axes ``dims``; returns outputs and their axes, as a rule for ``vmap`` does."""
        outs = _apply(_Mapped(self, dims, info.randomness), tensors)
        return outs, (0,) * len(outs)


class _Call(_Function):
    """A call of the user's function, as a function of those tensors in its arguments that are differentiated or mapped."""

    def __init__(self, fn: Callable[..., Any], leaves: list[Any], at: list[int], spec: pytree.TreeSpec) -> None:
        self.fn, self.leaves, self.at, self.spec = fn, leaves, at, spec
        for i in at:  # autograd keeps these
            leaves[i] = None
        self.frozen = [x for x in leaves if isinstance(x, Tensor)]
        self.autocast = _autocast()
        self.plan: list[tuple[int, Any]] = []
        self.out: pytree.TreeSpec | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = self.leaves.copy()
        for i, t in zip(self.at, tensors, strict=True):
            leaves[i] = t
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        if not self.autocast and not _autocast():
            found = self.fn(*args, **kwargs)
        else:
            with _casting(self.autocast):
                found = self.fn(*args, **kwargs)
        leaves, self.out = ([found], None) if isinstance(found, Tensor) else pytree.tree_flatten(found)
        return self._planned(leaves, tensors)

    def _planned(self, found: Sequence[Any], tensors: _Tensors) -> tuple[Tensor, ...]:
        """Returns the tensors that were made, each once, and notes where every leaf of the result comes from."""
        plan: list[tuple[int, Any]] = []
        outs: list[Tensor] = []
        for x in found:
            if not isinstance(x, Tensor) or _place(x, self.frozen) is not None:
                plan.append((_VALUE, x))
            elif (i := _place(x, tensors)) is not None:  # an argument is handed back as it is
                plan.append((_GIVEN, i))
            else:
                if (i := _place(x, outs)) is None:
                    i = len(outs)
                    outs.append(x)
                plan.append((_MADE, i))
        self.plan = plan
        return tuple(outs)

    def result(self, outs: _Tensors, tensors: _Tensors) -> Any:
        """Returns what the user's function returned, of the tensors of the caller's level."""
        sources = (outs, tensors)
        leaves = [x if source == _VALUE else sources[source][x] for source, x in self.plan]
        return leaves[0] if self.out is None else pytree.tree_unflatten(leaves, self.out)


_MADE, _GIVEN, _VALUE = range(3)


def _place(x: Tensor, tensors: _Tensors) -> int | None:
    return next((i for i, t in enumerate(tensors) if t is x), None)


class _Mapped(_Function):
    """A function under ``vmap``, the new axis first in every output."""

    def __init__(self, call: _Function, dims: _Dims, randomness: str) -> None:
        self.call = torch.func.vmap(call, in_dims=dims, randomness=randomness)
        self.frozen = call.frozen

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call(*tensors)


class _Pullback(_Function):
    """The vector-Jacobian product of a function: of its tensors and of the gradients of some of its outputs."""

    def __init__(self, call: _Function, wanted: tuple[bool, ...], given: tuple[int, ...], count: int) -> None:
        self.call, self.wanted, self.given, self.count = call, wanted, given, count
        self.frozen = call.frozen

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        tensors = [t for t, w in zip(operands, self.wanted, strict=False) if w]
        outs: list[Tensor] = []
        for g, t in zip(self.run(operands), tensors, strict=True):
            found = torch.zeros_like(t) if g is None else g
            # of a sum, say, both gradients are the one given; an autograd function returns neither its input nor one twice
            known = _place(found, operands) is not None or _place(found, outs) is not None
            outs.append(found.view_as(found) if known else found)
        return tuple(outs)

    def run(self, operands: _Tensors) -> Sequence[Tensor | None]:
        """Returns the gradient of every tensor wanted, ``None`` where there is no dependence."""
        pull = self._functional if torch._C._are_functorch_transforms_active() else self._plain
        return pull(operands[: len(self.wanted)], operands[len(self.wanted) :])

    def _plain(self, tensors: _Tensors, grads: _Tensors) -> Sequence[Tensor | None]:
        again = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *grads))
        with torch.enable_grad():
            held = [_tracked(t, w, again) for t, w in zip(tensors, self.wanted, strict=True)]
            outs = self._outputs(self.call(*held), grads)
            pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad]
            wrt = [t for t, w in zip(held, self.wanted, strict=True) if w]
            if not pairs:
                return [None] * len(wrt)
            dependent, weights = zip(*pairs, strict=True)
            return torch.autograd.grad(dependent, wrt, weights, create_graph=again, allow_unused=True)

    def _functional(self, tensors: _Tensors, grads: _Tensors) -> Sequence[Tensor | None]:
        at = [i for i, w in enumerate(self.wanted) if w]

        def of(*wrt: Tensor) -> tuple[Tensor, ...]:
            put = {**dict(enumerate(tensors)), **dict(zip(at, wrt, strict=True))}
            return self._outputs(self.call(*put.values()), grads)

        back: Any = torch.func.vjp(of, *(tensors[i] for i in at))[1]
        return back(tuple(grads))

    def _outputs(self, outs: tuple[Tensor, ...], grads: _Tensors) -> tuple[Tensor, ...]:
        used = tuple(outs[i] for i in self.given if i < len(outs))
        if len(outs) != self.count or any(o.shape != g.shape for o, g in zip(used, grads, strict=True)):
            found = f"{self.count} and then {len(outs)} tensors" if len(outs) != self.count else "other shapes the second time"
            remedy = "pass what it depends on as arguments"
            raise ValueError(errors.say("remat", "fn must return the same for the same arguments", found, remedy))
        return used

    def mapped(self, info: Any, dims: _Dims, tensors: _Tensors) -> Any:
        """Pulls back through the mapped function where every member has its own of what is wanted, which is cheaper."""
        n = len(self.wanted)
        own = [d for d, w in zip(dims, self.wanted, strict=False) if w]
        if any(d is None for d in own):
            return super().mapped(info, dims, tensors)
        grads = [
            g.expand(info.batch_size, *g.shape) if d is None else g.movedim(d, 0)
            for g, d in zip(tensors[n:], dims[n:], strict=True)
        ]
        call = _Pullback(_Mapped(self.call, dims[:n], info.randomness), self.wanted, self.given, self.count)
        return _apply(call, (*tensors[:n], *grads)), tuple(own)


def _tracked(t: Tensor, wanted: bool, again: bool) -> Tensor:
    """Returns a tensor that gradients are taken with respect to, apart from how it came about if none follow."""
    if again and t.requires_grad:
        return t.view_as(t)
    if wanted:
        return t.detach().requires_grad_()
    return t.detach() if t.requires_grad else t


def _first(call: _Function, tensors: _Tensors) -> tuple[Tensor, ...]:
    """Computes the outputs with no graph. Grad mode is on, so that one that requires a gradient has it from elsewhere."""
    with torch.enable_grad():
        outs = call(*[t.detach() if t.requires_grad else t for t in tensors])
    if any([o.requires_grad for o in outs]):
        raise ValueError(_elsewhere("one that requires a gradient and that fn reads from elsewhere"))
    return outs


def _apply(call: _Function, tensors: _Tensors) -> tuple[Tensor, ...]:
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(call, *tensors)
    return _Plain.apply(call, *tensors) if any([t.requires_grad for t in tensors]) else _first(call, tensors)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    wanted = tuple(ctx.needs_input_grad[1:])
    tensors = ctx.saved_tensors[: len(wanted)]
    given = tuple(i for i, g in enumerate(grads) if g is not None)
    if not given:
        return None, *(None for _ in wanted)
    pull = _Pullback(ctx.call, wanted, given, len(grads))
    operands = (*tensors, *(g for g in grads if g is not None))
    found = iter(_apply(pull, operands) if torch.is_grad_enabled() else pull.run(operands))
    return None, *(next(found) if w else None for w in wanted)


def _keep(ctx: Any, call: _Function, tensors: _Tensors) -> None:
    ctx.call = call
    ctx.set_materialize_grads(False)
    # the frozen ones too, since what is saved may not be written before it is read
    ctx.save_for_backward(*tensors, *(t for t in call.frozen if not t.is_inference()))


class _Plain(torch.autograd.Function):
    """A call outside of ``torch.func``, where ``setup_context``, for which torch binds a signature, is not needed."""

    @staticmethod
    def forward(ctx: Any, call: _Function, *tensors: Tensor) -> Any:
        outs = _first(call, tensors)
        _keep(ctx, call, tensors)
        return outs

    backward = staticmethod(_backward)


class _Transformed(torch.autograd.Function):
    """A call inside of ``torch.func``; each transform takes its turn, and what is below all of them is a plain call."""

    @classmethod
    def apply(cls, call: _Function, *tensors: Tensor) -> Any:
        """Leaves the level below all transforms to the faster way."""
        return super().apply(call, *tensors) if torch._C._are_functorch_transforms_active() else _apply(call, tensors)

    @staticmethod
    def forward(call: _Function, *tensors: Tensor) -> Any:
        return _first(call, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        call, *tensors = inputs
        _keep(ctx, call, tensors)

    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Function, *tensors: Tensor) -> Any:  # type: ignore[override]  # torch's: *args
        return call.mapped(info, tuple(in_dims[1:]), tensors)


_ACCELERATOR = torch.accelerator.current_accelerator()

#: The devices that autocast may be on for.
_DEVICES = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)

_Autocast = tuple[tuple[str, torch.dtype], ...]


def _autocast() -> _Autocast:
    """Returns the devices that autocast is on for, with their dtypes."""
    return tuple([(d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d)])


@contextlib.contextmanager
def _casting(autocast: _Autocast) -> Iterator[None]:
    """Sets autocast, without its cache: that would hand a weight cast in here, which has no graph, to the code outside."""
    on = dict(autocast)
    with contextlib.ExitStack() as stack:
        for d in {*on, *dict(_autocast())}:
            stack.enter_context(torch.autocast(d, dtype=on.get(d), enabled=d in on, cache_enabled=False))
        yield


def _require_arguments(fn: Callable[..., Any]) -> None:
    """Refuses tensors of a transform that are bound to a function: below the transform they would count as constants."""
    for t in _bound(fn, 0):
        if _wrapped(t):
            raise ValueError(_elsewhere("one that a transform wraps and that is bound to fn"))


def _bound(item: Any, depth: int) -> Iterator[Tensor]:
    """Yields the tensors bound to a function: in cells, defaults, partial functions, modules and trees, a few deep."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, nn.Module):
        yield from item.parameters()
    elif depth < _DEPTH:
        for x in _parts(item):
            yield from _bound(x, depth + 1)


#: How deep a function in a function is looked into.
_DEPTH = 4


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, types.MethodType):
        yield from (item.__self__, item.__func__)
    elif isinstance(item, types.FunctionType):
        yield from (item.__defaults__ or ())
        yield from (item.__kwdefaults__ or {}).values()
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # a name that is not assigned yet
                yield cell.cell_contents
    else:
        yield from (x for x in pytree.tree_leaves(item) if x is not item)


def _elsewhere(found: str) -> str:
    remedy = "pass it as an argument, or detach it"
    return errors.say("remat", "every tensor that a gradient may flow to must be an argument of fn", found, remedy)
