"""Facts: what a method of the call (prompts, prefixes) may know of a transformers model.

Numbers of its config under the names peft resolves them by, its input embedding as a function of ids, and its key-value
cache made of tensors. Imports functional; transformers only inside the function that makes a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.functional import Model, register_caches


class ModelFacts:
    """Reads a model's config on demand; a fact that the config does not have raises an error that names it."""

    def __init__(self, model: Model, params: Mapping[str, Any]) -> None:
        self._model, self._params = model, params
        config = model.config
        self.config = getattr(config, "text_config", config)

    def _first(self, fact: str, *names: str) -> int:
        for name in names:
            value = getattr(self.config, name, None)
            if isinstance(value, int):
                return value
        raise ValueError(
            errors.say(self._model.name, f"the config must say {fact} (one of {', '.join(names)})", type(self.config).__name__, "use a transformers model")
        )

    @property
    def token_dim(self) -> int:
        """Width of a token embedding."""
        return self._first("the token width", "hidden_size", "n_embd", "d_model")

    @property
    def num_layers(self) -> int:
        """Number of layers (of the encoder, where there is one)."""
        return self._first("the number of layers", "num_hidden_layers", "num_layers", "n_layer")

    @property
    def num_attention_heads(self) -> int:
        """Number of query heads."""
        return self._first("the number of heads", "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; fewer than query heads under grouped-query attention."""
        return getattr(self.config, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        known = getattr(self.config, "head_dim", None) or getattr(self.config, "d_kv", None)
        return known or self.token_dim // self.num_attention_heads

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._first("the vocabulary size", "vocab_size")

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder and a decoder."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the model's floating leaves (the first one's)."""
        return next(d for d in self._model.dtypes.values() if d.is_floating_point)

    @property
    def takes_cache(self) -> bool:
        """Whether the model's forward takes ``past_key_values``."""
        import inspect

        return "past_key_values" in inspect.signature(type(self._model.root).forward).parameters

    def embed(self, ids: Tensor) -> Tensor:
        """Looks ids up in the model's input embedding, adapted if the net adapts it."""
        return self._model.embed(dict(self._params), ids)

    def cache(self, layers: list[tuple[Tensor, Tensor]]) -> Any:
        """Makes a cache from a ``(key, value)`` pair per layer, each ``(batch, kv heads, length, head dim)``."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        register_caches()
        config = self.config if getattr(self.config, "sliding_window", None) else None
        cache = DynamicCache(config=config)
        for index, (k, v) in enumerate(layers):
            cache.update(k, v, index)
        return EncoderDecoderCache(cache, DynamicCache()) if self.encoder_decoder else cache
