"""transformers' key-value caches as trees, so that a default model's output maps under ``vmap``.

Imports torch alone; transformers only if it is imported already.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

import torch.utils._pytree as pytree
from torch import Tensor


def register_caches() -> None:
    """Registers transformers' cache classes with torch's pytree, so that a default model's output maps under ``vmap``."""
    if "transformers" in sys.modules:
        _CacheNode.register()


#: transformers' cache classes, once they are registered.
_kinds: tuple[type, ...] = ()


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers, which a forward fills in place."""
    return isinstance(value, _kinds)


class _Static:
    """A cache without its tensors: the static part of a node, equal where type, layers and places of tensors are."""

    def __init__(self, cache: Any, places: list[list[tuple[str, Any]]], layers: Iterable[type]) -> None:
        self.cache, self.places = cache, places
        self._facts = (type(cache), tuple(layers), tuple(map(tuple, places)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)


class _CacheNode:
    """How transformers' caches are trees: the tensors of each layer, among them those in its dicts (states of Mamba)."""

    done: ClassVar[bool] = False

    @classmethod
    def register(cls) -> None:
        if cls.done:
            return
        from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

        global _kinds
        _kinds = (Cache, EncoderDecoderCache)
        for node, flatten, unflatten, keyed in (
            (DynamicCache, cls.flatten, cls.unflatten, cls.keyed),
            (StaticCache, cls.flatten, cls.unflatten, cls.keyed),
            (EncoderDecoderCache, cls.flatten_pair, cls.unflatten_pair, cls.keyed_pair),
        ):
            if node not in pytree.SUPPORTED_NODES:
                pytree.register_pytree_node(node, flatten, unflatten, flatten_with_keys_fn=keyed)
        cls.done = True

    @staticmethod
    def _places(layer: Any) -> list[tuple[str, Any]]:
        """Lists where a layer has tensors: attribute, and key in it if it is a dict."""
        found: list[tuple[str, Any]] = []
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                found.append((name, None))
            elif isinstance(value, dict):
                found += [(name, k) for k, t in value.items() if isinstance(t, Tensor)]
        kept = vars(layer).get("_places", [])
        if any(place not in found and _CacheNode._at(layer, *place) is not None for place in kept):
            return kept  # a transform put its own objects (dims, specs) where the tensors were
        return found

    @staticmethod
    def _at(layer: Any, name: str, k: Any) -> Any:
        return getattr(layer, name) if k is None else getattr(layer, name)[k]

    @staticmethod
    def _with(layer: Any, places: list[tuple[str, Any]], values: Iterable[Any]) -> Any:
        """Copies a layer with values put at places."""
        made = copy.copy(layer)
        for name in dict.fromkeys(n for n, k in places if k is not None):
            setattr(made, name, dict(getattr(layer, name)))
        for (name, k), value in zip(places, values, strict=True):
            if k is None:
                setattr(made, name, value)
            else:
                getattr(made, name)[k] = value
        made._places = places
        return made

    @staticmethod
    def flatten(cache: Any) -> tuple[list[Any], _Static]:
        shell = copy.copy(cache)
        places = [_CacheNode._places(layer) for layer in cache.layers]
        leaves = [_CacheNode._at(layer, *p) for layer, here in zip(cache.layers, places, strict=True) for p in here]
        shell.layers = [_CacheNode._with(x, p, [None] * len(p)) for x, p in zip(cache.layers, places, strict=True)]
        return leaves, _Static(shell, places, map(type, shell.layers))

    @staticmethod
    def keyed(cache: Any) -> tuple[list[Any], _Static]:
        leaves, static = _CacheNode.flatten(cache)
        names = (f"layers[{i}].{name}" for i, here in enumerate(static.places) for name, _ in here)
        return [(pytree.GetAttrKey(n), t) for n, t in zip(names, leaves, strict=True)], static

    @staticmethod
    def keyed_pair(cache: Any) -> tuple[list[Any], _Static]:
        both, static = _CacheNode.flatten_pair(cache)
        names = ("self_attention_cache", "cross_attention_cache")
        return [(pytree.GetAttrKey(n), c) for n, c in zip(names, both, strict=True)], static

    @staticmethod
    def unflatten(children: Iterable[Any], static: _Static) -> Any:
        values, cache = list(children), copy.copy(static.cache)
        cache.layers = []
        for layer, places in zip(static.cache.layers, static.places, strict=True):
            cache.layers.append(_CacheNode._with(layer, places, values[: len(places)]))
            values = values[len(places) :]
        return cache

    @staticmethod
    def flatten_pair(cache: Any) -> tuple[list[Any], _Static]:
        shell = copy.copy(cache)
        shell.is_updated = dict(cache.is_updated)
        shell.self_attention_cache = shell.cross_attention_cache = None
        return [cache.self_attention_cache, cache.cross_attention_cache], _Static(shell, [], ())

    @staticmethod
    def unflatten_pair(children: Iterable[Any], static: _Static) -> Any:
        cache = copy.copy(static.cache)
        cache.is_updated = dict(cache.is_updated)
        cache.self_attention_cache, cache.cross_attention_cache = children
        return cache
