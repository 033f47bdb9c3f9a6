"""How the codes of a matrix are laid out in memory, one row of a table per layout.

Every layout is a pair of pure functions between codes, uint8 ``(rows, columns)`` of 0 .. 2^bits - 1, and the tensor that a
library stores. Columns are the inputs of the weight. Most are one bit stream per row, the earlier code in the lower bits:

========== ============================ ==================================================================================
bytes      uint8 (rows, columns)        a code per byte
int8       int8 (rows, columns)         code - 2^(bits - 1) (torchao, quanto qint8)
nibbles    uint8 (rows, columns b / 8)  the stream in bytes
compressed int32 (rows, columns b / 32) the stream in words (compressed-tensors)
gptq       int32 (columns b / 32, rows) the same, transposed (GPTQ)
awq        int32 (columns, rows / 8)    8 rows per word, even rows in its lower half (AWQ)
hqq        uint8 (rows b / 8, columns)  row blocks, the first in the highest bits; 3 bits: ten per int32 (HQQ)
quanto     uint8 (rows b / 8, columns)  row blocks, the first in the lowest bits (optimum-quanto qint2 and qint4)
========== ============================ ==================================================================================

Codes are spread over bytes by shifts of whole words, so the order of bytes is the machine's: little-endian is assumed, as all
of these libraries do. Imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """A layout of codes.

    Attributes:
        bits: The widths that it can hold.
        pack: ``pack(codes, bits)``, from uint8 codes ``(rows, columns)`` to what is stored.
        unpack: ``unpack(stored, bits, rows, columns)``, its inverse: plain torch operations, without a look at values.
        misfit: ``misfit(rows, columns, bits)``: what the layout requires of a matrix that does not fit it, else ``None``.
    """

    bits: tuple[int, ...]
    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int, int, int], Tensor]
    misfit: Callable[[int, int, int], str | None] = lambda rows, columns, bits: None


# -- bit streams ---------------------------------------------------------------------------------------------------------------

_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # the word with a byte for each of the codes of one byte


def _mask(width: int, every: int, size: int) -> int:
    """Returns ones in the lowest ``width`` of ``every`` bits, for a number of ``size`` bits."""
    return sum(((1 << width) - 1) << start for start in range(0, size, every))


def _spread(words: Tensor, bits: int) -> Tensor:
    """Moves the codes in the low bits of a word to a byte each: halves apart, then quarters, and so on."""
    size = 8 * words.element_size()
    half = size // 2
    while half >= 8:  # the bits of the word in which a half ends up; its codes fill ``used`` of them
        used = half // 8 * bits
        if bits <= 4:  # what stays behind of the upper half lies beyond the codes of the lower one
            words = (words << (half - used)).bitwise_or_(words).bitwise_and_(_mask(used, half, size))
        else:
            low = _mask(used, 2 * half, size)
            words = (words & low) | (words << (half - used)) & (low << half)
        half //= 2
    return words


def _gather(words: Tensor, bits: int) -> Tensor:
    """Inverts ``_spread`` for words of eight bytes."""
    for half in (8, 16, 32):
        used = half // 8 * bits
        low = _mask(used, 2 * half, 64)
        words = (words & low) | (words >> (half - used)) & (low << used)
    return words


def _stream(codes: Tensor, bits: int, unit: int = 1) -> Tensor:
    """Returns the codes of every row as a bit stream: uint8 ``(rows, bytes)``, the bytes a multiple of ``unit``."""
    rows, columns = codes.shape
    count = -(-columns * bits // 8)
    if bits == 8:
        stream = codes
    else:
        # flat first: a single row counts as contiguous whatever its stride, and is then no view of words
        words = F.pad(codes, (0, -columns % 8)).reshape(-1).view(torch.int64).reshape(rows, -1)
        stream = _gather(words, bits).view(torch.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)[:, :count]
    return F.pad(stream, (0, -count % unit)).contiguous()


def _unstream(stream: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Inverts ``_stream``."""
    if bits == 8:
        return stream[:, :columns]
    if bits in _WORDS:
        words = stream.to(_WORDS[bits])
    else:  # eight codes in ``bits`` bytes
        parts = F.pad(stream, (0, -stream.shape[1] % bits)).reshape(rows, -1, bits)
        words = F.pad(parts, (0, 8 - bits)).view(torch.int64).squeeze(-1)
    return _spread(words, bits).view(torch.uint8)[:, :columns]


def _to_words(codes: Tensor, bits: int) -> Tensor:
    return _stream(codes, bits, unit=4).view(torch.int32)


def _from_words(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    # flat first: a single column counts as contiguous whatever its stride, and is then no view of bytes
    stream = words.reshape(-1).view(torch.uint8).reshape(words.shape[0], -1)
    return _unstream(stream, bits, rows, columns)


def _gptq_misfit(rows: int, columns: int, bits: int) -> str | None:
    unit = 32 // math.gcd(32, bits)
    return f"packing 'gptq' requires a multiple of {unit} columns" if columns % unit else None


# -- signed bytes --------------------------------------------------------------------------------------------------------------


def _to_int8(codes: Tensor, bits: int) -> Tensor:
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def _from_int8(stored: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    return stored.view(torch.uint8) + 2 ** (bits - 1)


# -- blocks of rows in one word ------------------------------------------------------------------------------------------------


def _stacked(codes: Tensor, shifts: Iterable[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    """Returns as many blocks of rows as there are shifts, each shifted, in one; rows of zeros make the last block whole."""
    shifts = tuple(shifts)
    blocks = F.pad(codes, (0, 0, 0, -codes.shape[0] % len(shifts))).to(dtype).chunk(len(shifts))
    packed = torch.zeros_like(blocks[0])
    for block, shift in zip(blocks, shifts, strict=True):
        packed = packed | block << shift
    return packed


def _unstacked(stored: Tensor, shifts: Iterable[int], bits: int, rows: int) -> Tensor:
    """Inverts ``_stacked``."""
    return torch.cat([((stored >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts])[:rows]


def _hqq_shifts(bits: int) -> range:
    return range(27, -1, -3) if bits == 3 else range(8 - bits, -1, -bits)


def _to_hqq(codes: Tensor, bits: int) -> Tensor:
    return _stacked(codes, _hqq_shifts(bits), torch.int32 if bits == 3 else torch.uint8)


def _from_hqq(stored: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    return stored if bits == 8 else _unstacked(stored, _hqq_shifts(bits), bits, rows)


def _hqq_misfit(rows: int, columns: int, bits: int) -> str | None:
    unit = 1 if bits == 3 else 8 // bits  # with three bits the last block is filled up
    return f"packing 'hqq' requires a multiple of {unit} rows" if rows % unit else None


def _to_quanto(codes: Tensor, bits: int) -> Tensor:
    return _stacked(codes, range(0, 8, bits))


def _from_quanto(stored: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    return _unstacked(stored, range(0, 8, bits), bits, rows)


# -- AWQ -----------------------------------------------------------------------------------------------------------------------

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row, of eight, in every nibble of a word, the lowest first


def _to_awq(codes: Tensor, bits: int) -> Tensor:
    rows = codes.reshape(-1, 8, codes.shape[1])
    return _to_words(torch.stack([rows[:, i].t() for i in _AWQ_ORDER], -1).reshape(codes.shape[1], -1), bits)


def _from_awq(stored: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    words = stored.t().contiguous()
    even, odd = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F  # nibbles 0, 2, 4, 6 and 1, 3, 5, 7, a byte each
    nibbles = ((odd if k % 2 else even) >> (k // 2 * 8) for k in map(_AWQ_ORDER.index, range(8)))
    return torch.stack([n.to(torch.uint8) for n in nibbles], 1).reshape(rows, columns)


def _awq_misfit(rows: int, columns: int, bits: int) -> str | None:
    return "packing 'awq' requires a multiple of 8 rows" if rows % 8 else None


# -- the table -----------------------------------------------------------------------------------------------------------------

_ALL = tuple(range(1, 9))

#: Every layout by name.
PACKINGS: dict[str, Packing] = {
    "bytes": Packing(_ALL, lambda codes, bits: codes.contiguous(), lambda stored, bits, rows, columns: stored),
    "int8": Packing(_ALL, _to_int8, _from_int8),
    "nibbles": Packing((1, 2, 4), _stream, _unstream),
    "compressed": Packing(_ALL, _to_words, _from_words),
    "gptq": Packing(
        (2, 3, 4, 8),
        lambda codes, bits: _to_words(codes, bits).t().contiguous(),
        lambda stored, bits, rows, columns: _from_words(stored.t().contiguous(), bits, rows, columns),
        _gptq_misfit,
    ),
    "awq": Packing((4,), _to_awq, _from_awq, _awq_misfit),
    "hqq": Packing((1, 2, 3, 4, 8), _to_hqq, _from_hqq, _hqq_misfit),
    "quanto": Packing((2, 4), _to_quanto, _from_quanto),
}
