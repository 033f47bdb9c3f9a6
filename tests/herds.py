"""What tests of populations share: a model with members on it, and comparison of whole output trees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

import funcpeft as fp
from funcpeft.testing.cases import perturbed

#: LoRA on the layer that most of the tests' modules call ``lin``.
LIN = fp.LoRA(r=2, target_modules=["lin"])


def leaves(tree: Any) -> list[Tensor]:
    """Lists the tensors of a tree."""
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def agree(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    """Asserts that trees have equal tensors, up to a tolerance relative to the largest entry."""
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert not w.numel() or (g.double() - w.double()).abs().max() <= tolerance * (1 + w.double().abs().max())


def population(module: Any, method: Any = LIN, members: int = 3) -> Any:
    """Makes a net on a module, members whose leaves are moved away from init, and their stack."""
    model, params = fp.functionalize(module)
    net = fp.adapt(model, method)
    ads = [perturbed(net.init(params, seed=i), i, 0.3) for i in range(members)]
    return SimpleNamespace(model=model, params=params, net=net, ads=ads, many=fp.stack(ads))


def each(p: Any, xs: Any, **kw: Any) -> list[Any]:
    """Calls every member on its own input."""
    return [p.net(p.params, a, x, **kw) for a, x in zip(p.ads, xs, strict=True)]


def at(tree: Any, i: int) -> Any:
    """Takes one entry of the leading axis of every tensor of a tree."""
    return pytree.tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, tree)
