r"""Gradients of single examples: each example's, the norm of each, and the sum of the clipped ones.

A trained leaf of a low-rank method meets the input linearly, so the gradient of example b is a product of two factors,

.. math:: G_b = \sum_t l_{bt} r_{bt}^\top, \qquad
    \|G_b\|^2 = \sum_{t,t'} (l_{bt} \cdot l_{bt'}) (r_{bt} \cdot r_{bt'})

l: what reaches the leaf's rows at position t, r: what its columns are multiplied by. One ordinary forward and one backward to
the outputs of the adapted layers give both for all examples (``Method.factors``). What a method leaves out is computed by
``torch.func.vmap`` of the gradient over batches of one row, or a loop over them. Imports factors, gradients, inputs,
adapt, tree.

References:
    Goodfellow, Efficient Per-Example Gradient Computations, 2015, arXiv 1510.01799. Li et al., Large Language Models Can Be
    Strong Differentially Private Learners, 2021, arXiv 2110.05679, section 4 (ghost clipping). Abadi et al., Deep Learning
    with Differential Privacy, 2016, arXiv 1607.00133, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import errors
from funcpeft.adapt import Net
from funcpeft.context import EVAL, Context
from funcpeft.factors import Grads, NoClosedFormError, Norms, Tape, own_tensors, tapped
from funcpeft.functional import Params
from funcpeft.gradients import value_and_grad
from funcpeft.inputs import inputs_of
from funcpeft.tree import Adapter, Adapters, Tree, as_tuple
from funcpeft.weights import wide

_METHODS = ("auto", "closed", "vmap", "loop")


def per_example_grads(
    net: Net,
    params: Params,
    adapter: Adapters,
    loss_fn: Callable[..., Tensor],
    /,
    *args: Any,
    targets: Any = None,
    batch_dims: Any = 0,
    method: str = "auto",
    context: Context = EVAL,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Computes the loss and the gradient of every example of a batch.

    Rows of the batch must not influence one another: not in the model (batch statistics, routing with a capacity), nor in
    ``loss_fn``. Works under ``torch.no_grad``; nothing given is changed.

    Args:
        net: The net.
        params: The base's leaves; they may be quantized.
        adapter: What ``net.init`` made; its ``params`` are differentiated.
        loss_fn: ``loss_fn(outputs)``, or ``loss_fn(outputs, targets)`` if there are targets, returns one loss per example,
            ``(B,)``. It gets the model's outputs for the whole batch, or for one row of it.
        args: The model's own positional inputs.
        targets: A tree of tensors with examples on their first axis, cut as the inputs are.
        batch_dims: Which axis of the inputs holds examples: an int for all tensors, or a tree prefix of ``(args, kwargs)``,
            whose dict of keywords may leave out those at 0. ``None`` is for what all examples share.
        method: ``"closed"`` is the closed form, ``"vmap"`` maps the gradient over rows, ``"loop"`` takes one row after the
            other. ``"auto"`` takes the closed form if every site has it, then ``"vmap"`` if the model runs under it.
        context: Training flag and seed. Draws are those that ``net`` makes for the whole batch, so a training context needs
            the closed form.
        kwargs: The model's own keyword inputs.

    Note:
        The closed form calls the model once more with the first example alone, without gradients, to make sure that its loss
        does not depend on the others and that every layer gets examples on its first axis.

    Returns:
        ``(losses, grads)``, detached: ``(B,)``, and a tree as ``adapter.params`` (a tuple of them if ``adapter`` is one)
        whose leaves have a leading axis of B.

    Raises:
        TypeError: If the adapter was not made for this net, or ``loss_fn`` does not return a floating tensor.
        ValueError: If losses are not ``(B,)``, inputs disagree on B, ``method`` is none of the above, ``"closed"`` is asked for
            where a site has no closed form (the message names it), or another method with a training context.

    Example:
        >>> import torch
        >>> import funcpeft as fp
        >>> from funcpeft.perexample import per_example_grads
        >>> model, params = fp.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> net = fp.adapt(model, fp.LoRA(r=1, target_modules=["0"]))
        >>> adapter = net.init(params, seed=0)
        >>> x, y = torch.ones(4, 3), torch.zeros(4, 2)
        >>> losses, grads = per_example_grads(net, params, adapter, lambda out, y: (out - y).square().mean(-1), x, targets=y)
        >>> losses.shape, grads["0"]["B"].shape
        (torch.Size([4]), torch.Size([4, 2, 1]))
    """
    call = _Call.of("per_example_grads", net, params, adapter, loss_fn, args, kwargs, targets, batch_dims, context)
    losses, found = _by(method, call, Grads(call.rows), lambda grads: grads)
    return losses, found if isinstance(adapter, tuple) else found[0]


def per_example_norms(
    net: Net,
    params: Params,
    adapter: Adapters,
    loss_fn: Callable[..., Tensor],
    /,
    *args: Any,
    targets: Any = None,
    batch_dims: Any = 0,
    method: str = "auto",
    context: Context = EVAL,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Computes the loss and the L2 norm of the gradient of every example, over all trained leaves together.

    In the closed form no gradient of an example outlives its site: a norm comes from products of positions where there are
    few of them, else from the gradients of one leaf at a time. Arguments and errors are those of ``per_example_grads``.

    Returns:
        ``(losses, norms)``, detached, both ``(B,)``; norms are in float32 or wider.

    Example:
        >>> import torch
        >>> import funcpeft as fp
        >>> from funcpeft.perexample import per_example_norms
        >>> model, params = fp.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> net = fp.adapt(model, fp.LoRA(r=1, target_modules=["0"]))
        >>> x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
        >>> per_example_norms(net, params, net.init(params, seed=0), lambda out: out.sum(-1), x)[1] > 0
        tensor([ True, False])
    """
    call = _Call.of("per_example_norms", net, params, adapter, loss_fn, args, kwargs, targets, batch_dims, context)
    return _by(method, call, Norms(call.rows), _norms_of)


def clipped_grads(
    net: Net,
    params: Params,
    adapter: Adapters,
    loss_fn: Callable[..., Tensor],
    /,
    *args: Any,
    max_norm: float,
    targets: Any = None,
    batch_dims: Any = 0,
    method: str = "auto",
    context: Context = EVAL,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Any]:
    """Computes the sum over examples of gradients scaled down to a largest norm: what DP-SGD adds noise to.

    Example b counts ``min(1, max_norm / norm_b)``. The norms come first, then the gradient of the weighted sum of losses
    (ghost clipping), so that the gradients of single examples are never held. For differential privacy add noise
    ``noise_multiplier * max_norm * N(0, 1)`` to the result, and divide by the expected batch size. Arguments and errors are
    otherwise those of ``per_example_grads``.

    Returns:
        ``(losses, norms, grads)``, detached: ``(B,)``, ``(B,)`` before clipping, and a tree as ``adapter.params``.

    Raises:
        ValueError: If ``max_norm`` is not positive.

    Example:
        >>> import torch
        >>> import funcpeft as fp
        >>> from funcpeft.perexample import clipped_grads
        >>> model, params = fp.functionalize(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> net = fp.adapt(model, fp.LoRA(r=1, target_modules=["0"]))
        >>> x = torch.tensor([[100.0, 200.0, 300.0]])
        >>> grads = clipped_grads(net, params, net.init(params, seed=0), lambda out: out.sum(-1), x, max_norm=2.0)[2]
        >>> torch.linalg.vector_norm(torch.cat([t.flatten() for t in grads["0"].values()]))
        tensor(2.0000)
    """
    if not max_norm > 0:
        raise ValueError(errors.say("clipped_grads", "max_norm must be positive", max_norm))
    call = _Call.of("clipped_grads", net, params, adapter, loss_fn, args, kwargs, targets, batch_dims, context)
    losses, norms = _by(method, call, Norms(call.rows), _norms_of)
    with torch.inference_mode(False):  # a tensor made in it cannot be part of a graph
        weights = (max_norm / norms).clamp(max=1).to(losses.dtype)

    def weighted(adapter: Adapters) -> Tensor:
        return (weights * call.losses(net(params, adapter, *args, context=context, **kwargs))).sum()

    return losses, norms, value_and_grad(weighted)(adapter)[1]


# -- the call ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of the net with its loss; ``flat`` are the leaves of inputs and targets, ``dims`` where their rows are."""

    where: str
    net: Net
    params: Params
    adapters: tuple[Adapter, ...]
    loss_fn: Callable[..., Tensor]
    flat: list[Any]
    dims: list[int | None]
    spec: Any
    context: Context
    rows: int

    @staticmethod
    def of(
        where: str,
        net: Net,
        params: Params,
        adapter: Adapters,
        loss_fn: Callable[..., Tensor],
        args: Any,
        kwargs: Any,
        targets: Any,
        batch_dims: Any,
        context: Context,
    ) -> _Call:
        given = inputs_of(where, args, kwargs, None, batch_dims, None)
        axes = zip(given.leaves, given.row_axes, strict=True)
        dims = [None if d is None or t.shape[d] != given.rows else d for t, d in axes]  # an axis of size 1 is all examples'
        own = pytree.tree_leaves(targets)
        for t in own:
            if isinstance(t, Tensor) and t.shape[:1] != (given.rows,):
                rule = f"targets must have the {given.rows} examples on their first axis"
                raise ValueError(errors.say(where, rule, f"shape {tuple(t.shape)}"))
        dims += [0 if isinstance(t, Tensor) else None for t in own]
        spec, flat = pytree.tree_structure(((args, kwargs), targets)), [*given.leaves, *own]
        return _Call(where, net, params, as_tuple(adapter), loss_fn, flat, dims, spec, context, given.rows)

    def losses(self, outputs: Any, flat: list[Any] | None = None) -> Tensor:
        """Returns the losses of the rows in ``flat``, by default all, checked."""
        flat = self.flat if flat is None else flat
        targets = pytree.tree_unflatten(flat, self.spec)[1]
        rows = next(t.shape[d] for t, d in zip(flat, self.dims, strict=True) if d is not None)
        found = self.loss_fn(outputs) if targets is None else self.loss_fn(outputs, targets)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            what = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(errors.say(self.where, "loss_fn must return a floating tensor", what))
        if found.shape != (rows,):
            rule, remedy = f"loss_fn must return one loss per example, shape ({rows},)", "reduce every axis but the first"
            raise ValueError(errors.say(self.where, rule, f"shape {tuple(found.shape)}", remedy))
        return found

    def row(self, index: int) -> list[Any]:
        """Returns the leaves of a batch of one row."""
        return [t if d is None else t.narrow(d, index, 1) for t, d in zip(self.flat, self.dims, strict=True)]

    def run(self, adapters: tuple[Adapter, ...], flat: list[Any] | None = None) -> Any:
        """Calls the net."""
        args, kwargs = pytree.tree_unflatten(self.flat if flat is None else flat, self.spec)[0]
        return self.net(self.params, _as_given(adapters), *args, context=self.context, **kwargs)


def _as_given(adapters: tuple[Adapter, ...]) -> Adapters:
    return adapters[0] if len(adapters) == 1 else adapters


def _by(method: str, call: _Call, sink: Any, of_grads: Callable[[tuple[Tree, ...]], Any]) -> tuple[Tensor, Any]:
    """Returns the losses and what a sink makes of the factors, or ``of_grads`` of the examples' gradients."""
    if method not in _METHODS:
        raise ValueError(errors.one_of(call.where, "method", method, _METHODS))
    reason = ""
    if method in ("auto", "closed"):
        try:
            return _closed(call, sink)
        except NoClosedFormError as e:
            reason = str(e)
            if method == "closed":
                raise ValueError(reason) from None
    if call.context.training:
        rule = "draws of a training context are over the whole batch, which only the closed form can follow"
        found = f"method {method!r}" + (f" ({reason.rstrip('.')})" if reason else "")
        raise ValueError(errors.say(call.where, rule, found, "pass no training context"))
    if method == "loop":
        losses, grads = _looped(call)
    else:
        try:
            losses, grads = _mapped(call)
        except RuntimeError as e:
            if method == "vmap" or not str(e).startswith("vmap"):  # what the model does has no rule there
                raise
            losses, grads = _looped(call)
    return losses, of_grads(grads)


def _mapped(call: _Call) -> tuple[Tensor, tuple[Tree, ...]]:
    def loss(params: tuple[Tree, ...], flat: list[Any]) -> tuple[Tensor, Tensor]:
        made = tuple(one.replace(params=p) for one, p in zip(call.adapters, params, strict=True))
        one = [t if d is None else t.unsqueeze(d) for t, d in zip(flat, call.dims, strict=True)]
        found = call.losses(call.run(made, one), one)[0]
        return found, found

    nested = torch._C._are_functorch_transforms_active()
    with torch.inference_mode(False):
        grad = torch.func.vmap(torch.func.grad(loss, has_aux=True), in_dims=(None, list(call.dims)))
        grads, losses = grad(tuple(a.params for a in call.adapters), call.flat)
    return losses if nested else losses.detach(), grads if nested else tuple(_detached(tree) for tree in grads)


def _looped(call: _Call) -> tuple[Tensor, tuple[Tree, ...]]:
    def loss(adapters: tuple[Adapter, ...], row: list[Any]) -> Tensor:
        return call.losses(call.run(adapters, row), row)[0]

    step = value_and_grad(loss)
    each = [step(call.adapters, call.row(i)) for i in range(call.rows)]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *each)


def _norms_of(grads: tuple[Tree, ...]) -> Tensor:
    leaves = [wide(t).reshape(t.shape[0], -1) for tree in grads for at in tree.values() for t in at.values()]
    return torch.stack([t.square().sum(1) for t in leaves]).sum(0).sqrt()


# -- the closed form ---------------------------------------------------------------------------------------------------------


def _closed(call: _Call, sink: Any) -> tuple[Tensor, Any]:
    """Runs forward and backward once for all examples."""
    direct = _direct(call)
    with torch.inference_mode(False), torch.enable_grad():
        adapters = tuple(a.replace(params=_detached(a.params)) for a in call.adapters)
        trained = {id(t): t for a in adapters for leaves in a.params.values() for t in leaves.values()}
        tape = Tape(call.where, call.rows, trained, sink.add)
        losses = call.losses(_run_tapped(call, adapters, direct, tape, call.flat))
        tape.close()
        _require_rows_apart(call, adapters, direct, tape, losses)
        if losses.requires_grad:
            torch.autograd.grad(losses.sum(), [tape.root], allow_unused=True)
    return losses.detach(), sink.result(tuple(a.params for a in adapters))


#: By key of a layer's weight: the position of an entry, the path of a leaf there, and which of the layer's tensors it is.
_Direct = dict[str, list[tuple[int, str, str]]]


def _direct(call: _Call) -> _Direct:
    """Returns the trained tensors that are a linear layer's own.

    Raises:
        NoClosedFormError: If it can be told before the call that a site has no closed form.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise NoClosedFormError(errors.say(call.where, "the closed form is for calls outside of torch.func and torch.compile"))
    tape, found = Tape(call.where), _Direct()
    layers = own_tensors(call.net) if any(e.method.takes_any for e in call.net.entries) else {}
    for i, (entry, adapter) in enumerate(zip(call.net.entries, call.adapters, strict=False)):
        for path in adapter.params:
            site = entry.sites.get(path)
            if entry.method.takes_any and site is not None and site.weight in layers:
                layer, which = layers[site.weight]
                found.setdefault(layer, []).append((i, path, which))
            elif not entry.method.factored:
                raise tape.refuse(path, entry.method, "the method gives no factors")
            elif site is not None and not site.met:
                raise tape.refuse(path, entry.method, "since its module reads the weight by itself")
    return found


def _detached(tree: Tree) -> Tree:
    return {path: {name: t.detach() for name, t in leaves.items()} for path, leaves in tree.items()}


def _run_tapped(call: _Call, adapters: tuple[Adapter, ...], direct: _Direct, tape: Tape, flat: list[Any]) -> Any:
    attached = call.net.attach(call.params, _as_given(adapters), call.context)
    for key, leaf in attached.items():
        own = {which: adapters[i].params[path]["value"] for i, path, which in direct.get(key, ())}
        attached[key] = tapped(leaf, tape, call.net.model.site(key) if own else None, own)
    args, kwargs = pytree.tree_unflatten(flat, call.spec)[0]
    return call.net.model(attached, *args, **kwargs)


def _require_rows_apart(call: _Call, adapters: tuple[Adapter, ...], direct: _Direct, tape: Tape, losses: Tensor) -> None:
    """Raises unless the first example alone gives what it gives in the batch, and comes first in every layer's input."""
    if call.rows == 1:
        return tape.release(None)
    row, first = call.row(0), Tape(call.where)
    with torch.no_grad():
        alone = call.losses(_run_tapped(call, adapters, direct, first, row), row)
    dtypes = [losses.dtype, *(t.dtype for t in call.params.values() if t.dtype.is_floating_point)]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)  # the coarsest rounding that a batch's size can change
    allowed = eps**0.5 * losses.abs().max() + 16 * eps
    if not (alone[0] - losses[0]).abs() <= allowed:
        rule = "the model and loss_fn must keep examples apart; the first one's loss must not depend on the others"
        found = f"{losses[0].item():.6g} in the batch and {alone[0].item():.6g} alone"
        raise ValueError(errors.say(call.where, rule, found, "method='loop' takes every example alone"))
    return tape.release(first)
