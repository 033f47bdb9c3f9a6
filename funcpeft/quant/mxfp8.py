r"""MXFP8: eight-bit floats in blocks of 32 that share a power of two.

.. math:: \hat W_{ij} = q_{ij}\, 2^{e_{i, \lfloor j / 32 \rfloor} - 127}, \quad
    e = \lfloor \log_2 \max_{\text{block}} |W| \rfloor - e_{\max} + 127

e_max: 8 for e4m3 (levels up to 448), 15 for e5m2 (up to 57344). qdata: float8_e4m3fn or float8_e5m2 ``(R, C)``; scale: uint8
``(R, C / 32)``, the exponents (e8m0; 255 is NaN). As torchao's ``MXTensor`` stores it (its scale is the same bytes as
float8_e8m0fnu) and the MXFP8 checkpoints that transformers reads.

Refitting follows the specification, as ``MXTensor.to_mx`` does by default: the largest entries of a block may saturate, by up
to an eighth of their size. (torchao's configs round the exponent up instead.)

References:
    OCP Microscaling Formats (MX) Specification 1.0, 2023, sections 5.3.1 (e4m3, e5m2) and 6.3 (the scale).
"""

from __future__ import annotations

from dataclasses import dataclass

from funcpeft.quant.format import Format
from funcpeft.quant.minifloat import FLOAT8, Element, Microscaling


@dataclass(frozen=True, kw_only=True)
class MXFP8(Microscaling):
    """Blocks of 32 eight-bit floats with a power of two.

    Args:
        kind: ``"e4m3"`` (three bits of mantissa) or ``"e5m2"`` (two, and a wider range).
    """

    kind: str = "e4m3"

    def __post_init__(self) -> None:
        self.require(self.kind in FLOAT8, "kind", "'e4m3' or 'e5m2'", self.kind)

    @classmethod
    def examples(cls) -> tuple[Format, ...]:
        return (cls(), cls(kind="e5m2"))

    @property
    def element(self) -> Element:
        return FLOAT8[self.kind]
