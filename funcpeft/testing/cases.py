"""Cases: one method on one small generated model; what the laws are stated on.

A case is structure only (layer kind, sizes, bias, dtype, seed); arrays are made from the seed, so a failing case shrinks to
something readable and prints whole. Imports adapt and below.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcpeft import rng
from funcpeft.adapt import Net, adapt
from funcpeft.context import Context
from funcpeft.functional import Model, Params, functionalize
from funcpeft.method import FrozenDict, Method
from funcpeft.quant.format import Format
from funcpeft.quantization import dequantize
from funcpeft.tree import Adapter, Adapters, as_tuple, tree_leaves


class Read(nn.Module):
    """Reads a stack of matrices by itself, as fused experts do: each input row meets every matrix."""

    def __init__(self, out: int, in_: int, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.experts = nn.Parameter(torch.empty(2, *((in_, out) if transposed else (out, in_))))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(batch, in)`` to ``(2, batch, out)``."""
        return x @ (self.experts if self.is_transposed else self.experts.mT)


class Pair(nn.Module):
    """Two layers of one kind on the same input, so that sites can be told apart."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both layers' outputs."""
        return self.first(x), self.second(x)


@dataclass(frozen=True)
class Case:
    """A method on a small model.

    Attributes:
        method: The method, its targets not yet set.
        kind: Layer kind: ``linear``, ``transposed``, ``conv``, ``embedding``, ``raw``, ``vector`` or ``call``.
        out: Output features.
        in_: Input features (vocabulary of an embedding).
        bias: Whether the layers have biases.
        dtype: dtype of the base.
        seed: Determines every array.
        geometry: Dims, kernel, stride, padding, dilation and groups of a convolution.
        format: The format in which the base's matrices are stored where their shape fits it, or ``None``.
    """

    method: Method
    kind: str
    out: int = 4
    in_: int = 6
    bias: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    geometry: tuple[int, int, int, int, int, int] = (2, 3, 1, 1, 1, 1)
    format: Format | None = None

    def _draw(self, shape: Any, *data: str, scale: float = 1.0) -> Tensor:
        return rng.randn(tuple(shape), rng.generator(self.seed, "/".join(data))).to(torch.float64) * scale

    def _layer(self) -> nn.Module:
        match self.kind:
            case "linear":
                return nn.Linear(self.in_, self.out, bias=self.bias)
            case "transposed":
                from transformers.pytorch_utils import Conv1D

                return Conv1D(self.out, self.in_)
            case "conv":
                dims, kernel, stride, padding, dilation, groups = self.geometry
                made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
                return made(self.in_, self.out, kernel, stride, padding, dilation, groups, self.bias)
            case "embedding":
                return nn.Embedding(self.in_, self.out)
            case "raw":
                return Read(self.out, self.in_, transposed=self.bias)
            case "vector":
                return nn.LayerNorm(self.in_) if self.bias else nn.RMSNorm(self.in_)
            case _:
                raise ValueError(f"case: kind must be a layer kind, got {self.kind!r}.")

    def module(self) -> nn.Module:
        """Makes the module, its parameters drawn from the seed."""
        module = _tiny_model() if self.kind == "call" else Pair(self._layer)
        with torch.no_grad():
            for name, p in module.named_parameters():
                width = math.sqrt(max(1, p[0].numel() if p.ndim > 1 else 1))
                p.copy_(self._draw(p.shape, "module", name) / width)
        return module.to(self.dtype)

    def input(self) -> Tensor:
        """Makes an input: ids for embeddings and whole models, else floats."""
        gen = rng.generator(self.seed, "input")
        if self.kind == "call":
            return torch.randint(0, 32, (2, 5), generator=gen)
        if self.kind == "embedding":
            return torch.cat([torch.arange(self.in_), torch.randint(0, self.in_, (3,), generator=gen)])[None]
        shape = (2, self.in_, *(5,) * self.geometry[0]) if self.kind == "conv" else (3, self.in_)
        return self._draw(shape, "input").to(self.dtype)

    def targeted(self, *names: str) -> Method:
        """Returns the method with its targets set to the case's layers (or some of them)."""
        names = names or ("first", "second")
        if self.kind == "call":
            sited = self.method.sited and self.method.target_modules is None
            return replace(self.method, target_modules=("c_attn",)) if sited else self.method
        if self.kind == "raw":
            return replace(self.method, target_modules=(), target_parameters=tuple(f"{n}.experts" for n in names))
        kept = {  # patterns may only name sites that there are
            f.name: {k: v for k, v in getattr(self.method, f.name).items() if k in names}
            for f in fields(self.method)
            if f.name.endswith("_pattern") and isinstance(getattr(self.method, f.name), FrozenDict)
        }
        return replace(self.method, target_modules=names, **kept)

    def base(self) -> tuple[Model, Params]:
        """Returns the model and its params."""
        model, params = functionalize(self.module())
        stored = {key: self.format.sample(params[key]) for key in self.stored(model)} if self.format is not None else {}
        model.prepare(frozenset(stored))
        return model, {**params, **stored}

    def stored(self, model: Model) -> list[str]:
        """Lists the keys of the matrices that the case's format stores."""
        matrices = [k for k, s in model.shapes.items() if len(s) > 1 and k not in model.buffers]
        return [k for k in matrices if self.format is not None and self.format.fits(model.shapes[k])]

    def built(self) -> Built:
        """Builds model, net and input."""
        model, params = self.base()
        return Built(self, model, params, adapt(model, self.targeted()), self.input())

    def fits(self) -> bool:
        """Whether the method takes layers of these sizes."""
        try:
            adapt(_structure(self.kind, self.out, self.in_, self.bias, self.geometry), self.targeted())
        except (ValueError, IndexError):
            return False
        return True


@functools.lru_cache(maxsize=4096)
def _structure(kind: str, out: int, in_: int, bias: bool, geometry: tuple[int, int, int, int, int, int]) -> Model:
    """Returns the model of a case, which is the same for every method."""
    return Case(Method(), kind, out, in_, bias, geometry=geometry).base()[0]


@functools.cache
def _tiny_config() -> Any:
    from transformers import GPT2Config

    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, vocab_size=32)
    config._attn_implementation = "eager"  # fused attention has no vmap rule in torch 2.13
    return config


def _tiny_model() -> nn.Module:
    """Makes a GPT-2, which computes in its weights' dtype throughout (a Llama takes norms and softmax in float32)."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(copy.deepcopy(_tiny_config()))


@dataclass(frozen=True, eq=False)
class Built:
    """A case's model, net and input, and the adapters that laws are stated on."""

    case: Case
    model: Model
    params: Params  # where the case has a format, with stored leaves
    net: Net
    x: Tensor

    @functools.cached_property
    def dense(self) -> Params:
        """The params with every stored weight decoded."""
        return dequantize(self.params)

    @functools.cached_property
    def merges(self) -> bool:
        """Whether the method has a merged form at every site."""
        sites = [(e.method, b) for e in self.net.entries for b in self.net.bases(e, self.params).values()]
        return self.case.method.merges and all(method.merges_at(base) for method, base in sites)

    def fresh(self, seed: int | None = None) -> Any:
        """Returns a freshly initialised adapter."""
        return self.init(self.net, self.case.seed if seed is None else seed)

    def init(self, net: Net, seed: int) -> Any:
        """Returns a fresh adapter of a net on this case's model, made with sample data where its method needs any."""
        needs: dict[str, Any] = {}
        for entry in net.entries:
            needs |= entry.method.sample_needs(net.bases(entry, self.params), seed)
        return net.init(self.params, seed, **needs)

    def file_needs(self) -> dict[str, Any]:
        """Returns the sample data of this case's adapters that their files do not hold."""
        needs = self.net.entries[0].method.sample_needs(self.net.bases(self.net.entries[0], self.params), self.case.seed)
        return {name: needs[name] for name in self.case.method.file_needs if name in needs}

    def context(self, **fields: Any) -> Context:
        """Returns the context of a call on the case's input, with sample values where its method reads any."""
        return Context(**fields, values=self.case.method.sample_values(self.x.shape[0]))

    def adapter(self, member: int = 0, scale: float = 0.3) -> Any:
        """Returns an adapter whose trained leaves are moved away from init, where laws would hold vacuously."""
        return perturbed(self.fresh(self.case.seed + member), self.case.seed + 7919 * (member + 1), scale)

    def out(
        self, adapter: Adapters, params: Params | None = None, x: Tensor | None = None, context: Context | None = None
    ) -> tuple[Tensor, ...]:
        """Returns the tensors that the adapted model computes."""
        x, context = self.x if x is None else x, context or self.context()
        return outputs(self.net(params or self.params, adapter, x, context=context, **self.options()))

    def base_out(self, params: Params | None = None) -> tuple[Tensor, ...]:
        """Returns the tensors that the model computes with the given params."""
        return outputs(self.model(params or self.params, self.x, **self.options()))

    def options(self) -> dict[str, Any]:
        """Returns the keyword inputs of the model."""
        return {"use_cache": False} if self.case.kind == "call" else {}

    def tolerance(self, *params: Params, dtype: torch.dtype | None = None) -> float:
        """Computes the tolerance of a product: a constant times eps, sqrt(fan-in) and the sizes of weights and inputs."""
        dtype = dtype or self.case.dtype
        sizes = [
            _row_norm(v) for p in (self.dense, *params) for v in p.values() if isinstance(v, Tensor) and v.is_floating_point()
        ]
        x = float(self.x.abs().max()) if self.x.is_floating_point() else 1.0
        fan_in = max((int(v[0].numel()) for v in self.dense.values() if v.ndim > 1), default=1)
        depth = 50.0 if self.case.kind == "call" else 1.0
        return 16 * depth * torch.finfo(dtype).eps * math.sqrt(max(fan_in, 1)) * (1 + max(sizes)) * (1 + x)


def _row_norm(t: Tensor) -> float:
    wide = t.detach().to(torch.float64)
    return float((wide.flatten(1) if wide.ndim > 1 else wide.reshape(1, -1)).norm(dim=-1).max()) if t.numel() else 0.0


def outputs(out: Any) -> tuple[Tensor, ...]:
    """Returns the tensors of a model's output."""
    return (out.logits,) if hasattr(out, "logits") else tuple(out)


def perturbed(adapter: Adapters, seed: int, scale: float) -> Any:
    """Adds N(0, scale^2) to every trained leaf."""

    def move(i: int, a: Adapter) -> Adapter:
        return a.replace(
            params={
                p: {
                    n: t + scale * rng.randn(tuple(t.shape), rng.generator(seed, f"{i}/{p}/{n}")).to(t.dtype)
                    for n, t in v.items()
                }
                for p, v in a.params.items()
            }
        )

    made = tuple(move(i, a) for i, a in enumerate(as_tuple(adapter)))
    return made if isinstance(adapter, tuple) else made[0]


def loss(outs: tuple[Tensor, ...]) -> Tensor:
    """Sums squares of the outputs with weights that differ per element; a scalar that every leaf can reach."""
    total = torch.zeros((), dtype=torch.float64)
    for o in outs:
        flat = o.reshape(-1)
        weights = torch.linspace(0.5, 1.5, flat.shape[0], dtype=o.dtype, device=o.device)
        total = total + F.mse_loss(flat, weights, reduction="sum").to(torch.float64)
    return total


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees have equal leaves, bit for bit."""
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(
        (s.dtype, s.shape) == (t.dtype, t.shape) and torch.equal(_comparable(s), _comparable(t))
        for s, t in zip(left, right, strict=True)
    )


def _comparable(t: Tensor) -> Tensor:
    """Returns a float8 tensor as bytes, since torch 2.13 does not compare them."""
    return t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 and t.is_floating_point() else t


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree entrywise within a tolerance; NaN never does."""
    return a.shape == b.shape and bool(((a.detach().double() - b.detach().double()).abs() <= tolerance).all())


def distance(a: Tensor, b: Tensor) -> float:
    """Returns the largest entrywise difference."""
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.numel() else 0.0
