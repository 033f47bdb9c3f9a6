"""Layer replication: a deeper model whose layers are copies of a smaller one's and share its tensors.

The copies are ties to ``functionalize``, so the params are those of the small model, and an adapter has leaves of its own at
every copy. Imports fields, errors.

References:
    Kim et al., SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling, 2023,
    arXiv 2312.15166, section 2 (which layers, there with weights of their own).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from funcpeft import errors
from funcpeft.fields import freeze


def replicate_layers(module: nn.Module, ranges: Sequence[Sequence[int]], *, layers: str | None = None) -> nn.Module:
    """Returns a model whose layers are those of the given ranges, one range after the other.

    Args:
        module: The model; never written. Tensors are shared with it, structure is not.
        ranges: ``[start, end)`` pairs, such as ``[[0, 4], [2, 5]]`` for layers 0 1 2 3 2 3 4; as LoRA's ``layer_replication``.
        layers: Path of the list of layers; by default the one list that is as long as the config says layers are.

    Returns:
        A module of the same class; ``num_hidden_layers`` (and what the config says per layer) and every ``layer_idx`` count
        the new layers, and ``layer_replication`` holds the ranges.

    Raises:
        ValueError: If there is no range, one is empty or reaches beyond the layers, or not exactly one list of layers is found.

    Example:
        >>> import torch
        >>> import funcpeft as fp
        >>> stack = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))})
        >>> deeper = fp.replicate_layers(stack, [[0, 2], [1, 3]], layers="layers")
        >>> model, params = fp.functionalize(deeper)
        >>> len(deeper["layers"]), sorted(params)[-1], model.ties["layers.2.weight"]
        (4, 'layers.3.weight', 'layers.1.weight')
    """
    name = type(module).__name__
    path = _list_of(module, name) if layers is None else layers
    found = dict(module.named_modules(remove_duplicate=False)).get(path)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(errors.say(f"replicate_layers of {name}", "layers must be the path of a ModuleList", repr(path)))
    if not isinstance(ranges, list | tuple) or not ranges:
        raise ValueError(errors.say(f"replicate_layers of {name}", "ranges must be [start, end) pairs, at least one", ranges))
    chosen = [i for pair in ranges for i in _indices(pair, len(found), name)]
    kept = {id(t): t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    made = copy.deepcopy(module, dict(kept))
    new = nn.ModuleList(copy.deepcopy(found[i], dict(kept)) for i in chosen)
    for index, layer in enumerate(new):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = index  # type: ignore[assignment]
    parent, _, last = path.rpartition(".")
    setattr(made.get_submodule(parent), last, new)
    for config in {id(c): c for m in made.modules() for c in [getattr(m, "config", None)] if c is not None}.values():
        _deepen(config, len(found), chosen)
    made.__dict__["layer_replication"] = freeze(ranges)
    return made


def _indices(pair: Sequence[int], count: int, name: str) -> range:
    ok = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
    if not ok or not 0 <= pair[0] < pair[1] <= count:
        raise ValueError(errors.say(f"replicate_layers of {name}", f"a range must be [start, end) in 0 to {count}", pair))
    return range(*pair)


def _list_of(module: nn.Module, name: str) -> str:
    config: Any = getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    lists = [p for p, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outer = [p for p in lists if not any(p.startswith(f"{q}.") for q in lists)]
    if len(outer) != 1:
        rule, remedy = f"one list of the config's {count} layers must be found", "name it: layers='model.layers'"
        raise ValueError(errors.say(f"replicate_layers of {name}", rule, outer or "none", remedy))
    return outer[0]


def _deepen(config: Any, count: int, chosen: Sequence[int]) -> None:
    """Writes the number of layers, and what is listed per layer, into a config of the copy."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == count and key.endswith(("_types", "_layers", "_pattern")):
            setattr(config, key, type(value)(value[i] for i in chosen))
    if getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = len(chosen)
