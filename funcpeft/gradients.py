"""Gradients: the value of a loss and its gradient with respect to an adapter, or to every member of a population.

``value_and_grad`` differentiates, chunk by chunk where there are many members; ``accumulate`` averages what it returns over
micro-batches. Imports chunks, tree, errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import errors
from funcpeft.chunks import chunk, tokens
from funcpeft.tree import Adapter, Adapters, Tree, as_tuple, tree_leaves, tree_map

_WHERE = "value_and_grad"
_Traced = tuple[Tree, ...]
_Loss = Callable[[_Traced], tuple[Tensor, Any]]


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    in_dims: int | tuple[Any, ...] | None = None,
    chunk_size: int | str | None = "auto",
) -> Callable[..., Any]:
    """Returns a function that computes a loss and its gradient with respect to an adapter's ``params``.

    The function returned is pure and composes with ``torch.func.vmap``, ``grad``, ``jvp`` and ``torch.compile``. It works
    under ``torch.no_grad`` and ``torch.inference_mode`` as well, and never touches ``requires_grad`` of a tensor given.

    Args:
        loss_fn: ``loss_fn(adapter, *args, **kwargs)`` returns the loss, a 0-d floating tensor. With ``in_dims`` the adapter is
            a stack of N members, and it returns their N losses ``(N,)``, of which each depends on its own member alone.
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``, with ``aux`` a tree of tensors that is not differentiated. With
            ``in_dims`` each of them has a leading axis of N.
        in_dims: For a stack of members, which axis of ``args`` holds members, as in ``torch.func.vmap``: an int for all, or
            a tuple with an int, ``None`` (all members share it) or a tree prefix for each. ``kwargs`` are shared.
        chunk_size: How many members are computed at a time, loss and gradient, so that memory is that of one chunk: an int,
            ``None`` for all of them, or ``"auto"`` for about 4096 tokens a chunk. A member's tokens are counted on the inputs
            it gets, and the input with the most counts: the entries of an integer tensor, those of a floating one without
            its last axis. Tensors that ``loss_fn`` closes over are not seen.

    Returns:
        ``f(adapter, *args, **kwargs) -> (loss, grads)``, or ``((loss, aux), grads)`` with ``has_aux``. ``adapter`` is an
        ``Adapter`` or a tuple of them; ``grads`` has the form of ``adapter.params``, or is a tuple of such trees. The
        gradient of a leaf that the loss does not depend on is zero. With ``in_dims`` the loss is ``(N,)`` and ``grads`` are
        those of its sum: row i is the gradient of member i's loss.

    Raises:
        TypeError: If ``in_dims`` or ``chunk_size`` is of another kind. By the function returned, if its first argument is not
            an adapter, a leaf of ``params`` is not floating, or ``loss_fn`` does not return what is said above.
        ValueError: If ``chunk_size`` is not positive, or is given without ``in_dims``. By the function returned, if the loss
            has axes (with ``in_dims``: another shape than ``(N,)``), or leaves and inputs disagree on N.

    Note:
        Outside of ``torch.func`` and ``torch.compile`` the gradient is plain reverse mode that keeps no graph, because
        ``torch.func.grad`` always builds one for a second derivative, 1.1 to 1.35 times slower. Loss, aux and gradients
        are detached there: for a gradient of gradients take ``torch.func.grad`` of a function that calls this one.

    Example:
        >>> import torch
        >>> from funcpeft.gradients import value_and_grad
        >>> from funcpeft.tree import Adapter
        >>> adapter = Adapter({"layer": {"A": torch.tensor([1.0, 2.0])}}, {"layer": {"scaling": torch.tensor(3.0)}})
        >>> def loss_fn(adapter, x):
        ...     leaves = adapter.leaves("layer")
        ...     return (leaves["scaling"] * leaves["A"] * x).sum()
        >>> value_and_grad(loss_fn)(adapter, torch.tensor([1.0, 10.0]))
        (tensor(63.), {'layer': {'A': tensor([ 3., 30.])}})
        >>> many = Adapter({"layer": {"A": torch.tensor([[1.0], [2.0], [3.0]])}})
        >>> def losses_fn(many, x):
        ...     return (many.params["layer"]["A"] * x).square().sum(-1)
        >>> value_and_grad(losses_fn, in_dims=(None,), chunk_size=2)(many, torch.tensor([2.0]))
        (tensor([ 4., 16., 36.]), {'layer': {'A': tensor([[ 8.],
                [16.],
                [24.]])}})
    """
    _require_options(in_dims, chunk_size)

    def differentiated(adapter: Adapters, args: Iterable[Any], kwargs: dict[str, Any], members: int | None) -> Any:
        given = as_tuple(adapter)

        def traced(params: _Traced) -> tuple[Tensor, Any]:
            made = tuple(one.replace(params=p) for one, p in zip(given, params, strict=True))
            returned = loss_fn(made if isinstance(adapter, tuple) else made[0], *args, **kwargs)
            return _checked(returned, has_aux, members)

        # Inside a transform only torch.func sees the wrapped tensors for what they are; a traced graph has no autograd tape.
        nested = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        loss, aux, grads = (_functional if nested else _plain)(traced, tuple(one.params for one in given))
        return (loss, aux) if has_aux else loss, grads if isinstance(adapter, tuple) else grads[0]

    def f(adapter: Adapters, /, *args: Any, **kwargs: Any) -> Any:
        given = as_tuple(adapter)
        _require_floating(given)
        if in_dims is None:
            return differentiated(adapter, args, kwargs, None)
        members = _members(given)
        flat, spec = pytree.tree_flatten(args)
        dims = _flat_dims(in_dims, flat, spec, members)
        size = _chunk_members(chunk_size, members, flat, dims, kwargs)
        if size >= members:
            return differentiated(adapter, args, kwargs, members)
        parts: list[Any] = []
        for start in range(0, members, size):
            count = min(size, members - start)
            several = tuple(_cut(one, start, count) for one in given)
            part = several if isinstance(adapter, tuple) else several[0]
            own = [t if d is None else t.narrow(d, start, count) for t, d in zip(flat, dims, strict=True)]
            parts.append(differentiated(part, pytree.tree_unflatten(own, spec), kwargs, count))
        return pytree.tree_map(lambda *each: torch.cat(each), *parts)

    return f


def accumulate(
    step: Callable[..., Any],
    adapter: Adapters,
    batches: Iterable[Sequence[Any]],
    weights: Iterable[float | Tensor] | None = None,
) -> tuple[Any, Any]:
    """Averages loss and gradients over micro-batches, of which one at a time is computed.

    Equals the loss and gradient of the whole batch if its loss is the mean over examples (or tokens) and ``weights`` are the
    numbers of examples (or tokens) in the micro-batches.

    Args:
        step: ``step(adapter, *batch) -> (loss, grads)``, such as ``value_and_grad`` makes, of one adapter or a population.
        adapter: What ``step`` takes first.
        batches: The micro-batches, each a tuple or list of the further arguments of ``step``; a generator is read as it goes.
        weights: One non-negative number for each micro-batch, by default equal ones; only their ratios count. A tensor
            ``(N,)`` has one for every member of a population.

    Returns:
        ``(loss, grads)`` in the form that ``step`` returns, aux included. Sums are taken in float32 or wider, and each tensor
        is rounded once, to its own dtype; of an integer tensor in aux the mean is float32.

    Raises:
        TypeError: If a batch is neither a tuple nor a list, a weight is not a number, or aux holds something else than tensors.
        ValueError: If there is no batch, ``weights`` are not as many as batches or sum to zero, one is negative or has a shape
            that does not fit, or a tensor of aux changes its shape from batch to batch.

    Example:
        >>> import torch
        >>> from funcpeft.gradients import accumulate, value_and_grad
        >>> from funcpeft.tree import Adapter
        >>> adapter = Adapter({"layer": {"A": torch.tensor([1.0])}})
        >>> step = value_and_grad(lambda adapter, x: (adapter.params["layer"]["A"] * x).mean())
        >>> accumulate(step, adapter, [(torch.tensor([1.0, 2.0, 3.0]),), (torch.tensor([10.0]),)], weights=[3, 1])
        (tensor(4.), {'layer': {'A': tensor([4.])}})
    """
    shares = None if weights is None else [_weight(w) for w in weights]
    total: Any = None
    dtypes: Any = None
    divisor: Any = 0
    count = 0
    for batch in batches:
        if not isinstance(batch, tuple | list):
            remedy = "wrap what step takes after the adapter in a tuple"
            raise TypeError(errors.say("accumulate", "a batch must be a tuple or a list", type(batch).__name__, remedy))
        if shares is not None and count == len(shares):
            raise ValueError(errors.say("accumulate", "weights must be as many as batches", f"{count}, and more batches"))
        share = 1.0 if shares is None else shares[count]
        result = step(adapter, *batch)
        scaled = pytree.tree_map(lambda t, share=share: _scaled(t, share), result)
        total = scaled if total is None else pytree.tree_map(_added, total, scaled)
        dtypes = pytree.tree_map(lambda t: t.dtype if t.is_floating_point() else torch.float32, result)
        divisor, count = divisor + share, count + 1
    if not count:
        raise ValueError(errors.say("accumulate", "at least one batch is required", "none"))
    if shares is not None and count < len(shares):
        raise ValueError(errors.say("accumulate", "weights must be as many as batches", f"{len(shares)} for {count}"))
    if isinstance(divisor, float) and not divisor:
        raise ValueError(errors.say("accumulate", "weights must not all be zero", shares))
    return pytree.tree_map(lambda t, dtype: (t / _spread(divisor, t)).to(dtype), total, dtypes)


# -- one gradient ------------------------------------------------------------------------------------------------------------


def _summed(losses: Tensor) -> Tensor:
    return losses.sum() if losses.ndim else losses


def _plain(traced: _Loss, params: _Traced) -> tuple[Tensor, Any, _Traced]:
    # Leaving inference mode matters: in it nothing is recorded, and every gradient would be zero without a word.
    with torch.inference_mode(False), torch.enable_grad():
        tracked = tree_map(lambda t: t.detach().requires_grad_(), params)
        loss, aux = traced(tracked)
        leaves = tree_leaves(tracked)
        if leaves and loss.requires_grad:
            found = torch.autograd.grad(_summed(loss), leaves, allow_unused=True, materialize_grads=True)
        else:
            found = [torch.zeros_like(t) for t in leaves]
    grads = iter(found)
    return loss.detach(), pytree.tree_map_only(Tensor, Tensor.detach, aux), tree_map(lambda _: next(grads).detach(), tracked)


def _functional(traced: _Loss, params: _Traced) -> tuple[Tensor, Any, _Traced]:
    def tensors_only(params: _Traced) -> tuple[Tensor, tuple[Tensor, Any]]:
        loss, aux = traced(params)
        for t in pytree.tree_leaves(aux):
            if not isinstance(t, Tensor):
                raise TypeError(errors.say(_WHERE, "inside a transform aux must be a tree of tensors", type(t).__name__))
        return _summed(loss), (loss, aux)

    grads, (_, (loss, aux)) = torch.func.grad_and_value(tensors_only, has_aux=True)(params)
    return loss, aux, grads


def _require_floating(adapters: tuple[Adapter, ...]) -> None:
    for one in adapters:
        for path, leaves in one.params.items():
            for name, t in leaves.items():
                if not isinstance(t, Tensor) or not t.is_floating_point():
                    found = t.dtype if isinstance(t, Tensor) else type(t).__name__
                    raise TypeError(
                        errors.say(
                            f"{_WHERE}: adapter at {path!r}",
                            f"leaf {name!r} of params must be a floating tensor",
                            found,
                            "keep what is not trained in consts",
                        )
                    )


def _checked(returned: Any, has_aux: bool, members: int | None) -> tuple[Tensor, Any]:
    """Splits what the loss function returned into loss and aux, ``()`` if there is none."""
    if has_aux:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(errors.say(_WHERE, "with has_aux loss_fn must return (loss, aux)", type(returned).__name__))
        loss, aux = returned
    else:
        loss, aux = returned, ()
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        found = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
        remedy = "pass has_aux=True if it returns (loss, aux)" if isinstance(loss, tuple) else ""
        what = "a 0-d floating tensor" if members is None else f"a floating tensor of shape ({members},)"
        raise TypeError(errors.say(_WHERE, f"the loss must be {what}", found, remedy))
    if members is None and loss.ndim:
        remedy = "reduce it with mean or sum, or pass in_dims for one loss per member of a stack"
        raise ValueError(errors.say(_WHERE, "the loss must be a 0-d tensor", f"shape {tuple(loss.shape)}", remedy))
    if members is not None:
        _require_members(loss, aux, members)
    return loss, aux


# -- many members ------------------------------------------------------------------------------------------------------------


def _require_options(in_dims: Any, chunk_size: Any) -> None:
    if in_dims is not None and (isinstance(in_dims, bool) or not isinstance(in_dims, int | tuple)):
        remedy = "for example (0, None)"
        raise TypeError(errors.say(_WHERE, "in_dims must be an int, a tuple or None", type(in_dims).__name__, remedy))
    if chunk_size is not None and chunk_size != "auto":
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(errors.say(_WHERE, "chunk_size must be an int, 'auto' or None", repr(chunk_size)))
        if chunk_size < 1:
            raise ValueError(errors.say(_WHERE, "chunk_size must be positive", chunk_size))
        if in_dims is None:
            remedy = "say with in_dims which axis of the inputs is the members', or leave chunk_size out"
            raise ValueError(errors.say(_WHERE, "chunk_size is for a stack of members", chunk_size, remedy))


def _members(adapters: tuple[Adapter, ...]) -> int:
    trees = [tree for one in adapters for tree in (one.params, one.consts)]
    sizes = {t.shape[0] if t.ndim else 0 for tree in trees for leaves in tree.values() for t in leaves.values()}
    if len(sizes) != 1 or 0 in sizes:
        rule = "with in_dims every leaf of the adapter must have the same leading axis"
        raise ValueError(errors.say(_WHERE, rule, f"sizes {sorted(sizes)}", "make it with stack"))
    return sizes.pop()


def _cut(adapter: Adapter, start: int, count: int) -> Adapter:
    """Returns the stack of some of the members, as views."""

    def tree(t: Tree) -> Tree:
        return {path: {n: v.narrow(0, start, count) for n, v in leaves.items()} for path, leaves in t.items()}

    return adapter.replace(params=tree(adapter.params), consts=tree(adapter.consts))


def _require_members(loss: Tensor, aux: Any, members: int) -> None:
    if loss.shape != (members,):
        rule = f"with in_dims loss_fn must return one loss per member, shape ({members},)"
        remedy = "reduce every axis but the members'"
        raise ValueError(errors.say(_WHERE, rule, f"shape {tuple(loss.shape)}", remedy))
    for path, t in pytree.tree_flatten_with_path(aux)[0]:
        if not isinstance(t, Tensor):
            where = f"{_WHERE}: aux{pytree.keystr(path)}"
            raise TypeError(errors.say(where, "with in_dims aux must be a tree of tensors", type(t).__name__))
        if t.ndim == 0 or t.shape[0] != members:
            where, rule = f"{_WHERE}: aux{pytree.keystr(path)}", f"the leading axis must be the {members} members'"
            raise ValueError(errors.say(where, rule, f"shape {tuple(t.shape)}"))


def _flat_dims(in_dims: Any, flat: list[Any], spec: Any, members: int) -> list[int | None]:
    """Returns the members' axis of every leaf of the inputs, ``None`` where all share it."""
    dims = pytree._broadcast_to_and_flatten(in_dims, spec)
    if dims is None:
        rule = "in_dims must be a tree prefix of the inputs after the adapter"
        raise ValueError(errors.say(_WHERE, rule, f"in_dims {in_dims} for {spec.num_children} inputs"))
    for i, (t, d) in enumerate(zip(flat, dims, strict=True)):
        where = f"{_WHERE}: input leaf {i}"
        if d is None:
            continue
        if isinstance(d, bool) or not isinstance(d, int):
            raise TypeError(errors.say(where, "its entry of in_dims must be an int or None", repr(d)))
        if not isinstance(t, Tensor):
            remedy = "give None in in_dims for what all members share"
            raise TypeError(errors.say(where, f"a tensor is required where in_dims is {d}", type(t).__name__, remedy))
        if not -t.ndim <= d < t.ndim or t.shape[d] != members:
            rule, found = f"axis {d} must hold the {members} members", f"shape {tuple(t.shape)}"
            raise ValueError(errors.say(where, rule, found, "give None in in_dims for what all members share"))
    return dims


def _chunk_members(chunk_size: int | str | None, members: int, flat: list[Any], dims: list[int | None], kwargs: Any) -> int:
    """Returns how many members are computed at a time."""
    if isinstance(chunk_size, int):
        return chunk_size
    if chunk_size is None:
        return members
    shared = pytree.tree_leaves(kwargs)
    pairs = zip([*flat, *shared], [*dims, *(None,) * len(shared)], strict=True)
    return chunk(members, (tokens(t if d is None else t.select(d, 0)) for t, d in pairs if isinstance(t, Tensor)))


# -- micro-batches -----------------------------------------------------------------------------------------------------------


def _weight(weight: Any) -> float | Tensor:
    if isinstance(weight, Tensor) and not weight.is_complex():
        if weight.ndim > 1:
            rule, found = "a weight must be a number, or one per member", f"shape {tuple(weight.shape)}"
            raise ValueError(errors.say("accumulate", rule, found))
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(errors.say("accumulate", "a weight must be a number or a tensor", type(weight).__name__))
    if not 0 <= weight < math.inf:
        raise ValueError(errors.say("accumulate", "a weight must be finite and not negative", weight))
    return float(weight)


def _spread(weight: float | Tensor, t: Tensor) -> float | Tensor:
    """Returns a weight in the shape that multiplies a tensor, member by member if it has one for each."""
    if not isinstance(weight, Tensor) or not weight.ndim:
        return weight
    if not t.ndim or t.shape[0] != weight.shape[0]:
        rule, found = f"weights of {weight.shape[0]} members need results with that axis", f"shape {tuple(t.shape)}"
        raise ValueError(errors.say("accumulate", rule, found, "give one number per batch"))
    return weight.reshape(-1, *(1 for _ in t.shape[1:]))


def _scaled(t: Any, weight: float | Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(errors.say("accumulate", "step must return a tree of tensors", type(t).__name__, "leave it out of aux"))
    return t.to(torch.promote_types(t.dtype, torch.float32)) * _spread(weight, t)


def _added(total: Tensor, t: Tensor) -> Tensor:
    if total.shape != t.shape:
        rule, found = "tensors of aux must have one shape in all batches", f"{tuple(total.shape)} and {tuple(t.shape)}"
        raise ValueError(errors.say("accumulate", rule, found, "reduce them to their mean"))
    return total + t
