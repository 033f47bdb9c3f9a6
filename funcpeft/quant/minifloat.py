r"""What the formats of small floats share: their element types, e8m0 scales, and the blocks of 32 of MXFP4 and MXFP8.

.. math:: \hat W_k = 2^{e_{\lfloor k / 32 \rfloor} - 127}\, q_k

An element type has a sign, an exponent and a mantissa: e2m1 (levels up to 6, four bits), e4m3 (up to 448) and e5m2 (up to
57344), all with subnormals and both zeros. Every rounding is to the nearest level, ties to the even code, and saturates at
the largest one. Imports blocks, format.

References:
    OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3 (elements), 5.4 (scales) and 6.3 (conversion).
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv 2209.05433 (e4m3 and e5m2).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from funcpeft.quant.blocks import matrix_shape
from funcpeft.quant.format import Data, Format
from funcpeft.storage import Quantized

#: The smallest scale that is stored in float32: below it a quotient would lose bits.
TINY = torch.finfo(torch.float32).tiny


class Element(Protocol):
    """A small float as an array of codes."""

    @property
    def largest(self) -> float:
        """The largest level."""
        ...

    def codes(self, values: Tensor) -> Tensor:
        """Returns the codes of the levels nearest to float32 values ``(R, C)``, beyond the largest level that one."""
        ...

    def values(self, codes: Tensor) -> Tensor:
        """Returns the float32 level of every code, in row-major order."""
        ...

    def half_gaps(self, codes: Tensor) -> Tensor:
        """Returns half the distance from every code's level to the farther of its neighbours, in row-major order."""
        ...


@dataclass(frozen=True)
class Float8:
    """One code a byte, in a dtype of torch."""

    dtype: torch.dtype

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    def codes(self, values: Tensor) -> Tensor:
        return values.clamp(-self.largest, self.largest).to(self.dtype)

    def values(self, codes: Tensor) -> Tensor:
        if codes.device.type != "cpu" or torch.compiler.is_compiling():
            return codes.to(torch.float32)
        # torch 2.13 converts e4m3 on a CPU at 5 ns an entry: looking pairs up takes a fifth of that, where they align
        if codes.is_contiguous() and codes.shape[-1] % 2 == 0 and codes.storage_offset() % 2 == 0:
            return _looked_up(_float8_pairs(self.dtype), codes.view(torch.uint16))
        return _levels(self.dtype).index_select(0, codes.view(torch.uint8).reshape(-1).long())

    def half_gaps(self, codes: Tensor) -> Tensor:
        table = _half_gaps(tuple(_levels(self.dtype).tolist())).to(codes.device)
        return table.index_select(0, codes.view(torch.uint8).reshape(-1).long())


@dataclass(frozen=True)
class Float4:
    """e2m1, two codes a byte, the earlier entry in the low half."""

    #: The level of every code.
    levels: ClassVar[tuple[float, ...]] = (
        0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
    )  # fmt: skip

    @property
    def largest(self) -> float:
        return self.levels[7]

    def codes(self, values: Tensor) -> Tensor:
        # codes count steps of 1/2 up to 2, of 1 up to 4 and of 2 beyond, hence the least of three roundings
        sizes = values.abs()
        counts = (sizes + sizes).round_()
        counts = torch.minimum(counts, sizes.round().add_(2))
        counts = torch.minimum(counts, sizes.mul_(0.5).round_().add_(4))
        signs = (values.view(torch.int32) >> 28).to(torch.int8) & 8
        codes = (counts.clamp_(max=7).to(torch.int8) | signs).view(torch.uint8)
        return codes[:, 0::2] | (codes[:, 1::2] << 4)

    def values(self, codes: Tensor) -> Tensor:
        pairs = _nibble_pairs(self.levels) if torch.compiler.is_compiling() else _E2M1_PAIRS
        return _looked_up(pairs.to(codes.device), codes)

    def half_gaps(self, codes: Tensor) -> Tensor:
        gaps = tuple(_half_gaps(self.levels).tolist())
        return _looked_up(_nibble_pairs(gaps).to(codes.device), codes)


E2M1 = Float4()
#: The element types of eight bits by name.
FLOAT8 = {"e4m3": Float8(torch.float8_e4m3fn), "e5m2": Float8(torch.float8_e5m2)}


def quotient(weight: Tensor, scale: Tensor) -> Tensor:
    """Divides, and gives a zero of the weight's sign where the scale is 0."""
    return weight / scale.where(scale != 0, math.inf)


# -- tables --------------------------------------------------------------------------------------------------------------------


def _looked_up(pairs: Tensor, codes: Tensor) -> Tensor:
    """Returns two float32 numbers per code, from a table of them side by side as one 64-bit number."""
    return pairs.index_select(0, codes.reshape(-1).long()).view(torch.float32)


@functools.cache
def _levels(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(torch.float32)


@functools.cache
def _float8_pairs(dtype: torch.dtype) -> Tensor:
    """Returns the levels of every two bytes in memory order; the index is how this machine reads those bytes."""
    both = torch.arange(65536, dtype=torch.int32, device="cpu").to(torch.uint16).view(torch.uint8).long()
    return _levels(dtype).index_select(0, both).view(torch.int64)


def _nibble_pairs(table: tuple[float, ...]) -> Tensor:
    numbers, byte = torch.tensor(table, dtype=torch.float32, device="cpu"), torch.arange(256, device="cpu")
    return torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=-1).view(torch.int64).reshape(-1)


_E2M1_PAIRS = _nibble_pairs(Float4.levels)


def _half_gaps(levels: tuple[float, ...]) -> Tensor:
    """Returns per code half its distance to the farther neighbour; NaN where the code is no number."""
    ascending = sorted({v for v in levels if math.isfinite(v)})
    gaps = [b - a for a, b in itertools.pairwise(ascending)]
    wider = {v: max(gaps[max(i - 1, 0)], gaps[min(i, len(gaps) - 1)]) / 2 for i, v in enumerate(ascending)}
    return torch.tensor([wider.get(v, math.nan) for v in levels], dtype=torch.float32, device="cpu")


# -- scales that are powers of two ---------------------------------------------------------------------------------------------


def e8m0_values(scale: Tensor) -> Tensor:
    """Returns ``2 ** (scale - 127)`` in float32, of uint8 codes; 255 is NaN.

    Assembled from bits, since a power function may be inexact or flush 2^-127, which float32 holds as a subnormal number.
    """
    code = scale.to(torch.int32)
    bits = torch.where(code == 0, 0x00400000, torch.where(code == 255, 0x7FC00000, code << 23))
    return bits.view(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Microscaling(Format):
    """Blocks of 32 neighbours in a row that share a power of two.

    Refits by the rule of the specification, torchao's ``FLOOR``: the power of two below a block's absmax meets that below the
    element's largest level, so entries up to the next power saturate there.
    """

    block_size: ClassVar[int] = 32
    clips: ClassVar[float] = 1 / 16

    @property
    def element(self) -> Element:
        """How the codes are stored."""
        raise TypeError(f"{self.label}: a format must define element.")

    def misfit(self, shape: torch.Size) -> str | None:
        return block_misfit(shape, self.block_size)

    def encode(self, weight: Tensor) -> Data:
        maxima = weight.reshape(weight.shape[0], -1, self.block_size).abs().amax(2)
        emax = math.frexp(self.element.largest)[1] - 1
        scale = ((maxima.view(torch.int32) >> 23) - emax).clamp(min=0).to(torch.uint8)
        return {"qdata": self._codes(weight, scale), "scale": scale}

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        return {"qdata": self._codes(weight, like.data["scale"]), "scale": like.data["scale"]}

    def _codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        blocks = weight.reshape(*scale.shape, self.block_size)
        return self.element.codes((blocks / e8m0_values(scale)[..., None]).reshape(weight.shape))

    def decode(self, quantized: Quantized) -> Tensor:
        return self._scaled(self.element.values(quantized.data["qdata"]), quantized)

    def step(self, quantized: Quantized) -> Tensor:
        return self._scaled(self.element.half_gaps(quantized.data["qdata"]), quantized).reshape(quantized.shape)

    def _scaled(self, values: Tensor, quantized: Quantized) -> Tensor:
        return values.reshape(-1, self.block_size) * e8m0_values(quantized.data["scale"]).reshape(-1, 1)


def block_misfit(shape: torch.Size, block_size: int) -> str | None:
    """Says what blocks of neighbours in a row require of a shape."""
    rows, columns = matrix_shape(shape)
    if rows * columns == 0:
        return "a weight with entries is required"
    return f"in_features must be a multiple of block_size {block_size}" if columns % block_size else None
