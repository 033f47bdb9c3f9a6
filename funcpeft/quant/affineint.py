r"""AffineInt: integers of 1 to 8 bits on an even grid, one scale and zero per block.

.. math:: \hat W_{ij} = (q_{ij} - z_b)\, s_b, \quad q \in \{0, \dots, 2^{n} - 1\}

b: the block of entry ij; n: bits. qdata: the codes, in the layout of ``packing`` (see ``packing.py``); scale: any floating
dtype ``(R / r, C / c)``, blocks being r by c entries, rounded up; refit in float32. zero_point: as scale, integers or floats,
in units of the unsigned code; absent if z is the middle 2^(n-1). shift: as scale, floats, in place of a zero_point where the
library stores :math:`\hat W = q s - t`. g_idx: int32 ``(C,)``, the column of scale that each column of the weight uses, absent
if in order (GPTQ's act order). Zeros and shifts in half precision are met in that dtype, as their libraries do.

=========================== ====================================================== ===================================
library                     packing, layout                                        zero
=========================== ====================================================== ===================================
torchao Int8, Intx          int8, matrix                                           integer, less by 2^(n-1), or none
GPTQ                        gptq, matrix; its tables transposed                    integer, packed as qzeros
AWQ                         awq, matrix; its tables transposed                     integer, packed as qzeros
compressed-tensors          compressed, matrix                                     integer, or none
HQQ axis 1, axis 0          hqq, flat and strided                                  float
optimum-quanto qint8        int8, matrix                                           none
optimum-quanto qint2, qint4 quanto, flat                                           shift
=========================== ====================================================== ===================================

All of them decode to the library's weight bit for bit. Fitting follows torchao: scale = absmax / ((2^n - 1) / 2), or with zeros
(max - min) / (2^n - 1), rounded to nearest. One symmetric bit has the levels ±absmax / 2, whose cells cover the block: scale
absmax, zero_point 1/2.

References:
    Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2017,
    arXiv 1712.05877, eq. (1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.quant import blocks
from funcpeft.quant.blocks import BlockSize, Tile, matrix_shape, over_tiles, quotient, tiled
from funcpeft.quant.format import Data, Format
from funcpeft.quant.packing import PACKINGS
from funcpeft.storage import Quantized

_LAYOUTS = ("matrix", "flat", "strided")
_TABLES = ("scale", "zero_point", "shift")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class AffineInt(Format):
    """Integer codes with a scale and a zero per block.

    Args:
        bits: Width of a code, 1 to 8.
        block_size: Which entries share a scale: ``"tensor"``, ``"row"``, a number of neighbours in a row, or a tile
            ``(rows, columns)``.
        symmetric: Whether a grid that is fitted anew is symmetric, else it gets zeros. A stored one has what it has.
        packing: Layout of the codes, a name of ``packing.PACKINGS``; ``"auto"`` is ``"nibbles"`` for 1, 2 and 4 bits, else
            ``"bytes"``.
        layout: What blocks are cut from: ``"matrix"``, the weight's matrix; ``"flat"``, the ``(n / g, g)`` matrix of all n
            entries, g the block size, so that blocks run over the ends of rows; ``"strided"``, the ``(g, n / g)`` matrix,
            a block being a column. The last two are HQQ's axis 1 and 0 and require an int ``block_size``.
    """

    refits_exactly: ClassVar[bool] = False

    bits: int = 4
    block_size: BlockSize = 32
    symmetric: bool = True
    packing: str = "auto"
    layout: str = "matrix"

    def __post_init__(self) -> None:
        bits = self.bits
        self.require(isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8, "bits", "1 to 8", bits)
        self.require(blocks.valid(self.block_size), "block_size", blocks.RULE, self.block_size)
        self.require(isinstance(self.symmetric, bool), "symmetric", "True or False", self.symmetric)
        if self.packing == "auto":
            object.__setattr__(self, "packing", "nibbles" if bits in (1, 2, 4) else "bytes")
        able = [n for n, p in PACKINGS.items() if bits in p.bits]
        self.require(self.packing in able, "packing", f"one of {errors.listed(able)} for {bits} bits", self.packing)
        self.require(self.layout in _LAYOUTS, "layout", f"one of {errors.listed(_LAYOUTS)}", self.layout)
        whole = self.layout == "matrix" or isinstance(self.block_size, int)
        self.require(whole, "block_size", f"an int with layout {self.layout!r}", self.block_size)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (
            cls(block_size=8),
            cls(bits=8, block_size="row"),
            cls(bits=8, block_size="tensor", symmetric=False, packing="int8"),
            cls(bits=1, block_size=8),
            cls(bits=2, block_size=(2, 4), symmetric=False),
            cls(bits=3, block_size=8, packing="compressed"),
            cls(bits=5, block_size=8, symmetric=False, packing="compressed"),
            cls(block_size=8, packing="gptq"),
            cls(block_size=8, symmetric=False, packing="awq"),
            cls(block_size=8, symmetric=False, packing="hqq", layout="flat"),
            cls(bits=3, block_size=8, symmetric=False, packing="hqq", layout="strided"),
            cls(bits=2, block_size=8, packing="quanto", layout="flat"),
        )

    def misfit(self, shape: torch.Size) -> str | None:
        if not shape.numel():
            return "a weight with entries is required"
        if self.layout != "matrix" and shape.numel() % int(self.block_size):  # type: ignore[arg-type]
            return f"the number of entries must be a multiple of block_size {self.block_size}"
        (rows, columns), _ = self._cut(shape)
        return PACKINGS[self.packing].misfit(rows, columns, self.bits)

    def _cut(self, shape: torch.Size) -> tuple[tuple[int, int], Tile]:
        """Returns the size of the matrix that is cut into blocks, and the tile of a block."""
        rows, columns = matrix_shape(shape)
        if self.layout != "matrix":
            assert isinstance(self.block_size, int)
            g = self.block_size
            other = rows * columns // g
            return ((other, g), (1, g)) if self.layout == "flat" else ((g, other), (g, 1))
        r, c = blocks.tile_of(self.block_size, rows, columns)
        return (rows, columns), (min(r, rows), min(c, columns))

    # -- to codes ------------------------------------------------------------------------------------------------------

    def encode(self, weight: Tensor) -> Data:
        size, tile = self._cut(weight.shape)
        matrix = weight.reshape(size)
        tables = self._fit(matrix, tile)
        return {"qdata": self._packed(self._nearest(matrix, tile, tables)), **tables}

    def _fit(self, matrix: Tensor, tile: Tile) -> Data:
        top = 2**self.bits - 1
        if self.symmetric:
            width = blocks.maxima(matrix, tile)
            scale = _floored(width / (top / 2 if self.bits > 1 else 1), width)
            return {"scale": scale} if self.bits > 1 else {"scale": scale, "zero_point": torch.full_like(scale, 0.5)}
        cut = tiled(matrix, tile)
        low, high = cut.amin((1, 3)).clamp(max=0), cut.amax((1, 3)).clamp(min=0)
        scale = _floored((high - low) / top, high - low)
        return {"scale": scale, "zero_point": quotient(-low, scale).round().clamp(0, top).to(torch.uint8)}

    def _nearest(self, matrix: Tensor, tile: Tile, tables: Data) -> Tensor:
        """Returns the codes of the nearest grid points."""
        tables = {n: t.to(torch.float32) if t.is_floating_point() else t for n, t in tables.items()}
        scale, largest = tables["scale"], torch.finfo(torch.float32).max
        tables["scale"] = quotient(torch.ones_like(scale), scale).clamp(-largest, largest)

        def rounded(w: Tensor, inverse: Tensor, *offset: Tensor) -> Tensor:
            if "shift" in tables:
                codes = ((w + offset[0]) * inverse).round()
            elif offset and offset[0].is_floating_point():
                codes = (w * inverse + offset[0]).round()
            else:  # by the inverse and with the zero added last, as torchao: so ties fall alike
                codes = (w * inverse).round() + (offset[0] if offset else 2 ** (self.bits - 1))
            return codes.clamp(0, 2**self.bits - 1).to(torch.uint8)

        return over_tiles(rounded, matrix, tile, *tables.values())

    def encode_like(self, weight: Tensor, like: Quantized) -> Data:
        size, tile, tables = self._tables(like)
        matrix = weight.reshape(size)
        codes = self._nearest(matrix, tile, tables)
        # where two codes decode to one number (scale 0, or zeros in half precision) the stored one is kept
        kept = self.dequant(like).to(torch.float32).reshape(size) == matrix
        return {**like.data, "qdata": self._packed(torch.where(kept, self._unpacked(like), codes))}

    def _packed(self, codes: Tensor) -> Tensor:
        return PACKINGS[self.packing].pack(codes, self.bits)

    # -- from codes ----------------------------------------------------------------------------------------------------

    def _unpacked(self, quantized: Quantized) -> Tensor:
        """Returns the codes of the matrix that is cut into blocks."""
        size, _ = self._cut(quantized.shape)
        return PACKINGS[self.packing].unpack(quantized.data["qdata"], self.bits, *size)

    def codes(self, quantized: Quantized) -> Tensor:
        """Returns the codes of the weight's matrix, 0 to 2^bits - 1: uint8 ``(rows, columns)``."""
        return self._unpacked(quantized).reshape(matrix_shape(quantized.shape))

    def _tables(self, quantized: Quantized) -> tuple[tuple[int, int], Tile, Data]:
        """Returns size and tile of the matrix, and what its blocks store; each column is a block where ``g_idx`` says which."""
        size, tile = self._cut(quantized.shape)
        data = quantized.data
        tables = {n: data[n] for n in _TABLES if n in data}
        if "g_idx" not in data:
            return size, tile, tables
        group = data["g_idx"].long()
        floats = {n: t if t.is_floating_point() else t.to(torch.float32) for n, t in tables.items()}  # bytes select slowly
        return size, (tile[0], 1), {n: t.index_select(1, group) for n, t in floats.items()}

    def decode(self, quantized: Quantized) -> Tensor:
        _, tile, tables = self._tables(quantized)

        def levels(codes: Tensor, *found: Tensor) -> Tensor:
            return _levels(codes, **dict(zip(tables, found, strict=True)))

        codes = self._signed(quantized) if len(tables) == 1 else self._unpacked(quantized)
        return over_tiles(levels, codes, tile, *tables.values())

    def _signed(self, quantized: Quantized) -> Tensor:
        """Returns the codes less the middle, int8."""
        if self.packing == "int8":
            return quantized.data["qdata"]
        return (self._unpacked(quantized) - 2 ** (self.bits - 1)).view(torch.int8)

    def step(self, quantized: Quantized) -> Tensor:
        (rows, columns), tile, tables = self._tables(quantized)
        step = blocks.spread(tables["scale"].to(torch.float32).abs() / 2, tile, rows, columns).reshape(quantized.shape)
        offset = tables.get("zero_point", tables.get("shift"))
        if offset is None or offset.dtype not in _HALF:
            return step
        reach = self.decode(quantized).abs()  # levels in half precision are off the even grid by their own rounding
        if "shift" in tables:
            reach = reach + blocks.spread(offset.to(torch.float32).abs(), tile, rows, columns)
        return step + 2 * torch.finfo(offset.dtype).eps * reach.reshape(quantized.shape)

    def grid(self, quantized: Quantized) -> tuple[Tensor, Tensor]:
        """Returns scales and zero points, float32 ``(rows, groups)`` each: weight = (code - zero) * scale.

        Groups are those of neighbours along the input, in order; with ``g_idx`` every column is one. Zeros are in units of
        the unsigned code, the middle 2^(bits - 1) where none are stored.

        Raises:
            TypeError: If blocks are not parts of rows: layout ``"strided"``, or ``"flat"`` where they run over the ends.
        """
        rows, columns = matrix_shape(quantized.shape)
        _, (r, c), tables = self._tables(quantized)
        if self.layout == "strided" or columns % (c if self.layout == "flat" else 1):
            found = f"layout {self.layout!r} of {rows} x {columns}"
            raise TypeError(errors.say(self.label, "blocks within rows are required", found, "use layout='matrix'"))
        scale = tables["scale"].to(torch.float32)
        if "shift" in tables:
            zero = quotient(tables["shift"].to(torch.float32), scale)
        else:
            zero = tables.get("zero_point", torch.full_like(scale, 2 ** (self.bits - 1))).to(torch.float32)
        if self.layout == "flat":
            return scale.reshape(rows, -1), zero.reshape(rows, -1)
        return tuple(t.repeat_interleave(r, 0)[:rows] for t in (scale, zero))  # type: ignore[return-value]

    def repacked(self, quantized: Quantized, packing: str) -> Quantized:
        """Returns the same codes, scales and zeros with the codes in another layout.

        Raises:
            ValueError: If that layout does not hold this number of bits, or does not fit the shape.
        """
        target = replace(self, packing=packing)
        reason = target.misfit(quantized.shape)
        if reason:
            raise ValueError(errors.say(self.label, reason, tuple(quantized.shape), "keep the packing"))
        data = {**quantized.data, "qdata": target._packed(self._unpacked(quantized))}
        return replace(quantized, data=data, format=target)


def repack(quantized: Quantized, packing: str) -> Quantized:
    """Returns a weight stored as ``AffineInt`` with its codes in another layout, a name of ``packing.PACKINGS``.

    Raises:
        TypeError: If it is stored otherwise.
        ValueError: If that layout does not hold this number of bits, or does not fit the shape.
    """
    if not isinstance(quantized.format, AffineInt):
        raise TypeError(errors.say("repack", "a weight stored as AffineInt is required", repr(quantized.format)))
    return quantized.format.repacked(quantized, packing)


def _floored(scale: Tensor, width: Tensor) -> Tensor:
    """Keeps the inverse of a scale finite, and the scale of a block of zeros 0."""
    return scale.clamp(min=torch.finfo(scale.dtype).tiny).where(width > 0, 0)


def _levels(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Returns ``(codes - zero_point) * scale - shift`` in float32; the tables broadcast against the codes."""
    if zero_point is not None and zero_point.dtype in _HALF:
        return ((codes.to(zero_point.dtype) - zero_point) * scale).to(torch.float32)
    if shift is not None and shift.dtype in _HALF:
        return (codes.to(shift.dtype) * scale - shift).to(torch.float32)
    # One buffer for every pass: fresh memory costs more than the arithmetic. It is made from an entry of the result, so that
    # under vmap it has the batch axis of whichever factor has one.
    tables = [t.to(torch.float32) for t in (scale, zero_point, shift) if t is not None]
    seed = codes[:1, :1, :1, :1].to(torch.float32) + sum(t[:1, :1, :1, :1] for t in tables)
    values = seed.new_empty(codes.shape).copy_(codes)
    if zero_point is not None:
        values.sub_(zero_point.to(torch.float32))
    values.mul_(tables[0])
    return values if shift is None else values.sub_(tables[-1])
