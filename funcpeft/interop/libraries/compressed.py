"""compressed-tensors: integers and float8 with one scale per group, row, tile or weight, in checkpoints and in memory.

Format ``"pack-quantized"``, n bits: ``weight_packed`` int32 ``(out, ceil(in n / 32))``, a bit stream along the inputs,
``weight_scale`` floats, one per group ``(out, in / g)``, row ``(out, 1)`` or weight ``(1,)``, ``weight_shape`` int64
``(2,)``, without symmetry ``weight_zero_point``, a bit stream along the outputs ``(ceil(out n / 32), groups)``; older files
of act order have ``weight_g_idx`` ``(in,)``. Formats ``"int-quantized"``, ``"float-quantized"`` and ``"naive-quantized"``:
``weight`` int8 or float8 ``(out, in)``, ``weight_scale``, also one per tile, and ``weight_zero_point`` int8. Codes and
zeros are signed, the middle being 0.

A config has groups of layers, found by name, by ``"re:"`` pattern or by class. Scales of inputs and outputs, by which such
a layer may round its activations too, are no part of a weight and are left out. A layer in memory is an ``nn.Linear`` with
these tensors. The first forward of the model makes it a dense one, in storage that the library manages, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.libraries import gptq
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.blocks import BlockSize
from funcpeft.quant.fp8 import FP8
from funcpeft.quant.packing import PACKINGS
from funcpeft.storage import Quantized

_PACKED, _PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
_FORMATS = (_PACKED, *_PLAIN)
_STRATEGIES = ("group", "channel", "tensor", "block")
_STREAM = PACKINGS["compressed"]


@dataclass(frozen=True)
class CompressedTensors(Library):
    """Reader and writer of compressed-tensors."""

    name: ClassVar[str] = "compressed-tensors"
    quant_methods: ClassVar[tuple[str, ...]] = ("compressed-tensors", "compressed_tensors")

    def owns(self, layer: nn.Module) -> bool:
        scheme: Any = getattr(layer, "quantization_scheme", None)
        ours = type(scheme).__module__.startswith("compressed_tensors.") and scheme.weights is not None
        return isinstance(layer, nn.Linear) and ours and (_is_compressed(layer) or type(layer._parameters) is not dict)

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        if not _is_compressed(layer):
            remedy = "take it before the first forward, or from the file"
            raise gptq.unready(self, path, "a forward of the model has made its weight dense", remedy)
        scheme = {"weights": layer.quantization_scheme.weights.model_dump(), "format": layer.quantization_scheme.format}
        shape = torch.Size((layer.out_features, layer.in_features))
        return Taken(self._leaf(gptq.held(layer), path, shape, dtype, scheme), gptq.bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if not any(name.startswith("weight_") for name in tensors) and not gptq.is_coded(tensors):
            return None
        scheme = dict(_scheme(config, path, f"{self.name} at {path!r}"))
        scheme["format"] = scheme.get("format") or config.get("format")
        return self._leaf(tensors, path, shape, dtype, scheme)

    # -- from tensors ----------------------------------------------------------------------------------------------------

    def _leaf(self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, scheme: Mapping[str, Any]) -> Quantized:
        where, form, args = f"{self.name} at {path!r}", scheme["format"], scheme.get("weights")
        form = getattr(form, "value", form)
        if form not in _FORMATS:
            raise CheckpointError(errors.one_of(where, "format", form, _FORMATS))
        if not isinstance(args, Mapping):
            raise CheckpointError(errors.say(where, "the config group must have 'weights'", type(args).__name__))
        block, table = _blocks(args, shape, where)
        if args.get("type", "int") == "float":
            return self._floats(tensors, path, shape, dtype, block, table)
        bits = args.get("num_bits", 8)
        if isinstance(bits, bool) or bits not in range(1, 9):
            raise CheckpointError(errors.one_of(where, "num_bits", bits, range(1, 9)))
        packed = form == _PACKED
        symmetric = args.get("symmetric", True) is not False
        grid = AffineInt(bits=bits, block_size=block, symmetric=symmetric, packing="compressed" if packed else "int8")
        self.require_fit(grid, path, shape)
        codes = self._packed(tensors, path, shape, bits) if packed else self._bytes(tensors, path, shape)
        data = {"qdata": codes, "scale": self._scale(tensors, path, table)}
        if not symmetric:
            wide = packed and args.get("strategy") != "tensor"
            data["zero_point"] = self._zeros(tensors, path, table, bits, wide)
        if "weight_g_idx" in tensors:
            data |= self._order(tensors, path, shape, table, block)
        return Quantized(data, grid, shape, dtype)

    def _packed(self, tensors: Tensors, path: str, shape: torch.Size, bits: int) -> Tensor:
        out, in_ = shape
        if "weight_shape" in tensors:
            told = tuple(self.pick(tensors, path, "weight_shape", (2,), (torch.int64, torch.int32)).tolist())
            if told != (out, in_):
                raise CheckpointError(errors.say(f"{self.name} at {path!r}", f"'weight_shape' must be {(out, in_)}", told))
        return self.pick(tensors, path, "weight_packed", (out, -(-in_ * bits // 32)), (torch.int32,)).contiguous()

    def _bytes(self, tensors: Tensors, path: str, shape: torch.Size) -> Tensor:
        return self.pick(tensors, path, "weight", tuple(shape), (torch.int8,)).contiguous()

    def _scale(self, tensors: Tensors, path: str, table: tuple[int, int]) -> Tensor:
        scale = self.pick(tensors, path, "weight_scale", None, FLOATS)
        if scale.numel() != table[0] * table[1]:
            found = tuple(scale.shape)
            raise CheckpointError(errors.say(f"{self.name} at {path!r}", f"'weight_scale' must have shape {table}", found))
        return scale.reshape(table).contiguous()

    def _zeros(self, tensors: Tensors, path: str, table: tuple[int, int], bits: int, packed: bool) -> Tensor:
        rows, groups = table
        if packed:
            words = (-(-rows * bits // 32), groups)
            stored = self.pick(tensors, path, "weight_zero_point", words, (torch.int32,))
            return gptq.transposed(_STREAM.unpack(gptq.transposed(stored), bits, groups, rows))
        kinds = (torch.int8, torch.int32, torch.int64)
        stored, half = self.pick(tensors, path, "weight_zero_point", None, kinds), 2 ** (bits - 1)
        where = f"{self.name} at {path!r}"
        if stored.numel() != rows * groups:
            raise CheckpointError(errors.say(where, f"'weight_zero_point' must have shape {table}", tuple(stored.shape)))
        unsigned = stored.to(torch.int64).reshape(table) + half
        if not bool(((unsigned >= 0) & (unsigned < 2 * half)).all()):
            found = (int(stored.min()), int(stored.max()))
            raise CheckpointError(errors.say(where, f"'weight_zero_point' must be {-half} to {half - 1}", found))
        return unsigned.to(torch.uint8)

    def _order(
        self, tensors: Tensors, path: str, shape: torch.Size, table: tuple[int, int], block: BlockSize
    ) -> dict[str, Tensor]:
        """Reads the group of every input; nothing if groups are neighbours, which -1 throughout says too."""
        g_idx = self.pick(tensors, path, "weight_g_idx", (shape[1],), (torch.int32, torch.int64)).to(torch.int32)
        if bool((g_idx == -1).all()):
            return {}
        if not bool(((g_idx >= 0) & (g_idx < table[1])).all()):
            found, rule = (int(g_idx.min()), int(g_idx.max())), f"'weight_g_idx' must be 0 to {table[1] - 1}"
            raise CheckpointError(errors.say(f"{self.name} at {path!r}", rule, found))
        size = block if isinstance(block, int) else shape[1]
        return {} if torch.equal(g_idx, gptq.in_order(shape[1], size, g_idx.device)) else {"g_idx": g_idx.contiguous()}

    def _floats(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, block: BlockSize, table: tuple[int, int]
    ) -> Quantized:
        fmt = FP8(block_size=block)
        self.require_fit(fmt, path, shape)
        codes = self.pick(tensors, path, "weight", tuple(shape), (torch.float8_e4m3fn,))
        scale = self._scale(tensors, path, table).to(torch.float32)
        return Quantized({"qdata": codes.contiguous(), "scale": scale}, fmt, shape, dtype)

    # -- to tensors ------------------------------------------------------------------------------------------------------

    def refuses(self, quantized: Quantized) -> str | None:
        fmt, data = quantized.format, quantized.data
        if len(quantized.shape) != 2:
            return f"compressed-tensors stores matrices, not shape {tuple(quantized.shape)}"
        if isinstance(fmt, FP8):
            if fmt.kind != "e4m3":
                return "compressed-tensors stores FP8 of kind 'e4m3' only"
            return "compressed-tensors has scales per row, tile or weight for FP8" if isinstance(fmt.block_size, int) else None
        if not isinstance(fmt, AffineInt):
            return f"compressed-tensors stores AffineInt(packing='compressed') and FP8, not {fmt!r}"
        if fmt.packing != "compressed":
            return f"compressed-tensors stores packing 'compressed', not {fmt.packing!r}: see repack"
        if fmt.layout != "matrix" or isinstance(fmt.block_size, tuple):
            return f"compressed-tensors has scales per row, group of inputs or weight, not {fmt!r}"
        if "shift" in data or ("zero_point" in data and data["zero_point"].is_floating_point()):
            return "compressed-tensors stores integer zeros only"
        if "g_idx" in data:
            return "compressed-tensors 0.20 has no act order any more"
        if "zero_point" in data and fmt.block_size != "tensor":
            return "transformers 5.23 does not load what compressed-tensors 0.20 packs as zeros; fit a symmetric grid"
        if isinstance(fmt.block_size, int) and quantized.shape[1] % fmt.block_size:
            return f"in_features must be a multiple of block_size {fmt.block_size}, not {quantized.shape[1]}"
        return None

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        data, fmt = quantized.data, quantized.format
        scale = data["scale"].reshape(1) if fmt.block_size == "tensor" else data["scale"]
        if isinstance(fmt, FP8):
            return {"weight": data["qdata"], "weight_scale": scale}, {}
        shape = torch.tensor(list(quantized.shape), dtype=torch.int64)
        tensors = {"weight_packed": data["qdata"], "weight_scale": scale, "weight_shape": shape}
        if "zero_point" in data:
            zero = data["zero_point"].to(torch.uint8)
            tensors["weight_zero_point"] = (zero - 2 ** (fmt.bits - 1)).view(torch.int8).reshape(1)
        return tensors, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        schemes: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for path, quantized in stored.items():
            scheme = _written(quantized)
            schemes.setdefault(repr(scheme), (scheme, []))[1].append(path)
        alone = len(schemes) == 1
        groups = {
            f"group_{i}": scheme | {"targets": ["Linear"] if alone else paths}
            for i, (scheme, paths) in enumerate(schemes.values())
        }
        formats = {str(scheme["format"]) for scheme, _ in schemes.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dense),
        }


def _is_compressed(layer: nn.Module) -> bool:
    status = getattr(layer, "quantization_status", None)
    return str(getattr(status, "value", status)) == "compressed"


def _blocks(args: Mapping[str, Any], shape: torch.Size, where: str) -> tuple[BlockSize, tuple[int, int]]:
    """Returns which entries share a scale, and the shape of the table of scales."""
    out, in_ = shape
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in _STRATEGIES:
        raise CheckpointError(errors.one_of(where, "strategy", strategy, _STRATEGIES))
    if strategy == "channel":
        return "row", (out, 1)
    if strategy == "tensor":
        return "tensor", (1, 1)
    if strategy == "group":
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or in_ % size:
            raise CheckpointError(errors.say(where, f"group_size must divide in_features {in_}", repr(size)))
        return size, (out, in_ // size)
    tile = args.get("block_structure")
    tile = [int(n) for n in tile.split("x")] if isinstance(tile, str) and re.fullmatch(r"\d+x\d+", tile) else tile
    if not isinstance(tile, list | tuple) or len(tile) != 2 or not all(type(n) is int and n > 0 for n in tile):
        raise CheckpointError(errors.say(where, "block_structure must be two positive ints", repr(tile)))
    return (tile[0], tile[1]), (-(-out // tile[0]), -(-in_ // tile[1]))


def _scheme(config: Mapping[str, Any], path: str, where: str) -> Mapping[str, Any]:
    """Returns the group of the config that a linear layer is in: by its name first, then a pattern, then its class.

    Raises:
        CheckpointError: If there is none.
    """
    groups = config.get("config_groups")
    found = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    matches = (lambda t: t == path, lambda t: t.startswith("re:") and _like(t[3:], path, where), lambda t: t == "Linear")
    for match in matches:
        for group in found:
            targets = group.get("targets")
            if isinstance(targets, Iterable) and any(match(str(t)) for t in targets):
                return group
    targets = [t for g in found for t in g.get("targets") or ()]
    raise CheckpointError(errors.say(where, "a group of the config must have it among its targets", errors.listed(targets)))


def _like(pattern: str, path: str, where: str) -> bool:
    try:
        return re.match(pattern, path) is not None
    except re.error as e:
        raise CheckpointError(errors.say(where, "targets must be regular expressions after 're:'", f"{pattern!r}: {e}")) from e


def _written(quantized: Quantized) -> dict[str, Any]:
    """Returns the group of a config that describes a stored weight, its targets left out."""
    fmt = quantized.format
    floats = isinstance(fmt, FP8)
    args: dict[str, Any] = {
        "num_bits": 8 if floats else fmt.bits,
        "type": "float" if floats else "int",
        "symmetric": floats or "zero_point" not in quantized.data,
        "dynamic": False,
    }
    if isinstance(fmt.block_size, tuple):
        args |= {"strategy": "block", "block_structure": list(fmt.block_size)}
    elif isinstance(fmt.block_size, int):
        args |= {"strategy": "group", "group_size": fmt.block_size}
    else:
        args["strategy"] = "channel" if fmt.block_size == "row" else "tensor"
    return {
        "weights": args,
        "input_activations": None,
        "output_activations": None,
        "format": "float-quantized" if floats else _PACKED,
    }
