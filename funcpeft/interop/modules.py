"""``functionalize`` for models whose layers belong to a quantization library: their leaves are taken, not called.

Imports libraries, functional, errors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from funcpeft import functional
from funcpeft.functional import Model, Params
from funcpeft.interop import libraries
from funcpeft.interop.library import Library, Taken

#: One reader of every library.
LIBRARIES: tuple[Library, ...] = tuple(getattr(libraries, name)() for name in libraries.__all__)


def functionalize(module: nn.Module, *, remat: bool | str | Sequence[str] = False) -> tuple[Model, Params]:
    """Turns a module into a pure function and a flat tree of its tensors.

    Layers that bitsandbytes, torchao, GPTQ and the like put in the place of linear layers become plain linear layers, their
    weights ``Quantized`` leaves with the very codes that the layer holds; no code of the library is called afterwards.

    Args:
        module: Any ``nn.Module``. It is never written, and storage is shared where a leaf is as the module has it. The
            function runs in eval mode.
        remat: Whether each transformer block (``GradientCheckpointingLayer`` of transformers) keeps its inputs alone and is
            computed again in the backward pass: gradient checkpointing that works in ``torch.func`` too, where
            ``torch.compile`` does not decide. Or names, dotted suffixes or regular expressions of the modules to recompute.
            Where gradients are recorded, the model is called with ``use_cache=False`` unless the call says otherwise; a
            block that gets a cache is not recomputed.

    Returns:
        ``(model, params)``: ``model(params, *args, **kwargs)`` returns exactly what the module's forward returns (up to the
        arithmetic that a library's own layers do in place of a product with the decoded weight); ``params`` holds
        parameters and buffers by dotted name, detached, tied ones once (``model.ties`` maps aliases).

    Raises:
        NoMatchError: If ``remat`` names no module.
        TypeError: If ``module`` is not an ``nn.Module`` or cannot be copied.
        ValueError: If a parameter or buffer holds no data (on the meta device, or of a lazy module), or a library's layer
            has rewritten its weight.

    Note:
        State that a forward keeps in attributes starts each call as it was when this function was called. A forward that
        changes one of its *parameters* in place (only ``max_norm`` of torch's layers does) would change the caller's leaf.
    """
    taken = foreign(module) if isinstance(module, nn.Module) else {}
    module = _without_hooks(module) if taken else module
    replaced = {path: (t.plain(), _leaves(t)) for path, t in taken.items()}
    return functional.functionalize(module, remat=remat, replaced=replaced)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Returns a shallow copy without the hooks by which compressed-tensors decompresses layers before a forward."""
    kept = {k: h for k, h in module._forward_pre_hooks.items() if not str(h.__module__).startswith("compressed_tensors.")}
    if len(kept) == len(module._forward_pre_hooks):
        return module
    new = copy.copy(module)
    held = {n: v for n, v in module.__dict__.items() if n != "ct_decompress_hook"}
    new.__dict__ = {**held, "_forward_pre_hooks": OrderedDict(kept)}
    return new


def foreign(module: nn.Module) -> dict[str, Taken]:
    """Reads every layer of a quantization library in a module, by dotted name."""
    found = [(path, m, lib) for path, m in module.named_modules() if (lib := owner(m)) is not None]
    if not found:
        return {}
    dtype, config = floating_dtype(module), quantization_config(module)
    return {path: lib.take(m, path, dtype, config) for path, m, lib in found}


def owner(layer: nn.Module) -> Library | None:
    """Returns the library that a layer belongs to, or ``None``."""
    return next((lib for lib in LIBRARIES if lib.owns(layer)), None)


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Returns the dtype in which a model computes: its config's, else that of its first floating parameter."""
    named = getattr(getattr(module, "config", None), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    floats = (p.dtype for p in module.parameters() if p.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    return next(floats, torch.float32)


def quantization_config(module: nn.Module) -> Mapping[str, Any]:
    """Returns the ``quantization_config`` of a model as a dict, ``{}`` if it has none."""
    config: Any = getattr(getattr(module, "config", None), "quantization_config", None)
    return config if isinstance(config, dict) else config.to_dict() if hasattr(config, "to_dict") else {}


def _leaves(t: Taken) -> dict[str, Any]:
    return {"weight": t.weight} if t.bias is None else {"weight": t.weight, "bias": t.bias}
