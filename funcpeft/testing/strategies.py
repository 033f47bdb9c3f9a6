"""Hypothesis strategies that draw cases: structure only, sizes that include 1, square and awkward ones. Imports cases."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from funcpeft.method import Method
from funcpeft.testing.cases import Case

SIZES = (1, 2, 3, 4, 6, 8, 12)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
#: Dims, kernel, stride, padding, dilation, groups: 1x1, plain, strided, dilated, grouped; one and two dims.
GEOMETRIES = (
    (2, 1, 1, 0, 1, 1),
    (2, 3, 1, 1, 1, 1),
    (1, 3, 2, 1, 1, 1),
    (2, 2, 1, 1, 2, 1),
    (2, 3, 2, 1, 1, 2),
    (3, 2, 1, 1, 1, 1),
)


@functools.lru_cache(maxsize=4096)
def fitting(method: Method, kind: str) -> tuple[Case, ...]:
    """Lists the cases of a kind that a method's fields fit, over sizes, biases and geometries."""
    if kind == "call":
        return (Case(method, kind),)
    geometries = GEOMETRIES if kind == "conv" else GEOMETRIES[:1]
    biases = (True,) if kind in ("embedding", "transposed") else (True, False)
    sizes = itertools.product(SIZES, SIZES) if kind != "vector" else ((n, n) for n in SIZES)
    found = []
    for (out, in_), bias, geometry in itertools.product(sizes, biases, geometries):
        groups = geometry[5]
        if kind == "conv" and (out % groups or in_ % groups or max(out, in_) > 8):
            continue
        case = Case(method, kind, out, in_, bias, geometry=geometry)
        if case.fits():
            found.append(case)
    return tuple(found)


def kinds_of(method: Method) -> tuple[str, ...]:
    """Lists the kinds of case that a method has: its layer kinds, or the call it wraps."""
    return ("call",) if method.wraps else tuple(sorted(k for k in method.kinds if fitting(method, k)))


def cases(
    method: Method, kinds: Sequence[str] | None = None, dtypes: Sequence[torch.dtype] = DTYPES
) -> st.SearchStrategy[Case]:
    """Draws cases of a method over its layer kinds, sizes, biases, dtypes and seeds.

    Raises:
        ValueError: If the method fits no layer of any of these kinds.
    """
    chosen = [c for k in (kinds or kinds_of(method)) for c in [fitting(method, k)] if c]
    if not chosen:
        raise ValueError(f"cases: {method!r} fits no layer of kinds {kinds or sorted(method.kinds)} with sizes in {SIZES}.")
    structure = st.one_of([st.sampled_from(c) for c in chosen])
    allowed = [d for d in dtypes if d != torch.bfloat16 or not method.wraps]
    return st.builds(
        lambda case, dtype, seed: Case(case.method, case.kind, case.out, case.in_, case.bias, dtype, seed, case.geometry),
        structure,
        st.sampled_from(allowed),
        st.integers(0, 2**16),
    )
