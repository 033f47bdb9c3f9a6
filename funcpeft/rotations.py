"""Rotations: orthogonal matrices of free parameters, and how blocks of them turn features. Imports torch alone.

References:
    Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal Finetuning, 2023, arXiv 2306.07280 (Cayley's form).
    Qiu et al., Orthogonal Finetuning Made Scalable, 2025, arXiv 2506.19847 (its series).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The most terms of a series: none has more that matter, and each costs a product.
MOST_TERMS = 1000


def skew(vector: Tensor, size: int) -> Tensor:
    """Returns the skew-symmetric matrices ``(..., size, size)`` whose strict upper triangles, row by row, are given."""
    rows, cols = torch.triu_indices(size, size, 1, device=vector.device)
    flat = vector.new_zeros(*vector.shape[:-1], size * size).index_copy(-1, rows * size + cols, vector)
    upper = flat.unflatten(-1, (size, size))
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """Returns (I - Q)(I + Q)^{-1} for skew-symmetric ``q (..., b, b)``: orthogonal, and defined for every Q."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, eye - q)


def cayley_series(q: Tensor, terms: int) -> Tensor:
    """Returns the first powers of the series of (I + Q)(I - Q)^{-1}; the last of three or more terms has weight 1."""
    weights = [1.0, 2.0][:terms] if terms < 3 else [1.0, *[2.0] * (max(terms, 4) - 2), 1.0]
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    total = weights[-1] * eye.expand_as(q)
    for weight in reversed(weights[:-1]):
        total = total @ q + weight * eye
    return total


def within(vector: Tensor, radius: float) -> Tensor:
    """Scales rows so that the Frobenius norm of their skew-symmetric matrices is at most ``radius``."""
    square = 2 * vector.square().sum(-1, keepdim=True)
    inside = square <= radius**2
    return vector * torch.where(inside, 1.0, radius * torch.where(inside, 1.0, square).rsqrt())


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiplies consecutive pieces of the last axis by ``blocks (n, b, b)`` from the right; one block serves all."""
    dtype = torch.promote_types(x.dtype, blocks.dtype)
    pieces, blocks = x.to(dtype).unflatten(-1, (-1, blocks.shape[-1])), blocks.to(dtype)
    turned = pieces @ blocks[0] if blocks.shape[0] == 1 else torch.einsum("...nk,nkc->...nc", pieces, blocks)
    return turned.flatten(-2)
