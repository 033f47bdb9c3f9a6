"""The tiles of a weight matrix that share a scale.

A weight is quantized as a matrix: a convolution's kernel flattened, any other weight with its leading axes (experts) as
further rows. ``block_size`` says, in torchao's manner, which entries of the matrix share a scale: ``"tensor"`` all,
``"row"`` those of a row, an int that many neighbours in a row, a pair ``(rows, columns)`` a tile. Imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

BlockSize = int | str | tuple[int, int]
Tile = tuple[int, int]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns rows and columns of a weight of the given shape; a vector is one row."""
    if len(shape) >= 4:
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), (shape[-1] if shape else 1)


def tile_of(block_size: BlockSize, rows: int, columns: int) -> Tile:
    """Returns the rows and columns of a tile, for a matrix of the given size."""
    if block_size == "tensor":
        return rows, columns
    if block_size == "row":
        return 1, columns
    if isinstance(block_size, int):
        return 1, block_size
    assert isinstance(block_size, tuple)
    return block_size


def valid(block_size: object) -> bool:
    """Whether a value may be a block size."""
    if isinstance(block_size, str):
        return block_size in ("tensor", "row")
    sizes = block_size if isinstance(block_size, tuple) and len(block_size) == 2 else (block_size,)
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)


#: What ``valid`` requires, for messages.
RULE = "'tensor', 'row', a positive int or a pair of them"


def tiled(matrix: Tensor, tile: Tile) -> Tensor:
    """Returns a matrix ``(R, C)`` as ``(R / r, r, C / c, c)``, ragged edges filled with zeros."""
    (r, c), (rows, columns) = tile, matrix.shape
    if rows % r or columns % c:
        matrix = F.pad(matrix, (0, -columns % c, 0, -rows % r))
    return matrix.reshape(matrix.shape[0] // r, r, matrix.shape[1] // c, c)


def untiled(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Inverts ``tiled``."""
    a, r, b, c = tiles.shape
    return tiles.reshape(a * r, b * c)[:rows, :columns]


def over_tiles(f: Callable[..., Tensor], matrix: Tensor, tile: Tile, *tables: Tensor) -> Tensor:
    """Computes ``f(matrix, *tables)`` entry by entry, the tables ``(R / r, C / c)`` having one number per tile."""
    rows, columns = matrix.shape
    spread = (t[:, None, :, None] for t in tables)
    return untiled(f(tiled(matrix, tile), *spread), rows, columns)


def spread(table: Tensor, tile: Tile, rows: int, columns: int) -> Tensor:
    """Returns a table ``(R / r, C / c)`` with every number repeated over its tile: ``(R, C)``."""
    (r, c), (a, b) = tile, table.shape
    return untiled(table[:, None, :, None].expand(a, r, b, c), rows, columns)


def maxima(matrix: Tensor, tile: Tile) -> Tensor:
    """Returns the largest absolute value of every tile: ``(R / r, C / c)``."""
    return tiled(matrix.abs(), tile).amax((1, 3))


def quotient(matrix: Tensor, divisor: Tensor) -> Tensor:
    """Divides, and gives 0 where the divisor is 0 (a tile of zeros has scale 0)."""
    return (matrix / divisor.where(divisor != 0, 1)).where(divisor != 0, 0)
