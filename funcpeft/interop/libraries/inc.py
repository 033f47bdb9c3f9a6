"""INC: Intel Neural Compressor's ``INCWeightOnlyLinear``, in memory and in checkpoints, in its Hugging Face layout.

``qweight``, ``qzeros``, ``scales`` and ``g_idx`` as GPTQ's of ``checkpoint_format`` ``"gptq"``: zeros are stored less one,
modulo 2^bits, for symmetric weights too. 2, 4 and 8 bits; a width that does not divide 32 is packed with gaps by this
library, and is refused, as is the layout of ``use_optimum_format=False``. Written by nothing: a
``GPTQ(checkpoint_format="gptq")`` checkpoint is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from funcpeft.interop.libraries import gptq
from funcpeft.interop.library import Library, Taken, Tensors
from funcpeft.storage import Quantized

_BITS = (2, 4, 8)


@dataclass(frozen=True)
class INC(Library):
    """Reader of Intel Neural Compressor."""

    name: ClassVar[str] = "inc"
    quant_methods: ClassVar[tuple[str, ...]] = ("inc",)
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (("neural_compressor.", "INCWeightOnlyLinear"),)

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        if not layer.use_optimum_format:
            raise gptq.unready(self, path, "use_optimum_format=False", "convert it with use_optimum_format=True")
        size = {"bits": layer.bits, "group_size": layer.group_size}
        bits, group = gptq.bits_and_size(size, f"{self.name} at {path!r}", _BITS)
        shape = torch.Size((layer.out_features, layer.in_features))
        return Taken(gptq.grouped(self, gptq.held(layer), path, shape, dtype, bits, group, 1), gptq.bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if not any(name in tensors for name in ("qweight", "qzeros", "scales")):
            return None
        bits, group = gptq.bits_and_size(config, f"{self.name} at {path!r}", _BITS)
        return gptq.grouped(self, tensors, path, shape, dtype, bits, group, 1)

    def refuses(self, quantized: Quantized) -> str | None:
        return 'inc has no loader in transformers; write GPTQ(checkpoint_format="gptq"), whose layout is the same'
