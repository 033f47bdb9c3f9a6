r"""MXFP4: four-bit floats in blocks of 32 that share a power of two.

.. math:: \hat W_{ij} = q_{ij}\, 2^{e_{i, \lfloor j / 32 \rfloor} - 127}, \quad
    e = \lfloor \log_2 \max_{\text{block}} |W| \rfloor - 2 + 127

q: one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (e2m1). qdata: uint8 ``(R, C / 2)``, two codes a byte, the earlier
entry in the low half; scale: uint8 ``(R, C / 32)``, the exponents (e8m0; 255 is NaN). As torchao's ``MXTensor`` stores it (its
scale is the same bytes as float8_e8m0fnu) and gpt-oss' checkpoints: their ``blocks (E, out, in / 32, 16)`` and ``scales`` are
qdata and scale of the weight ``(E, out, in)``.

Refitting follows the specification, as ``MXTensor.to_mx`` does by default: the largest entries of a block may saturate, by up
to a quarter of their size. (torchao's configs round the exponent up instead. On a gaussian weight that errs by 0.119 of its
norm, this by 0.114.)

References:
    OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.3 (e2m1) and 6.3 (the scale).
"""

from __future__ import annotations

from dataclasses import dataclass

from funcpeft.quant.minifloat import E2M1, Element, Microscaling


@dataclass(frozen=True, kw_only=True)
class MXFP4(Microscaling):
    """Blocks of 32 e2m1 codes with a power of two."""

    @property
    def element(self) -> Element:
        return E2M1
