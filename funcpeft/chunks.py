"""Chunks: how many members of a population are computed at a time where nobody says so. Imports torch alone.

At small sizes members are cheapest all at once; from a few thousand tokens on everything is bound by the base's products, and
a larger chunk only takes more memory (``tests/benchmarks/population.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

#: Tokens of all members of a chunk together.
TOKENS = 4096


def tokens(t: Tensor) -> int:
    """Counts the tokens of one member's input: the entries of ids, those of floats without the last axis."""
    return t.numel() // (t.shape[-1] or 1) if t.is_floating_point() and t.ndim else t.numel()


def chunk(members: int, each: Iterable[int]) -> int:
    """Returns how many members are computed at a time.

    Args:
        members: N.
        each: Tokens of a member's inputs, of which the largest counts.
    """
    most = max(1, TOKENS // max(1, *each, 1))
    return math.ceil(members / math.ceil(members / most))  # even chunks: a last one of few members costs nearly as much
