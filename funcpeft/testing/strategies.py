"""Hypothesis strategies that draw cases: structure only, sizes that include 1, square and awkward ones. Imports cases."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st

from funcpeft.method import Method
from funcpeft.quant.format import Format
from funcpeft.storage import Quantized
from funcpeft.testing.cases import Case
from funcpeft.testing.format_laws import SHAPES, Stored

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


_BIASED = ("embedding", "transposed", "call")  # kinds whose layers come in one form
#: Sizes of the layers whose weights are stored: formats have blocks of up to 32.
_STORED_SIZES = (8, 32)


@functools.lru_cache(maxsize=65536)
def storing(method: Method, format: Format, kind: str) -> tuple[Case, ...]:
    """Lists the cases of a kind that a method's fields fit and in which the format stores the weight of a site."""
    if kind == "vector":
        return ()
    sizes = itertools.product(_STORED_SIZES, _STORED_SIZES) if kind != "call" else ((4, 6),)
    cases = [Case(method, kind, out, in_, format=format) for out, in_ in sizes]
    return tuple(c for c in cases if _stores(c))


def _stores(case: Case) -> bool:
    try:
        params = case.built().params
    except (ValueError, IndexError):
        return False
    return any(isinstance(leaf, Quantized) for leaf in params.values())


def stored_cases(
    method: Method, formats: Sequence[Format], dtypes: Sequence[torch.dtype] = DTYPES
) -> st.SearchStrategy[Case] | None:
    """Draws cases of a method on bases stored in one of some formats; ``None`` where it takes no matrix."""
    kinds = ("call",) if method.wraps else sorted(method.kinds)
    pairs = [(f, k) for f in formats for k in kinds if storing(method, f, k)]
    if not pairs:
        return None
    allowed = [d for d in dtypes if d != torch.bfloat16 or not method.wraps]
    structure = st.sampled_from(pairs).flatmap(lambda pair: st.sampled_from(storing(method, *pair)))

    def drawn(case: Case, bias: bool, dtype: torch.dtype, seed: int) -> Case:
        other = replace(case, bias=bias or case.kind in _BIASED)  # a method may need layers that have one
        return replace(other if other.fits() else case, dtype=dtype, seed=seed)

    return st.builds(drawn, structure, st.booleans(), st.sampled_from(allowed), st.integers(0, 2**16))


def weights(format: Format, dtypes: Sequence[torch.dtype] = DTYPES) -> st.SearchStrategy[Stored]:
    """Draws weights of the shapes that fit a format.

    Raises:
        ValueError: If none of the shapes tried fits.
    """
    fitting_shapes = [s for s in SHAPES if format.fits(s)]
    if not fitting_shapes:
        raise ValueError(f"weights: {format!r} fits none of the shapes {SHAPES}.")
    sizes = st.sampled_from([1e-4, 0.02, 1.0, 300.0])
    return st.builds(
        Stored, st.just(format), st.sampled_from(fitting_shapes), st.sampled_from(list(dtypes)), st.integers(0, 2**16), sizes
    )


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
