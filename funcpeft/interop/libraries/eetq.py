"""EETQ: ``weight`` int8 ``(in, out)`` and ``weight_scales`` ``(out,)``: the weight is ``weight * weight_scales``, transposed.

That is what the library's quantizer computes. Its kernels want the bytes moved about and 128 added to each, in an order
that belongs to the GPU, and transformers saves them so; nothing in the file tells the two apart. Codes that are plain have
most of their bytes near 0, moved ones near 128: by that alone the second are refused here, as is every layer in memory.
Written by nothing, since transformers loads this layout with CUDA kernels only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import gptq
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors
from funcpeft.quant.affineint import AffineInt
from funcpeft.storage import Quantized

_FORMAT = AffineInt(bits=8, block_size="row", packing="int8")
_REMEDY = "load the model that was quantized, and store it as Int8"


@dataclass(frozen=True)
class EETQ(Library):
    """Reader of EETQ's plain codes."""

    name: ClassVar[str] = "eetq"
    quant_methods: ClassVar[tuple[str, ...]] = ("eetq",)
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (
        ("transformers.integrations.eetq", "EetqLinear"),
        ("eetq.", "W8A16Linear"),
    )

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        raise gptq.unready(self, path, "bytes in the order of a GPU's kernel", _REMEDY)

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if "weight_scales" not in tensors and not gptq.is_coded(tensors):
            return None
        self.require_fit(_FORMAT, path, shape)
        out, in_ = shape
        codes = self.pick(tensors, path, "weight", (in_, out), (torch.int8,))
        scale = self.pick(tensors, path, "weight_scales", (out,), FLOATS)
        if _moved(codes):
            rule, found = "'weight' must hold codes in order", "bytes in the order of a GPU's kernel"
            raise CheckpointError(errors.say(f"{self.name} at {path!r}", rule, found, _REMEDY))
        return Quantized({"qdata": gptq.transposed(codes), "scale": scale[:, None]}, _FORMAT, shape, dtype)

    def refuses(self, quantized: Quantized) -> str | None:
        return "transformers loads eetq with CUDA kernels only, in an order that belongs to the GPU"


def _moved(codes: Tensor) -> bool:
    """Whether 128 was added to the codes of a weight: then few are within 64 of 0."""
    return bool((codes.view(torch.uint8) + 64 >= 128).to(torch.float32).mean() > 0.5)
