"""Fine-grained fp8 and fbgemm fp8: float8 weights with a scale per tile or per row, in checkpoints and in memory.

Fine-grained (DeepSeek's): ``weight`` float8_e4m3fn ``(out, in)`` and ``weight_scale_inv`` ``(ceil(out / r), ceil(in / c))``
for ``weight_block_size`` ``(r, c)``, or one number without; a multiplier, despite its name, of float32, bfloat16, or a
power of two in eight bits (float8_e8m0fnu, or its byte). Some checkpoints call it ``scale`` or ``qscale_weight``. fbgemm:
``weight_scale`` float32 ``(out, 1)``. ``activation_scale`` and ``input_scale_ub`` are about inputs, which these layers
round to float8; a leaf is the weight alone. On a CPU transformers decodes the first kind when it loads, and has no second
kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import gptq
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors
from funcpeft.quant.blocks import BlockSize
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.minifloat import e8m0_values
from funcpeft.storage import Quantized

_CODES = (torch.float8_e4m3fn,)
_SCALES = (*FLOATS, torch.float8_e8m0fnu, torch.uint8)
_NAMES = ("weight_scale_inv", "scale", "qscale_weight")
_SOURCE = "transformers.integrations."


@dataclass(frozen=True)
class FineGrainedFP8(Library):
    """Reader and writer of fine-grained fp8, reader of fbgemm fp8."""

    name: ClassVar[str] = "fp8"
    quant_methods: ClassVar[tuple[str, ...]] = ("fp8", "mxfp8", "fbgemm_fp8")
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (
        (f"{_SOURCE}finegrained_fp8", "FP8Linear"),
        (f"{_SOURCE}fbgemm_fp8", "FbgemmFp8Linear"),
    )

    def owns(self, layer: nn.Module) -> bool:
        return super().owns(layer) and gptq.is_coded(gptq.held(layer))

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        if type(layer).__name__ == "FP8GroupedLinear":
            raise gptq.unready(self, path, "a layer of several products", "load the model with dequantize=True")
        tensors, shape = gptq.held(layer), torch.Size(layer.weight.shape)
        rowwise = not hasattr(layer, "block_size")
        block = None if rowwise else layer.block_size
        leaf = self._rows(tensors, path, shape, dtype) if rowwise else self._tiles(tensors, path, shape, dtype, block)
        return Taken(leaf, gptq.bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        rowwise = config.get("quant_method") == "fbgemm_fp8"
        names = ("weight_scale",) if rowwise else _NAMES
        if not any(name in tensors for name in names) and not gptq.is_coded(tensors):
            return None
        if rowwise:
            return self._rows(tensors, path, shape, dtype)
        return self._tiles(tensors, path, shape, dtype, config.get("weight_block_size", (128, 128)))

    def _rows(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype) -> Quantized:
        self.require_fit(FP8(), path, shape)
        codes = self.pick(tensors, path, "weight", tuple(shape), _CODES)
        scale = self.pick(tensors, path, "weight_scale", (shape[0], 1), FLOATS)
        return Quantized({"qdata": codes, "scale": scale.to(torch.float32)}, FP8(), shape, dtype)

    def _tiles(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, size: Any) -> Quantized:
        where = f"{self.name} at {path!r}"
        block: BlockSize = "tensor"
        if size is not None:
            block = tuple(size) if isinstance(size, list | tuple) else size
            if not isinstance(block, tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
                rule = "weight_block_size must be two positive ints"
                raise CheckpointError(errors.say(where, rule, repr(size)))
        fmt = FP8(block_size=block[1] if isinstance(block, tuple) and block[0] == 1 else block)
        self.require_fit(fmt, path, shape)
        table = (-(-shape[0] // block[0]), -(-shape[1] // block[1])) if isinstance(block, tuple) else (1, 1)
        codes = self.pick(tensors, path, "weight", tuple(shape), _CODES)
        name = next((n for n in _NAMES if n in tensors), _NAMES[0])
        scale = self.pick(tensors, path, name, table if block != "tensor" else None, _SCALES)
        if scale.numel() != table[0] * table[1]:
            raise CheckpointError(errors.say(where, f"{name!r} must have one entry", tuple(scale.shape)))
        return Quantized({"qdata": codes, "scale": _widened(scale, name, where).reshape(table)}, fmt, shape, dtype)

    def refuses(self, quantized: Quantized) -> str | None:
        fmt, shape = quantized.format, quantized.shape
        if not isinstance(fmt, FP8) or fmt.kind != "e4m3":
            return f"fp8 stores FP8 of kind 'e4m3', not {fmt!r}"
        if len(shape) != 2:
            return f"fp8 stores matrices, not shape {tuple(shape)}"
        if fmt.block_size == "row":
            return "a scale per row is fbgemm's layout, which transformers loads on a GPU only; use compressed-tensors"
        r, c = _tile(quantized)
        if fmt.block_size != "tensor" and ((shape[0] % r and shape[0] > r) or (shape[1] % c and shape[1] > c)):
            return f"transformers 5.23 decodes tiles that do not divide the weight wrongly: {r} x {c} of {tuple(shape)}"
        return None

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        scale = quantized.data["scale"]
        scale = scale.reshape(()) if quantized.format.block_size == "tensor" else scale
        return {"weight": quantized.data["qdata"], "weight_scale_inv": scale}, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        block = self.same(stored, lambda q: q.format.block_size)
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": None if block == "tensor" else list(_tile(next(iter(stored.values())))),
            "modules_to_not_convert": list(dense),
        }


def _tile(quantized: Quantized) -> tuple[int, int]:
    block = quantized.format.block_size
    if block == "tensor":
        return tuple(quantized.shape)  # type: ignore[return-value]
    return block if isinstance(block, tuple) else (1, block)


def _widened(scale: Tensor, name: str, where: str) -> Tensor:
    """Returns a scale in float32, exactly."""
    if scale.dtype in FLOATS:
        return scale.to(torch.float32)
    exponents = scale.view(torch.uint8)
    if bool((exponents == 255).any()):
        raise CheckpointError(errors.say(where, f"{name!r} must be finite", "NaN or infinity"))
    return e8m0_values(exponents)
