"""GPTQ: ``qweight``, ``qzeros``, ``scales`` and ``g_idx``, in checkpoints and in gptqmodel's layers.

With n bits, g inputs per group and G = ceil(in / g) groups: ``qweight`` int32 ``(in n / 32, out)``, a bit stream along the
inputs; ``qzeros`` int32 ``(G, out n / 32)``, one along the outputs; ``scales`` floats ``(G, out)``; ``g_idx`` int32
``(in,)``, the group of every input. A checkpoint of ``checkpoint_format`` ``"gptq"`` stores its zeros less one, modulo 2^n,
``"gptq_v2"`` as they are; gptqmodel's layers hold them as they are whatever the file has. Its layers for CPUs rewrite their
weight in an eval forward; such a layer is refused. What ``save_pretrained`` writes of a ``"gptq"`` checkpoint that was
loaded is labelled wrongly (transformers 5.23): its zeros are ``"gptq_v2"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.errors import CheckpointError
from funcpeft.interop.library import FLOATS, Library, Taken, Tensors
from funcpeft.quant.affineint import AffineInt
from funcpeft.quant.packing import PACKINGS
from funcpeft.storage import Quantized

_INTEGERS = (torch.int32, torch.int64)
#: What a checkpoint subtracts from its zeros, by its ``checkpoint_format``.
_LESS = {"gptq": 1, "gptq_v2": 0}
_BITS = (2, 3, 4, 8)
#: Inputs per group for which gptqmodel 7.6 has a layer. Four bits in groups of 16 load on a CPU, but in eval mode torch 2.13
#: has no kernel for them.
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)
_STREAM = PACKINGS["compressed"]


@dataclass(frozen=True)
class GPTQ(Library):
    """Reader and writer of GPTQ.

    Args:
        checkpoint_format: How ``write`` stores zeros: ``"gptq_v2"`` as they are; ``"gptq"`` less one, which older programs
            want and which has no place for a zero of 0.
    """

    name: ClassVar[str] = "gptq"
    quant_methods: ClassVar[tuple[str, ...]] = ("gptq",)
    layer_types: ClassVar[tuple[tuple[str, str], ...]] = (("gptqmodel.", "GPTQQuantLinear"),)

    checkpoint_format: str = "gptq_v2"

    def __post_init__(self) -> None:
        if self.checkpoint_format not in _LESS:
            raise ValueError(errors.one_of(self.name, "checkpoint_format", self.checkpoint_format, _LESS))

    def take(self, layer: Any, path: str, dtype: torch.dtype, config: Mapping[str, Any]) -> Taken:
        require_stored(self, layer, path)
        if not type(layer).REQUIRES_FORMAT_V2:
            raise unready(self, path, f"the layout of the kernel {type(layer).__name__}", "take it from the file")
        shape, bits, size = torch.Size((layer.out_features, layer.in_features)), layer.bits, layer.group_size
        if getattr(layer, "planar", False):
            raise unready(self, path, "bits in planes", "take it from a checkpoint of format 'gptq_v2'")
        return Taken(grouped(self, held(layer), path, shape, dtype, bits, size, 0), bias_of(layer))

    def read(
        self, tensors: Tensors, path: str, shape: torch.Size, dtype: torch.dtype, config: Mapping[str, Any], metadata: Any
    ) -> Quantized | None:
        if not any(name in tensors for name in ("qweight", "qzeros", "scales")):
            return None
        where, label = f"{self.name} at {path!r}", config.get("checkpoint_format") or config.get("format") or "gptq"
        if label not in _LESS:
            raise CheckpointError(errors.one_of(where, "checkpoint_format", label, _LESS))
        bits, size = bits_and_size(config, where, _BITS)
        leaf = grouped(self, tensors, path, shape, dtype, bits, size, _LESS[label])
        middle = 2 ** (bits - 1)
        if label == "gptq" and config.get("sym") and "zero_point" in leaf.data and bool((zeros(leaf) == middle + 1).all()):
            remedy = "it was loaded and saved again by transformers: change its checkpoint_format to 'gptq_v2'"
            raise CheckpointError(errors.say(where, f"zeros of a symmetric checkpoint must be {middle}", middle + 1, remedy))
        return leaf

    def refuses(self, quantized: Quantized) -> str | None:
        reason = unlike(quantized, "gptq", self.name)
        if reason is not None:
            return reason
        zero = quantized.data.get("zero_point")
        if zero is None:
            return None
        if bool((zero > 2**quantized.format.bits - 1).any()):
            return f"gptq stores zeros of at most {2**quantized.format.bits - 1}, not {int(zero.max())}"
        if self.checkpoint_format == "gptq" and bool((zero == 0).any()):
            return "checkpoint_format 'gptq' stores zeros less one, so none of 0; use 'gptq_v2'"
        return None

    def write(self, quantized: Quantized, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        in_, bits, data = quantized.shape[1], quantized.format.bits, quantized.data
        size, less = group_size(quantized), _LESS[self.checkpoint_format]
        zero = (zeros(quantized) - less) & (2**bits - 1)
        g_idx = data["g_idx"] if "g_idx" in data else in_order(in_, size, data["qdata"].device)
        return {
            "qweight": data["qdata"],
            "qzeros": _STREAM.pack(transposed(zero), bits),
            "scales": transposed(data["scale"]),
            "g_idx": g_idx,
        }, {}

    def config(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> dict[str, Any]:
        bits, size = self.same(stored, lambda q: (q.format.bits, written_size(q)))
        made: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": size,
            "desc_act": any("g_idx" in q.data for q in stored.values()),
            "sym": not any("zero_point" in q.data for q in stored.values()),
            "checkpoint_format": self.checkpoint_format,
        }
        parts = self._parts(stored, dense)
        return made if parts is None else made | {"modules_in_block_to_quantize": [parts]}

    def _parts(self, stored: Mapping[str, Quantized], dense: tuple[str, ...]) -> list[str] | None:
        """Returns the names of the stored layers within a block of the model, ``None`` if all linear layers there are stored.

        Raises:
            ValueError: If a stored layer is in no block, or blocks differ.
        """
        parts: dict[str, str] = {}
        for path in stored:
            found = _BLOCK.match(path)
            if not found:
                rule, remedy = "transformers loads layers of the model's blocks only", "leave this one dense"
                raise ValueError(errors.say(f"{self.name} at {path!r}", rule, "a layer outside", remedy))
            parts.setdefault(found[1], path)
        inside = [path for path in dense if _BLOCK.match(path)]
        for path in inside:
            for part, other in parts.items():
                if path.endswith(part):
                    rule = f"must be stored as {other!r} is, since one configuration describes all blocks"
                    raise ValueError(errors.say(f"{self.name} at {path!r}", rule, "a dense layer"))
        return sorted(parts) if inside else None


#: The path of a layer in a block, the part after the block's index captured.
_BLOCK = re.compile(r".*?\.\d+\.(.+)")


# -- what the readers of checkpoints share -----------------------------------------------------------------------------------


def is_coded(tensors: Tensors) -> bool:
    """Whether the tensor of the name of a dense weight has entries of eight bits, which no dense weight has."""
    return "weight" in tensors and tensors["weight"].element_size() == 1


# -- what GPTQ, AWQ and INC share --------------------------------------------------------------------------------------------


def bits_and_size(config: Mapping[str, Any], where: str, known: tuple[int, ...]) -> tuple[int, int]:
    """Returns ``bits`` and ``group_size`` of a quantization config.

    Raises:
        CheckpointError: If they are missing or make no sense.
    """
    bits, size = config.get("bits", known[0] if len(known) == 1 else None), config.get("group_size", 128)
    if isinstance(bits, bool) or bits not in known:
        raise CheckpointError(errors.one_of(where, "bits", bits, known))
    if isinstance(size, bool) or not isinstance(size, int) or (size <= 0 and size != -1):
        raise CheckpointError(errors.say(where, "group_size must be a positive int, or -1 for whole rows", repr(size)))
    return bits, size


def grouped(
    library: Library,
    tensors: Tensors,
    path: str,
    shape: torch.Size,
    dtype: torch.dtype,
    bits: int,
    size: int,
    less: int,
) -> Quantized:
    """Reads ``qweight``, ``qzeros``, ``scales`` and, if it is there, ``g_idx``.

    Args:
        library: For messages.
        tensors: The tensors by name.
        path: The layer's dotted name.
        shape: ``(out, in)``.
        dtype: dtype of the decoded weight.
        bits: Width of a code.
        size: Inputs per group, -1 for all.
        less: What was subtracted from the zeros.

    Raises:
        CheckpointError: If a tensor is missing or does not fit.
    """
    out, in_ = shape
    fmt = AffineInt(bits=bits, block_size="row" if size in (-1, in_) else size, packing="gptq")
    library.require_fit(fmt, path, shape)
    size = in_ if size == -1 else size
    groups, words = -(-in_ // size), -(-out * bits // 32)
    codes = library.pick(tensors, path, "qweight", (in_ * bits // 32, out), (torch.int32,))
    stored = library.pick(tensors, path, "qzeros", (groups, words), (torch.int32,))
    scale = library.pick(tensors, path, "scales", (groups, out), FLOATS)
    data = {"qdata": codes.contiguous(), "scale": transposed(scale)}
    zero = (_STREAM.unpack(stored.contiguous(), bits, groups, out) + less) & (2**bits - 1)
    if "g_idx" in tensors:
        g_idx = library.pick(tensors, path, "g_idx", (in_,), _INTEGERS).to(torch.int32)
        if not bool(((g_idx >= 0) & (g_idx < groups)).all()):
            found = (int(g_idx.min()), int(g_idx.max()))
            raise CheckpointError(errors.say(f"{library.name} at {path!r}", f"'g_idx' must be 0 to {groups - 1}", found))
        if not torch.equal(g_idx, in_order(in_, size, g_idx.device)):
            data["g_idx"] = g_idx.contiguous()
    return with_zeros(data, transposed(zero), fmt, shape, dtype)


def with_zeros(data: dict[str, Tensor], zero: Tensor, fmt: AffineInt, shape: torch.Size, dtype: torch.dtype) -> Quantized:
    """Returns a leaf with the given zeros ``(out, groups)``, which are left out where all are the middle."""
    if bool((zero == 2 ** (fmt.bits - 1)).all()):
        return Quantized(data, fmt, shape, dtype)
    asymmetric = AffineInt(bits=fmt.bits, block_size=fmt.block_size, symmetric=False, packing=fmt.packing)
    order = {n: data[n] for n in ("g_idx",) if n in data}
    return Quantized({"qdata": data["qdata"], "scale": data["scale"], "zero_point": zero, **order}, asymmetric, shape, dtype)


def in_order(in_: int, size: int, device: torch.device) -> Tensor:
    """Returns the group of every input where groups are neighbours."""
    return (torch.arange(in_, device=device) // size).to(torch.int32)


def transposed(t: Tensor) -> Tensor:
    """Returns a transposed matrix with the strides of a new one, also of a single row."""
    return t.t().clone(memory_format=torch.contiguous_format)


def zeros(quantized: Quantized) -> Tensor:
    """Returns the zeros of a leaf, uint8 ``(out, groups)``, also where they are left out."""
    zero = quantized.data.get("zero_point")
    middle = 2 ** (quantized.format.bits - 1)
    return torch.full_like(quantized.data["scale"], middle, dtype=torch.uint8) if zero is None else zero.to(torch.uint8)


def group_size(quantized: Quantized) -> int:
    """Returns the inputs per group."""
    block = quantized.format.block_size
    return quantized.shape[1] if block == "row" else block


def written_size(quantized: Quantized) -> int:
    """Returns what a config has as ``group_size``."""
    return -1 if quantized.format.block_size == "row" else quantized.format.block_size


def unlike(quantized: Quantized, packing: str, name: str) -> str | None:
    """Says why a stored weight is not one with a scale and an integer zero per group of inputs, or ``None`` if it is."""
    fmt, data = quantized.format, quantized.data
    if len(quantized.shape) != 2:
        return f"{name} stores matrices, not shape {tuple(quantized.shape)}"
    if not isinstance(fmt, AffineInt):
        return f"{name} stores AffineInt(packing={packing!r}), not {fmt!r}"
    if fmt.packing != packing:
        return f"{name} stores packing {packing!r}, not {fmt.packing!r}: see repack"
    if fmt.layout != "matrix" or (fmt.block_size != "row" and fmt.block_size not in GROUP_SIZES):
        return f"{name} has scales per row or per group of {', '.join(map(str, GROUP_SIZES))} inputs, not {fmt!r}"
    if "shift" in data or ("zero_point" in data and data["zero_point"].is_floating_point()):
        return f"{name} stores integer zeros only"
    return None


# -- layers of gptqmodel -----------------------------------------------------------------------------------------------------


def require_stored(library: Library, layer: Any, path: str) -> None:
    """Raises ``ValueError`` if a layer of gptqmodel has rewritten its weight, or does more than meet it."""
    if getattr(layer, "adapter", None) is not None:
        raise unready(library, path, "a layer with an adapter", "load the model without it")
    if getattr(layer, "had_K", None) is not None:
        raise unready(library, path, "a layer that rotates its input", "load a checkpoint without rotation")
    ran = str(getattr(layer, "linear_mode", None) or "").lower().endswith("inference")
    kinds = [getattr(getattr(layer, name, None), "dtype", None) for name in ("qweight", "qzeros")]
    if ran or any(kind != torch.int32 for kind in kinds):
        raise unready(library, path, "a forward has repacked its weight", "take it before the first forward, or from the file")


def unready(library: Library, path: str, found: str, remedy: str) -> ValueError:
    """Returns the error that says why a layer cannot be taken."""
    rule = "a layer with its weight as the checkpoint has it is required"
    return ValueError(errors.say(f"{library.name} at {path!r}", rule, found, remedy))


def held(layer: Any) -> dict[str, Tensor]:
    """Returns the tensors of a layer by name."""
    return {n: t for n, t in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)) if t is not None}


def bias_of(layer: Any) -> Tensor | None:
    """Returns the bias of a layer, detached."""
    return None if getattr(layer, "bias", None) is None else layer.bias.detach()
