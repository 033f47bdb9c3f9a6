"""Gradients: the value of a loss and its gradient with respect to an adapter. Imports tree, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import errors
from funcpeft.tree import Adapter, Adapters, Tree, as_tuple, tree_leaves, tree_map

_WHERE = "value_and_grad"
_Traced = tuple[Tree, ...]


def value_and_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Returns a function that computes a loss and its gradient with respect to an adapter's ``params``.

    The function returned is pure and composes with ``torch.func.vmap``, ``grad``, ``jvp`` and ``torch.compile``. It works
    under ``torch.no_grad`` and ``torch.inference_mode`` as well, and never touches ``requires_grad`` of a tensor given.

    Args:
        loss_fn: ``loss_fn(adapter, *args, **kwargs)`` returns the loss, a 0-d floating tensor.
        has_aux: Whether ``loss_fn`` returns ``(loss, aux)``, with ``aux`` a tree of tensors that is not differentiated.

    Returns:
        ``f(adapter, *args, **kwargs) -> (loss, grads)``, or ``((loss, aux), grads)`` with ``has_aux``. ``adapter`` is an
        ``Adapter`` or a tuple of them; ``grads`` has the form of ``adapter.params``, or is a tuple of such trees. The
        gradient of a leaf that the loss does not depend on is zero.

    Raises:
        TypeError: By the function returned, if its first argument is not an adapter, a leaf of ``params`` is not floating,
            or ``loss_fn`` does not return what is said above.
        ValueError: By the function returned, if the loss has axes.

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
    """

    def f(adapter: Adapters, /, *args: Any, **kwargs: Any) -> Any:
        given = as_tuple(adapter)
        _require_floating(given)

        def traced(params: _Traced) -> tuple[Tensor, Any]:
            made = tuple(one.replace(params=p) for one, p in zip(given, params, strict=True))
            return _checked(loss_fn(made if isinstance(adapter, tuple) else made[0], *args, **kwargs), has_aux)

        # Inside a transform only torch.func sees the wrapped tensors for what they are; a traced graph has no autograd tape.
        nested = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        loss, aux, grads = (_functional if nested else _plain)(traced, tuple(one.params for one in given))
        return (loss, aux) if has_aux else loss, grads if isinstance(adapter, tuple) else grads[0]

    return f


def _plain(traced: Callable[[_Traced], tuple[Tensor, Any]], params: _Traced) -> tuple[Tensor, Any, _Traced]:
    # Leaving inference mode matters: in it nothing is recorded, and every gradient would be zero without a word.
    with torch.inference_mode(False), torch.enable_grad():
        tracked = tree_map(lambda t: t.detach().requires_grad_(), params)
        loss, aux = traced(tracked)
        leaves = tree_leaves(tracked)
        if leaves and loss.requires_grad:
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        else:
            found = [torch.zeros_like(t) for t in leaves]
    grads = iter(found)
    return loss.detach(), pytree.tree_map_only(Tensor, Tensor.detach, aux), tree_map(lambda _: next(grads).detach(), tracked)


def _functional(traced: Callable[[_Traced], tuple[Tensor, Any]], params: _Traced) -> tuple[Tensor, Any, _Traced]:
    def tensors_only(params: _Traced) -> tuple[Tensor, Any]:
        loss, aux = traced(params)
        for t in pytree.tree_leaves(aux):
            if not isinstance(t, Tensor):
                raise TypeError(errors.say(_WHERE, "inside a transform aux must be a tree of tensors", type(t).__name__))
        return loss, aux

    grads, (loss, aux) = torch.func.grad_and_value(tensors_only, has_aux=True)(params)
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


def _checked(returned: Any, has_aux: bool) -> tuple[Tensor, Any]:
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
        raise TypeError(errors.say(_WHERE, "the loss must be a 0-d floating tensor", found, remedy))
    if loss.ndim:
        remedy = "reduce it with mean or sum, or vmap over members"
        raise ValueError(errors.say(_WHERE, "the loss must be a 0-d tensor", f"shape {tuple(loss.shape)}", remedy))
    return loss, aux
