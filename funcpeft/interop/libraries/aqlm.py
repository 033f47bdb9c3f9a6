"""AQLM: ``codes``, ``codebooks`` and ``scales``, in checkpoints and in aqlm's ``QuantizedLinear``.

With C codebooks of 2^b vectors for groups of o outputs and i inputs: ``codes`` int8 or int16 ``(out / o, in / i, C)``,
``codebooks`` floats ``(C, 2^b, o, i)``, ``scales`` floats ``(out / o, 1, 1, 1)``. With 256 vectors the library's layer on a
CPU moves the axes of its codes in its first forward; such a layer is refused, but a file that was saved from one is
recognised only where ``out / o`` and ``in / i`` differ.
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
from funcpeft.quant.codebook import Codebook
from funcpeft.storage import Quantized

#: Fields of a config, and their values where they are left out.
_FIELDS = {"num_codebooks": 1, "nbits_per_codebook": 16, "in_group_size": 8, "out_group_size": 1}


@dataclass(frozen=True)
class AQLM(Library):
    """Reader of AQLM, and writer of the codes that were read."""

    name: ClassVar[str] = "aqlm"
    quant_methods: ClassVar[tuple[str, ...]] = ("aqlm",)
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (("aqlm.", "QuantizedLinear"),)

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        fmt = Codebook(**{name: getattr(layer, name) for name in _FIELDS})
        shape = torch.Size((layer.out_features, layer.in_features))
        kept = (shape[0] // fmt.out_group_size, shape[1] // fmt.in_group_size, fmt.num_codebooks)
        moved = fmt.nbits_per_codebook == 8 and layer.gemv_op is not None and not layer.codes.is_cuda
        if moved or tuple(layer.codes.shape) != kept:
            remedy = "take it before the first forward, or from the file"
            raise gptq.unready(self, path, "a forward has moved the axes of its codes", remedy)
        return Taken(self._leaf(gptq.held(layer), path, shape, dtype, fmt), gptq.bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if not any(name in tensors for name in ("codes", "codebooks", "scales")):
            return None
        try:
            fmt = Codebook(**{name: config.get(name, default) for name, default in _FIELDS.items()})
        except ValueError as e:
            raise CheckpointError(f"{self.name} at {path!r}: {e}") from e
        return self._leaf(tensors, path, shape, dtype, fmt)

    def _leaf(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, fmt: Codebook) -> Quantized:
        self.require_fit(fmt, path, shape)
        if not shape.numel():
            raise CheckpointError(errors.say(f"{self.name} at {path!r}", "a weight with entries is required", tuple(shape)))
        count, bits, rows, columns = fmt.num_codebooks, fmt.nbits_per_codebook, fmt.out_group_size, fmt.in_group_size
        groups = (shape[0] // rows, shape[1] // columns, count)
        codes = self.pick(tensors, path, "codes", groups, (torch.int8 if bits <= 8 else torch.int16,))
        if bits not in (8, 16):
            _require_codes(codes, bits, f"{self.name} at {path!r}")
        data = {
            "qdata": codes.contiguous(),
            "codebooks": self.pick(tensors, path, "codebooks", (count, 2**bits, rows, columns), FLOATS),
            "scale": self.pick(tensors, path, "scales", (groups[0], 1, 1, 1), FLOATS),
        }
        return Quantized(data, fmt, shape, dtype)

    def refuses(self, quantized: Quantized) -> str | None:
        if not isinstance(quantized.format, Codebook):
            return f"aqlm stores Codebook, not {quantized.format!r}"
        return None if len(quantized.shape) == 2 else f"aqlm stores matrices, not shape {tuple(quantized.shape)}"

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        data = quantized.data
        return {"codes": data["qdata"], "codebooks": data["codebooks"], "scales": data["scale"]}, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        values = self.same(stored, lambda q: tuple(getattr(q.format, name) for name in _FIELDS))
        # names of modules, despite the field's: with ".weight" after them transformers replaces the layers all the same
        fields = dict(zip(_FIELDS, values, strict=True))
        return {"quant_method": "aqlm", **fields, "linear_weights_not_to_quantize": list(dense)}


def _require_codes(codes: Tensor, bits: int, where: str) -> None:
    low, high = int(codes.min()), int(codes.max())
    half = 2 ** (bits - 1)
    if low < -half or high >= half:
        raise CheckpointError(errors.say(where, f"'codes' must be {-half} to {half - 1}", (low, high)))
