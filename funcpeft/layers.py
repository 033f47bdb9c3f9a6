"""Layer kinds: each is a linear map of a matrix ``(out, in)``, described once.

A kind says how the stored weight becomes the matrix and back, how an input meets the stored weight exactly as the module
computes it, and how an input meets any other matrix at the same geometry (a low-rank ``A`` of a convolution is a
convolution). Methods see matrices; nothing above this file asks what class a module has. To add a kind: one class here
and one row in ``_ROWS``. Imports torch alone; transformers' ``Conv1D`` is known by name, so transformers is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """A layer kind. Hashable: the geometry that a module holds is in its fields."""

    name: ClassVar[str]
    takes_ids: ClassVar[bool] = False
    #: Whether ``adjoint`` is there, so that a product can be differentiated without keeping the weight.
    has_adjoint: ClassVar[bool] = False
    groups = 1

    def matrix(self, stored: Tensor) -> Tensor:
        """Returns the stored weight as a matrix ``(*lead, out, in)``."""
        raise TypeError(f"{self.name}: a kind must say how its weight becomes a matrix.")

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Returns a matrix in the layout of a stored weight of the given shape."""
        raise TypeError(f"{self.name}: a kind must say how a matrix becomes its weight.")

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        """Meets an input with the stored weight, bit for bit as the module does."""
        raise TypeError(f"{self.name}: a weight of this kind is read by its module and never meets an input by itself.")

    def adjoint(self, y: Tensor, stored: Tensor) -> Tensor:
        """Meets an output with the transposed weight: the derivative of ``product`` with respect to its input."""
        raise TypeError(f"{self.name}: a kind with has_adjoint must say how its transposed weight meets an output.")

    def map(self, x: Tensor, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        """Meets an input with a matrix ``(rows, in)`` at this kind's geometry, without bias."""
        raise TypeError(f"{self.name}: a weight of this kind is read by its module and never meets an input by itself.")

    def feature_axis(self) -> int:
        """Says which axis of inputs and outputs holds features, from the end."""
        return -1

    def channels(self, shape: torch.Size) -> int:
        """Counts the input features of a stored weight of the given shape."""
        return self.matrix(torch.empty(shape, device="meta")).shape[-1]

    def over_columns(self, scale: Tensor, shape: torch.Size) -> Tensor:
        """Spreads one number per input feature ``(channels,)`` over the matrix: ``(1 or out, in)``."""
        return scale.reshape(1, -1)


@dataclass(frozen=True)
class Linear(Kind):
    """``torch.nn.Linear``: stored ``(out, in)``."""

    name: ClassVar[str] = "linear"
    has_adjoint: ClassVar[bool] = True

    def matrix(self, stored: Tensor) -> Tensor:
        return stored

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, stored, bias)

    def adjoint(self, y: Tensor, stored: Tensor) -> Tensor:
        return y @ stored

    def map(self, x: Tensor, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        return F.linear(x, matrix)


@dataclass(frozen=True)
class Transposed(Kind):
    """transformers' ``Conv1D`` (GPT-2): stored ``(in, out)``."""

    name: ClassVar[str] = "transposed"
    has_adjoint: ClassVar[bool] = True

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.mT

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = torch.mm(flat, stored) if bias is None else torch.addmm(bias, flat, stored)
        return y.view(*x.shape[:-1], stored.shape[-1])

    def adjoint(self, y: Tensor, stored: Tensor) -> Tensor:
        return y @ stored.mT

    def map(self, x: Tensor, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        return F.linear(x, matrix)


_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Conv(Kind):
    """``torch.nn.Conv1d/2d/3d``: stored ``(out, in / groups, *kernel)``; the matrix is ``(out, in / groups * kernel)``."""

    name: ClassVar[str] = "conv"
    dims: int
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    edges: tuple[int, ...] = ()

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(matrix.shape[0], *shape[1:])

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.edges, mode=self.padding_mode), (0,) * self.dims
        return _CONV[self.dims](x, stored, bias, self.stride, padding, self.dilation, self.groups)

    def map(self, x: Tensor, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        if not matrix.shape[0]:  # a rank of 0: torch has no convolution without output channels
            return self.map(x, F.pad(matrix, (0, 0, 0, 1)), stored_shape).narrow(self.feature_axis(), 0, 0)
        return self.product(x, self.stored(matrix, stored_shape), None)

    def feature_axis(self) -> int:
        return -1 - self.dims

    def channels(self, shape: torch.Size) -> int:
        return shape[1] * self.groups

    def over_columns(self, scale: Tensor, shape: torch.Size) -> Tensor:
        kernel = shape[2:].numel()
        rows = scale.reshape(self.groups, -1).repeat_interleave(kernel, dim=1)
        return rows if self.groups == 1 else rows.repeat_interleave(shape[0] // self.groups, dim=0)


@dataclass(frozen=True)
class Embedding(Kind):
    """``torch.nn.Embedding``: stored ``(vocab, dim)``; the matrix is ``(dim, vocab)`` and an id is a one-hot input."""

    name: ClassVar[str] = "embedding"
    takes_ids: ClassVar[bool] = True
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False
    sparse: bool = False

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.mT

    def product(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        return self._looked_up(x, stored, self.sparse)

    def map(self, x: Tensor, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        return self._looked_up(x, matrix.mT, False)

    def _looked_up(self, ids: Tensor, table: Tensor, sparse: bool) -> Tensor:
        options = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": sparse}
        if self.padding_idx is None or not torch._C._are_functorch_transforms_active():
            return F.embedding(ids, table, self.padding_idx, **options)
        # torch 2.13's vmap of a mapped table keeps the gradient from the first member's padding row alone
        found, padding = F.embedding(ids, table, **options), self.padding_idx % table.shape[0]
        return torch.where((ids == padding)[..., None], found.detach(), found)


@dataclass(frozen=True)
class Raw(Kind):
    """A matrix parameter its module reads by itself (fused experts, ``in_proj_weight``): ``(*lead, out, in)``.

    ``transposed`` says that the module stores ``(*lead, in, out)``.
    """

    name: ClassVar[str] = "raw"
    transposed: bool = False

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.mT if self.transposed else stored

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.mT if self.transposed else matrix


@dataclass(frozen=True)
class Vector(Kind):
    """A vector parameter: a norm's scale, a bias, or any tensor that a method replaces whole. It is its own matrix."""

    name: ClassVar[str] = "vector"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix


#: The kinds whose weight is a matrix that meets an input.
MET = frozenset({"linear", "transposed", "conv", "embedding"})


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, the transposed linear layer of GPT-2."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _base_class(module: nn.Module, name: str) -> type:
    return next(c for c in type(module).__mro__ if c.__name__ == name)


def _linear(m: nn.Linear) -> Kind | None:
    return Linear() if m.weight.shape == (m.out_features, m.in_features) else None


def _conv(m: nn.Module) -> Kind:
    assert isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    padding = m.padding if isinstance(m.padding, str) else tuple(m.padding)
    edges = tuple(m._reversed_padding_repeated_twice) if m.padding_mode != "zeros" else ()
    return Conv(m.weight.ndim - 2, tuple(m.stride), padding, tuple(m.dilation), m.groups, m.padding_mode, edges)


def _embedding(m: nn.Embedding) -> Kind | None:
    if m.max_norm is not None:  # rescales rows after the lookup, so the layer is no linear map of its weight
        return None
    return Embedding(m.padding_idx, m.scale_grad_by_freq, m.sparse)


_ROWS: tuple[tuple[Callable[[nn.Module], bool], str, Callable[..., Kind | None]], ...] = (
    (lambda m: isinstance(m, nn.Linear), "Linear", _linear),
    (is_conv1d_of_transformers, "Conv1D", lambda m: Transposed()),
    (lambda m: isinstance(m, nn.Conv1d), "Conv1d", _conv),
    (lambda m: isinstance(m, nn.Conv2d), "Conv2d", _conv),
    (lambda m: isinstance(m, nn.Conv3d), "Conv3d", _conv),
    (lambda m: isinstance(m, nn.Embedding), "Embedding", _embedding),
)


def kind_of(module: nn.Module) -> tuple[Kind, type] | None:
    """Returns the kind of a module's ``weight`` and the class whose ``forward`` meets it, or ``None``.

    A weight or bias that is computed from other parameters (``torch.nn.utils.parametrize``) is none of the module's.
    """
    own = module._parameters
    if own.get("weight") is None or (own.get("bias") is None and getattr(module, "bias", None) is not None):
        return None
    for matches, name, make in _ROWS:
        if matches(module):
            kind = make(module)
            return None if kind is None else (kind, _base_class(module, name))
    return None


def read_weights(module: nn.Module) -> Iterator[tuple[str, str | None, Kind]]:
    """Yields ``(parameter, bias, kind)`` for matrices a module reads by itself although it looks like one layer."""
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is not None:
            yield "in_proj_weight", "in_proj_bias" if module.in_proj_bias is not None else None, Raw()
        else:
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                yield name, None, Raw()
        yield "out_proj.weight", "out_proj.bias" if module.out_proj.bias is not None else None, Linear()


def parameter_kind(module: nn.Module, name: str) -> Kind:
    """Returns the kind of any parameter taken by its name: a matrix (or a stack of them), or a vector."""
    parameter = getattr(module, name)
    known = kind_of(module)
    if name == "weight" and known is not None:
        return known[0]
    if parameter.ndim >= 2:
        return Raw(transposed=bool(getattr(module, "is_transposed", False)))
    return Vector()
