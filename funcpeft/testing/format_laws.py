"""The laws of formats: what every quantization format must satisfy, one documented function each.

A law takes a ``Stored`` case and raises ``AssertionError`` with the numbers if the case breaks it; it returns at once where it
does not apply. ``funcpeft.testing.check_format`` runs them all on one format. Imports storage, quant, tree, layers.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from funcpeft import rng, storage
from funcpeft.layers import Linear
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized
from funcpeft.testing.cases import same_bits
from funcpeft.tree import NAMESPACE

#: Shapes on which formats are tried: flat and tall, odd, one entry, ragged against every block size, experts, a kernel.
SHAPES = ((8, 32), (32, 8), (64, 64), (96, 80), (5, 7), (1, 1), (3, 130), (2, 8, 32), (4, 4, 2, 2), (2, 256))


@dataclass(frozen=True)
class Stored:
    """A format and a weight that it is to store.

    Attributes:
        format: The format.
        shape: Shape of the weight; one that fits.
        dtype: Its dtype.
        seed: Determines its values, normal with standard deviation ``scale`` and some blocks zero.
        scale: Size of the values.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0
    scale: float = 0.02

    def weight(self, member: int = 0) -> Tensor:
        """Makes the weight; its first row is zero if it has several."""
        w = self.scale * rng.randn(self.shape, rng.generator(self.seed, f"weight {member}"))
        if len(self.shape) > 1 and self.shape[0] > 1:
            w[0] = 0
        return w.to(self.dtype)

    def quantized(self, member: int = 0) -> Quantized:
        """Stores it."""
        return self.format.sample(self.weight(member))


FormatLaw = Callable[[Stored], None]


def cell(case: Stored) -> None:
    """An entry errs by at most ``step`` and what float32 rounds, unless it is beyond the grid, which is counted."""
    if case.format.decode_only:
        return
    w, q = case.weight(), case.quantized()
    step, clipped = case.format.step(q), float(case.format.clipped(w, q))
    assert step.shape == w.shape, f"cell: step has shape {tuple(step.shape)}, at {case}"
    assert bool((step >= 0).all()), f"cell: a step is negative or NaN, at {case}"
    assert clipped <= case.format.clips, f"cell: {clipped:.3g} of the entries err by more than step, at {case}"


def grid(case: Stored) -> None:
    """Storing what a weight decodes to on the grid it came from changes no bit, twenty times over."""
    if case.format.decode_only:
        return
    first = q = replace(case.quantized(), dtype=torch.float32)
    for _ in range(20):
        q = case.format.requant(case.format.dequant(q), like=q)
    assert same_bits(dict(q.data), dict(first.data)), f"grid: the codes or the grid drifted, at {case}"


def refit(case: Stored) -> None:
    """Where the format says so, storing what a weight decodes to with a grid fitted anew gives the same bits."""
    if case.format.decode_only or not case.format.refits_exactly:
        return
    q = replace(case.quantized(), dtype=torch.float32)
    again = case.format.requant(case.format.dequant(q))
    assert torch.equal(case.format.dequant(again), case.format.dequant(q)), f"refit: the weight changed, at {case}"


def kind(case: Stored) -> None:
    """Decoding gives the weight's shape, dtype and device; storing and decoding change no argument and alias none."""
    w = case.weight()
    before = w.clone()
    q = case.format.sample(w)
    held = {k: t.clone() for k, t in q.data.items()}
    back = case.format.dequant(q)
    assert (back.shape, back.dtype, back.device) == (w.shape, w.dtype, w.device), f"kind: {back.shape} {back.dtype}, at {case}"
    assert bool(torch.isfinite(back).all()), f"kind: the weight is not finite, at {case}"
    assert torch.equal(w, before), f"kind: the weight was changed, at {case}"
    assert same_bits(dict(q.data), held), f"kind: the codes were changed, at {case}"
    owned = {t.untyped_storage().data_ptr() for t in (w, *q.data.values()) if t.numel()}
    assert back.untyped_storage().data_ptr() not in owned or not back.numel(), f"kind: decoding aliases the codes, at {case}"
    stored = {t.untyped_storage().data_ptr() for t in q.data.values() if t.numel()}
    assert w.untyped_storage().data_ptr() not in stored, f"kind: the codes alias the weight, at {case}"


def node(case: Stored) -> None:
    """It is a node of both tree libraries, its static parts hash, it is saved and copied, and a dtype cast moves nothing."""
    q = case.quantized()
    leaves, spec = pytree.tree_flatten(q)
    assert same_bits(dict(pytree.tree_unflatten(leaves, spec).data), dict(q.data)), f"node: torch's pytree, at {case}"
    assert pytree.tree_flatten(case.quantized())[1] == spec, f"node: equal formats have different structure, at {case}"
    paths = [str(path[-1]) for path, _ in pytree.tree_flatten_with_path(q)[0]]
    assert paths == [f".{n}" for n in q.data], f"node: paths {paths}, at {case}"
    node_: Any = q
    assert optree.tree_paths(node_, namespace=NAMESPACE) == [(n,) for n in q.data], f"node: optree's paths, at {case}"
    assert hash(q.format) == hash(type(q.format).from_dict(q.format.to_dict())), f"node: the format's dict, at {case}"
    for again in (_saved(q), copy.deepcopy(q), q.to(dtype=torch.float16)):
        assert again.format == q.format, f"node: the format changed, at {case}"
        assert same_bits(dict(again.data), dict(q.data)), f"node: the tensors changed, at {case}"
    assert case.format.dequant(q.to(dtype=torch.float16)).dtype == torch.float16, f"node: the decoded dtype, at {case}"


def _saved(q: Quantized) -> Quantized:
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file)


def vmap(case: Stored) -> None:
    """Storing weights and decoding stacked codes under ``vmap`` is doing so with each, bit for bit."""
    each = [case.quantized(i) for i in range(3)]
    many = pytree.tree_map(lambda *t: torch.stack(t), *each)
    got = torch.func.vmap(case.format.dequant)(many)
    for i, q in enumerate(each):
        assert torch.equal(got[i], case.format.dequant(q)), f"vmap: member {i} decodes differently, at {case}"
    if case.format.decode_only:
        return
    stored = torch.func.vmap(case.format.requant)(torch.stack([case.weight(i) for i in range(3)]))
    for i, q in enumerate(each):
        one = {n: t[i] for n, t in stored.data.items()}
        assert same_bits(one, dict(q.data)), f"vmap: member {i} is stored differently, at {case}"


def product(case: Stored) -> None:
    """A product with the stored weight equals that with the decoded one: forward, every derivative, under ``vmap``."""
    if len(case.shape) != 2:
        return
    case = replace(case, dtype=torch.float64)
    q, x = case.quantized(), _input(case)
    dense = case.format.dequant(q)
    for name, transform in _TRANSFORMS.items():
        want = transform(lambda x: F.linear(x, dense))(x)
        got = transform(lambda x: _recomputed(x, q))(x)
        for g, w in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            allowed = 64 * torch.finfo(torch.float64).eps * math.sqrt(w.numel() + 1) * (1 + float(w.abs().max()))
            apart = float((g - w).abs().max()) if w.numel() else 0.0
            assert apart <= allowed, f"product: {name} differs by {apart:.3g}, allowed {allowed:.3g}, at {case}"


def _recomputed(x: Tensor, q: Quantized) -> Tensor:
    return storage.product(Linear(), x, q, None, recompute=True)


def _input(case: Stored) -> Tensor:
    return rng.randn((3, case.shape[1]), rng.generator(case.seed, "input")).to(torch.float64)


Map = Callable[[Tensor], Tensor]


def _loss(f: Map) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sin().square().sum()


def _hvp(f: Map) -> Callable[[Tensor], Any]:
    return lambda x: torch.func.jvp(torch.func.grad(_loss(f)), (x,), (x.cos(),))


_TRANSFORMS: dict[str, Callable[[Map], Callable[[Tensor], Any]]] = {
    "forward": lambda f: f,
    "grad": lambda f: torch.func.grad(_loss(f)),
    "vmap": lambda f: torch.func.vmap(f),
    "vmap over the last axis": lambda f: lambda x: torch.func.vmap(f, in_dims=1)(x.T[..., None] * x[None]),
    "vmap(grad)": lambda f: torch.func.vmap(torch.func.grad(_loss(f))),
    "jacrev": lambda f: torch.func.jacrev(f),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)),
    "hvp": _hvp,
    "grad(grad)": lambda f: torch.func.grad(lambda x: torch.func.grad(_loss(f))(x).sin().sum()),
}


def compiled(case: Stored) -> None:
    """``torch.compile(fullgraph=True)`` of decoding equals eager, bit for bit."""
    q = case.quantized()
    torch.compiler.reset()
    got = torch.compile(case.format.dequant, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(got, case.format.dequant(q)), f"compiled: decodes differently, at {case}"


def scales(case: Stored) -> None:
    """A derivative with respect to floating leaves is that of decoding, never a silent zero."""
    q, x = case.quantized(), _input(case) if len(case.shape) == 2 else None
    floats = [n for n, t in q.data.items() if t.dtype in (torch.float32, torch.float16, torch.bfloat16)]
    if x is None or not floats:
        return
    for name in floats:
        t = q.data[name]
        met, decoded = (_of_leaf(case, q, x.float(), name, recompute) for recompute in (True, False))
        want, got = torch.func.grad(decoded)(t), torch.func.grad(met)(t)
        assert torch.equal(got, want), f"scales: the gradient of {name} is not that of decoding, at {case}"
        tangents = [torch.func.jvp(f, (t,), (torch.ones_like(t),))[1] for f in (met, decoded)]
        assert torch.equal(*tangents), f"scales: the tangent of {name} is not that of decoding, at {case}"


def _of_leaf(case: Stored, q: Quantized, x: Tensor, name: str, recompute: bool) -> Map:
    """Returns a loss as a function of one leaf: through the product, or of the decoded weight."""

    def loss(t: Tensor) -> Tensor:
        made = replace(q, data={**q.data, name: t}, dtype=torch.float32)
        y = storage.product(Linear(), x, made, None, recompute=True) if recompute else F.linear(x, case.format.dequant(made))
        return y.square().sum()

    return loss


#: Every law by name.
FORMAT_LAWS: dict[str, FormatLaw] = {
    "cell": cell,
    "grid": grid,
    "refit": refit,
    "kind": kind,
    "node": node,
    "vmap": vmap,
    "product": product,
    "compiled": compiled,
    "scales": scales,
}
