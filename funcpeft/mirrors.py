"""Mirrors: a smaller decoder of a model's own class, run beside it, as ShadowPEFT needs one.

The mirror of a transformers model is its decoder's class on a shrunk config. Its structure is static and kept with the model
(``Model.mirrors``); its tensors are leaves of an adapter. It decodes with a key-value cache of its own, whose layers ride at
the end of the base's cache, so that what reorders or crops that one does so to both. Imports functional, blocks, rng, errors.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcpeft import errors, rng
from funcpeft.blocks import decoder_of
from funcpeft.functional import Model

#: What a config calls a size, by the name that a mirror's sizes have.
_NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}

#: Sizes by name, as a key.
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Mirror:
    """The static part of a mirror.

    Attributes:
        model: The smaller decoder as a pure function.
        width: Width of its states.
        shares: Whether it reads the base's embedding and has none that it uses.
        unused: Keys of an embedding that it has and does not use.
        kept: Keys of its buffers that checkpoints hold.
    """

    model: Model
    width: int
    shares: bool
    unused: frozenset[str]
    kept: frozenset[str]

    def run(self, tensors: Mapping[str, Tensor], given: Mapping[str, Any], cache: Any = None, *, rows: bool = False) -> Tensor:
        """Computes the last hidden states ``(batch, length, width)``.

        Args:
            tensors: The tensors of the mirror, with a leading axis of rows if ``rows``.
            given: The inputs: embeddings or ids, and what there is of mask and positions.
            cache: The mirror's key-value cache, which it fills, or ``None``.
            rows: Whether every row of the batch has tensors of its own; they run mapped, or where there are masks or
                positions in a loop.
        """
        options = {"use_cache": cache is not None, "past_key_values": cache, "return_dict": True}
        if not rows:
            return self.model(dict(tensors), **given, **options).last_hidden_state
        batch = next(iter(given.values())).shape[0]
        values = [t if t.shape[0] == batch else t.expand(batch, *t.shape[1:]) for t in given.values()]

        def one(tensors: dict[str, Tensor], values: list[Tensor]) -> Tensor:
            inputs = {name: t[None] for name, t in zip(given, values, strict=True)}
            if "input_ids" in inputs:  # some models look at the values of ids, which a map does not allow
                inputs["inputs_embeds"] = self.model.embed(tensors, inputs.pop("input_ids"))
            return self.model(tensors, **inputs, **options).last_hidden_state[0]

        if len(given) > 1:  # transformers looks at the values of masks and positions too
            each = ({k: t[i] for k, t in tensors.items()} for i in range(batch))
            return torch.stack([one(own, [t[i] for t in values]) for i, own in enumerate(each)])
        return torch.func.vmap(one)(dict(tensors), values)

    def pair(self, past: Any, layers: int, where: str) -> Pair:
        """Returns the caches of a call whose base has ``layers`` layers and was given the cache ``past``, or ``None``."""
        return Pair(self.model.config, past, layers, where)


def drawn(model: Model, sizes: Sizes, share: bool, gen: torch.Generator) -> tuple[Mirror, dict[str, Tensor]]:
    """Makes a mirror as transformers initialises it.

    Args:
        model: The base.
        sizes: What its config is changed to.
        share: Whether to read the base's embedding, where the widths allow it.
        gen: What its weights are drawn from.

    Returns:
        ``(mirror, tensors)``, the tensors by the mirror's own keys.
    """
    with rng.lent(gen):
        module = _module(model, sizes)
    width = _read(module.config, "hidden_size", model.name)
    takes = "inputs_embeds" in inspect.signature(type(module).forward).parameters
    shares = share and takes and width == _read(decoder_of(model.root)[1].config, "hidden_size", model.name)
    if shares and isinstance(getattr(module, "embed_tokens", None), nn.Module):
        del module.embed_tokens
    tensors = {k: t.detach() for k, t in (*module.named_parameters(), *module.named_buffers())}
    if (sizes, share) not in model.mirrors:
        unused = _embedding_keys(module) if shares else frozenset()
        kept = frozenset(k for k, _ in module.named_buffers()) & module.state_dict().keys()
        model.mirrors[sizes, share] = Mirror(Model(module), width, shares, unused, frozenset(kept))
    return model.mirrors[sizes, share], tensors


def mirror_of(model: Model, sizes: Sizes, share: bool) -> Mirror:
    """Returns the static part of a mirror, made once for a model."""
    if (sizes, share) not in model.mirrors:
        drawn(model, sizes, share, rng.stream(0).generator)
    return model.mirrors[sizes, share]


def _module(model: Model, sizes: Sizes) -> nn.Module:
    _, decoder = decoder_of(model.root)
    config = copy.deepcopy(decoder.config)
    for name, size in sizes:
        setattr(config, _key(config, name, model.name), size)
    layers = _read(config, "num_hidden_layers", model.name)
    if types := list(getattr(config, "layer_types", None) or ()):
        config.layer_types = (types + [types[-1]] * layers)[:layers]
    if (getattr(config, "max_window_layers", None) or 0) > layers:
        config.max_window_layers = layers
    with torch.device("cpu"):
        return type(decoder)(config).eval()


def _read(config: Any, name: str, where: str) -> int:
    return getattr(config, _key(config, name, where))


def _key(config: Any, name: str, where: str) -> str:
    """Returns what a config calls a size."""
    found = next((n for n in _NAMES[name] if hasattr(config, n)), None)
    if found is None:
        rule = f"the config must have one of {', '.join(_NAMES[name])}"
        raise ValueError(errors.say(where, rule, type(config).__name__, "leave that size out"))
    return found


def _embedding_keys(module: Any) -> frozenset[str]:
    table = getattr(module, "wte", None)
    return frozenset(n for n, p in module.named_parameters() if isinstance(table, nn.Module) and p is table.weight)


class Pair:
    """The key-value caches of a call of a base and its mirror: the mirror's layers are the last ones of the base's cache."""

    def __init__(self, config: Any, past: Any, layers: int, where: str) -> None:
        from transformers.cache_utils import DynamicCache

        self.layers, self.past = layers, past
        self.cache = DynamicCache(config=getattr(config, "text_config", config))
        self.joined = False
        if past is not None and past.get_seq_length() > 0:
            if len(getattr(past, "layers", ())) <= layers:
                rule, remedy = "a cache must hold the shadow's layers too", "take it from an earlier call, or use_cache=False"
                raise ValueError(errors.say(where, rule, "the base's alone", remedy))
            self.cache.layers, self.joined = past.layers[layers:], True

    def join(self, out: Any) -> None:
        """Puts the mirror's layers behind the base's, where the call returned or filled a cache."""
        past = self.past if self.past is not None else getattr(out, "past_key_values", None)
        if not self.joined and past is not None and len(getattr(past, "layers", ())) == self.layers:
            past.layers.extend(self.cache.layers)


def blocked(module: nn.Module, forward: Any, instead: Any, *, blocks: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
    """Calls a forward while functions run around the forwards of some modules below.

    Args:
        module: The module of the skeleton.
        forward: What to call.
        instead: The context manager that sets a function on a module.
        blocks: Functions by dotted name; each gets the module's forward and its arguments.
        kwargs: Inputs.
    """
    if not blocks:
        return forward(**kwargs)
    path, *rest = blocks
    inner = module.get_submodule(path)
    with instead(inner, "forward", functools.partial(blocks[path], inner.forward)):
        return blocked(module, forward, instead, blocks={p: blocks[p] for p in rest}, **kwargs)
